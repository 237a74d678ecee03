"""SideNets on a network that is small already: a pruned and an int8 MainNet, CIFAR-10.

  plain    ResNet-20 as it was trained, 91.73 % on the test images
  pruned   cut to 60 % of its FLOPs by L1 norm, fine-tuned for an epoch, saved, and read
           from its folder, as `depthprune run sidenet --pretrained DIR` does
  int8     quantised by qwix after training: weights int8 by output channel, inputs of
           every layer int8 by example, sums int32; normalisation and heads float32

Paper: arXiv 2007.13512 says that SideNets compose with pruning and quantisation. Every
(MainNet, seed) is one row, what is saved is of the FLOPs of that MainNet, and seeds of
the heads share the features of it. The weights have seen all training images, so the
first half of the test images decides and the second reports. Seed 0 is also executed.

  pip install 'qwix>=0.1.8'
  TFDS_DATA_DIR=../shared/data/tfds python -m experiments.sidenet.composed

Sized for a CPU: heads see 10,000 images, without augmentation. `--minutes 10` stops and
goes on with the next call. XLA has no fast int8 convolution for CPUs: there int8 saves
memory and costs time.
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import depthprune as dp
from depthprune.data.features import FeatureSet
from depthprune.exports import networks as checkpoint
from depthprune.options import SideNet
from depthprune.run import early_exit as reached
from depthprune.run import heads as sides
from depthprune.run.config import RECIPES
from depthprune.run.early_exit import Decided, assembled, decide, splits
from depthprune.run.job import Job, prepare, stage
from depthprune.run.network import network, start
from depthprune.train.method import plain
from depthprune.train.task import Tree
from experiments.pieces import SEEDS, Arguments, Case, Rows, main, within
from experiments.sidenet.table import composed

RESULT = Path(__file__).parent / 'results' / 'composed.json'
FOLDER = Path('runs/sidenet/composed')
CONFIG = dataclasses.replace(
  RECIPES['sidenet'],
  options=SideNet(drop=0.5, views=1, dropout=0.0),
  model='resnet20',
  data='cifar10',
  pretrained='../shared/data/checkpoints/resnet20_cifar10.npz',
  subset=10_000,
  gate_epochs=10,
  finetune_epochs=1,
  learning_rate=0.02,
)
TARGET = 0.6  # of the FLOPs, for `pruned`
STATISTICS = 20  # batches that its statistics are measured on, before it is fine-tuned


class MainNet(NamedTuple):
  """A network and its arrays, of whatever kind they are."""

  model: Any
  variables: Tree


def unchanged(job: Job) -> MainNet:
  """The network of a job's config, as it is stored."""
  model = network(job.config, job.images.classes)
  return MainNet(model, start(job, model))


def thinner(job: Job) -> MainNet:
  """Pruned, fine-tuned and saved, unless that was done; then read from its folder."""
  folder = job.folder / 'network'
  if not folder.is_dir():
    model, variables = unchanged(job)
    coupling = dp.couple(model, variables, *job.inputs)
    keep = dp.oneshot(coupling, variables, TARGET, scope='uniform')
    small = dp.prune(model, variables, keep, job.inputs, coupling=coupling)
    batch_at = job.batch_at('statistics').stepwise()
    batches = (batch_at(job.train, i) for i in range(STATISTICS))
    fresh = dp.recalibrate(small.model, small.variables, batches)
    peak, epochs = job.config.learning_rate, job.config.epochs.finetune
    given = small.model, plain(), fresh
    state = stage(job, 'finetune', *given, epochs=epochs, peak=peak)
    small = small._replace(variables=state.variables)
    checkpoint.save(folder, small, job.images.normalisation)
  config = dataclasses.replace(job.config, pretrained=str(folder))
  return unchanged(job._replace(config=config))


def int8(job: Job) -> MainNet:
  """Quantised after training. Raises ModuleNotFoundError where there is no qwix."""
  import qwix  # only here, so that the others run without it

  model, variables = unchanged(job)
  rule = qwix.QuantizationRule(weight_qtype=jnp.int8, act_qtype=jnp.int8)
  quantised = qwix.quantize_model(model, qwix.PtqProvider([rule]))
  shapes = jax.eval_shape(quantised.init, job.key('int8'), *job.inputs)
  params = qwix.quantize_params(variables['params'], shapes['params'])
  return MainNet(quantised, {**variables, 'params': params})


MAINNETS: dict[str, Callable[[Job], MainNet]] = {
  'plain': unchanged,
  'pruned': thinner,
  'int8': int8,
}


def run(given: Arguments) -> list[Case]:
  """The only size there is, also with --full."""
  rows = Rows(RESULT, {**CONFIG.to_json(), 'target': TARGET}, ('mainnet', 'seed'))
  seeds = given.seeds or range(SEEDS)
  every = [{'mainnet': name, 'seed': seed} for name in MAINNETS for seed in seeds]
  left = lambda: [case for case in every if rows.missing(**case)]
  if not given.left:
    with within(given.minutes):
      for name in MAINNETS:
        missing = [case['seed'] for case in left() if case['mainnet'] == name]
        if missing:
          fill(rows, name, missing)
  return left()


def fill(rows: Rows, name: str, seeds: list[int]) -> None:
  """The rows of one MainNet; a MainNet that cannot be made is left out, and said."""
  job = splits(prepare(dataclasses.replace(CONFIG, workdir=str(FOLDER / name))))
  try:
    mainnet = MAINNETS[name](job)
  except ModuleNotFoundError as error:
    print(f"{name} is left out: {error}; pip install 'qwix>=0.1.8'")
    return
  model = sides.with_sides(CONFIG, mainnet.model, job)
  whole = sides.with_trunk(job, model, mainnet.variables)
  features = sides.feature_set(job, model, whole)
  for seed in seeds:
    config = dataclasses.replace(job.config, seed=seed)
    mine = job._replace(config=config, folder=job.folder / f'seed{seed}')
    found = row(mine, model, mainnet.variables, features)
    rows.add({'mainnet': name, 'seed': seed, **found})
  shutil.rmtree(job.folder / 'features')


def row(job: Job, model: Any, variables: Tree, features: FeatureSet) -> dict[str, Any]:
  """What heads of one seed reach; `variables` are those of the MainNet."""
  whole = sides.with_trunk(job, model, variables)
  trained = sides.fit_heads(job, model, whole, features)
  decided = decide(job, trained)
  test = decided.test
  right = (test.logits.argmax(-1) == test.labels).mean(-1)
  arrays = {k: v for k, v in variables.items() if k != 'branches'}
  return {
    'accuracy': float(right[-1]),
    'flops': decided.stages.whole,
    'bytes': sum(x.nbytes for x in jax.tree.leaves(arrays)),
    'exit_accuracy': dict(zip(test.exits, right.tolist(), strict=True)),
    'cost': dict(zip(test.exits, decided.stages.flops, strict=True)),
    'requested': {decided.kind: decided.requested},
    **reached.outcome(decided, decided.chosen),
    'executed': None if job.config.seed else executed(job, trained, decided),
  }


def executed(job: Job, trained: sides.Trained, decided: Decided) -> dict[str, Any]:
  """The cascade run on the reporting images, beside what was simulated, and timed."""
  _, early = assembled(job, trained, decided)
  return {'exits': early.exits, **reached.execute(job, decided, early)}


if __name__ == '__main__':
  main(__doc__, run)
  if RESULT.is_file():
    print(composed())
