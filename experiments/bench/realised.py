"""How much faster networks get where they run, beside how many FLOPs they lose.

Random weights, float32, evaluation. Every network takes turns with all that is made of
it, in one process; medians and quartiles. `realised` is the speed-up over the ratio of
FLOPs: 1 where the time shrinks as the FLOPs do.

  channels   half of the FLOPs by the L1 norm, the same part of each group, at any width
             and at multiples of 8
  depth      half of the residual units of a ResNet-56 erased; a ResNet-110 cut at the
             half, as NetCut cuts
  cascade    half of the examples leave after a third of a network, beside the simulated
             cost; `cascades.race.merge` decides what is skipped

  python -m experiments.bench.realised [--quick]

Where torch and torch_pruning are installed (they are no dependencies), Torch-Pruning
cuts the ResNets and the VGG-16 to the same FLOPs, and PyTorch runs both by turns.
Each row is written when it is there, and the next call goes on. `--quick` is a smoke
test on small networks, whose times mean nothing. `python -m experiments.tables` writes
docs/realised.md.

About 25 minutes on 2 cores. Expected: below 1 nearly everywhere at batch 1, where small
networks are mostly launches; nearer to 1 at large batches and round widths, and for
depth, which leaves the layers as wide as they were.
"""

import argparse
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import depthprune as dp
from depthprune.cascades.cascade import cascade
from depthprune.cascades.race import merge, race
from depthprune.models.heads import Head, WithHeads, every_tap
from depthprune.program.modules import runnable
from depthprune.timing import clock
from experiments import result_files
from experiments.bench import measure, pytorch

TARGET, LEAVE = 0.5, 0.5
KEYS = 'kind', 'network', 'variant'
WIDTHS = {'any width': 1, 'multiples of 8': 8}


class Subject(NamedTuple):
  """A network to measure.

  Attributes:
    kind: 'channels', 'units', 'exits' or 'cascade': how it gets smaller.
    network: name of the network, with what differs from its defaults.
    model: the module, built by `build`.
    arguments: arguments of `build`.
    tokens: length of its texts; None where it reads images.
    side: side of its images.
  """

  kind: str
  network: str
  model: str
  arguments: Mapping[str, Any] = {}
  tokens: int | None = None
  side: int = 32


class Size(NamedTuple):
  """How much is measured: batch sizes, seconds for each of them, and on what."""

  batches: tuple[int, ...]
  seconds: float
  least: int
  subjects: tuple[Subject, ...]


TEXTS = {'classes': 2, 'vocab': 1000, 'depth': 4}
FULL = Size(
  (1, 32, 128),
  8.0,
  9,
  (
    Subject('channels', 'ResNet-20', 'resnet20'),
    Subject('channels', 'ResNet-56', 'resnet56'),
    Subject('channels', 'VGG-16', 'vgg16'),
    Subject('channels', 'MobileNetV2', 'mobilenet_v2'),
    Subject('channels', 'ViT, CIFAR', 'vit_cifar'),
    Subject('channels', 'BERT of 4 layers, 32 tokens', 'bert_minilm', TEXTS, tokens=32),
    Subject('units', 'ResNet-56', 'resnet56'),
    Subject('exits', 'ResNet-110', 'resnet110'),
    Subject('cascade', 'ResNet-56', 'resnet56'),
  ),
)
QUICK = Size(
  (1, 2),
  0.01,
  2,
  (
    Subject('channels', 'ResNet-8', 'resnet8', side=8),
    Subject('units', 'ResNet-14', 'resnet14', side=8),
    Subject('exits', 'ResNet-14', 'resnet14', side=8),
    Subject('cascade', 'ResNet-8', 'resnet8', side=8),
  ),
)


def inputs_of(subject: Subject, batch: int) -> tuple:
  """Images, or texts with their mask: [batch, ...], always the same."""
  if subject.tokens is None:
    return (measure.random_images(batch, subject.side, subject.side, 3),)
  drawn = np.random.default_rng(0).integers(0, TEXTS['vocab'], (batch, subject.tokens))
  return jnp.asarray(drawn, jnp.int32), jnp.ones((batch, subject.tokens), bool)


