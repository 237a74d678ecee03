"""What a method's file says besides its equations.

That is how a run uses the method, what the command line offers, and what a report says
of it. The command line reads all of it to answer `--help`, so nothing here loads jax.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from etils import epy

from depthprune.train.options import Epochs

with epy.lazy_imports():
  import numpy as np

  from depthprune.program.coupling import Coupling
  from depthprune.train.method import Method
  from depthprune.train.result import Result


COSTS = {'flops': 'FLOPs', 'params': 'parameters', 'milliseconds': 'milliseconds'}
"""The costs that a target may count, as people call them."""


class Setting(NamedTuple):
  """What a run gives to a recipe's `build`.

  Attributes:
    options: what the user chose, an instance of the recipe's `options`.
    coupling: of the network as it is now.
    whole: coupling of the network before any cut; the same in the first round.
    steps: length of the stage that trains gates and weights together.
    scores: {group: [n]}, first guesses of what every channel is worth.
    seed: the run's.
    stage: name of the stage that is trained.
    remember: (measure, to_json, from_json) -> array. Measures something once, keeps it
      in the run's directory, and reads it there when the run is resumed. `from_json`
      returns None for a record of something else.
  """

  options: Any
  coupling: Coupling
  whole: Coupling
  steps: int
  scores: Mapping[str, np.ndarray]
  seed: int
  stage: str
  remember: Callable[..., np.ndarray]


class Target(NamedTuple):
  """The part of a cost that a run was asked to keep.

  Attributes:
    cost: 'flops', 'params' or 'milliseconds'.
    fraction: in (0, 1].
    batch: examples in a call, where the cost is measured in milliseconds.
  """

  cost: str
  fraction: float
  batch: int | None = None


class CascadePlan(NamedTuple):
  """How exits are put on a network, trained and used, for a method with early exits.

  Attributes:
    taps: where heads are put; () spreads five over the depth.
    hidden: width of a head's hidden layer, 0 for none.
    pool: how a head turns positions into one vector; None goes by the input.
    frozen: whether the heads are first trained alone, on features of the network.
    joint: whether network and heads are trained together (afterwards, if `frozen` too).
    views: augmented copies of every image whose features are kept.
    dropout: of the heads. smoothing: of the labels that they learn from.
    head_learning_rate: of the heads, while nothing else is trained.
    confidence: what an exit is judged sure by, see `cascade.confidence`.
    request: what the thresholds are chosen for: ('drop', points of accuracy),
      ('budget', part of the FLOPs), ('milliseconds', of an example),
      ('threshold', at every exit) or ('risk', part of the examples).
    delta: how likely the guarantee of a risk may fail.
    decide_on: 'train', 'test' or 'auto': where thresholds come from.
  """

  taps: tuple[str, ...]
  hidden: int
  pool: Any
  frozen: bool
  joint: bool
  views: int
  dropout: float
  smoothing: float
  head_learning_rate: float
  confidence: Literal['probability', 'entropy', 'margin', 'patience', 'learned']
  request: tuple[str, float]
  delta: float
  decide_on: str


class Chart(NamedTuple):
  """Something that the method learns, drawn in the report of a run.

  Attributes:
    title: above the chart.
    kind: what the entries of `key` are counted by.
      'channels': {group: open channels}, over training, as a share of the widths.
      'exits': {exit: weight}, over training; the exit that was kept is marked.
      'units': {residual unit: weight}, over training; a row ends where it was erased.
      'connections': {path of a connection: weight} at the end, and 'open' beside it.
    key: the entry of the tree that `Method.report` returns.
    label: what its values are.
  """

  title: str
  kind: Literal['channels', 'exits', 'units', 'connections']
  key: str
  label: str


def no_target(options: Mapping[str, Any]) -> None:
  """The method is not asked for a part of a cost."""
  del options


def no_remarks(result: Result) -> Sequence[str]:
  """The report says no more than the method's sentence."""
  del result
  return ()


def accept(config: Any) -> None:
  """Every config will do."""
  del config


class Recipe(NamedTuple):
  """How runs and reports use a method; a method's file offers one as RECIPE.

  Attributes:
    options: frozen dataclass of what the command line offers, with a property `label`,
      a few letters for the name of a run's directory.
    build: makes the method for one network.
    description: one sentence for `depthprune run METHOD --help`.
    epochs: passes over the training data by data set; '' is for all others.
    legend: what the report's columns 'before', 'cut' and 'after' are.
    sentence: what was asked for and what was decided, from a result; of a cascade the
      report knows by itself.
    defaults: fields of a run's config that suit the method: {'model': ..., ...}.
    peaks: highest learning rate of the gate stage and after a cut, as parts of the
      run's.
    decides_only: names of options that no training depends on, so that a run may be
      continued with others.
    check: refuses a run's config that the method cannot use, by a ConfigError.
    heads: (options, network, depthprune.models.heads) -> the network with the exits
      that it is trained with. None: the method needs none.
    own_exits: whether the method puts exits on the network that answer, so that a
      network which has several already (of several tasks, say) cannot be used.
    deepest_answers: whether it is the deepest exit that answers in the uncut network.
    cascade: (options) -> CascadePlan, for a method whose result is a cascade.
    target: (options as a dict) -> the Target that was asked for, or None.
    round_to: (options) -> what widths are multiples of.
    erases_units: whether rounds erase residual units, which the report then lists.
    remarks: further sentences for the report.
    charts: drawn in the report.
  """

  options: type
  build: Callable[[Setting], Method]
  description: str
  epochs: Mapping[str, Epochs]
  legend: str
  sentence: Callable[[Result], str] | None = None
  defaults: Mapping[str, Any] = {}
  peaks: tuple[float, float] = (1.0, 1.0)
  decides_only: tuple[str, ...] = ()
  check: Callable[[Any], None] = accept
  heads: Callable[[Any, Any, Any], Any] | None = None
  own_exits: bool = False
  deepest_answers: bool = False
  cascade: Callable[[Any], CascadePlan] | None = None
  target: Callable[[Mapping[str, Any]], Target | None] = no_target
  round_to: Callable[[Any], int] = lambda options: 1
  erases_units: bool = False
  remarks: Callable[[Result], Sequence[str]] = no_remarks
  charts: tuple[Chart, ...] = ()
