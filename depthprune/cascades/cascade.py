"""Cascades: networks with early exits that skip the computation behind an exit.

A batch of any size runs as one compiled program of static shapes; `executor` does it.
With a batch of one example, a stage runs or does not, which suits latency. Where a
device takes longer to decide than to compute, `race.merge` finds it out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.cascades import executor
from depthprune.cascades.confidence import KINDS, Kind, scores
from depthprune.cascades.executor import Answer, Settings
from depthprune.cascades.predictions import Predictions
from depthprune.cascades.thresholds import Choice, above
from depthprune.program import arguments, modules
from depthprune.program.stages import Stages, split


class CascadeCost(NamedTuple):
  """Mean FLOPs per example of a batch that a cascade answered; 1 MAC = 2 FLOPs.

  Attributes:
    ideal: the cost if every stage ran only on the examples that reach it.
    padded: the cost as executed, on batches of a few static sizes.
    whole: the cost of the network without any other exit.
  """

  ideal: float
  padded: float
  whole: float


@dataclasses.dataclass(frozen=True, eq=False)
class Cascade:
  """A network that examples leave at the first exit that is confident enough.

  Call it as `cascade(*inputs)` with a batch; the result is an `executor.Answer`. The
  function `cascade` makes it.

  Attributes:
    stages: the stages of the network, from `split`.
    variables: the arrays of the network.
    thresholds: float32 [exits - 1]; an example leaves if its score is above.
    temperatures: float32 [exits - 1]; logits are divided by them before the score.
    confidence: the kind of score, one of `confidence.KINDS`.
    weights: [exits - 1, 4] for the score 'learned', else None.
    steps: number of batch sizes that later stages are compiled for.
    program: the compiled function (variables, settings, inputs, last, merged) ->
      Answer.
    merged: {batch size: exits behind which a batch of that size skips nothing}, as
      `race.merge` measures it: the next stage runs on the examples that leave there,
      too, where that takes less time than not to run it. Who leaves where, and with
      which answer, is the same at every batch size, unless there is None for it: then
      the exits cost more than they save, and the network alone answers.
  """

  stages: Stages
  variables: Any
  thresholds: np.ndarray
  temperatures: np.ndarray
  confidence: Kind
  weights: np.ndarray | None
  steps: int
  program: Callable[..., Answer]
  merged: Mapping[int, tuple[str, ...] | None] = dataclasses.field(default_factory=dict)
  # What calls have found: settings on the device, and sizes of batches by their shapes.
  _kept: dict[Any, Settings] = dataclasses.field(
    default_factory=dict, init=False, repr=False
  )
  _sizes: dict[Any, int] = dataclasses.field(
    default_factory=dict, init=False, repr=False
  )

  @property
  def exits(self) -> tuple[str, ...]:
    """The names of the exits in order; the last is the network's own."""
    return self.stages.exits

  def __repr__(self) -> str:
    flops = ' -> '.join(f'{each:,}' for each in self.stages.flops)
    return (
      f'Cascade: {above(self.exits, self.thresholds)}; score: {self.confidence}\n'
      f'  FLOPs up to each exit: {flops}; of the network alone: {self.stages.whole:,}'
    )

  def __call__(self, *inputs: Any, last: str | None = None) -> Answer:
    """Answers a batch.

    Args:
      *inputs: arrays [batch, ...], or trees of them; the batch may have any size, 0
        included. What the examples of the network share is passed as it was there.
      last: the exit at which all examples leave that are still there; by default the
        network's own.

    Raises:
      ValueError: there is no such exit, or the inputs have other ranks than the example
        of the network.
    """
    with modules.explained(self.variables, inputs):
      return self.program(*self._arguments(inputs, last))

  def lower(self, *inputs: Any, last: str | None = None) -> Any:
    """Traces the program for such inputs, as a `jax.stages.Lowered`."""
    return self.program.lower(*self._arguments(inputs, last))

  def _arguments(self, inputs: tuple, last: str | None) -> tuple:
    if last is not None and last not in self.exits:
      raise ValueError(
        f'cascade: no exit {last!r}; there are: {arguments.listed(self.exits)}'
      )
    end = self.exits.index(last) + 1 if last else len(self.exits)
    leaves, tree = jax.tree.flatten(inputs)
    shapes = tree, *map(np.shape, leaves)
    if shapes not in self._sizes:  # to check takes as long as a small stage
      self._check(inputs)
      self._sizes[shapes] = self.stages.examples(inputs)
    merged = self.merged.get(self._sizes[shapes], ())
    if merged is None and end < len(self.exits):
      merged = self.exits[: end - 1]
    return self.variables, self._settings(), inputs, end, merged

  def _settings(self) -> Settings:
    """Returns the settings on the device.

    They stay there from call to call: to move them takes a CPU longer than a small
    stage.
    """
    values = self.thresholds, self.temperatures, self.weights
    key = tuple(None if x is None else np.asarray(x).tobytes() for x in values)
    if key not in self._kept:
      with jax.ensure_compile_time_eval():  # arrays, also within another program
        moved = (None if x is None else jnp.asarray(x) for x in values)
        self._kept.clear()
        self._kept[key] = Settings(*moved)  # pyright: ignore[reportArgumentType]
    return self._kept[key]

  def _check(self, inputs: tuple) -> None:
    """Raises ValueError unless these are inputs of one batch, as the example was."""
    expected = [x.shape for x in jax.tree.leaves(self.stages.inputs)]
    got = [np.shape(x) for x in jax.tree.leaves(inputs)]
    same_ranks = [*map(len, expected)] == [*map(len, got)]
    sizes = {shape[:1] for shape, c in zip(got, self.stages.counts) if c}
    alike = jax.tree.structure(inputs) == jax.tree.structure(self.stages.inputs)
    if not alike or not same_ranks or len(sizes) != 1:
      every = zip(expected, self.stages.counts, strict=True)
      shared = ', '.join(str([*shape]) for shape, c in every if not c)
      also = f' (shared by all examples: {shared})' if shared else ''
      raise ValueError(
        f'cascade: expected inputs of one batch, as {expected} is{also}, got {got}'
      )

  def at(self, *inputs: Any) -> Stages:
    """Returns the stages for inputs [batch, ...] of another shape."""
    return self.stages.again(*inputs)

  def within(self, budget: float, *inputs: Any, cost: Any = None) -> Answer:
    """Answers a batch within a budget per example (anytime prediction).

    Every example goes on until it is confident enough or the next exit is above the
    budget.

    Args:
      budget: FLOPs of one example, or a number in the unit of `cost`.
      *inputs: arrays [batch, ...].
      cost: [exits], the cost of an example that leaves at each exit, such as measured
        milliseconds; FLOPs by default.

    Raises:
      ValueError: the budget is below the cost of the first exit.
    """
    cost = np.asarray(self.at(*inputs).flops if cost is None else cost, np.float64)
    reached = np.flatnonzero(cost <= budget)
    if not reached.size:
      raise ValueError(
        f'cascade: a budget of {budget:g} is below the cheapest exit: {self.exits[0]} '
        f'costs {cost[0]:g}'
      )
    return self(*inputs, last=self.exits[int(reached[-1])])

  def predictions(self, labels: Any, *inputs: Any, batch: int = 256) -> Predictions:
    """Computes the answers and scores of all exits, by which thresholds are chosen.

    Args:
      labels: int [n]; None if only agreement with the network matters.
      *inputs: arrays [n, ...] of held-out examples.
      batch: how many of them are computed at a time.

    Returns:
      The `Predictions` that the functions of `cascades.thresholds` take.

    Raises:
      ValueError: the batch is below 1, or the inputs are not those of one batch.
    """
    arguments.whole('batch', batch)
    write = 'write predictions(labels, *inputs), or None for no labels'
    if labels is not None and inputs:
      labels = np.asarray(labels)
      if labels.ndim != 1 or labels.dtype.kind not in 'iu':
        raise arguments.refused('labels', 'integers [n]', labels, write, ValueError)
    self._check(inputs)
    arrays, tree = jax.tree.flatten(inputs)
    counts = self.stages.counts
    n = self.stages.examples(inputs)
    if labels is not None and len(labels) != n:
      has = f'expected one for each of {n} examples, got {len(labels)}'
      raise arguments.wrong('labels', has, write)
    batch = max(1, min(batch, n))

    @jax.jit
    def answers(variables, *inputs):
      outputs = self.stages.fn(variables, *inputs)
      return jnp.stack([outputs[name] for name in self.exits])

    parts = []
    for start in range(0, max(n, 1), batch):
      # The last rows are repeated to the full batch, so that all share one program.
      rows = np.minimum(np.arange(start, start + batch), n - 1) if n else slice(0)
      part = [x[rows] if c else x for x, c in zip(arrays, counts, strict=True)]
      stacked = answers(self.variables, *jax.tree.unflatten(tree, part))
      parts.append(np.asarray(stacked)[:, : n - start])
    logits = np.concatenate(parts, axis=1)
    scale = np.append(self.temperatures, np.float32(1))[:, None, None]
    stages = self.at(*inputs)
    return Predictions(
      exits=self.exits,
      logits=logits,
      labels=None if labels is None else np.asarray(labels),
      scores=scores(self.confidence, logits / scale, self.weights),
      cost=np.asarray(stages.flops, np.float64),
      whole=float(stages.whole),
    )

  def choosing(self, chosen: Choice) -> Cascade:
    """Returns the cascade with the thresholds of a choice; nothing compiles again.

    Raises:
      ValueError: the thresholds were chosen for other exits.
    """
    if chosen.exits != self.exits:
      raise ValueError(
        f'cascade: expected thresholds of the exits {", ".join(self.exits)}, got '
        f'those of {", ".join(chosen.exits)}'
      )
    return dataclasses.replace(self, thresholds=chosen.thresholds)

  def cost(self, answer: Answer, *inputs: Any) -> CascadeCost:
    """Computes the mean FLOPs per example that an answer cost; 0 for an empty batch.

    Args:
      answer: the answer to a batch.
      *inputs: the batch, if its examples have another shape than the cascade's example.
    """
    stages = self.at(*inputs) if inputs else self.stages
    left, rows, whole = np.asarray(answer.exit), np.asarray(answer.rows), stages.whole
    if not left.size:
      return CascadeCost(0.0, 0.0, float(whole))
    if not rows.any():  # the network alone answered
      return CascadeCost(*[float(whole)] * 3)
    each = np.array([stage.flops for stage in stages][: len(rows)], np.float64)
    ideal = np.array(stages.flops, np.float64)[left].mean()
    return CascadeCost(float(ideal), float(each @ rows / left.size), float(whole))


