"""Measures how fast images are read, and how fast the training step consumes them."""

import time
from typing import Any, NamedTuple

import jax

STEPS = 3  # steps that are timed


class Throughput(NamedTuple):
  """Images per second of the input pipeline and of the training step.

  Attributes:
    read: what the pipeline delivers when nothing else runs.
    needed: what the step consumes when its batch is there already.
  """

  read: float
  needed: float

  @property
  def input_bound(self) -> bool:
    """Whether the devices wait for images."""
    return self.read < self.needed

  def __str__(self) -> str:
    rate = lambda x: f'{x:,.0f}' if x >= 10 else f'{x:.2g}'
    said = f'{rate(self.read)} images/s are read, the step takes {rate(self.needed)}'
    if not self.input_bound:
      return f'{said}: not input-bound'
    return (
      f'{said}: input-bound, the devices wait {1 - self.read / self.needed:.0%} of the '
      'time (--workers N reads in N processes)'
    )


def measure(
  batch_at: Any, split: Any, step: Any, state: Any, key: jax.Array, teacher: Any
) -> Throughput:
  """Reads some batches alone, then times the training step on one of them.

  Args:
    batch_at: sampler of streamed images, split over a mesh.
    split: the images to read.
    step: the training step, (state, batch, key, teacher) -> (state, metrics).
    state: the training state; the step gets a copy.
    key: jax random key.
    teacher: variables of the teacher.
  """
  stream, size, depth = (
    batch_at.stepwise(),
    batch_at.sampler.size,
    batch_at.sampler.depth,
  )
  batch: Any = None
  for i in range(depth):  # batches that workers have prepared do not count
    jax.block_until_ready(stream(split, i))
  start = time.perf_counter()
  for i in range(depth, 2 * depth):
    batch = jax.block_until_ready(stream(split, i))
  read = size * depth / (time.perf_counter() - start)
  del stream  # ends the workers, which would take cores from the step
  state = jax.tree.map(lambda x: x.copy(), state)
  run = lambda state: jax.block_until_ready(step(state, batch, key, teacher))[0]
  state = run(state)
  start = time.perf_counter()
  for _ in range(STEPS):
    state = run(state)
  return Throughput(read, size * STEPS / (time.perf_counter() - start))


def tell(measured: Throughput, name: str, show: bool) -> dict[str, Any]:
  """Returns the entry for the file of a run, and prints it if `show` is true."""
  if show:
    print(f'{name}: {measured}', flush=True)
  return {'stage': name, **measured._asdict(), 'input_bound': measured.input_bound}
