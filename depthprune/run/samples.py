"""Held-out texts, continued by a network and by what a method has made of it."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from depthprune.cascades.confidence import Kind
from depthprune.cascades.generation import generate_early
from depthprune.models.decoder import Decoder
from depthprune.models.generation import generate
from depthprune.models.heads import WithHeads, variables_of_trunk
from depthprune.run import data
from depthprune.run.job import Job
from depthprune.train.task import Tree

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
  writers = {
    'whole': partial(generate, model, small.before),
    'cut': partial(generate, small.model, small.recalibrated),
    'healed': partial(generate, small.model, small.variables),
  }
  if not job.config.epochs.finetune:
    del writers['healed']
  return _continued(job, model.positions, writers)


def early_samples(
  job: Job,
  model: WithHeads,
  variables: Tree,
  exits: Mapping[str, float],
  confidence: Kind,
) -> list[dict[str, str]]:
  """Returns a few prompts with 'whole' and 'early', as `samples` does.

  Args:
    job: the run, whose held-out texts begin the prompts.
    model: a decoder with heads.
    variables: its variables.
    exits: {head: threshold}.
    confidence: the kind of score, see `generate_early`.
  """
  early = lambda prompts, steps: generate_early(
    model, variables, prompts, steps, exits, confidence
  )
  writers = {
    'whole': partial(generate, model.trunk, variables_of_trunk(variables)),
    'early': lambda prompts, steps: early(prompts, steps).tokens,
  }
  return _continued(job, model.trunk.positions, writers)


def _continued(
  job: Job, positions: int, writers: Mapping[str, Callable]
) -> list[dict[str, str]]:
  """Returns prompts, continued by each of `writers`, (prompts, steps) -> texts."""
  rows = job.images.held_out['image']
  chosen = np.unique(np.linspace(0, len(rows) - 1, TEXTS).astype(int))
  prompts = rows[chosen, : max(1, min(READ, rows.shape[1] // 2))]
  steps = min(WRITTEN, positions - prompts.shape[1])
  if steps < 1:
    return []
  decode = data.writing(job.config).decode

  def texts(tokens: Any) -> Iterator[str]:
    for row in np.asarray(tokens).tolist():
      yield decode(row, skip_special_tokens=False)

  found = {'prompt': [*texts(prompts)]}
  for name, write in writers.items():
    text = write(jnp.asarray(prompts), steps)
    found[name] = [*texts(text[:, prompts.shape[1] :])]
  return [dict(zip(found, each)) for each in zip(*found.values(), strict=True)]
