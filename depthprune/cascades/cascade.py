"""Early exit that is executed: any batch, one compiled program, static shapes.

What happens inside is in `bucketed`. One example is a batch of size 1: then a stage
runs or does not, which is the mode for latency.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.cascades import confidence as sure
from depthprune.cascades import executor
from depthprune.cascades.executor import Answer, Settings
from depthprune.cascades.predictions import Predictions
from depthprune.cascades.thresholds import Choice
from depthprune.program.stages import Stages, split


class Cost(NamedTuple):
  """FLOPs of one example in the mean. 1 MAC = 2 FLOPs.

  Attributes:
    ideal: if every stage ran on those that reach it. padded: as it was executed.
    whole: of the network alone, without any other exit.
  """

  ideal: float
  padded: float
  whole: float


@dataclasses.dataclass(frozen=True, eq=False)
class Cascade:
  """cascade(*inputs) -> Answer. Made by `cascade`.

  Attributes:
    stages: of the network, from `split`. variables: its arrays.
    thresholds: float32 [exits - 1]: an example leaves where its score is above.
    temperatures: float32 [exits - 1]: logits are divided by them before the score.
    confidence: how sure an exit is, see `inference.confidence`; weights: [exits - 1, 4]
      of 'learned'.
    steps: number of sizes that later stages are compiled for.
    program: (variables, settings, inputs, last) -> Answer, compiled per batch size.
  """

  stages: Stages
  variables: Any
  thresholds: np.ndarray
  temperatures: np.ndarray
  confidence: sure.Kind
  weights: np.ndarray | None
  steps: int
  program: Callable[..., Answer]

  @property
  def exits(self) -> tuple[str, ...]:
    return self.stages.exits

  def __call__(self, *inputs: Any, last: str | None = None) -> Answer:
    """The answers to a batch of any size, 0 included.

    last: exit at which all that are still there leave; the network's own by default.

    Raises: ValueError for an exit that there is not, and for inputs of other ranks.
    """
    return self.program(*self._arguments(inputs, last))

  def lower(self, *inputs: Any, last: str | None = None) -> Any:
    """The program for such inputs, traced and not compiled: `jax.stages.Lowered`."""
    return self.program.lower(*self._arguments(inputs, last))

  def _arguments(self, inputs: tuple, last: str | None) -> tuple:
    if last is not None and last not in self.exits:
      raise ValueError(f'cascade: no exit {last!r}; there are: {", ".join(self.exits)}')
    end = self.exits.index(last) + 1 if last else len(self.exits)
    self._fits(inputs)
    weights = None if self.weights is None else jnp.asarray(self.weights)
    settings = Settings(
      jnp.asarray(self.thresholds), jnp.asarray(self.temperatures), weights
    )
    return self.variables, settings, inputs, end

  def at(self, *inputs: Any) -> Stages:
    """The stages for inputs of this shape, examples in front."""
    return self.stages.again(*inputs)

  def within(self, budget: float, *inputs: Any, cost: Any = None) -> Answer:
    """The best answer that each example can have for `budget` (anytime prediction).

    budget: FLOPs of one example, or in the unit of `cost` [exits]: what leaving at each
      exit costs, such as measured milliseconds.

    Raises: ValueError for a budget below the first exit; says the floor.
    """
    cost = np.asarray(self.at(*inputs).flops if cost is None else cost, np.float64)
    reached = np.flatnonzero(cost <= budget)
    if not reached.size:
      raise ValueError(
        f'cascade: a budget of {budget:g} is below the cheapest exit: {self.exits[0]} '
        f'costs {cost[0]:g}'
      )
    return self(*inputs, last=self.exits[int(reached[-1])])

  def predictions(self, labels: Any, *inputs: Any) -> Predictions:
    """What every exit says of examples, for `inference.thresholds` to choose by.

    labels: int [n]; None where only agreement with the network counts.
    """
    said = jax.jit(self.stages.fn)(self.variables, *inputs)
    logits = np.stack([np.asarray(said[name]) for name in self.exits])
    scale = np.append(self.temperatures, np.float32(1))[:, None, None]
    scores = sure.scores(self.confidence, logits / scale, self.weights)
    stages, labels = self.at(*inputs), None if labels is None else np.asarray(labels)
    costs = np.asarray(stages.flops, np.float64), float(stages.whole)
    return Predictions(self.exits, logits, labels, scores, *costs)

  def choosing(self, chosen: Choice) -> Cascade:
    """The cascade with thresholds that were chosen for its exits; nothing compiles."""
    if chosen.exits != self.exits:
      raise ValueError(
        f'cascade: expected thresholds of the exits {", ".join(self.exits)}, got '
        f'those of {", ".join(chosen.exits)}'
      )
    return dataclasses.replace(self, thresholds=chosen.thresholds)

  def cost(self, answer: Answer, *inputs: Any) -> Cost:
    """What an answer cost: FLOPs of one example in the mean, 0 for an empty batch.

    inputs: those of the answer, where their shape is another than the example's.
    """
    stages = self.at(*inputs) if inputs else self.stages
    left, rows, whole = np.asarray(answer.exit), np.asarray(answer.rows), stages.whole
    if not left.size:
      return Cost(0.0, 0.0, float(whole))
    each = np.array([stage.flops for stage in stages][: len(rows)], np.float64)
    ideal = np.array(stages.flops, np.float64)[left].mean()
    return Cost(float(ideal), float(each @ rows / left.size), float(whole))

  def sizes(self, batch: int) -> tuple[int, ...]:
    """What later stages are compiled for: 0, ... batch."""
    return executor.sizes(batch, self.steps)

  def _fits(self, inputs: tuple) -> None:
    expected, got = [x.shape for x in self.stages.inputs], [np.shape(x) for x in inputs]
    alike = [len(shape) for shape in expected] == [len(shape) for shape in got]
    if not alike or len({shape[0] for shape in got}) != 1:
      raise ValueError(
        f'cascade: expected inputs of one batch, as {expected} is, got {got}'
      )


def cascade(
  model: Any,
  variables: Any,
  *inputs: Any,
  thresholds: Mapping[str, float] | None = None,
  exits: tuple[str, ...] = (),
  temperatures: Mapping[str, float] | None = None,
  confidence: sure.Kind = 'probability',
  weights: np.ndarray | None = None,
  steps: int = 8,
  **kwargs,
) -> Cascade:
  """A network with exits as a cascade.

  Args:
    model: f(variables, *inputs) -> {exit: logits [batch, classes]}, or an object with
      such an `apply`: a `WithHeads`, a Pruned's `apply`, any function.
    variables: its arrays. inputs: examples, arrays or shapes.
    thresholds: by exit; where one is missing nobody leaves. The last exit has none.
      `inference.thresholds` finds them on held-out data.
    exits: in order; default by depth. temperatures: by exit, 1 where one is missing.
    confidence: 'probability' (the paper's), 'entropy', 'margin', 'patience' or
      'learned'; weights: of 'learned', from `confidence.learn`.
    steps: later stages are compiled for so many sizes.

  Raises: ValueError as `split` does, for a threshold or temperature of an exit that
    there is not, a temperature that is not above 0, and for steps below 1.
  """
  stages = split(model, variables, *inputs, exits=exits, **kwargs)
  early = stages.exits[:-1]
  thresholds, temperatures = thresholds or {}, temperatures or {}
  _named(early, 'threshold', thresholds)
  _named(early, 'temperature', temperatures)
  if any(not 0 < t < np.inf for t in temperatures.values()):
    raise ValueError(f'cascade: temperatures are above 0, got {dict(temperatures)}')
  said = {name: executor.logits(stages, name) for name in stages.exits}
  shapes = {(x.shape, x.dtype) for x in said.values()}
  if len(shapes) > 1 or any(len(s) != 2 or s[1] < 2 for s, _ in shapes):
    raise ValueError(
      f'cascade: expected logits [batch, classes] of two classes or more, of one shape '
      f'and type at all exits, got {", ".join(f"{n} {x}" for n, x in said.items())}'
    )
  if confidence not in sure.KINDS:
    raise ValueError(f'confidence: {confidence!r}: expected {", ".join(sure.KINDS)}')
  if steps < 1:
    raise ValueError(f'cascade: expected steps >= 1, got {steps}')
  run = functools.partial(executor.run, stages, confidence, steps)
  return Cascade(
    stages,
    variables,
    np.array([thresholds.get(name, np.inf) for name in early], np.float32),
    np.array([temperatures.get(name, 1.0) for name in early], np.float32),
    confidence,
    weights,
    steps,
    jax.jit(run, static_argnums=3),
  )


def _named(early: tuple[str, ...], what: str, given: Mapping[str, float]) -> None:
  if unknown := [name for name in given if name not in early]:
    raise ValueError(
      f'cascade: a {what} for {unknown[0]!r}; exits that can be left early are: '
      f'{", ".join(early)}'
    )
