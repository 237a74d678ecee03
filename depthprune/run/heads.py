"""Training a network with heads on its taps: the heads alone, or all of it."""

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
from depthprune.models.decoder import Decoder
from depthprune.models.heads import Head, Unembedding, WithHeads, variables_of_trunk
from depthprune.models.layers import Pool
from depthprune.program.coupling import couple
from depthprune.program.modules import runnable
from depthprune.run.config import Config
from depthprune.run.job import Job, stage
from depthprune.run.network import initial_variables, network
from depthprune.train import mesh
from depthprune.train import task as tasks
from depthprune.train.method import plain
from depthprune.train.recipe import CascadePlan
from depthprune.train.task import Tree

SPREAD = (2 / 9, 1 / 3, 1 / 2, 2 / 3, 5 / 6)  # of the depth, where five heads are put


class Answers(NamedTuple):
  """The answers of every exit to a split, and the labels.

  Attributes:
    logits: float32 [exits, n, classes].
    labels: int [n].
  """

  logits: np.ndarray
  labels: np.ndarray

  @property
  def accuracy(self) -> float:
    """Accuracy of the last exit, which is the network's own."""
    return float((self.logits[-1].argmax(-1) == self.labels).mean())


class Trained(NamedTuple):
  """A trained network with heads, and its answers.

  Attributes:
    model: the network with its heads.
    variables: its variables.
    exits: names of the exits by depth, 'main' last.
    held_out: answers to the held-out split.
    test: answers to the test split.
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
  """Trains the network, if it is not pretrained, and its heads, as the plan says."""
  config, epochs, plan = job.config, job.config.epochs, cascade_plan(job.config)
  trunk = network(config, job.images.classes, *job.inputs)
  variables = initial_variables(job, trunk)
  model = with_sides(plan, trunk, job)
  if not plan.frozen:
    original = {}
    if config.pretrained:
      original = job.accuracies(trunk, variables)
    variables = with_trunk(job, model, variables)
    total = epochs.train + epochs.gates
    return together(job, 'joint', model, variables, total, original)
  variables = trained_before(job, trunk, variables)
  frozen = fit_heads(job, model, with_trunk(job, model, variables))
  if not plan.joint:
    return frozen
  return together(
    job, 'mixed', model, frozen.variables, epochs.finetune, frozen.original
  )


def trained_before(job: Job, trunk: Any, variables: Tree) -> Tree:
  """Trains a network without heads in the stage 'train', if the run asks for that."""
  epochs, peak = job.config.epochs.train, job.config.learning_rate
  if not epochs:
    return variables
  return stage(
    job, 'train', trunk, plain(), variables, epochs=epochs, peak=peak
  ).variables


def cascade_plan(config: Config) -> CascadePlan:
  """Returns how the run's method puts exits on a network, trains and uses them."""
  assert config.recipe.cascade is not None
  return config.recipe.cascade(config.options)


def smoothed(job: Job) -> tasks.Task:
  """Returns the task of the run, with the label smoothing of heads."""
  config, smoothing = job.config, cascade_plan(job.config).smoothing
  return tasks.task_of(job.images, config.metric, config.class_weights, smoothing)


def with_sides(plan: CascadePlan, trunk: Any, job: Job) -> WithHeads:
  """Puts the heads that the plan asks for on a trunk: exit1, exit2, ... by depth.

  Those of a language model share its logits, which cost as much as several layers: two
  are the default.

  Raises:
    ValueError: there is no such tap, or the trunk has fewer than two taps.
  """
  taps = trunk.taps
  chosen = sorted(set(plan.taps), key=lambda t: taps.index(t) if t in taps else -1)
  writes = isinstance(trunk, Decoder)
  if not chosen:
    parts = spread(plan.heads or (2 if writes else 5))
    numbers = sorted({max(1, int(len(taps) * part)) for part in parts})
    chosen = [taps[i - 1] for i in numbers if i < len(taps)]
  if not chosen:
    raise ValueError(
      f'{job.config.method}: {type(trunk).__name__} has the taps '
      f'{", ".join(taps) or "none"}: too few for an exit before its own'
    )
  if writes:
    own = {f'exit{i}': Unembedding(tap, plan.hidden) for i, tap in enumerate(chosen, 1)}
    return WithHeads(trunk, own)
  pool = plan.pool or pool_of(trunk, job)
  fields = (job.images.classes, plan.hidden, pool, plan.dropout, plan.normalise)
  after = lambda i: f'exit{i - 1}' if plan.sees_earlier and i > 1 else ''
  heads = {
    f'exit{i}': Head(tap, *fields, after=after(i)) for i, tap in enumerate(chosen, 1)
  }
  return WithHeads(trunk, heads)


def spread(heads: int) -> np.ndarray:
  """Returns the parts of the depth where heads are put, float64 [heads]."""
  between = np.linspace(0, len(SPREAD) - 1, heads)
  return np.interp(between, np.arange(len(SPREAD)), SPREAD)


