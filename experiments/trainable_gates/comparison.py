"""Trainable gates beside their controls: the same network, cost, epochs and seeds.

  gates     trained jointly with the weights, then fine-tuned
  l1        uniform L1 norm of the trained network, fine-tuned as long in total, at the
            same rates, refitted and towards the same teacher if the gates are
  global    the same by the L1 norm over all layers
  random    uniform random channels, fine-tuned as long in total
  torch_pruning  the same by Torch-Pruning's default scores; see torch_pruned.py
  uncut     the whole network, trained as long in total and towards the same teacher
  scratch   the shape that the gates found, trained from scratch for all epochs together

Every (seed, target, method) is one row. The network that is cut is trained once for
each seed, or pretrained. Decisions see held-out images only; the test images are read
once per row. A pretrained network may have seen all training images: then the first
half of the test images is what is held out, and accuracy is that of the second.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import depthprune as dp
from depthprune import methods
from depthprune.methods.trainable_gates import GateOptions
from depthprune.report.numbers import counted, spread
from depthprune.run import rounds
from depthprune.run.config import TRAIN, Config
from depthprune.run.job import Job, prepare, stage
from depthprune.run.network import initial_variables, network
from depthprune.storage import directory as record
from depthprune.train.method import Method, plain
from depthprune.train.result import to_json
from depthprune.train.task import Tree
from experiments.result_files import (
  Row,
  files_with,
  link,
  notes,
  path_of,
  percent,
  read,
  table,
)
from experiments.run import (
  SEEDS,
  Arguments,
  Case,
  compare,
  on_unseen,
  sized,
  within,
)
from experiments.trainable_gates import torch_pruned

FEW = 2048  # held-out images on which the stages of a run are measured
NAMES = {
  'gates': 'trainable gates',
  'l1': 'uniform L1',
  'global': 'global L1',
  'random': 'uniform random',
  'torch_pruning': 'Torch-Pruning, L2',
  'uncut': 'not cut, trained as long',
  'scratch': 'same shape from scratch',
}


@dataclasses.dataclass(frozen=True, eq=False)
class Base:
  """The network that is cut, trained."""

  job: Job
  model: Any
  variables: Tree

  @functools.cached_property
  def accuracy(self) -> float:
    """Its accuracy on the images that report."""
    return _test_accuracy(self.job, self.model, self.variables)


def run(
  name: str,
  full: Config[GateOptions],
  small: Mapping[str, Any],
  targets: Sequence[float],
  methods: Sequence[str],
  arguments: Arguments,
) -> list[Case]:
  """Fills the result file of an experiment and returns the cases that are left.

  Args:
    name: The function in configs.py.
    full: The config for an accelerator.
    small: What differs from `full` at the size for a CPU.
    targets: Fractions of the FLOPs.
    methods: Those of NAMES that are compared.
    arguments: What the experiment is asked.
  """
  path, config = sized('trainable_gates', name, full, small, arguments)
  cases = [{'target': t, 'method': method} for t in targets for method in methods]
  make_row = functools.partial(_make_row, config)
  return compare(path, config, cases, make_row, arguments)


def demo(name: str, config: Config[GateOptions], arguments: Arguments) -> list[Case]:
  """Fills a result file with the results of whole runs, one for each seed."""
  path = path_of('trainable_gates', name, full=False)
  runs = json.loads(path.read_text())['runs'] if path.is_file() else []
  done = {result['config']['seed'] for result in runs}
  seeds = arguments.seeds or range(SEEDS)
  left = [{'seed': seed} for seed in seeds if seed not in done]
  with within(arguments.minutes):
    while left and not arguments.left:
      seed = left[0]['seed']
      workdir = f'runs/trainable_gates/{name}/seed{seed}'
      result = to_json(
        rounds.run(dataclasses.replace(config, seed=seed, workdir=workdir))
      )
      del result['report']  # kept indices; result.json of the run has them
      runs.append(result)
      record.write(path, {'command': record.command(), 'runs': runs})
      print(json.dumps(result['accuracy']), flush=True)
      left = left[1:]
  return left


def _make_row(
  shared: Config[GateOptions],
  config: Config[GateOptions],
  case: Case,
  same_seed: list[Row],
) -> Row:
  started = time.monotonic()
  base = base_of(shared, config)
  config = _with_epochs(config, case['method'])
  options = dataclasses.replace(config.options, target=case['target'])
  config = dataclasses.replace(config, options=options)
  job = job_of(base, config)
  if case['method'] == 'scratch':
    gates = {'target': case['target'], 'method': 'gates'}.items()
    (shape,) = (row for row in same_seed if gates <= row.items())
    row = _scratch_row(job, base, shape)
  else:
    row = _cut_row(job, base, case['method'])
  return {**row, 'wall_seconds': round(time.monotonic() - started, 1)}


def base_of(shared: Config[GateOptions], config: Config[GateOptions]) -> Base:
  """The network that the runs of a seed start from.

  Args:
    shared: What all runs of an experiment have in common.
    config: That of a run, from which the seed and what concerns the data are taken.
  """
  common = {k: getattr(config, k) for k in ('seed', 'batch', 'mixup')}
  folder = shared.path / f'base-seed{config.seed}'
  return _base(dataclasses.replace(shared, **common, workdir=str(folder)))


@functools.lru_cache(1)
def _base(config: Config[GateOptions]) -> Base:
  job = prepare(config)
  if config.pretrained:
    job = on_unseen(job)
  model = network(config, job.images.classes)
  variables = initial_variables(job, model)
  if epochs := config.epochs.train:
    variables = _trained(job, TRAIN, model, variables, epochs)
  return Base(job, model, variables)


def job_of(base: Base, config: Config[GateOptions]) -> Job:
  """The job of one run, with fewer held-out images: only what is refitted or measured
  anew at a cut, or after training, is decided on them."""
  few = jax.tree.map(lambda x: x[:FEW], base.job.images.held_out)
  images = base.job.images._replace(held_out=few)
  return base.job._replace(config=config, folder=config.path, images=images)


def _with_epochs(config: Config[GateOptions], method: str) -> Config[GateOptions]:
  """All methods see the images equally often after the base training."""
  train, gates, finetune = config.epochs
  if method == 'gates':
    return config
  total = gates + finetune + (train if method == 'scratch' else 0)
  return dataclasses.replace(config, gate_epochs=0, finetune_epochs=total)


def _trained(job: Job, name: str, model: Any, variables: Tree, epochs: float) -> Tree:
  peak = job.config.learning_rate
  return stage(job, name, model, plain(), variables, epochs=epochs, peak=peak).variables


def _test_accuracy(job: Job, model: Any, variables: Tree) -> float:
  return job.scores(model)(variables, job.images.test)['accuracy']


def _scratch_row(job: Job, base: Base, shape: Mapping[str, Any]) -> Row:
  model = base.model.clone(arch=type(base.model.arch)(shape['arch']))
  fresh = jax.jit(model.init)(job.key('init'), *job.inputs)
  variables = _trained(job, 'scratch', model, fresh, job.config.epochs.finetune)
  cost = {k: shape[k] for k in ('flops', 'params')}
  return {'accuracy': _test_accuracy(job, model, variables), **cost}


def _cut_row(job: Job, base: Base, method: str) -> Row:
  if method == 'gates':
    build = functools.partial(methods.build, job.config.options)
  else:
    build = _control(job, base.variables, method)
  shrunk = rounds.shrink(job, base.model, base.variables, build)
  report = shrunk.pruned.report
  return {
    'accuracy': _test_accuracy(job, shrunk.model, shrunk.variables),
    'accuracy_unpruned': base.accuracy,
    'flops': report['flops']['after'],
    'flops_unpruned': report['flops']['before'],
    'params': report['params']['after'],
    'difference': report['verify']['difference'],
    'arch': dict(shrunk.pruned.arch),
  }


def _control(job: Job, variables: Tree, name: str) -> Callable[..., Method]:
  """A control, as a method that decides without training."""

  def build(coupling, steps, scores, whole) -> Method:
    del steps, scores, whole
    options = job.config.options
    if name == 'uncut':
      keep = {}
    elif name == 'torch_pruning':
      keep = torch_pruned.keep(coupling, variables, options.target)
    else:
      score, scope = ('l1', 'global') if name == 'global' else (name, 'uniform')
      keep = dp.oneshot(
        coupling,
        variables,
        options.target,
        score=score,
        scope=scope,
        of=options.of,
        round_to=options.round_to,
        key=job.key('random'),
      )
    return Method(decide=lambda theta, stats, evaluate: keep)

  return build


def demo_table() -> str:
  """The run of `make demo`, over its seeds."""
  path = 'trainable_gates/results/digits.json'
  runs = read(path)['runs']
  accuracy = lambda name: percent(r['accuracy'][name] for r in runs)
  speedup = lambda batch: spread(r['latency_ms'][batch]['speedup'] for r in runs)
  share = lambda cost: percent(r[cost]['after'] / r[cost]['before'] for r in runs)
  config, images = runs[0]['config'], runs[0]['images']
  target = config.get('options', config)['target']  # older files have it at the top
  head = ('', 'before', 'right after the cut', 'fine-tuned')
  lines = [
    ('test accuracy, %', accuracy('before'), accuracy('pruned'), accuracy('after')),
    ('FLOPs, %', '100', share('flops'), ''),
    ('parameters, %', '100', share('params'), ''),
    ('speed-up at batch 1 / 128', '', '', f'{speedup("1")} / {speedup("128")}'),
  ]
  return (
    f'`make demo`: {config["model"]} on {config["data"]}, {images["test"]} test '
    f'images, to {100 * target:g} % of its FLOPs; {len(runs)} seeds, '
    f'mean ± standard deviation; {runs[0]["device"]} '
    f'({link(path)}):\n\n' + table(head, lines)
  )


def gates_tables() -> str:
  """Accuracy by FLOPs beside the controls; a table for each result file, or a dash."""
  contents = files_with('trainable_gates', 'target', 'method', 'accuracy')
  return '\n\n'.join(_table(*file) for file in contents.items()) or (
    'Trainable gates beside their controls: –'
  )


def _table(path: Path, content: dict[str, Any]) -> str:
  config, rows = content['config'], content['rows']
  targets = sorted({r['target'] for r in rows}, reverse=True)
  at = lambda method, t: [r for r in rows if (r['method'], r['target']) == (method, t)]
  accuracy = lambda rows: percent(r['accuracy'] for r in rows) if rows else '–'
  share = lambda rows: percent(r['flops'] / r['flops_unpruned'] for r in rows)
  lines = [
    [name, *(accuracy(at(method, target)) for target in targets)]
    for method, name in NAMES.items()
    if any(r['method'] == method for r in rows)
  ]
  reached = ', '.join(share(gates) for t in targets if (gates := at('gates', t)))
  cut = [r for r in rows if 'accuracy_unpruned' in r]
  unpruned = {r['seed']: r['accuracy_unpruned'] for r in cut}
  part = 'the second half of the ' if config['pretrained'] else ''
  return (
    f'{config["model"]} on {config["data"]}{_training(config)}, '
    f'{counted(len(unpruned), "seed")}, accuracy in % on {part}test images; unpruned '
    f'{percent(unpruned.values())}; FLOPs reached by gates: {reached or "–"} % '
    f'({link(path)}).{notes(content)}\n\n'
    + table(['FLOPs kept', *(f'{100 * t:g} %' for t in targets)], lines)
  )


def _training(config: dict[str, Any]) -> str:
  """On how many images, for how many epochs."""
  images = f', {config["subset"]:,} training images' if config['subset'] else ''
  before = 'pretrained' if config.get('pretrained') else config['train_epochs']
  size = ' (CPU-sized)' if images else ''
  epochs = f'{config["gate_epochs"]} + {config["finetune_epochs"]} epochs'
  return f'{images}, {before} + {epochs}{size}'
