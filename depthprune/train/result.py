"""What a run reached: `result.json`, typed.

The file has the same entries under the same names. `SCHEMA` counts its changes; files
of older versions are read by `from_json` too. Costs are of one example, 1 MAC = 2
FLOPs, and accuracies are fractions in [0, 1].
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import cattrs
from cattrs.errors import BaseValidationError

SCHEMA = 2
T = TypeVar('T')


@dataclasses.dataclass(frozen=True)
class Change:
  """A quantity of the network before pruning and after."""

  before: float
  after: float

  @property
  def kept(self) -> float:
    """The part that is left."""
    return self.after / self.before


@dataclasses.dataclass(frozen=True)
class Accuracies:
  """Accuracy of the network, and of what is left of it at several times.

  Attributes:
    before: of the network that is about to be cut.
    pruned: right after surgery. recalibrated: with fresh batch statistics.
    after: once it was trained again. None is not known.
  """

  before: float
  after: float | None = None
  pruned: float | None = None
  recalibrated: float | None = None


@dataclasses.dataclass(frozen=True)
class Latency:
  """Milliseconds of one batch before and after, measured in turns: medians.

  Attributes:
    runs: turns. faster: turns in which the network after the cut was the faster one.
    notes: what the numbers do not say by themselves.
  """

  before: float
  after: float
  speedup: float
  before_quartiles: tuple[float, float] | None = None
  after_quartiles: tuple[float, float] | None = None
  runs: int | None = None
  faster: int | None = None
  notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class TimeReached:
  """Milliseconds of a batch of a run whose target counted them."""

  batch: int
  before: float
  after: float


@dataclasses.dataclass(frozen=True)
class Proof:
  """How far the small network is from the masked one, see `surgery.verify.Verdict`."""

  difference: float
  settled: float = 0.0
  moved: float = 0.0
  tolerance: float | None = None


@dataclasses.dataclass(frozen=True)
class RoundResult:
  """One cut.

  Attributes:
    units: residual units before and after it. erased: names of those that went.
    exits: names of those that are left.
    learned: what the method had learnt, as `Method.report` says it.
    held_out: accuracies on held-out data; `after` is of the retraining that follows.
  """

  units: tuple[int, int]
  erased: list[str]
  exits: list[str]
  flops: Change
  params: Change
  held_out: Accuracies
  learned: dict[str, Any] = dataclasses.field(default_factory=dict)
  verify: Proof | None = None
  notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class SurgeryReport:
  """What surgery reports of the last cut, see `surgery.prune.Pruned`."""

  requested: dict[str, Any] = dataclasses.field(default_factory=dict)
  flops: Change | None = None
  params: Change | None = None
  peak_bytes: Change | None = None
  widths: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
  kept: dict[str, list[int]] = dataclasses.field(default_factory=dict)
  branches: dict[str, bool] = dataclasses.field(default_factory=dict)
  exits: dict[str, bool] = dataclasses.field(default_factory=dict)
  tensors: dict[str, Any] = dataclasses.field(default_factory=dict)
  verify: Proof | None = None
  notes: list[str] = dataclasses.field(default_factory=list)
  inputs: list[list[int]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Bins:
  """A reliability diagram, see `cascade.calibration.Reliability`; None in empty bins."""

  edges: list[float]
  confidence: list[float | None]
  accuracy: list[float | None]
  count: list[int]


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Calibration error, negative log-likelihood in nats, and where they come from."""

  ece: float | None = None
  nll: float | None = None
  bins: Bins | None = None


@dataclasses.dataclass(frozen=True)
class Calibrated:
  """Some examples at one exit, before and after its temperature."""

  n: int | None = None
  accuracy: float | None = None
  auroc: float | None = None
  before: Calibration | None = None
  after: Calibration | None = None


@dataclasses.dataclass(frozen=True)
class ExitCalibration:
  """Calibration of one exit: on all examples, and on those that leave there."""

  temperature: float | None = None
  all: Calibrated | None = None
  exited: Calibrated | None = None


