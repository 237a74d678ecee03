"""A network and heads on its taps, trained: heads alone, or everything together."""

import dataclasses
import functools
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from depthprune import methods
from depthprune.data.dataset import count, inputs_of, real_rows
from depthprune.data.features import FeatureSet, collect
from depthprune.distributed import fetch
from depthprune.models.heads import Head, WithHeads
from depthprune.models.layers import Pool
from depthprune.program.coupling import couple
from depthprune.program.trace import runnable
from depthprune.run.config import Config
from depthprune.run.job import Job, stage
from depthprune.run.network import initial_variables, network
from depthprune.train import mesh
from depthprune.train import task as tasks
from depthprune.train.method import plain
from depthprune.train.recipe import CascadePlan
from depthprune.train.task import Tree

SPREAD = (2 / 9, 1 / 3, 1 / 2, 2 / 3, 5 / 6)  # of the depth: where heads are put


class Answers(NamedTuple):
  """What every exit says of a split: logits float32 [exits, n, classes], labels [n]."""

  logits: np.ndarray
  labels: np.ndarray

  @property
  def accuracy(self) -> float:
    """Of the last exit, the network itself."""
    return float((self.logits[-1].argmax(-1) == self.labels).mean())


class Trained(NamedTuple):
  """A network with heads, trained, and its answers on the splits of the job.

  Attributes:
    exits: in order, 'main' last.
    original: accuracy on 'held_out' and 'test' of the network alone, before it was
      trained together with heads; empty where it was not trained before.
  """

  model: WithHeads
  variables: Tree
  exits: tuple[str, ...]
  held_out: Answers
  test: Answers
  original: dict[str, float]


def train(job: Job) -> Trained:
  """Trains the network where that is asked for, and its heads, by the regime."""
  config, epochs, plan = job.config, job.config.epochs, cascade_plan(job.config)
  trunk = network(config, job.images.classes)
  variables = initial_variables(job, trunk)
  model = with_sides(plan, trunk, job)
  if not plan.frozen:
    whole = with_trunk(job, model, variables)
    original = alone(job, trunk, variables) if config.pretrained else {}
    count = epochs.train + epochs.gates
    return together(job, 'joint', model, whole, count, original)
  if epochs.train:
    peak = config.learning_rate
    state = stage(
      job, 'train', trunk, plain(), variables, epochs=epochs.train, peak=peak
    )
    variables = state.variables
  frozen = fit_heads(job, model, with_trunk(job, model, variables))
  if not plan.joint:
    return frozen
  return together(
    job, 'mixed', model, frozen.variables, epochs.finetune, frozen.original
  )


def cascade_plan(config: Config) -> CascadePlan:
  """How the run's method puts exits on a network, trains and uses them."""
  assert config.recipe.cascade is not None
  return config.recipe.cascade(config.options)


def alone(job: Job, trunk: Any, variables: Tree) -> dict[str, float]:
  """Accuracy of a network without heads, on held-out and test data."""
  measure, images = job.scores(trunk), job.images
  splits = {'held_out': images.held_out, 'test': images.test}
  return {name: measure(variables, of)['accuracy'] for name, of in splits.items()}


def with_sides(plan: CascadePlan, trunk: Any, job: Job) -> WithHeads:
  """The trunk with the heads that the plan asks for: exit1, exit2, ... by depth.

  Raises: ValueError for a tap that there is not, and a trunk without two taps.
  """
  taps = trunk.taps
  chosen = sorted(set(plan.taps), key=lambda t: taps.index(t) if t in taps else -1)
  if not chosen:
    numbers = sorted({max(1, int(len(taps) * part)) for part in SPREAD})
    chosen = [taps[i - 1] for i in numbers if i < len(taps)]
  if not chosen:
    raise ValueError(
      f'{job.config.method}: {type(trunk).__name__} has the taps {", ".join(taps) or "none"}: too '
      'few for an exit before its own'
    )
  pool = plan.pool or pool_of(trunk, job)
  head = lambda tap: Head(tap, job.images.classes, plan.hidden, pool, plan.dropout)
  return WithHeads(trunk, {f'exit{i}': head(tap) for i, tap in enumerate(chosen, 1)})


def with_trunk(job: Job, model: WithHeads, variables: Tree) -> Tree:
  """The variables of a network with heads: new heads, its trunk's as they are given.

  The trunk may be any module with taps that the model was made with: pruned before, or
  quantised, whatever its arrays are then.
  """

  def fresh(key, *inputs):  # an own trunk would only be compiled to be thrown away
    whole = model.init(key, *inputs)
    given = lambda name: {'trunk'} if name in variables else set()
    return {
      name: {k: v for k, v in tree.items() if k not in given(name)}
      for name, tree in whole.items()
    }

  whole = jax.jit(fresh)(job.key('heads'), *job.inputs)
  for name, tree in variables.items():
    whole[name]['trunk'] = tree
  return whole