def with_trunk(job: Job, model: WithHeads, variables: Tree) -> Tree:
  """Returns the variables of a network with new heads on a trunk.

  Args:
    job: the run, whose seed initialises the heads.
    model: the network with heads.
    variables: those of its trunk, which may be pruned or quantised.
  """

  def init(key, *inputs):  # without a new trunk, which would be compiled for nothing
    return {
      name: {k: v for k, v in tree.items() if k != 'trunk' or name not in variables}
      for name, tree in model.init(key, *inputs).items()
    }

  merged = jax.jit(init)(job.key('heads'), *job.inputs)
  for name, tree in variables.items():
    merged[name]['trunk'] = tree
  return merged


def pool_of(trunk: Any, job: Job) -> Pool:
  """Returns how heads pool: images on a grid, tokens by their mean.

  In early layers the [CLS] token has seen little of a text.
  """
  shapes = jax.eval_shape(trunk.init_with_output, job.key('shapes'), *job.inputs)[0]
  pools: dict[int, Pool] = {2: 'avg', 3: 'avg', 4: 'grid4'}
  return pools[shapes[trunk.taps[0]].ndim]


def fit_heads(
  job: Job, model: WithHeads, variables: Tree, features: FeatureSet | None = None
) -> Trained:
  """Trains all heads together on a frozen trunk, whose features are computed once.

  Args:
    job: the run.
    model: the network with heads.
    variables: its variables.
    features: features of the trunk that were computed before, such as for another seed.
  """
  config, plan, heads = job.config, cascade_plan(job.config), model.alone
  features = features or feature_set(job, model, variables)
  mine = {
    name: own
    for name, tree in variables.items()
    if (own := {k: v for k, v in tree.items() if k != 'trunk'})
  }
  own = job._replace(
    config=dataclasses.replace(config, optimizer='adamw'),
    images=features,
    train=features.on_device(functools.partial(mesh.replicate, job.mesh)),
    task=smoothed(job),
  )
  # Without a trunk, nothing has to stay in evaluation mode, and heads have dropout.
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
  held_out, test = (
    answers(own, heads, state.variables, model, split)
    for split in (features.held_out, features.test)
  )
  return Trained(
    model=model,
    variables={
      name: {**tree, **state.variables.get(name, {})}
      for name, tree in variables.items()
    },
    exits=in_order(model),
    held_out=held_out,
    test=test,
    original={'held_out': held_out.accuracy, 'test': test.accuracy},
  )


def together(
  job: Job,
  name: str,
  model: WithHeads,
  variables: Tree,
  epochs: float,
  original: dict[str, float],
) -> Trained:
  """Trains a network together with its heads, in the stage 'joint' or 'mixed'."""
  first, later = job.config.recipe.peaks
  peak = (first if name == 'joint' else later) * job.config.learning_rate
  coupling = couple(model, variables, *job.inputs)
  method = methods.build(job.config.options, coupling, stage=name)
  state = stage(
    job._replace(task=smoothed(job)),
    name,
    model,
    method,
    variables,
    epochs=epochs,
    peak=peak,
  )
  held_out, test = (
    answers(job, model, state.variables, model, split)
    for split in (job.images.held_out, job.images.test)
  )
  return Trained(model, state.variables, in_order(model), held_out, test, original)


def in_order(model: WithHeads) -> tuple[str, ...]:
  """Returns the names of the exits by depth, the network's own last."""
  return (*(name for name in model.exits if name != 'main'), 'main')


def answers(job: Job, run: Any, variables: Tree, model: WithHeads, split) -> Answers:
  """Computes the answers of all exits of `model` to a split.

  Args:
    job: the run.
    run: the module that is run: the model, or its heads alone on features.
    variables: variables of `run`.
    model: the network with heads, for the order of its exits.
    split: the examples.
  """
  apply, names = jax.jit(runnable(run)), in_order(model)
  logits, labels = [], []
  variables = job.on_mesh(variables)
  for batch in job.own_batches(split):
    inputs = mesh.by_rows(job.mesh, inputs_of(batch))
    outputs = fetch(apply(variables, *inputs))
    real = real_rows(batch)
    logits.append(np.stack([outputs[name][real] for name in names]))
    labels.append(np.asarray(batch['label'])[real])
  return Answers(np.concatenate(logits, 1), np.concatenate(labels))


# ---- features ------------------------------------------------------------------------


def feature_set(job: Job, model: WithHeads, variables: Tree) -> FeatureSet:
  """Computes the features that the heads read, with augmented views for training."""
  read: Any = functools.partial(model.apply, method='features')
  images, folder = job.images, job.folder / 'features'
  crc32 = lambda crc, x: zlib.crc32(np.ascontiguousarray(x).tobytes(), crc)
  arrays = functools.reduce(crc32, jax.tree.leaves(variables_of_trunk(variables)), 0)
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
  """Yields all training data as it is, and then augmented, `views` times in all."""
  yield from job.batches(job.images.train)
  for i in range(1, views):
    batch_at = job.batch_at(f'view{i}').stepwise()
    yield from (batch_at(job.train, step) for step in range(job.steps(1)))