def cascade(
  model: Any,
  variables: Any,
  *inputs: Any,
  thresholds: Mapping[str, float] | None = None,
  exits: tuple[str, ...] = (),
  temperatures: Mapping[str, float] | None = None,
  confidence: Kind = 'probability',
  weights: np.ndarray | None = None,
  steps: int = 8,
  **kwargs,
) -> Cascade:
  """Turns a network with exits into a cascade that examples leave early.

      early = dp.cascade(model, variables, images[:1], thresholds={'early': 0.9})
      answer = early(images)  # logits, the exit of every example, its score

      held_out = early.predictions(held_out_labels, held_out_images)
      early = early.choosing(thresholds.for_drop(held_out, drop=0.5))

  `thresholds` is the module `depthprune.cascades.thresholds`, which chooses thresholds
  on held-out data for a mean cost, a drop in accuracy or a certified risk. An example
  leaves at the first exit whose score is above its threshold.

  Args:
    model: a function f(variables, *inputs) -> {exit: logits [batch, classes]}, such as
      the `apply` of a `Pruned`, or a linen module, such as a `WithHeads`.
    variables: the arrays of the network.
    *inputs: an example of the inputs [batch, ...], as arrays or shapes, or trees of
      them. Those of another first size than the logits, such as positions [length], as
      well as scalars and keys are shared by all examples.
    thresholds: {exit: threshold}; no example leaves at an exit without one. The last
      exit has none.
    exits: names of the exits in order; by default all, in order of depth.
    temperatures: {exit: temperature}, by which logits are divided before the score; 1
      by default.
    confidence: the kind of score: 'probability', 'entropy', 'margin', 'patience' or
      'learned', explained in `depthprune.cascades.confidence`.
    weights: [exits - 1, 4] for 'learned', from `confidence.learn`.
    steps: number of batch sizes that later stages are compiled for. With 8, a stage
      runs on at most an eighth of the batch more than needed.
    **kwargs: further arguments of the model, such as train=False.

  Returns:
    The cascade, called with inputs [batch, ...] of any batch size.

  Raises:
    ValueError: the network cannot be split at its exits; its logits are not [batch,
      classes], of one shape and type; a threshold or temperature is for an exit that
      cannot be left early; a temperature is not above 0; or steps is below 1.
  """
  modules.checked_call(model, variables, inputs)
  arguments.alive('variables', variables, 'pass arrays that are still there')
  arguments.whole('steps', steps)
  stages = split(model, variables, *inputs, exits=exits, **kwargs)
  early = stages.exits[:-1]
  thresholds, temperatures = thresholds or {}, temperatures or {}
  for what, values in (('thresholds', thresholds), ('temperatures', temperatures)):
    write = f'write {{{early[0]!r}: 0.9}}'
    arguments.kind_of(what, values, Mapping, '{exit: number}', write)
    for name, value in values.items():
      if isinstance(value, str) or np.ndim(value):
        raise arguments.refused(f'{what}[{name!r}]', 'a number', value, write)
  for what, values in (('threshold', thresholds), ('temperature', temperatures)):
    if unknown := [name for name in values if name not in early]:
      raise ValueError(
        f'cascade: a {what} for {unknown[0]!r}; exits that can be left early are: '
        f'{", ".join(early)}'
      )
  if any(not 0 < t < np.inf for t in temperatures.values()):
    raise ValueError(f'cascade: temperatures are above 0, got {dict(temperatures)}')
  logits = {name: executor.logits(stages, name) for name in stages.exits}
  shapes = {(x.shape, x.dtype) for x in logits.values()}
  if len(shapes) > 1 or any(len(s) != 2 or s[1] < 2 for s, _ in shapes):
    raise ValueError(
      f'cascade: expected logits [batch, classes] of two classes or more, of one shape '
      f'and type at all exits, got {", ".join(f"{n} {x}" for n, x in logits.items())}'
    )
  if confidence not in KINDS:
    raise ValueError(f'confidence: {confidence!r}: expected {", ".join(KINDS)}')
  run = functools.partial(executor.run, stages, confidence, steps)
  return Cascade(
    stages,
    variables,
    np.array([thresholds.get(name, np.inf) for name in early], np.float32),
    np.array([temperatures.get(name, 1.0) for name in early], np.float32),
    confidence,
    weights,
    steps,
    jax.jit(run, static_argnums=(3, 4)),
  )
