"""Measures how much faster a network is after a cut, on the device at hand.

Networks are compiled and warmed up first. Inputs and weights are on the device before
the clock starts, and are arguments of the program, because the compiler would fold
constants. Every call is waited for. Networks take turns in alternating order, so that a
drifting clock or another process affects all of them. Results are medians and
quartiles.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.program.trace import counts_examples, split_arrays
from depthprune.timing import clock, compilation, difference

NEAR = 0.02  # a target is reached within this fraction of the time
NOISE = 0.2  # quartiles further apart than this fraction are too noisy to judge
SATURATED = 4.0  # a batch faster than this many single images is mostly overhead


class Network(NamedTuple):
  """A network to time, called as `apply(variables, *inputs)`."""

  apply: Callable[..., Any]
  variables: Any


class Timing(NamedTuple):
  """Milliseconds of one call: median, lower and upper quartile of `runs` calls."""

  median: float
  lower: float
  upper: float
  runs: int


class Comparison(NamedTuple):
  """The times of two networks on one batch, measured in turns.

  Attributes:
    batch: examples in a call.
    before: time of the first network.
    after: time of the second network.
    faster: number of turns, out of `after.runs`, in which the second one was faster.
  """

  batch: int
  before: Timing
  after: Timing
  faster: int

  @property
  def speedup(self) -> float:
    """Median of the first network divided by that of the second."""
    return self.before.median / self.after.median

  @property
  def distinct(self) -> bool:
    """Whether a sign test over the turns rules out chance at two sigma."""
    return difference.beyond_chance(self.faster, self.after.runs)


def timing(milliseconds: np.ndarray) -> Timing:
  """Returns the Timing of a function from its milliseconds [turns]."""
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
  """Measures the latency of two networks.

  Args:
    before: the first network.
    after: the second network.
    *example: inputs, arrays or trees of them. Those with at least one example along
      axis 0 are repeated or shortened to every batch size; those of another first size
      than the outputs, such as positions [length], are passed as they are.
    batches: batch sizes to measure.
    exits: where the networks return a dict, the outputs to compute. Without it every
      tap is computed and written to memory.
    seconds: time to spend on each batch size, compilation not counted.

  Returns:
    One Comparison per batch size, in rising order.

  Raises:
    ValueError: an input has no examples along axis 0.
  """
  both = sweep((before, after), *example, batches=batches, exits=exits, seconds=seconds)
  return tuple(compared(batch, *taken) for batch, taken in both)


def compared(batch: int, before: np.ndarray, after: np.ndarray) -> Comparison:
  """Returns the Comparison of two networks from their milliseconds [turns]."""
  faster = int(np.sum(after < before))
  return Comparison(batch, timing(before), timing(after), faster)


def sweep(
  networks: Sequence[Network],
  *example: Any,
  batches: Iterable[int],
  exits: Sequence[str] = (),
  seconds: float = 2.0,
) -> Iterator[tuple[int, np.ndarray]]:
  """Measures several networks in turns.

  Yields:
    (batch, milliseconds [networks, turns]) for every batch size; see `compare`.
  """
  programs = [_program(network, exits) for network in networks]
  first = networks[0]
  arrays, merge = split_arrays(jax.tree.map(jnp.asarray, example))
  answers = jax.eval_shape(first.apply, first.variables, *example)
  counts = counts_examples(arrays, answers)
  if not any(counts) or not len(arrays[counts.index(True)]):
    shapes = ', '.join(str(x.shape) for x in arrays)
    raise ValueError(
      f'compare: expected an example with the batch in front, got shape {shapes}; '
      'pass at least one image, such as images[:1]'
    )
  for batch in sorted(set(batches)):
    sized = [_sized(x, batch) if c else x for x, c in zip(arrays, counts)]
    inputs = jax.block_until_ready(merge(sized))
    calls = [functools.partial(program, *inputs) for program in programs]
    yield batch, clock.interleave(calls, seconds)


def compile_seconds(network: Network, *inputs: Any) -> float:
  """Returns the seconds that XLA takes to compile the network, without tracing."""
  lowered = jax.jit(network.apply).lower(network.variables, *inputs)
  return compilation.compile_seconds(lowered)


def notes(measured: Sequence[Comparison]) -> list[str]:
  """Returns warnings about the measurements, as sentences."""
  one = next((m.after.median for m in measured if m.batch == 1), None)
  return [note for m in measured for note in _notes(m, one)]


def to_json(measured: Sequence[Comparison]) -> dict[str, dict[str, Any]]:
  """Returns the measurements by batch size as plain values, times in milliseconds."""
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
  """Says whether a target for the time was missed, or is hidden by noise.

  Args:
    m: the measurement.
    target: the time that was to be left, as a fraction in (0, 1].

  Returns:
    Sentences; none where the target was reached.
  """
  share = m.after.median / m.before.median
  low, high = m.after.lower / m.before.upper, m.after.upper / m.before.lower
  said = f'batch {m.batch}: {100 * target:g} % of the time was asked for'
  ends = f'{100 * low:.1f} to {100 * high:.1f} %'
  quartiles = f'{100 * share:.1f} % measured (quartiles {ends})'
  if abs(share - target) > NEAR and not low <= target <= high:
    return [
      f'{said}, and missed: {quartiles}; the target counts layers timed alone, in '
      'steps of a quarter of their widths; widths that suit the device (round_to 8 or '
      '16) are predicted best'
    ]
  if high - low > NOISE:
    return [f'{said}, {quartiles}: too noisy to say whether it was reached']
  return []


def device() -> str:
  """Returns the name of the device: 'NVIDIA H200', or 'CPU, Xeon ..., 2 cores'."""
  first = jax.devices()[0]
  if first.platform != 'cpu':
    return first.device_kind
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else None
  listing = Path('/proc/cpuinfo')
  lines = listing.read_text().splitlines() if listing.is_file() else []
  names = (line.partition(':')[2] for line in lines if line.startswith('model name'))
  processor = next((' '.join(name.split()) for name in names), '')
  parts = ('CPU', processor, f'{cores or os.cpu_count()} cores')
  return ', '.join(part for part in parts if part)


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


def _program(network: Network, exits: Sequence[str]) -> Callable[..., Any]:
  def answers(variables, *inputs):
    outputs = network.apply(variables, *inputs)
    if exits and isinstance(outputs, dict):
      return {name: outputs[name] for name in exits if name in outputs}
    return outputs

  compiled = jax.jit(answers)
  variables = jax.device_put(network.variables)
  return lambda *inputs: compiled(variables, *inputs)


def _sized(x: jax.Array, batch: int) -> jax.Array:
  return jnp.take(x, np.arange(batch) % x.shape[0], axis=0)
