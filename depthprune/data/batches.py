"""Batches of arrays and of iterables, for training and judging in one's own program.

A source is one of

  arrays     a dict of them, {'image': ..., 'label': ...}, or a tuple (x, y)
  iterable   of batches, each such a dict or pair: a list, a tf.data.Dataset, a loader
             of Grain or PyTorch, a generator

In both, x is the network's input (a tuple of several), and y the labels.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from depthprune.data.dataset import DataError, count
from depthprune.data.features import FeatureSampler
from depthprune.program.arguments import described
from depthprune.program.arguments import whole as whole_number

# What other libraries call the entries of a batch.
NAMES = {
  'x': 'input',
  'inputs': 'input',
  'images': 'image',
  'input_ids': 'tokens',
  'attention_mask': 'mask',
  'token_type_ids': 'types',
  'y': 'label',
  'labels': 'label',
  'target': 'label',
  'targets': 'label',
}


def named(batch: Any) -> dict[str, Any]:
  """Returns a batch, or arrays, by the names that `inputs_of` and tasks know.

  Integer labels become int32, and a mask becomes bool. Tensors of other libraries
  become numpy arrays.

  Raises:
    DataError: it is neither a dict nor a pair.
  """
  if not isinstance(batch, Mapping):
    if not isinstance(batch, tuple | list) or len(batch) != 2:
      raise DataError(
        "data: expected batches {'image': x, 'label': y} or (x, y), got "
        f'{described(batch)}; one batch goes into a list: [batch]'
      )
    x, y = batch
    if isinstance(y, Mapping | str):
      raise DataError(f'data: expected labels y in (x, y), got {described(y)}')
    batch = {'input': tuple(x) if isinstance(x, tuple | list) else x, 'label': y}
  made: dict[str, Any] = {}
  for key, value in batch.items():
    name: Any = NAMES.get(key, key)
    made[key if name in batch else name] = jax.tree.map(_array, value)
  label, mask = (made.get(k, ()) for k in ('label', 'mask'))
  if hasattr(label, 'dtype') and label.dtype.kind in 'iu':
    made['label'] = label.astype(np.int32)
  if hasattr(mask, 'dtype'):
    made['mask'] = mask.astype(bool)
  return made


def _array(x: Any) -> Any:
  if isinstance(x, np.ndarray | jax.Array):
    return x
  if hasattr(x, 'detach'):  # of PyTorch, perhaps on another device
    x = x.detach().cpu()
  return np.asarray(x)


def are_arrays(source: Any) -> bool:
  """Whether a source is arrays, and not batches."""
  pair = isinstance(source, tuple) and len(source) == 2
  return isinstance(source, Mapping) or (
    pair and not isinstance(source[1], Mapping | tuple | list)
  )


def sampled(source: Any, key: jax.Array, size: int) -> tuple[Callable, Any]:
  """Returns (batch_at, data) of a source, to train on.

  Every epoch goes through arrays in a new order; the rows that are left over are others
  each time. An iterable is gone through as it is, again and again if it can be.

  Args:
    source: arrays or an iterable.
    key: random key of the orders.
    size: examples in a batch of arrays.

  Raises:
    DataError: the source is of another kind, or arrays differ in length; or, from
      batch_at, an iterator has ended.
  """
  if are_arrays(source):
    return FeatureSampler(key, size), jax.device_put(_of_one_length(source))
  return _Iterated(_iterable(source)), None


class _Iterated:
  """batch_at(data, step) of an iterable: its next batch, whatever the step."""

  on_host = True

  def __init__(self, source: Iterable):
    self.source, self.left, self.seen = source, iter(source), 0

  def __call__(self, data: Any, step: int) -> dict[str, Any]:
    del data
    batch = next(self.left, None)
    if batch is None:
      self.left = iter(self.source)
      batch = next(self.left, None)
    if batch is None:
      raise DataError(
        f'data: ended after {self.seen} batches, at step {step}: expected something '
        'that can be iterated again, such as a list or a loader, or an iterator '
        'without an end'
      )
    self.seen += 1
    return named(batch)


def whole(source: Any, size: int) -> list[dict[str, Any]]:
  """Returns all examples of a source once, in batches of one size, to judge on.

  Where batches differ in size, the smaller ones are filled with copies of their last
  row, of 'weight' 0.

  Args:
    source: arrays or an iterable.
    size: examples in a batch of arrays, at most.

  Raises:
    DataError: the source is of another kind, or arrays differ in length.
  """
  size = whole_number('batch', size)
  batches = _in_order(source, size)
  most = max(map(_size, batches), default=0)
  return [each if _size(each) == most else _filled(each, most) for each in batches]


def full(source: Any, size: int) -> list[dict[str, Any]]:
  """Returns the batches of a source; of arrays without the rows that fill no batch.

  Nothing is padded, as padding would count in batch statistics. Arguments and errors
  are those of `whole`.
  """
  batches = _in_order(source, size)
  short = are_arrays(source) and len(batches) > 1 and _size(batches[-1]) < size
  return batches[:-1] if short else batches


def _in_order(source: Any, size: int) -> list[dict[str, Any]]:
  if not are_arrays(source):
    return [named(batch) for batch in _iterable(source)]
  arrays = _of_one_length(source)
  rows = lambda i: jax.tree.map(lambda x: x[i : i + size], arrays)
  return [rows(i) for i in range(0, _size(arrays), size)]


def _of_one_length(source: Any) -> dict[str, Any]:
  arrays = named(source)
  sizes = {k: [len(x) for x in jax.tree.leaves(v)] for k, v in arrays.items()}
  if len({n for of in sizes.values() for n in of}) != 1:
    raise DataError(f'data: expected arrays of one length, got {sizes}')
  return arrays


def _size(batch: Mapping[str, Any]) -> int:
  return count(batch.get('label', batch))


def _filled(batch: dict[str, Any], size: int) -> dict[str, Any]:
  n = _size(batch)
  weight = np.asarray(batch.get('weight', np.ones(n)), np.float32)
  rows = np.arange(size).clip(max=n - 1)
  filled = jax.tree.map(lambda x: x[rows], batch)
  return {**filled, 'weight': np.where(np.arange(size) < n, weight[rows], 0)}


def _iterable(source: Any) -> Iterable:
  if not hasattr(source, '__iter__') or hasattr(source, 'shape'):
    raise DataError(
      "data: expected arrays ({'image': x, 'label': y} or (x, y)), an iterable of such "
      f'batches, or a function, got {described(source)}'
    )
  return source
