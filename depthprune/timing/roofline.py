"""What the device can do at most, measured: the roof over every latency.

Sources: Williams, Waterman, Patterson, Roofline, CACM 52(4), 2009. What stays in a
cache from call to call is read faster than memory is, so bandwidth is that of a copy as
large as what is moved: Ilic, Pratas, Sousa, Cache-aware Roofline model, 2014.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from depthprune.timing import clock

ENOUGH = 20.0  # milliseconds of a call whose start is not what is measured
MATMUL = tuple(2**i for i in range(9, 15))  # sides of square matrices
COPIES = tuple(2**i for i in (18, 20, 22, 24, 26, 28))  # bytes
LOOPS = tuple(4**i for i in range(12))


class Peak(NamedTuple):
  """The most that was measured in this process.

  flops: a second, of a product of square matrices `side` wide, 1 MAC = 2 FLOPs, at the
    precision that networks of this `dtype` get.
  bytes: {bytes of an array: bytes a second}, read and written to add one to all of it.
  """

  flops: float
  side: int
  bytes: dict[int, float]
  dtype: str

  def bandwidth(self, moved: float) -> float:
    """Bytes a second of the fastest copy that is no smaller than what is moved."""
    large = [speed for size, speed in self.bytes.items() if size >= moved]
    return max(large, default=self.bytes[max(self.bytes)])

  def milliseconds(self, flops: float, moved: float) -> float:
    """No program that computes so many FLOPs and moves so many bytes is faster."""
    return 1e3 * max(flops / self.flops, moved / self.bandwidth(moved))

  def to_json(self) -> dict[str, Any]:
    """Plain values, sizes as words."""
    return {**self._asdict(), 'bytes': {str(k): v for k, v in self.bytes.items()}}


def measure(dtype: Any = jnp.float32, seconds: float = 0.5) -> Peak:
  """Measures the device that jax computes on, about so many seconds for each number."""
  dtype = jnp.dtype(dtype)

  def product(side: int) -> Callable[[], Any]:
    x = jax.random.normal(jax.random.key(0), (side, side), dtype)
    multiply = jax.jit(jnp.matmul)
    return lambda: multiply(x, x)

  side, ms = _long_enough(product, MATMUL, seconds)
  copies = {}
  for size in COPIES:
    times, taken = _long_enough(_copies(size, dtype), LOOPS, seconds / len(COPIES))
    copies[size] = 2e3 * size * times / taken
  return Peak(2e3 * side**3 / ms, side, copies, dtype.name)


def _copies(size: int, dtype: Any) -> Callable[[int], Callable[[], Any]]:
  """(times) -> a call that reads and writes so many bytes that often."""
  x = jnp.zeros(size // dtype.itemsize, dtype)

  @jax.jit
  def add(x, times):
    return jax.lax.fori_loop(0, times, lambda _, x: x + jnp.ones((), x.dtype), x)

  return lambda times: lambda: add(x, times)


def _long_enough(
  make: Callable[[int], Callable], sizes: tuple[int, ...], seconds: float
) -> tuple[int, float]:
  """(size, milliseconds of the fastest call) of the first that takes long enough."""
  for size in sizes:
    call = make(size)
    if clock.interleave([call], 0, least=1, warmup=1).min() >= ENOUGH:
      break
  return size, float(clock.interleave([call], seconds, least=3, warmup=0).min())