def built(subject: Subject) -> tuple[Any, Any]:
  """(network, random variables)."""
  model = dp.models.build(subject.model, **{'classes': 10, **subject.arguments})
  if subject.kind == 'exits':
    model = every_tap(model)
  elif subject.kind == 'cascade':
    taps = model.taps
    model = WithHeads(model, {'early': Head(taps[len(taps) // 3])})
  variables = jax.jit(model.init)(jax.random.key(0), *inputs_of(subject, 1))
  return model, variables


# ---- smaller networks ----------------------------------------------------------------


def decisions(subject: Subject, model: Any, coupling: Any, variables: Any) -> dict:
  """{variant: what to keep}."""
  if subject.kind == 'channels':
    return {
      name: dp.oneshot(coupling, variables, TARGET, scope='uniform', round_to=n)
      for name, n in WIDTHS.items()
    }
  if subject.kind == 'units':
    names = sorted(coupling.gates()['branches'], key=_depth)
    gone = names[1::2]  # every second one, from stem to head
    return {
      'half of the units': {'branches': {name: name not in gone for name in names}}
    }
  exits = [name for name in coupling.exits if name != 'main']
  kept = exits[(len(exits) - 1) // 2]
  keep = {name: name == kept for name in coupling.exits}
  return {'cut at the half': {'exits': keep}}


def _depth(name: str) -> tuple[int, ...]:
  digits = ''.join(c if c.isdigit() else ' ' for c in name)
  return tuple(map(int, digits.split()))


def smaller(subject: Subject, size: Size, missing: Sequence[str]) -> list[dict]:
  """The rows of a network and of what is cut of it, all by turns."""
  model, variables = built(subject)
  example = inputs_of(subject, 1)
  coupling = dp.couple(model, variables, *example)
  decided = decisions(subject, model, coupling, variables)
  decided = {name: keep for name, keep in decided.items() if name in missing}
  cut = [
    dp.prune(model, variables, keep, example, coupling=coupling)
    for keep in decided.values()
  ]
  networks = [(runnable(model), variables, model.exits[-1])]
  networks += [(p.apply, p.variables, p.model.exits[-1]) for p in cut]
  whole = networks[0]
  before = flops_of(*whole, example)
  rows = [
    {
      'kind': subject.kind,
      'network': subject.network,
      'variant': name,
      'flop_ratio': before / flops_of(*network, example),
      'batches': {},
    }
    for name, network in zip(decided, networks[1:], strict=True)
  ]
  for batch in size.batches:
    inputs = inputs_of(subject, batch)
    calls = [caller(*network, inputs) for network in networks]
    base, *others = clock.interleave(calls, size.seconds, least=size.least)
    for row, taken in zip(rows, others, strict=True):
      row['batches'][str(batch)] = timed(base, taken, row['flop_ratio'])
  if subject.kind == 'channels':
    for row in rows:
      row['torch'] = pytorch.pruned_times(
        subject.model, variables, row['flop_ratio'], WIDTHS[row['variant']],
        size.batches, size.seconds,
      )  # fmt: skip
  return rows


def flops_of(apply: Callable, variables: Any, answer: str, example: tuple) -> int:
  """FLOPs of one example, of what leads to the answer alone."""
  only = lambda v, *x: apply(v, *x)[answer]
  return int(dp.cost.flops(dp.couple(only, variables, *example)))


def caller(apply: Callable, variables: Any, answer: str, inputs: tuple) -> Callable:
  """A function without arguments that does the next evaluation."""
  run = jax.jit(lambda v, *x: apply(v, *x)[answer])
  return lambda: run(variables, *inputs)


def timed(base: np.ndarray, taken: np.ndarray, flop_ratio: float) -> dict[str, Any]:
  """The times of two calls by turns, and their ratio beside that of the FLOPs."""
  faster = measure.ratio(base, taken)
  return {
    'whole_ms': float(np.median(base)),
    'small_ms': float(np.median(taken)),
    'speedup': faster['ratio'],
    'quartiles': faster['quartiles'],
    'realised': faster['ratio'] / flop_ratio,
    'turns': len(base),
  }


# ---- cascades ------------------------------------------------------------------------


def leaving(subject: Subject, size: Size) -> list[dict]:
  """The row of a cascade that half of the examples leave early."""
  model, variables = built(subject)
  inputs = inputs_of(subject, size.batches[-1])
  early = cascade(model, variables, *inputs_of(subject, 1))
  scores = early.predictions(None, *inputs).scores[0]
  limit = np.quantile(scores, 1 - LEAVE)
  variant = f'{100 * LEAVE:.0f} % leave early'
  row = {'kind': 'cascade', 'network': subject.network, 'variant': variant}
  early = cascade(
    model, variables, *inputs_of(subject, 1), thresholds={'early': float(limit)}
  )
  ratios, batches = [], {}
  for batch in size.batches:
    early = merge(early, *inputs, batch=batch, seconds=size.seconds)
    found = race(early, *inputs, batch=batch, seconds=size.seconds)
    ratios.append(found.cost.whole / found.cost.ideal)
    batches[str(batch)] = {
      'whole_ms': found.whole.median,
      'small_ms': found.cascade.median,
      'speedup': 1 / found.share,
      'quartiles': [
        found.whole.median / found.cascade.upper,
        found.whole.median / found.cascade.lower,
      ],
      'realised': 1 / found.share / ratios[-1],
      'turns': found.cascade.runs,
      'merged': list(early.merged[batch] or ()),
      'alone': early.merged[batch] is None,
    }
  return [{**row, 'flop_ratio': ratios[-1], 'batches': batches}]


def variants(subject: Subject) -> tuple[str, ...]:
  """The variants of a network, one row each."""
  return {
    'channels': tuple(WIDTHS),
    'units': ('half of the units',),
    'exits': ('cut at the half',),
    'cascade': (f'{100 * LEAVE:.0f} % leave early',),
  }[subject.kind]


def main(words: Sequence[str] | None = None) -> None:
  """Measures what is missing in the result file, and adds it row by row."""
  parser = argparse.ArgumentParser(prog='python -m experiments.bench.realised')
  parser.add_argument('--quick', action='store_true', help='a smoke test')
  quick = parser.parse_args(words).quick
  size = QUICK if quick else FULL
  name = 'realised_quick' if quick else f'realised_{jax.default_backend()}'
  config = {
    'target': TARGET,
    'leave': LEAVE,
    'batches': list(size.batches),
    'seconds': size.seconds,
  }
  rows = result_files.Rows(result_files.path_of('bench', name, False), config, KEYS)
  for subject in size.subjects:
    about = {'kind': subject.kind, 'network': subject.network}
    missing = [v for v in variants(subject) if rows.missing(**about, variant=v)]
    if not missing:
      continue
    cascaded = subject.kind == 'cascade'
    made = leaving(subject, size) if cascaded else smaller(subject, size, missing)
    for row in made:
      rows.add(row)
  beside = all(map(importlib.util.find_spec, ('torch', 'torch_pruning')))
  print('' if beside else 'torch and torch_pruning are not there: nothing beside ours')


if __name__ == '__main__':
  main()
