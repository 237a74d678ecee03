"""Held-out texts, continued by a network before its cut, after it, and once healed."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from depthprune.models.decoder import Decoder
from depthprune.models.generation import generate
from depthprune.run import data
from depthprune.run.job import Job

if TYPE_CHECKING:
  from depthprune.run.rounds import Shrunk

TEXTS, READ, WRITTEN = 3, 16, 24  # texts; tokens of a prompt; tokens after it


def samples(job: Job, model: Any, small: 'Shrunk') -> list[dict[str, str]]:
  """Returns a few prompts, and the most probable tokens after them.

  Args:
    job: the run, whose held-out texts begin the prompts.
    model: the network before the cut.
    small: what it became.

  Returns:
    A dict for each `Sample`, with 'prompt', 'whole', 'cut' and, if the network was
    trained after its cut, 'healed'. None for a network that does not write, or that has
    no positions for more than a prompt.
  """
  if not all(isinstance(m, Decoder) for m in (model, small.model)):
    return []
  rows = job.images.held_out['image']
  chosen = np.unique(np.linspace(0, len(rows) - 1, TEXTS).astype(int))
  prompts = rows[chosen, : max(1, min(READ, rows.shape[1] // 2))]
  steps = min(WRITTEN, model.positions - prompts.shape[1])
  if steps < 1:
    return []
  networks = {
    'whole': (model, small.before),
    'cut': (small.model, small.recalibrated),
    'healed': (small.model, small.variables),
  }
  if not job.config.epochs.finetune:
    del networks['healed']
  decode = data.writing(job.config).decode

  def texts(tokens: Any) -> Iterator[str]:
    for row in np.asarray(tokens).tolist():
      yield decode(row, skip_special_tokens=False)

  found = {'prompt': [*texts(prompts)]}
  for name, (network, variables) in networks.items():
    text = generate(network, variables, jnp.asarray(prompts), steps)
    found[name] = [*texts(text[:, prompts.shape[1] :])]
  return [dict(zip(found, each)) for each in zip(*found.values(), strict=True)]
