"""The result of a run as dataclasses, and how `result.json` is written and read.

The file has the same entries under the same names. `SCHEMA` counts its changes, and
`from_json` reads files of older versions too. Costs are those of one example with 1 MAC
= 2 FLOPs, and accuracies are fractions in [0, 1].
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import cattrs
from cattrs.errors import BaseValidationError

from depthprune.storage import files
from depthprune.timing import difference

SCHEMA = 2
T = TypeVar('T')


@dataclasses.dataclass(frozen=True)
class Change:
  """A quantity of the network before pruning and after."""

  before: float
  after: float

  @property
  def kept(self) -> float:
    """The part that is left, after / before; NaN of nothing."""
    return self.after / self.before if self.before else math.nan


@dataclasses.dataclass(frozen=True)
class Accuracies:
  """Accuracy of a network at several times; None where it was not measured.

  Attributes:
    before: before the cut.
    after: after it was trained again.
    pruned: right after surgery.
    recalibrated: after surgery, with fresh batch statistics.
  """

  before: float
  after: float | None = None
  pruned: float | None = None
  recalibrated: float | None = None


@dataclasses.dataclass(frozen=True)
class Latency:
  """Median milliseconds of one batch before and after the cut, measured in turns.

  Attributes:
    runs: number of turns.
    faster: number of turns in which the cut network was faster.
    notes: sentences that qualify the numbers.
  """

  before: float
  after: float
  speedup: float
  before_quartiles: tuple[float, float] | None = None
  after_quartiles: tuple[float, float] | None = None
  runs: int | None = None
  faster: int | None = None
  notes: list[str] = dataclasses.field(default_factory=list)

  @property
  def difference(self) -> difference.Difference:
    """How the times differ, by more than chance."""
    return difference.compare(
      self.before,
      self.after,
      self.before_quartiles,
      self.after_quartiles,
      self.faster,
      self.runs,
    )


@dataclasses.dataclass(frozen=True)
class TimeReached:
  """Milliseconds of a batch, for a run whose target is in milliseconds."""

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
  """One round: training, a cut, and the training that follows.

  Attributes:
    units: number of residual units before and after the cut.
    erased: names of the residual units that were erased.
    exits: names of the exits that are left.
    held_out: accuracies on held-out data; `after` is that of the next training.
    learned: what the method had learnt, from `Method.report`.
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
class LayerReport:
  """A layer before surgery and after, see `program.cost.Layer`.

  Attributes:
    width: number of slices of what it returns; 0 after where the layer is gone.
    flops: FLOPs of all its calls.
    outputs: the axes of its array that have these slices.
    ms: milliseconds of all its calls, timed alone; None where they were not measured.
  """

  width: tuple[int, int]
  flops: tuple[float, float]
  outputs: list[int] = dataclasses.field(default_factory=list)
  ms: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class SurgeryReport:
  """The report of surgery about the last cut, see `surgery.prune.Pruned`."""

  requested: dict[str, Any] = dataclasses.field(default_factory=dict)
  flops: Change | None = None
  params: Change | None = None
  peak_bytes: Change | None = None
  widths: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
  kept: dict[str, list[int]] = dataclasses.field(default_factory=dict)
  branches: dict[str, bool] = dataclasses.field(default_factory=dict)
  exits: dict[str, bool] = dataclasses.field(default_factory=dict)
  tensors: dict[str, Any] = dataclasses.field(default_factory=dict)
  layers: dict[str, LayerReport] = dataclasses.field(default_factory=dict)
  verify: Proof | None = None
  notes: list[str] = dataclasses.field(default_factory=list)
  inputs: list[list[int]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Bins:
  """A reliability diagram, see `cascades.calibration`; None in empty bins."""

  edges: list[float]
  confidence: list[float | None]
  accuracy: list[float | None]
  count: list[int]


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Calibration error, negative log-likelihood in nats, and the reliability diagram."""

  ece: float | None = None
  nll: float | None = None
  bins: Bins | None = None


@dataclasses.dataclass(frozen=True)
class Calibrated:
  """Calibration of one exit on n examples, before and after its temperature."""

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
  """What thresholds reached on test data.

  Attributes:
    saved: part of the FLOPs that is saved.
    drop: points of accuracy that are lost.
  """

  saved: float
  drop: float | None = None
  accuracy: float | None = None
  cost: float | None = None
  risk: float | None = None
  milliseconds: float | None = None
  certificate: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class RequestResult:
  """A request for thresholds, and what they reached.

  Attributes:
    kind: kind of the request, as in `CascadePlan.request`.
    requested: its value.
    chosen: whether it is the run's own request.
    refused: why it cannot be met, else None.
    held_out: accuracy and cost on the data where the thresholds were chosen.
    test: what was reached on test data.
    interval: 95 % intervals of `test`, by name.
  """

  kind: str
  requested: float
  chosen: bool = False
  refused: str | None = None
  held_out: dict[str, Any] | None = None
  test: Reached | None = None
  interval: dict[str, list[float | None]] | None = None


@dataclasses.dataclass(frozen=True)
class SmallBatch:
  """A cascade that answers examples one by one or a few at a time, and its network.

  Attributes:
    ms: milliseconds of the cascade for a batch, a mean over typical ones.
    whole_ms: milliseconds of the network alone.
    speedup: whole_ms / ms.
    merged: exits behind which nothing is skipped, as that was measured to be faster.
    alone: whether no exit is used, as they were measured to cost more than they save.
    ms_quartiles: quartiles of `ms`.
    whole_ms_quartiles: quartiles of `whole_ms`.
    runs: number of turns in which they were measured.
    faster: number of turns in which the cascade was faster.
    batch: number of examples.
  """

  ms: float
  whole_ms: float
  speedup: float
  merged: tuple[str, ...] = ()
  alone: bool = False
  ms_quartiles: tuple[float, float] | None = None
  whole_ms_quartiles: tuple[float, float] | None = None
  runs: int | None = None
  faster: int | None = None
  batch: int = 1

  @property
  def difference(self) -> difference.Difference:
    """How the times of a batch differ, by more than chance."""
    return _beside_whole(self)


@dataclasses.dataclass(frozen=True)
class Executed:
  """A cascade executed on the test data, compared with the simulation, and timed.

  Attributes:
    ideal: FLOPs of an example if every stage runs only on examples that reach it.
    padded: FLOPs of an example as executed.
    whole: FLOPs of an example in the network alone.
    accuracy: accuracy of the executed cascade; of a language model, the part of `n`
      tokens that stays the same.
    differ: number of examples that left at another exit than simulated.
    near: how many of these were close to a threshold.
    n: number of examples.
    broken: number of examples with an answer that was not finite.
    device: the device it ran on.
    batch: examples in a timed batch.
    ms: milliseconds of a batch of the cascade.
    whole_ms: milliseconds of a batch of the network alone.
    speedup: whole_ms / ms.
    compile_s: seconds to compile the cascade.
    ms_quartiles, whole_ms_quartiles: lower and upper quartiles of these times.
    runs: number of turns in which they were measured.
    faster: number of turns in which the cascade was faster.
    one: the times of one example at a time.
    few: the times of batches between one example and `batch`, in order of size.
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
  faster: int | None = None
  one: SmallBatch | None = None
  few: tuple[SmallBatch, ...] = ()

  @property
  def difference(self) -> difference.Difference:
    """How the times of a batch differ, by more than chance."""
    return _beside_whole(self)


def _beside_whole(times: SmallBatch | Executed) -> difference.Difference:
  """How the time of a cascade differs from that of its network alone."""
  return difference.compare(
    times.whole_ms or 0,
    times.ms or 0,
    times.whole_ms_quartiles,
    times.ms_quartiles,
    times.faster,
    times.runs,
  )


@dataclasses.dataclass(frozen=True)
class CurvePoint:
  """Cost and accuracy of efficient thresholds, on test data and on held-out data."""

  cost: float | None = None
  accuracy: float | None = None
  cost_held_out: float | None = None
  accuracy_held_out: float | None = None


@dataclasses.dataclass(frozen=True)
class CascadeResult:
  """A cascade of early exits; dictionaries are by name of the exit.

  Attributes:
    exits: names of the exits by depth, the network's own last.
    cost: FLOPs of an example that leaves at an exit.
    whole: FLOPs of an example in the network alone.
    exit_accuracy: accuracy if all examples left at an exit.
    curve: the efficient choices of thresholds.
    thresholds: threshold of an exit; None where no examples leave, or all do.
    shares: part of the examples that leave at an exit.
    requests: the run's request and others, with what they reached.
    taps: the tap that each exit reads.
    original: accuracy of the network before it was trained with its heads.
    agreement: of a language model, the part of the test tokens that stays the same;
      `exit_accuracy`, `curve` and the drop of requests then count such tokens. None for
      other networks.
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
  agreement: float | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
  """A held-out text, and the most probable tokens with which networks continue it.

  Attributes:
    prompt: how the text begins.
    whole: what the network before the cut writes.
    cut: what is written right after the cut; '' where there was none.
    healed: what is written after further training; '' where there was none.
    early: what is written with early exits; '' where there are none.
  """

  prompt: str
  whole: str
  cut: str = ''
  healed: str = ''
  early: str = ''


@dataclasses.dataclass(frozen=True)
class Result:
  """Everything that is known about a finished run.

  Attributes:
    method, options, model, data, seed, config: what was run.
    accuracy: accuracies on test data, which decided nothing.
    held_out: accuracies on held-out data.
    scores: all scores on test data, {'before' or 'after': {name: value}}.
    flops, params, peak_bytes: costs of the network.
    widths: {group: (width before, width after)}.
    layers: the layers by the path of their array, before all cuts and after them; {} in
      files that were written before there was such an entry.
    layers_batch: batch size at which the layers were timed; None where they were not.
    multiples: {group: what its width is a multiple of}, where that was chosen for the
      device of the run.
    latency_ms: latency by batch size.
    milliseconds: latency that the target counted, else None.
    compile_s: seconds that the networks took to compile.
    rounds: the cuts, in order.
    report: the report of surgery about the last cut.
    verify: the proof of the last cut.
    cascade: the cascade of a method that makes one, else None.
    epochs: passes over the training data in this run, of the network before and after.
    original: accuracy on 'test' and 'held_out' of the weights that the run began with,
      where the network before was trained further.
    control: accuracy on 'test' and 'held_out' of the network that was trained for
      comparison, where there was one.
    samples: texts that a network writes, before and after its cut.
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
  layers: dict[str, LayerReport] = dataclasses.field(default_factory=dict)
  layers_batch: int | None = None
  multiples: dict[str, int] = dataclasses.field(default_factory=dict)
  latency_ms: dict[str, Latency] = dataclasses.field(default_factory=dict)
  milliseconds: TimeReached | None = None
  compile_s: Change | None = None
  verify: Proof | None = None
  report: SurgeryReport = dataclasses.field(default_factory=SurgeryReport)
  cascade: CascadeResult | None = None
  epochs: Change | None = None
  original: dict[str, float] = dataclasses.field(default_factory=dict)
  control: dict[str, float] = dataclasses.field(default_factory=dict)
  samples: list[Sample] = dataclasses.field(default_factory=list)
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
  """The part of a run's result that `sweep.json` contains."""

  accuracy: Accuracies
  flops: Change
  params: Change
  held_out: Accuracies
  device: str
  latency_ms: dict[str, Latency] = dataclasses.field(default_factory=dict)
  wall_seconds: float | None = None


def to_json(result: Result) -> dict[str, Any]:
  """Returns a result as plain JSON values, without the entries that are None."""
  values = json.loads(json.dumps(dataclasses.asdict(result)))
  return {name: value for name, value in values.items() if value is not None}


def from_json(values: Any) -> Result:
  """Returns the Result in the values of a `result.json` of this or an older version.

  Raises:
    ValueError: an entry is missing or of another type; the message names it.
  """
  if not isinstance(values, Mapping):
    raise ValueError(f'not the result of a run: expected an object, got {values!r:.60}')
  schema = values.get('schema', 1)
  if not isinstance(schema, int) or schema > SCHEMA:
    raise ValueError(
      f'expected schema {SCHEMA} at most, got {schema!r}: read it with the version of '
      'depthprune that wrote it'
    )
  values = dict(values)
  # The oldest files are of one method, whose options stood beside the other entries.
  if 'method' not in values and 'options' not in values:
    if missing := [key for key in ('target', 'of') if key not in values]:
      raise ValueError(
        f'not the result of a run: required field missing @ $.{missing[0]}'
      )
    options = {key: values[key] for key in ('target', 'of')}
    values |= {'method': 'trainable_gates', 'options': options, 'rounds': []}
  result = structured(values, Result)
  for part in (result, result.report):
    for group, (before, after) in part.widths.items():
      if not 0 <= after <= before:
        raise ValueError(
          f'not the result of a run: widths of {group!r:.80}: expected 0 to {before} '
          f'after the cut, got {after}'
        )
  return result


def structured(values: Any, kind: type[T]) -> T:
  """Turns plain values into one of the dataclasses here, without converting any.

  Raises:
    ValueError: an entry is missing or of another type; the message names it.
  """
  try:
    return _CONVERTER.structure(values, kind)
  except BaseValidationError as error:
    wrong = cattrs.transform_error(error)
    more = f'; and {len(wrong) - 8} more' * (len(wrong) > 8)
    raise ValueError(
      f'not the result of a run: {"; ".join(wrong[:8])}{more}'
    ) from error


def _exactly(*kinds: type) -> Callable[[Any, Any], Any]:
  """Returns a hook of cattrs that accepts only values of these types."""

  def hook(value: Any, _: Any) -> Any:
    if type(value) not in kinds or (type(value) is int and value not in files.INTEGERS):
      raise TypeError(f'expected {kinds[0].__name__}, got {value!r:.60}')
    return kinds[0](value)

  return hook


_CONVERTER = cattrs.Converter()
for _kinds in ((str,), (bool,), (int,), (float, int)):
  _CONVERTER.register_structure_hook(_kinds[0], _exactly(*_kinds))
