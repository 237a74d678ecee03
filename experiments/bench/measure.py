"""What the benchmarks share: inputs, networks, training steps and result files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import depthprune as dp
from depthprune.program.coupling import Coupling
from depthprune.run.job import surroundings
from depthprune.storage import directory as record
from depthprune.train import task as tasks
from depthprune.train.method import Method
from depthprune.train.step import init_state
from depthprune.train.task import Tree

RESULTS = Path(__file__).parent / 'results'
CLASSES = 10


class Network(NamedTuple):
  """A network with random weights, and its groups."""

  model: Any
  variables: Tree
  coupling: Coupling


def write(name: str, content: Mapping[str, Any]) -> None:
  """Writes results/NAME.json: the command, the versions, the device, the content."""
  header = surroundings()
  record.write(RESULTS / f'{name}.json', {**header, **content})


def random_images(size: int, *shape: int) -> jax.Array:
  """Normally distributed images, always the same: [size, *shape]."""
  draw = np.random.default_rng(0).normal(size=(size, *shape))
  return jnp.asarray(draw, jnp.float32)


def random_batch(
  rng: np.random.Generator, shape: tuple[int, ...], labels: tuple[int, ...]
) -> dict[str, jax.Array]:
  """Images of a shape with random labels; both shapes begin with the batch."""
  return {
    'image': jnp.asarray(rng.normal(size=shape), jnp.float32),
    'label': jnp.asarray(rng.integers(0, CLASSES, labels), jnp.int32),
  }


def initialised(model: Any, images: jax.Array, seed: int = 0) -> Network:
  """A module with random weights; `images` are such as it will see."""
  variables = jax.jit(model.init)(jax.random.key(seed), images[:1])
  return Network(model, variables, dp.couple(model, variables, images[:1]))


def training_step(
  model: Any,
  variables: Tree,
  method: Method,
  coupling: Coupling | None,
  batch: Mapping[str, jax.Array],
  task: Any = tasks.classification(CLASSES),
) -> Callable[[], Any]:
  """A function without arguments that does the next training step."""
  tx = optax.sgd(0.1, momentum=0.9, nesterov=True)
  state = init_state(model, method, tx, variables, coupling, batch)
  step = dp.make_step(model, method, task, tx, coupling)

  def advance():
    nonlocal state
    state, metrics = step(state, batch, jax.random.key(0))
    return metrics

  return advance


def ratio(times: np.ndarray, base: np.ndarray) -> dict[str, Any]:
  """Median and quartiles of the ratio of two calls that were timed by turns."""
  lower, median, upper = np.percentile(times / base, (25, 50, 75))
  return {'ratio': float(median), 'quartiles': [float(lower), float(upper)]}
