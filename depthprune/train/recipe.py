"""The `Recipe` of a method: how runs, the command line and reports use it.

The command line reads every method's recipe to answer `--help`, so nothing here loads
jax.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from etils import epy

from depthprune.train.options import Epochs

with epy.lazy_imports():
  import numpy as np

  from depthprune.program.coupling import Coupling
  from depthprune.program.rounding import RoundTo
  from depthprune.train.method import Method
  from depthprune.train.result import Result


COSTS = {'flops': 'FLOPs', 'params': 'parameters', 'milliseconds': 'milliseconds'}
"""The names, in reports, of the costs that a target may count."""

TOLERANCE = 0.005
"""How far a decision may be off its target, as a part of the cost."""


class Setting(NamedTuple):
  """The arguments of a recipe's `build`.

  Attributes:
    options: the user's choices, an instance of the recipe's `options`.
    coupling: coupling of the network as it is now.
    whole: coupling of the network before any cut; the same in the first round.
    steps: length of the stage that trains gates and weights together.
    scores: {group: [n]}, estimates of how much every channel is worth; also of
      branches, {path: () or [layers]}, where `scores_layers` says so.
    seed: the run's seed.
    stage: name of the stage that is trained.
    round_to: what widths are multiples of; where the options say 'auto', it stands for
      the same in all of a run, on whatever device that goes on.
    remember: (measure, to_json, from_json) -> array. It measures something once, stores
      it in the run's directory, and reads it from there when the run is resumed.
      `from_json` returns None for a record of something else.
  """

  options: Any
  coupling: Coupling
  whole: Coupling
  steps: int
  scores: Mapping[str, np.ndarray]
  seed: int
  stage: str
  round_to: RoundTo
  remember: Callable[..., np.ndarray]


class Target(NamedTuple):
  """The part of a cost that a run is to keep.

  Attributes:
    cost: 'flops', 'params' or 'milliseconds'.
    fraction: the part, in (0, 1].
    batch: examples in a call, where the cost is measured in milliseconds.
  """

  cost: str
  fraction: float
  batch: int | None = None


class CascadePlan(NamedTuple):
  """How exits are put on a network, trained and used, for a method with early exits.

  Attributes:
    taps: the taps that get heads; () spreads them over the depth.
    heads: how many are spread; None for five, or for two of a language model.
    hidden: width of a head's hidden layer, 0 for none.
    pool: how a head turns positions into one vector; None chooses by the input.
    normalise: whether batch normalisation of that comes first.
    sees_earlier: whether a head reads the answer of the head before it too.
    frozen: whether the heads are first trained alone, on features of the network.
    joint: whether network and heads are trained together (afterwards, if `frozen` too).
    views: augmented copies of every image whose features are computed.
    dropout: dropout rate of the heads.
    smoothing: label smoothing while heads are trained.
    head_learning_rate: learning rate of the heads while nothing else is trained.
    confidence: the measure of how sure an exit is, see `cascades.confidence`.
    request: the goal of the thresholds: ('drop', points of accuracy), ('budget', part
      of the FLOPs), ('milliseconds', per example), ('threshold', the value at every
      exit) or ('risk', part of the examples).
    delta: probability with which the guarantee of a risk may fail.
    shared_threshold: whether all exits have the same threshold, for a drop or a budget.
    decide_on: the data that choose thresholds: 'train', 'test' or 'auto'.
  """

  taps: tuple[str, ...]
  heads: int | None
  hidden: int
  pool: Any
  normalise: bool
  sees_earlier: bool
  frozen: bool
  joint: bool
  views: int
  dropout: float
  smoothing: float
  head_learning_rate: float
  confidence: Literal['probability', 'entropy', 'margin', 'patience', 'learned']
  request: tuple[str, float]
  delta: float
  shared_threshold: bool
  decide_on: str


class Chart(NamedTuple):
  """A chart of something that the method learns, for the report of a run.

  Attributes:
    title: title of the chart.
    kind: the form of the entry.
      'channels': {group: open channels}, over training, as a share of the widths.
      'exits': {exit: weight}, over training; the exit that was kept is marked.
      'units': {residual unit: weight}, over training; a row ends where it was erased.
      'connections': {path of a connection: weight} at the end, and 'open' beside it.
    key: name of the entry in the tree that `Method.report` returns.
    label: label of its values.
  """

  title: str
  kind: Literal['channels', 'exits', 'units', 'connections']
  key: str
  label: str


class Recipe(NamedTuple):
  """How runs and reports use a method; a method's file offers one as RECIPE.

  Attributes:
    options: frozen dataclass of the method's options on the command line. Its property
      `label` abbreviates them for the name of a run's directory.
    build: makes the method for one network.
    description: one sentence for `depthprune run METHOD --help`.
    epochs: passes over the training data by data set; '' is for all others.
    legend: explains the report's columns 'before', 'cut' and 'after'.
    name: name of the method in titles; '' takes that of its file.
    question: (result, network) -> the question that a run answers; `network` names the
      network and its data.
    sentence: (result) -> a sentence about what was requested and decided. None for a
      cascade, about which the report has its own.
    defaults: fields of a run's config that suit the method: {'model': ..., ...}.
    peaks: highest learning rate of the network's weights in the gate stage and after a
      cut, as parts of the run's learning rate.
    decides_only: names of options that no training depends on, so that a run may be
      continued with other values of them. An option that changes what is cut does not
      belong here if the small network is trained afterwards.
    check: (config) -> None; raises ConfigError if the method cannot use the config.
    heads: (options, network, depthprune.models.heads) -> the network with the exits
      that it is trained with; None if the method needs none.
    tells_tokens: whether its exits also work on a language model.
    check_texts: (options) -> None; raises ConfigError for options that do not suit a
      language model.
    own_exits: whether the method puts exits on the network that answer, so that a
      network with several exits of its own (for several tasks, say) cannot be used.
    deepest_answers: whether the deepest exit answers in the uncut network.
    cascade: (options) -> CascadePlan, for a method whose result is a cascade.
    target: (options as a dict) -> the requested Target, or None.
    round_to: (options) -> the number that widths are multiples of, or 'auto'.
    score: (options) -> the score of the channels in a `Setting`: 'l1', the norms of
      their kernels, or 'taylor', see `train.importance`.
    scores_layers: (options) -> whether residual branches are scored too, by 'taylor'.
    frozen: (options) -> whether the network's weights rest until the cut.
    refits: (options) -> whether the weights that stay are refitted at a cut to do the
      work of what goes, where that helps on held-out data; see `surgery.refit`.
    control: (options) -> the options of the network that is trained as long for
      comparison, or None where it is not asked for.
    formerly: {option: default} of options whose default was another in an earlier
      version, or that did not exist. A stored run without the option has this value;
      and where a stored run has it, a command that leaves the option at its new default
      continues that run.
    erases_units: whether rounds erase residual units, which the report then lists.
    remarks: (result) -> further sentences for the report.
    charts: the charts in the report.
  """

  options: type
  build: Callable[[Setting], Method]
  description: str
  epochs: Mapping[str, Epochs]
  legend: str
  name: str = ''
  question: Callable[[Result, str], str] = lambda result, network: (
    f'what is left of {network}?'
  )
  sentence: Callable[[Result], str] | None = None
  defaults: Mapping[str, Any] = {}
  peaks: tuple[float, float] = (1.0, 1.0)
  decides_only: tuple[str, ...] = ()
  check: Callable[[Any], None] = lambda config: None
  heads: Callable[[Any, Any, Any], Any] | None = None
  tells_tokens: bool = False
  check_texts: Callable[[Any], None] = lambda options: None
  own_exits: bool = False
  deepest_answers: bool = False
  cascade: Callable[[Any], CascadePlan] | None = None
  target: Callable[[Mapping[str, Any]], Target | None] = lambda options: None
  round_to: Callable[[Any], int | Literal['auto']] = lambda options: 1
  score: Callable[[Any], Literal['l1', 'taylor']] = lambda options: 'l1'
  scores_layers: Callable[[Any], bool] = lambda options: False
  frozen: Callable[[Any], bool] = lambda options: False
  refits: Callable[[Any], bool] = lambda options: False
  control: Callable[[Any], Any] = lambda options: None
  formerly: Mapping[str, Any] = {}
  erases_units: bool = False
  remarks: Callable[[Result], Sequence[str]] = lambda result: ()
  charts: tuple[Chart, ...] = ()