@dataclasses.dataclass(frozen=True)
class Reached:
  """What thresholds gave on test data: points lost, the part of the FLOPs saved."""

  saved: float
  drop: float | None = None
  accuracy: float | None = None
  cost: float | None = None
  risk: float | None = None
  milliseconds: float | None = None
  certificate: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class RequestResult:
  """Thresholds for one request: what was asked for, and what was reached.

  Attributes:
    kind, requested: as in `CascadePlan.request`. chosen: whether it is the run's own.
    refused: why it cannot be met, else None.
    held_out: where it was chosen. test: on test data. interval: 95 % of it, by name.
  """

  kind: str
  requested: float
  chosen: bool = False
  refused: str | None = None
  held_out: dict[str, Any] | None = None
  test: Reached | None = None
  interval: dict[str, list[float | None]] | None = None


@dataclasses.dataclass(frozen=True)
class Executed:
  """A cascade run on the test data, beside what was simulated, and timed.

  Attributes:
    ideal, padded, whole: FLOPs of an example: if every stage runs on just those that
      reach it, as executed, and of the network alone.
    differ: examples that left elsewhere than simulated, `near` of them close to a
      threshold, out of n. broken: examples with an answer that was not finite.
    batch, ms, whole_ms, speedup, compile_s: time of the cascade and the network alone.
  """

  ideal: float | None = None
  padded: float | None = None
  whole: float | None = None
  accuracy: float | None = None
  differ: int | None = None
  near: int = 0
  n: int = 0
  broken: int = 0
  device: str = ''
  batch: int | None = None
  ms: float | None = None
  whole_ms: float | None = None
  speedup: float | None = None
  compile_s: float | None = None
  ms_quartiles: tuple[float, float] | None = None
  whole_ms_quartiles: tuple[float, float] | None = None
  runs: int | None = None


@dataclasses.dataclass(frozen=True)
class CurvePoint:
  """An efficient choice of thresholds: cost and accuracy on test and held-out data."""

  cost: float | None = None
  accuracy: float | None = None
  cost_held_out: float | None = None
  accuracy_held_out: float | None = None


@dataclasses.dataclass(frozen=True)
class CascadeResult:
  """A cascade of early exits; dictionaries are by name of the exit.

  Attributes:
    exits: in order, the network's own last. taps: where the others read.
    cost: FLOPs up to an exit. whole: FLOPs of the network alone.
    thresholds: None where nobody leaves, or all do. shares: part that leaves there.
    exit_accuracy: if all left there. curve: the efficient thresholds.
    original: accuracy of the network before it was trained with its heads.
  """

  exits: list[str]
  cost: dict[str, float]
  whole: float
  exit_accuracy: dict[str, float | None]
  curve: list[CurvePoint]
  thresholds: dict[str, float | None] = dataclasses.field(default_factory=dict)
  shares: dict[str, float] = dataclasses.field(default_factory=dict)
  requests: list[RequestResult] = dataclasses.field(default_factory=list)
  taps: dict[str, str] = dataclasses.field(default_factory=dict)
  stages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  confidence: str = 'probability'
  temperatures: dict[str, float] = dataclasses.field(default_factory=dict)
  calibration: dict[str, ExitCalibration] = dataclasses.field(default_factory=dict)
  original: dict[str, float] = dataclasses.field(default_factory=dict)
  executed: Executed = dataclasses.field(default_factory=Executed)


