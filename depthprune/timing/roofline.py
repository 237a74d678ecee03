"""Measures the most that the device can do, which bounds every latency from below.

Source: Williams, Waterman, Patterson, Roofline, CACM 52(4), 2009. What stays in a cache
from call to call is read faster than memory, so the bandwidth is that of a copy of the
size that is moved: Ilic, Pratas, Sousa, Cache-aware Roofline model, 2014.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from depthprune.timing import clock

ENOUGH = 20.0  # milliseconds, of which starting the call is a small part
MATMUL = tuple(2**i for i in range(9, 15))  # sides of square matrices
COPIES = tuple(2**i for i in (18, 20, 22, 24, 26, 28))  # bytes of an array
LOOPS = tuple(4**i for i in range(12))  # repetitions of a copy


class Peak(NamedTuple):
  """The highest speeds that were measured in this process.

  Attributes:
    flops: FLOPs per second of a product of square matrices, where 1 MAC = 2 FLOPs, at
      the precision that networks of this `dtype` get.
    side: rows of these matrices.
    bytes: {bytes of an array: bytes per second}, read and written to add 1 to the
      array.
    dtype: type of the elements.
  """

  flops: float
  side: int
  bytes: dict[int, float]
  dtype: str

  def bandwidth(self, moved: float) -> float:
    """Returns the bytes per second of the fastest copy of at least `moved` bytes."""
    large = [speed for size, speed in self.bytes.items() if size >= moved]
    return max(large, default=self.bytes[max(self.bytes)])

  def milliseconds(self, flops: float, moved: float) -> float:
    """Returns the least time for so many FLOPs and so many bytes moved."""
    return 1e3 * max(flops / self.flops, moved / self.bandwidth(moved))

  def to_json(self) -> dict[str, Any]:
    """Returns plain values, with sizes as strings."""
    return {**self._asdict(), 'bytes': {str(k): v for k, v in self.bytes.items()}}


def measure(dtype: Any = jnp.float32, seconds: float = 0.5) -> Peak:
  """Measures the device that jax computes on.

  Args:
    dtype: type of the elements.
    seconds: time to spend on the FLOPs, and again on the bandwidth.
  """
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
  """Returns (times) -> a call that reads and writes `size` bytes that many times."""
  x = jnp.zeros(size // dtype.itemsize, dtype)

  @jax.jit
  def add(x, times):
    return jax.lax.fori_loop(0, times, lambda _, x: x + jnp.ones((), x.dtype), x)

  return lambda times: lambda: add(x, times)


def _long_enough(
  make: Callable[[int], Callable], sizes: tuple[int, ...], seconds: float
) -> tuple[int, float]:
  """Returns the first size whose call is long enough, and its least milliseconds."""
  for size in sizes:
    call = make(size)
    if clock.interleave([call], 0, least=1, warmup=1).min() >= ENOUGH:
      break
  return size, float(clock.interleave([call], seconds, least=3, warmup=0).min())
