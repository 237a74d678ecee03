"""Times functions in turns, after a warm-up, waiting for the device each time."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def interleave(
  calls: Sequence[Callable[[], Any]],
  seconds: float = 2.0,
  least: int = 9,
  most: int = 200,
  warmup: int = 3,
) -> np.ndarray:
  """Times functions without arguments in turns.

  The first rounds, in which functions are compiled, do not count. The order of the
  functions alternates from turn to turn, and every result is waited for on the device.

  Args:
    calls: the functions.
    seconds: time to spend on all functions together.
    least: least number of turns.
    most: largest number of turns.
    warmup: number of rounds that do not count.

  Returns:
    Milliseconds, float64 [calls, turns].
  """
  for _ in range(warmup):
    for call in calls:
      jax.block_until_ready(call())
  turns: list[list[float]] = []
  spent = 0.0
  while len(turns) < most and (len(turns) < least or spent < seconds):
    order = list(range(len(calls)))[:: 1 if len(turns) % 2 == 0 else -1]
    taken = [0.0] * len(calls)
    for index in order:
      start = time.perf_counter()
      jax.block_until_ready(calls[index]())
      taken[index] = time.perf_counter() - start
    turns.append(taken)
    spent += sum(taken)
  return 1e3 * np.array(turns).T


def made_up(shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
  """Returns an array to time a function on.

  It holds small positive numbers, zeros for integers, or random keys.
  """
  if jnp.issubdtype(dtype, jax.dtypes.prng_key):
    return jnp.broadcast_to(jax.random.key(0), shape)
  if not jnp.issubdtype(dtype, jnp.floating):
    return jnp.zeros(shape, dtype)
  return jnp.asarray(np.random.default_rng(0).uniform(0.01, 0.1, shape), dtype)
