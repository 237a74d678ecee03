"""SideNet: small perceptrons on the features of a pretrained network answer early.

Morisot: "Add a SideNet to your MainNet" (NLDL 2022, arXiv 2007.13512). An example
leaves at the first SideNet that is surer than a threshold; the others go on. Several
SideNets, pooling to a grid and the regimes other than `frozen` are ours or of others:

  z_k    = W2 relu(W1 pool(h_k) + b1) + b2
  L      = sum_k CE(z_k, y)                  frozen (the paper's), and first of mixed
  L      = CE(z, y) + sum_k CE(z_k, y)       joint, and second of mixed
  with a > 0, for CE(z_k, y):
           (1 - a) CE(z_k, y) + a CE(z_k, softmax(z / T))

  h_k      features of the MainNet at the tap of SideNet k; a perceptron on them is
           models.heads.Head(tap, hidden=...)
  z_k, z   logits of SideNet k and of the MainNet
  y        labels;  CE the cross-entropy with them, or with probabilities, in nats
  a, T     share of the MainNet's answer, whose gradient is stopped; T = TEMPERATURE

Frozen: neither parameters nor batch statistics of the MainNet change, so its features
can be computed once (`data.features`). Joint: all is trained together from the start.
Mixed: the MainNet first, then all together; reported best by arXiv 2407.14320.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, get_args

import tyro
from etils import epy

from depthprune.train.method import Method, exit_metrics, partitioned
from depthprune.train.options import (
  FRACTION,
  ConfigError,
  Epochs,
  at_least,
  finite,
  fraction,
  inside,
  one_of,
)
from depthprune.train.recipe import CascadePlan, Recipe, Setting

with epy.lazy_imports():
  import jax
  import jax.numpy as jnp
  import optax

  from depthprune.program import arguments, trace
  from depthprune.program.coupling import Coupling
  from depthprune.train import task as tasks
  from depthprune.train.task import Task, Tree

Regime = Literal['frozen', 'joint']
TEMPERATURE = 2.0  # of the MainNet's answer, from which heads learn


def sidenet(
  coupling: Coupling, regime: Regime = 'frozen', taught: float = 0.0
) -> Method:
  """Trains small heads on a pretrained network, to answer easy examples early.

  Nothing is cut: `decide` keeps all exits. What comes after training is a cascade:
  thresholds from held-out data (`cascade.thresholds`), and `cascade(...)`, in which an
  example leaves at the first exit that is sure enough.

  Args:
    coupling: what `couple` found in the network, which returns {'main': its own logits
      [batch, classes], NAME: logits of each head}; `models.heads.WithHeads` has heads
      on the taps of a network. What 'main' does not read belongs to the heads. The
      logits of a language model are [batch, length, vocab], and its heads are
      `models.heads.Unembedding` with a hidden layer, at which `generate_early` then
      lets tokens leave.
    regime: 'frozen' trains the heads alone and leaves every parameter and statistic of
      the network as it is, 'joint' trains everything. The mixed regime is 'frozen',
      then 'joint' from what that left.
    taught: share of the MainNet's answer in what heads learn, from 0 to 1; the rest are
      the labels.

  Returns:
    The Method.

  Raises:
    ValueError: there is no exit 'main' and another one, the regime is unknown, `taught`
      is no share, or the network was coupled in training mode (a frozen network runs in
      evaluation mode).

  Source: Morisot, arXiv 2007.13512.
  """
  names = early(coupling)
  arguments.number('taught', taught, least=0, most=1)
  if regime not in get_args(Regime):
    expected = ', '.join(get_args(Regime))
    raise ValueError(f'sidenet: regime={regime!r}: expected one of {expected}')
  if coupling.kwargs.get('train'):
    raise ValueError(
      'sidenet: the MainNet is in training mode, where its batch statistics move and '
      'examples see each other; couple it with train=False'
    )
  keep = dict.fromkeys(coupling.exits, True)

  def objective(task, outputs, batch, theta, step):
    del theta, step
    losses = [task.loss(outputs[name], batch) for name in names]
    if taught:
      answer = task.log_probs(jax.lax.stop_gradient(outputs['main']) / TEMPERATURE)
      soft = [_cross_entropy(task, answer, outputs[name], batch) for name in names]
      losses = [(1 - taught) * y + taught * z for y, z in zip(losses, soft)]
    if regime == 'joint':
      losses.append(task.loss(outputs['main'], batch))
    loss = jnp.stack(losses).sum()
    return loss, exit_metrics(task, outputs['main'], outputs, batch, names)

  return Method(
    objective=objective,
    decide=lambda theta, stats, evaluate: {'exits': keep},
    transform=lambda tx: tx if regime == 'joint' else only(tx, side_paths(coupling)),
    trunk_train=regime == 'joint',
  )


def _cross_entropy(task: Task, log_p: jax.Array, logits: jax.Array, batch: Tree):
  """The mean over examples, and their tokens, of the cross-entropy with exp(log_p)."""
  each = -(jnp.exp(log_p) * task.log_probs(logits)).sum(-1)
  return tasks.mean(each.mean(range(1, each.ndim)), batch)


def early(coupling: Coupling) -> tuple[str, ...]:
  """The exits before the network's own. Raises ValueError where there are none."""
  arguments.coupling(coupling)
  names = tuple(name for name in coupling.exits if name != 'main')
  if not names or 'main' not in coupling.exits:
    raise ValueError(
      f"sidenet: expected a network with an exit 'main' and others, got "
      f'{", ".join(coupling.exits) or "none"}; models.heads.WithHeads has them on taps'
    )
  return names


