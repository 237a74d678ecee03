"""How fast images are read, beside how fast the training step wants them."""

import time
from typing import Any, NamedTuple

import jax

STEPS = 3  # that are timed


class Throughput(NamedTuple):
  """Images per second: of the pipeline alone, and of the step on a batch that is there.

  read: what the pipeline gives when nothing else runs. needed: what the step takes.
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
  """Reads some batches alone, then runs the step on one of them, of a copied state.

  batch_at: a sampler of streamed images, split over a mesh. The others as for `fit`.
  """
  stream, size, many = (
    batch_at.stepwise(),
    batch_at.sampler.size,
    batch_at.sampler.depth,
  )
  batch: Any = None
  for i in range(many):  # those that are made while nobody waits prove nothing
    jax.block_until_ready(stream(split, i))
  start = time.perf_counter()
  for i in range(many, 2 * many):
    batch = jax.block_until_ready(stream(split, i))
  read = size * many / (time.perf_counter() - start)
  del stream  # the workers end, and leave the cores to the step
  state = jax.tree.map(lambda x: x.copy(), state)
  run = lambda state: jax.block_until_ready(step(state, batch, key, teacher))[0]
  state = run(state)
  start = time.perf_counter()
  for _ in range(STEPS):
    state = run(state)
  return Throughput(read, size * STEPS / (time.perf_counter() - start))


def tell(found: Throughput, name: str, show: bool) -> dict[str, Any]:
  """The line for the file of a run; `show`: printed too."""
  if show:
    print(f'{name}: {found}', flush=True)
  return {'stage': name, **found._asdict(), 'input_bound': found.input_bound}
