"""Honest timing: what a cut gains on the device at hand, not on paper.

Compiled once and warmed up; inputs and weights are on the device before the clock
starts and are arguments of the program (a weight that is a constant would be folded);
every call is waited for; the networks take turns, in alternating order, so that a
clock that drifts or a neighbour that wakes up hits both; medians with quartiles.
"""

import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.timing import clock

# Parts of the time: what is called near, and how wide quartiles are called noise.
NEAR, NOISE = 0.02, 0.2
# Below this many times the latency of one image, a whole batch is mostly overhead.
SATURATED = 4.0


class Network(NamedTuple):
  """A network to time: `apply(variables, *inputs)`."""

  apply: Callable[..., Any]
  variables: Any


class Timing(NamedTuple):
  """Milliseconds of one call: median and quartiles of `runs` calls."""

  median: float
  lower: float
  upper: float
  runs: int


class Comparison(NamedTuple):
  """Two networks on one batch, measured in turns."""

  batch: int
  before: Timing
  after: Timing
  faster: int
  """Turns, out of `after.runs`, in which the second network was the faster one."""

  @property
  def speedup(self) -> float:
    return self.before.median / self.after.median

  @property
  def distinct(self) -> bool:
    """Whether chance is ruled out: a sign test over the turns, two sigma."""
    runs = self.after.runs
    return abs(self.faster - runs / 2) > runs**0.5


def timing(milliseconds: np.ndarray) -> Timing:
  """Median and quartiles of one function's turns [turns]."""
  lower, median, upper = np.percentile(milliseconds, (25, 50, 75))
  return Timing(float(median), float(lower), float(upper), len(milliseconds))


def compare(
  before: Network,
  after: Network,
  *example: Any,
  batches: Iterable[int] = (1, 128),
  exits: Sequence[str] = (),
  seconds: float = 2.0,
) -> tuple[Comparison, ...]:
  """Measured latency of two networks, one Comparison per batch size.

  `example`: inputs with the batch in front, of any length; repeated or shortened to
  every batch size. `exits`: where the networks return a dict, the outputs that are
  computed (a tap that is returned would be computed and written for nobody).
  Raises ValueError for inputs without a batch axis.
  """
  both = sweep((before, after), *example, batches=batches, exits=exits, seconds=seconds)
  return tuple(compared(batch, *taken) for batch, taken in both)


def compared(batch: int, before: np.ndarray, after: np.ndarray) -> Comparison:
  """Two networks from what their turns took, milliseconds [turns]."""
  faster = int(np.sum(after < before))
  return Comparison(batch, timing(before), timing(after), faster)


def sweep(
  networks: Sequence[Network],
  *example: Any,
  batches: Iterable[int],
  exits: Sequence[str] = (),
  seconds: float = 2.0,
) -> Iterator[tuple[int, np.ndarray]]:
  """(batch, milliseconds [networks, turns]) for every batch size; see `compare`."""
  programs = [_program(network, exits) for network in networks]
  for batch in sorted(set(batches)):
    inputs = jax.block_until_ready([_sized(x, batch) for x in example])
    calls = [functools.partial(program, *inputs) for program in programs]
    yield batch, clock.interleave(calls, seconds)


def compile_seconds(network: Network, *inputs: Any) -> float:
  """Seconds that XLA takes to compile the network, tracing not counted."""
  lowered = jax.jit(network.apply).lower(network.variables, *inputs)
  start = time.perf_counter()
  lowered.compile()
  return time.perf_counter() - start


def notes(measured: Sequence[Comparison]) -> list[str]:
  """What the numbers do not say by themselves, as sentences."""
  one = next((m.after.median for m in measured if m.batch == 1), None)
  return [note for m in measured for note in _notes(m, one)]


def to_json(measured: Sequence[Comparison]) -> dict[str, dict[str, Any]]:
  """`{batch: {before, after, speedup, ..., notes}}`, times in milliseconds."""
  one = next((m.after.median for m in measured if m.batch == 1), None)
  return {
    str(m.batch): {
      'before': m.before.median,
      'after': m.after.median,
      'speedup': m.speedup,
      'before_quartiles': [m.before.lower, m.before.upper],
      'after_quartiles': [m.after.lower, m.after.upper],
      'runs': m.after.runs,
      'faster': m.faster,
      'notes': _notes(m, one),
    }
    for m in measured
  }


def missed(m: Comparison, target: float) -> list[str]:
  """Whether the part of the time that was to remain was missed, or drowned in noise.

  target: in (0, 1]. Sentences; none where it was met.
  """
  share = m.after.median / m.before.median
  low, high = m.after.lower / m.before.upper, m.after.upper / m.before.lower
  said = f'batch {m.batch}: {100 * target:g} % of the time was asked for'
  ends = f'{100 * low:.1f} to {100 * high:.1f} %'
  quartiles = f'{100 * share:.1f} % measured (quartiles {ends})'
  notes = []
  if abs(share - target) > NEAR and not low <= target <= high:
    notes.append(
      f'{said}, and missed: {quartiles}; the target counts layers timed alone, in '
      'steps of a quarter of their widths; widths that suit the device (round_to 8 or '
      '16) are foreseen best'
    )
  elif high - low > NOISE:
    notes.append(f'{said}, {quartiles}: too noisy to say whether it was reached')
  return notes


def device() -> str:
  """The device that jax computes on, in words: 'NVIDIA H200', 'CPU ..., 2 cores'."""
  first = jax.devices()[0]
  if first.platform != 'cpu':
    return first.device_kind
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else None
  counted = f'{cores or os.cpu_count()} cores'
  return ', '.join(part for part in ('CPU', _processor(), counted) if part)


def _notes(m: Comparison, one: float | None) -> list[str]:
  said = []
  if not m.distinct:
    said.append(
      f'batch {m.batch}: faster in {m.faster} of {m.after.runs} turns, which may be '
      'chance; no difference in speed was measured'
    )
  if m.batch > 1 and one is not None:
    growth = m.after.median / one
    if growth < min(SATURATED, m.batch):
      said.append(
        f'batch {m.batch} takes only {growth:.1f} x the time of one image: the device '
        'is not saturated and most of that time is overhead, which fewer FLOPs do not '
        'reduce; measure with a larger batch'
      )
  return said


def _processor() -> str:
  listing = Path('/proc/cpuinfo')
  lines = listing.read_text().splitlines() if listing.is_file() else []
  names = (line.partition(':')[2] for line in lines if line.startswith('model name'))
  return next((' '.join(name.split()) for name in names), '')


def _program(network: Network, exits: Sequence[str]) -> Callable[..., Any]:
  def answers(variables, *inputs):
    outputs = network.apply(variables, *inputs)
    if exits and isinstance(outputs, dict):
      return {name: outputs[name] for name in exits if name in outputs}
    return outputs

  compiled = jax.jit(answers)
  variables = jax.device_put(network.variables)
  return lambda *inputs: compiled(variables, *inputs)


def _sized(x: Any, batch: int) -> jax.Array:
  x = jnp.asarray(x)
  if x.ndim == 0 or x.shape[0] == 0:
    raise ValueError(
      f'compare: expected an example with the batch in front, got shape {x.shape}; '
      'pass at least one image, such as images[:1]'
    )
  return jnp.take(x, np.arange(batch) % x.shape[0], axis=0)