@dataclasses.dataclass(frozen=True)
class Result:
  """Everything that a finished run says.

  Attributes:
    method, options, model, data, seed, config: what was run.
    accuracy, held_out: on test data, which decided nothing, and on held-out data.
    scores: further scores of the test data, {'before' or 'after': {name: value}}.
    flops, params, peak_bytes: costs. widths: {group: (before, after)}.
    latency_ms: by batch size. milliseconds: where the target counted them.
    compile_s: seconds that the networks took to compile.
    rounds: the cuts, in order. report: of the last one. verify: its proof.
    cascade: of a method that makes one, else None.
  """

  method: str
  options: dict[str, Any]
  model: str
  data: str
  accuracy: Accuracies
  flops: Change
  params: Change
  widths: dict[str, tuple[int, int]]
  rounds: list[RoundResult]
  held_out: Accuracies | None = None
  scores: dict[str, dict[str, float | None]] = dataclasses.field(default_factory=dict)
  peak_bytes: Change | None = None
  latency_ms: dict[str, Latency] = dataclasses.field(default_factory=dict)
  milliseconds: TimeReached | None = None
  compile_s: Change | None = None
  verify: Proof | None = None
  report: SurgeryReport = dataclasses.field(default_factory=SurgeryReport)
  cascade: CascadeResult | None = None
  config: dict[str, Any] = dataclasses.field(default_factory=dict)
  seed: int | None = None
  device: str | None = None
  versions: dict[str, str] = dataclasses.field(default_factory=dict)
  command: str | None = None
  mesh: dict[str, int] = dataclasses.field(default_factory=dict)
  data_notes: list[str] = dataclasses.field(default_factory=list)
  images: dict[str, int] = dataclasses.field(default_factory=dict)
  wall_seconds: float | None = None
  schema: int = SCHEMA


@dataclasses.dataclass(frozen=True)
class SweepResult:
  """What `sweep.json` keeps of the result of each of its runs."""

  accuracy: Accuracies
  flops: Change
  params: Change
  held_out: Accuracies
  device: str
  latency_ms: dict[str, Latency] = dataclasses.field(default_factory=dict)
  wall_seconds: float | None = None


def to_json(result: Result) -> dict[str, Any]:
  """Plain values, as `result.json` keeps them; parts that there are not are left out."""
  values = json.loads(json.dumps(dataclasses.asdict(result)))
  return {name: value for name, value in values.items() if value is not None}


def from_json(values: Any) -> Result:
  """The Result in a `result.json`, of this version or an older one.

  Raises: ValueError that names the entries which are missing or of another kind.
  """
  if not isinstance(values, Mapping):
    raise ValueError(f'not the result of a run: expected an object, got {values!r:.60}')
  schema = values.get('schema', 1)
  if not isinstance(schema, int) or schema > SCHEMA:
    raise ValueError(
      f'expected schema {SCHEMA} at most, got {schema!r}: read it with the version of '
      'depthprune that wrote it'
    )
  return structured(_upgraded(values), Result)


def structured(values: Any, kind: type[T]) -> T:
  """Plain values as one of the dataclasses here; nothing is converted or made up.

  Raises: ValueError that names the entries which are missing or of another kind.
  """
  try:
    return _CONVERTER.structure(values, kind)
  except BaseValidationError as error:
    wrong = '; '.join(cattrs.transform_error(error))
    raise ValueError(f'not the result of a run: {wrong}') from error


def _upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
  """The entries of this version's schema, from those of any."""
  values = dict(values)
  # From when there was one method, whose options stood beside the rest.
  if 'method' not in values and 'options' not in values:
    if missing := [key for key in ('target', 'of') if key not in values]:
      raise ValueError(
        f'not the result of a run: required field missing @ $.{missing[0]}'
      )
    options = {key: values[key] for key in ('target', 'of')}
    values |= {'method': 'trainable_gates', 'options': options, 'rounds': []}
  return values


def _exactly(*kinds: type) -> Callable[[Any, Any], Any]:
  """A hook of cattrs that takes values of these types and no others."""

  def hook(value: Any, _: Any) -> Any:
    if type(value) not in kinds:
      raise TypeError(f'expected {kinds[0].__name__}, got {value!r:.60}')
    return kinds[0](value)

  return hook


_CONVERTER = cattrs.Converter()
for _kinds in ((str,), (bool,), (int,), (float, int)):
  _CONVERTER.register_structure_hook(_kinds[0], _exactly(*_kinds))