def side_paths(coupling: Coupling) -> frozenset[str]:
  """Paths of the parameters that 'main' does not read: those of the SideNets."""
  main = trace.Decision({}, {name: name == 'main' for name in coupling.exits})
  return coupling.unneeded(main) - coupling.unneeded(trace.Decision({}, {}))


def only(
  tx: optax.GradientTransformation, paths: frozenset[str]
) -> optax.GradientTransformation:
  """tx for the parameters at these paths ('params/...'); the others stay."""

  def labels(tree: Tree) -> Tree:
    name = lambda path, _: jax.tree_util.keystr(path, simple=True, separator='/')
    kind = lambda path, leaf: 'side' if name(path, leaf) in paths else 'main'
    return jax.tree_util.tree_map_with_path(kind, tree)

  return partitioned({'side': tx, 'main': optax.set_to_zero()}, labels)


# ---- runs and reports ----------------------------------------------------------------

BY_INPUT = tyro.conf.arg(
  metavar='{max,avg,cls,grid4}',
  help_behavior_hint='(default: grid4 of images, avg of tokens)',
)
SPREAD = tyro.conf.arg(
  metavar='NAME', help_behavior_hint='(default: spread over the depth)'
)
FIVE = tyro.conf.arg(
  metavar='INT', help_behavior_hint='(default: 5, of a language model 2)'
)
NUMBER = tyro.conf.arg(metavar='NUMBER', help_behavior_hint='(default: none)')
LABELS = tyro.conf.arg(metavar='NUMBER', help_behavior_hint='(default: labels alone)')

REQUESTS = ('budget', 'milliseconds', 'threshold', 'risk')  # instead of a drop
Confidence = Literal['probability', 'entropy', 'margin', 'patience', 'learned']


@dataclasses.dataclass(frozen=True)
class SideNetOptions:
  """SideNet: small heads on a pretrained network, where sure answers leave early."""

  taps: Annotated[tuple[str, ...], SPREAD] = ()
  """Where heads are put, such as stage1/block5."""

  heads: Annotated[int | None, FIVE] = None
  """How many heads are spread over the depth, where no taps are named."""

  hidden: int = 256
  """Width of a head's hidden layer."""

  pool: Annotated[Literal['max', 'avg', 'cls', 'grid4'] | None, BY_INPUT] = None
  """How a head turns positions into one vector."""

  normalise: bool = True
  """Batch normalisation of what a head reads."""

  sees_earlier: bool = False
  """The last layer of a head reads the answer of the head before it too."""

  regime: Literal['frozen', 'joint', 'mixed'] = 'frozen'
  """frozen: the heads alone are trained (the paper's). joint: all together. mixed:
  frozen, then all together for --finetune-epochs."""

  views: int = 2
  """Augmented copies of every image whose features are kept (frozen, mixed)."""

  dropout: float = 0.3
  """Dropout in the heads."""

  smoothing: float = 0.05
  """Smoothing of the labels that heads learn from."""

  taught: Annotated[float | None, LABELS] = None
  """Share of the MainNet's answer in what heads learn; the rest are the labels."""

  head_learning_rate: float = 1e-3
  """Learning rate of the heads, while nothing else is trained (Adam, cosine)."""

  confidence: Confidence = 'probability'
  """What an exit is judged sure by."""

  drop: float = 0.5
  """Points of accuracy that the cascade which is saved may lose against the network
  alone, as it is after training. Of a language model: percent of the tokens that may
  change."""

  budget: Annotated[float | None, FRACTION] = None
  """Save the best cascade for this part of the network's FLOPs, such as 0.6 or 60%,
  instead of by drop."""

  milliseconds: Annotated[float | None, NUMBER] = None
  """Save the best cascade for this time of an example, in full batches, as measured
  here on this device, instead of by drop."""

  threshold: Annotated[float | None, NUMBER] = None
  """Save the cascade with this threshold at every exit, instead of by drop."""

  risk: Annotated[float | None, FRACTION] = None
  """Save the cascade that is wrong where the network is right on at most this part of
  all examples, guaranteed with confidence 1 - delta, instead of by drop."""

  delta: float = 0.05
  """How likely the guarantee may fail."""

  shared_threshold: bool = True
  """One threshold for all exits, which keeps to a drop on new data too; else one for
  each, for a drop by cross-validation."""

  decide_on: Literal['auto', 'train', 'test'] = 'auto'
  """train: thresholds come from images held out of training. test: from the first half
  of the test images, and the second half reports, because pretrained weights may have
  seen all training images. auto: test for pretrained weights that are not trained
  further, except for a language model."""

  def __post_init__(self):
    one_of(self, 'regime', ('frozen', 'joint', 'mixed'))
    one_of(self, 'decide_on', ('auto', 'train', 'test'))
    one_of(self, 'confidence', get_args(Confidence))
    at_least(self, 'hidden', 0)
    at_least(self, 'heads', 1)
    at_least(self, 'views', 1)
    finite(self, 'drop', positive=False)
    finite(self, 'head_learning_rate', positive=True)
    for name in ('dropout', 'smoothing'):
      inside(self, name, 0, 1)
    if self.taught is not None and not 0 <= self.taught <= 1:
      raise ConfigError(f'taught: expected a number in [0, 1], got {self.taught!r}')
    for name in ('budget', 'risk', 'delta'):
      if isinstance(value := getattr(self, name), str):
        object.__setattr__(self, name, fraction(value, name))
      if value is not None:
        inside(self, name, 0, 1, open_=True)
    if self.milliseconds is not None:
      finite(self, 'milliseconds', positive=True)
    if self.threshold is not None:
      finite(self, 'threshold', positive=False)
    requests = [name for name in REQUESTS if getattr(self, name) is not None]
    if len(requests) > 1:
      raise ConfigError(
        f'{", ".join(requests)}: expected one of them, got {len(requests)}'
      )

  @property
  def request(self) -> tuple[str, float]:
    """('drop', points), or one of REQUESTS and its value."""
    values = ((name, getattr(self, name)) for name in REQUESTS)
    return next((one for one in values if one[1] is not None), ('drop', self.drop))

  @property
  def label(self) -> str:
    kind, value = self.request
    much = 100 * value if kind in ('budget', 'risk') else value
    return f'{self.regime}-{kind}{much:g}-{self.confidence}'


