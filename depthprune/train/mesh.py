"""Where arrays lie on several devices: batches split, weights whole or split too.

A mesh has two axes. Over 'data' the examples of a batch are split, over 'model' the
weights, with what the optimizer keeps of them. The program is that of one device: XLA
partitions it, so means, and batch statistics, are those of the whole batch.
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

AXES = ('data', 'model')
ROWS = P('data')
Tree = Any


def of(asked: str | None, batch: int) -> Mesh:
  """The mesh that is asked for, such as 'data=4,model=2'.

  None is one device or, of several processes, all. `batch` is how many examples are
  split over it.

  Raises: ConfigError for more devices than there are, fewer than all where there are
    several processes, and a batch that the data axis does not divide.
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
  """The multiple of `of` that is nearest to a number, and not 0."""
  return max(1, (number + of // 2) // of) * of


def by_rows(mesh: Mesh, tree: Tree) -> Tree:
  """Arrays [batch, ...], that every process has whole, split over 'data'."""
  return _laid(tree, lambda x: NamedSharding(mesh, ROWS))


def rows_here(mesh: Mesh, size: int) -> np.ndarray:
  """Which rows of a batch of `size` lie on this process's devices, sorted."""
  where = NamedSharding(mesh, ROWS).addressable_devices_indices_map((size,))
  return np.unique(np.concatenate([np.arange(size)[part] for part in where.values()]))


def by_own_rows(mesh: Mesh, size: int, tree: Tree) -> Tree:
  """Arrays [size, ...] split over 'data', each process having its `rows_here` alone."""
  where = NamedSharding(mesh, ROWS)
  joined = jax.make_array_from_process_local_data
  return jax.tree.map(lambda x: joined(where, x, (size, *x.shape[1:])), tree)


def placement(mesh: Mesh) -> Placement:
  """How batches are split over 'data'."""
  of = lambda function: partial(function, mesh)
  return Placement(of(by_rows), of(rows_here), of(by_own_rows))


def by_weights(mesh: Mesh, tree: Tree) -> Tree:
  """Weights, or what is shaped like them, split over 'model' where they can be.

  That is along the last axis that 'model' divides, of arrays with two axes or more; all
  others lie whole on every device.
  """
  return _laid(tree, lambda x: NamedSharding(mesh, _spec(mesh, np.shape(x))))


def whole(mesh: Mesh, tree: Tree) -> Tree:
  """Arrays whole on every device."""
  return _laid(tree, lambda x: NamedSharding(mesh, P()))


def _spec(mesh: Mesh, shape: tuple[int, ...]) -> P:
  parts = mesh.shape['model']
  divided = [i for i, size in enumerate(shape) if size % parts == 0 and size]
  if parts == 1 or len(shape) < 2 or not divided:
    return P()
  return P(*(None,) * divided[-1], 'model')


def _laid(tree: Tree, sharding: Callable[[Any], NamedSharding]) -> Tree:
  """The same arrays on the mesh; inside jit, constrained to lie there."""

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
  """A sampler whose batches are split over the mesh: all that `fit` takes."""

  sampler: Any
  mesh: Mesh

  @property
  def on_host(self) -> bool:
    return self.sampler.on_host

  def __call__(self, split: Tree, step: jax.Array | int) -> Tree:
    return by_rows(self.mesh, self.sampler(split, step))

  def stepwise(self) -> Callable[[Tree, int], Tree]:
    return self.sampler.stepwise(placement(self.mesh))
