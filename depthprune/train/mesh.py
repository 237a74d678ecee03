"""Training on several devices: batches are split, and weights may be split too.

A mesh has two axes: the examples of a batch are split over 'data', and the weights with
their optimizer state over 'model'. The program is that of one device and XLA partitions
it, so means and batch statistics are those of the complete batch.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from depthprune.data.dataset import Placement
from depthprune.train.options import ConfigError, axes
from depthprune.train.task import Tree

AXES = ('data', 'model')
ROWS = P('data')


def make_mesh(asked: str | None, batch: int) -> Mesh:
  """Makes the mesh of a run.

  Args:
    asked: the axes, such as 'data=4,model=2'. None takes one device, or all devices
      where there are several processes.
    batch: examples in a batch.

  Raises:
    ConfigError: there are fewer devices, several processes would not use all devices,
      or the data axis does not divide the batch.
  """
  devices, processes = jax.devices(), jax.process_count()
  data, model = axes(asked or ('data' if processes > 1 else 'data=1'))
  data = data or max(1, len(devices) // model)
  size, there = data * model, len(devices)
  if size > there:
    most = f'data={there // model}' if model <= there else f'model={there}'
    raise ConfigError(
      f'mesh: data={data},model={model} takes {size} devices, there are {there} '
      f'({devices[0].device_kind}): ask for at most {most}, or leave the number out'
    )
  if processes > 1 and size < there:
    raise ConfigError(
      f'mesh: data={data},model={model} takes {size} devices, but {processes} '
      f'processes have {there} and all must take part: choose numbers whose product '
      f'is {there}'
    )
  if batch % data:
    raise ConfigError(
      f'batch: expected a multiple of {data}, as the mesh splits a batch over {data} '
      f'devices, got {batch}: the nearest is {nearest(batch, data)}'
    )
  kinds = (AxisType.Auto, AxisType.Auto)
  return jax.make_mesh((data, model), AXES, axis_types=kinds, devices=devices[:size])


def nearest(number: int, of: int) -> int:
  """Returns the positive multiple of `of` that is nearest to a number."""
  return max(1, (number + of // 2) // of) * of


def by_rows(mesh: Mesh, tree: Tree) -> Tree:
  """Splits arrays [batch, ...], which every process holds completely, over 'data'."""
  return _laid(tree, lambda x: NamedSharding(mesh, ROWS))


def rows_here(mesh: Mesh, size: int) -> np.ndarray:
  """Returns the rows of a batch of `size` that this process's devices hold, sorted."""
  where = NamedSharding(mesh, ROWS).addressable_devices_indices_map((size,))
  return np.unique(np.concatenate([np.arange(size)[part] for part in where.values()]))


def placement(mesh: Mesh) -> Placement:
  """Returns how batches are split over 'data'."""

  def joined(size, tree):  # every process has the rows that are here
    make = partial(jax.make_array_from_process_local_data, NamedSharding(mesh, ROWS))
    return jax.tree.map(lambda x: make(x, (size, *x.shape[1:])), tree)

  return Placement(partial(by_rows, mesh), partial(rows_here, mesh), joined)


def by_weights(mesh: Mesh, tree: Tree) -> Tree:
  """Splits weights, or arrays shaped like them, over 'model' where that is possible.

  Arrays with two or more axes are split along the last axis that 'model' divides; all
  others are copied to every device.
  """
  return _laid(tree, lambda x: NamedSharding(mesh, _spec(mesh, np.shape(x))))


def replicate(mesh: Mesh, tree: Tree) -> Tree:
  """Copies arrays to every device."""
  return _laid(tree, lambda x: NamedSharding(mesh, P()))


def _spec(mesh: Mesh, shape: tuple[int, ...]) -> P:
  parts = mesh.shape['model']
  divided = [i for i, size in enumerate(shape) if size % parts == 0 and size]
  if parts == 1 or len(shape) < 2 or not divided:
    return P()
  return P(*(None,) * divided[-1], 'model')


def _laid(tree: Tree, sharding: Callable[[Any], NamedSharding]) -> Tree:
  """Puts arrays on the mesh; inside jit, constrains them to lie there."""

  def one(x):
    where = sharding(x)
    if isinstance(x, Tracer):
      return jax.lax.with_sharding_constraint(x, where)
    if where.is_fully_addressable or not getattr(x, 'is_fully_addressable', True):
      return jax.device_put(x, where)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, where, lambda part: x[part])

  return jax.tree.map(one, tree)


class Sharded(NamedTuple):
  """A sampler whose batches are split over the mesh, for `fit`."""

  sampler: Any
  mesh: Mesh

  @property
  def on_host(self) -> bool:
    return self.sampler.on_host

  def __call__(self, split: Tree, step: jax.Array | int) -> Tree:
    return by_rows(self.mesh, self.sampler(split, step))

  def stepwise(self) -> Callable[[Tree, int], Tree]:
    return self.sampler.stepwise(placement(self.mesh))