def _build(setting: Setting) -> Method:
  joint = setting.stage in ('joint', 'mixed')
  regime = 'joint' if joint else 'frozen'
  return sidenet(setting.coupling, regime, setting.options.taught or 0.0)


def _check(config: Any) -> None:
  if config.mixup and config.options.regime != 'joint':
    raise ConfigError(
      'mixup: leave it out for sidenet, where heads learn from features of whole '
      'images (joint trains everything together, and may mix)'
    )


def _check_texts(o: SideNetOptions) -> None:
  """Refuses what heads on the features of every token do not have."""
  if (kind := o.request[0]) in ('milliseconds', 'risk'):
    raise ConfigError(
      f'{kind}: expected a drop, a budget or a threshold for a language model: tokens '
      'of one text are too alike to certify a risk, and their time is not measured'
    )
  if o.confidence in ('patience', 'learned'):
    raise ConfigError(
      'confidence: expected probability, entropy or margin for a language model, got '
      f'{o.confidence!r}'
    )
  if o.hidden < 1:
    raise ConfigError(
      'hidden: expected 1 or more for a language model, got 0: such exits have nothing '
      'to train, and dp.generate_early uses them as they are'
    )
  names = 'pool', 'normalise', 'sees_earlier', 'regime', 'views', 'dropout', 'smoothing'
  default = SideNetOptions()
  if given := [k for k in names if getattr(o, k) != getattr(default, k)]:
    raise ConfigError(
      f'{", ".join(given)}: expected the default for a language model, whose heads '
      'read every token of a frozen network as it is'
    )


def _plan(o: SideNetOptions) -> CascadePlan:
  return CascadePlan(
    taps=o.taps,
    heads=o.heads,
    hidden=o.hidden,
    pool=o.pool,
    normalise=o.normalise,
    sees_earlier=o.sees_earlier,
    frozen=o.regime != 'joint',
    joint=o.regime != 'frozen',
    views=o.views,
    dropout=o.dropout,
    smoothing=o.smoothing,
    head_learning_rate=o.head_learning_rate,
    confidence=o.confidence,
    request=o.request,
    delta=o.delta,
    shared_threshold=o.shared_threshold,
    decide_on=o.decide_on,
  )


RECIPE = Recipe(
  options=SideNetOptions,
  build=_build,
  description=(
    'Put small heads on a pretrained network, find out how sure each must be, and save '
    'the cascade in which sure answers leave early, and report.'
  ),
  epochs={
    'digits': Epochs(train=30, gates=30, finetune=20),
    'fashion_mnist': Epochs(train=12, gates=20, finetune=6),
    '': Epochs(train=60, gates=20, finetune=10),
  },
  peaks=(1.0, 0.1),
  decides_only=('drop', *REQUESTS, 'delta', 'confidence', 'shared_threshold'),
  formerly={'normalise': False, 'shared_threshold': False},
  check=_check,
  tells_tokens=True,
  check_texts=_check_texts,
  own_exits=True,
  cascade=_plan,
  name='SideNets',
  question=lambda result, network: f'how early can {network} answer?',
  legend=(
    'MainNet: the network alone; cascade: with early exits and their heads. FLOPs: of '
    'an example in the mean; ideal if every stage runs on just those that reach it, '
    'padded as executed, in batches of a few compiled sizes.'
  ),
)