def pool_of(trunk: Any, job: Job) -> Pool:
  """A grid of images; the mean of tokens, as an early [CLS] has seen little."""
  shapes = jax.eval_shape(trunk.init_with_output, job.key('shapes'), *job.inputs)[0]
  pools: dict[int, Pool] = {2: 'avg', 3: 'avg', 4: 'grid4'}
  return pools[shapes[trunk.taps[0]].ndim]


def fit_heads(
  job: Job, model: WithHeads, variables: Tree, features: FeatureSet | None = None
) -> Trained:
  """Heads on a frozen trunk: its features once, then one program for all heads.

  features: of the trunk, where there are some already, such as those of another seed.
  """
  config, plan, heads = job.config, cascade_plan(job.config), model.alone
  features = features or feature_set(job, model, variables)
  mine = {'params': {k: v for k, v in variables['params'].items() if k != 'trunk'}}
  own = job._replace(
    config=dataclasses.replace(config, optimizer='adamw'),
    images=features,
    train=features.on_device(functools.partial(mesh.whole, job.mesh)),
    task=tasks.classification(job.images.classes, plan.smoothing),
  )
  # There is no trunk here to keep in evaluation mode; heads have dropout.
  coupling = couple(heads, mine, *features.example())
  method = methods.build(config.options, coupling, stage='heads')
  state = stage(
    own,
    'heads',
    heads,
    method._replace(trunk_train=True),
    mine,
    epochs=config.epochs.gates,
    peak=plan.head_learning_rate,
  )
  params = {**variables['params'], **state.params}
  says = lambda split: answers(own, heads, state.variables, model, split)
  splits = {'held_out': says(features.held_out), 'test': says(features.test)}
  original = {name: split.accuracy for name, split in splits.items()}
  whole = {**variables, 'params': params}
  return Trained(model, whole, in_order(model), **splits, original=original)


def together(
  job: Job,
  name: str,
  model: WithHeads,
  variables: Tree,
  epochs: int,
  original: dict[str, float],
) -> Trained:
  """Network and heads trained as one."""
  first, later = job.config.recipe.peaks
  peak = (first if name == 'joint' else later) * job.config.learning_rate
  coupling = couple(model, variables, *job.inputs)
  method = methods.build(job.config.options, coupling, stage=name)
  task = tasks.classification(job.images.classes, cascade_plan(job.config).smoothing)
  smoothed, given = job._replace(task=task), (model, method, variables)
  state = stage(smoothed, name, *given, epochs=epochs, peak=peak)
  says = lambda split: answers(job, model, state.variables, model, split)
  images = job.images
  splits = says(images.held_out), says(images.test)
  return Trained(model, state.variables, in_order(model), *splits, original)


def in_order(model: WithHeads) -> tuple[str, ...]:
  """The exits by depth, the network's own last."""
  return (*(name for name in model.exits if name != 'main'), 'main')


def answers(job: Job, run: Any, variables: Tree, model: WithHeads, split) -> Answers:
  """What every exit of `model` says of a split, by a `run` that may be its heads."""
  apply, names = jax.jit(runnable(run)), in_order(model)
  logits, labels = [], []
  variables = job.on_mesh(variables)
  for batch in job.own_batches(split):
    inputs = mesh.by_rows(job.mesh, inputs_of(batch))
    found = fetch(apply(variables, *inputs))
    real = real_rows(batch)
    logits.append(np.stack([found[name][real] for name in names]))
    labels.append(np.asarray(batch['label'])[real])
  return Answers(np.concatenate(logits, 1), np.concatenate(labels))


# ---- features ------------------------------------------------------------------------


def feature_set(job: Job, model: WithHeads, variables: Tree) -> FeatureSet:
  """What the heads read of every split; of training data, several augmented views."""
  read: Any = functools.partial(model.apply, method='features')
  images, folder = job.images, job.folder / 'features'
  crc32 = lambda crc, x: zlib.crc32(np.ascontiguousarray(x).tobytes(), crc)
  trunk = {name: tree['trunk'] for name, tree in variables.items()}
  arrays = functools.reduce(crc32, jax.tree.leaves(trunk), 0)
  about = {**job.relevant(), 'arrays': arrays}
  variables = job.on_mesh(variables)
  augments = job.config.augment and images.augments
  views = cascade_plan(job.config).views if augments else 1
  sources = {
    'train': (_views(job, views), views * count(images.train)),
    'held_out': (job.batches(images.held_out), count(images.held_out)),
    'test': (job.batches(images.test), count(images.test)),
  }
  splits = {
    name: collect(read, variables, batches, most, folder / name, about)
    for name, (batches, most) in sources.items()
  }
  return FeatureSet(images.name, **splits, classes=images.classes)


def _views(job: Job, views: int) -> Iterator[Tree]:
  """All training data as it is, then again and again augmented."""
  yield from job.batches(job.images.train)
  for i in range(1, views):
    batch_at = job.batch_at(f'view{i}').stepwise()
    yield from (batch_at(job.train, step) for step in range(job.steps(1)))
