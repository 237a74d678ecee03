"""The labels of a batch, checked against the logits before they meet.

Types and shapes are looked at in every batch, which costs nothing in a compiled step.
Values are looked at where the labels lie in the memory of the host.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.program.arguments import listed, refused, whole, wrong
from depthprune.program.trace import is_array


def check_count(classes: Any) -> None:
  """Checks the number of classes of a task.

  Raises:
    TypeError: it is no whole number.
    ValueError: it is below 2.
  """
  whole('classes', classes, 2, 'write how many there are, such as len(names)')


def of(batch: Mapping[str, Any]) -> Any:
  """Returns the labels of a batch, an array or a dict of them.

  Raises:
    ValueError: there are none.
    TypeError: they are no arrays.
  """
  if 'label' not in batch:
    got = f'expected an entry for the task to read (label), got {listed(batch)}'
    raise wrong('batch', got, "write {'image': x, 'label': y}")
  labels = batch['label']
  if not all(
    map(is_array, labels.values() if isinstance(labels, Mapping) else [labels])
  ):
    raise refused("batch['label']", 'an array', labels, 'write numpy.asarray(labels)')
  return labels


def integers(logits: jax.Array, batch: Mapping[str, Any], classes: int) -> jax.Array:
  """Returns the classes int [...] that the labels of logits [..., classes] name.

  Raises:
    ValueError: the logits are of another number of classes, or the labels are no whole
      numbers or have another shape.
  """
  label = of(batch)
  if logits.shape[-1:] != (classes,):
    raise wrong(
      'task',
      f'{classes} classes need logits [..., {classes}], got {[*logits.shape]}',
      'give the task and the network as many classes',
    )
  counts = jnp.issubdtype(label.dtype, np.integer)
  if not counts or label.shape != logits.shape[:-1]:
    write = '' if counts else 'write labels.astype(int)'
    write = 'write labels.argmax(-1)' if label.shape == logits.shape else write
    expected = f'integers {[*logits.shape[:-1]]}, a class for every answer'
    raise refused("batch['label']", expected, label, write, ValueError)
  return label


def in_range(batch: Mapping[str, Any], classes: int) -> None:
  """Checks the classes that labels name, where they lie in the memory of the host.

  Negative labels are allowed where an example has several: they are left out.

  Raises:
    ValueError: a label is no class.
  """
  label = batch['label']
  if (
    not isinstance(label, np.ndarray) or label.dtype.kind not in 'iu' or not label.size
  ):
    return
  low, high = int(label.min()), int(label.max())
  if high >= classes or (low < 0 and label.ndim == 1):
    raise wrong(
      "batch['label']",
      f'expected classes from 0 to {classes - 1}, got {low} to {high}',
      'number the classes from 0, or give the task more of them',
    )


def numbers(
  logits: jax.Array, batch: Mapping[str, Any], most: int
) -> tuple[jax.Array, jax.Array]:
  """Returns logits and labels [batch, most]; both may be [batch] where `most` is 1.

  Raises:
    ValueError: the logits or the labels have another shape.
  """
  rows = lambda x: x.reshape(x.shape[0] if x.ndim else 1, -1)
  x, y = rows(logits), rows(jnp.asarray(of(batch)))
  if logits.ndim not in (1, 2) or x.shape[1] != most:
    raise wrong(
      'task',
      f'{most} answers need logits [batch, {most}], got {[*logits.shape]}',
      'give the task and the network as many',
    )
  if x.shape != y.shape:
    expected = f'shape {[*logits.shape]}, as the logits have it'
    raise refused("batch['label']", expected, batch['label'], kind=ValueError)
  return x, y


def per_pixel(logits, batch: Mapping[str, Any], classes: int, ignore: int | None):
  """Returns (label int32, weight float32), both [batch, height, width].

  Labels that are negative or `ignore` have weight 0.

  Raises:
    ValueError: as for `integers`; or there are no rows and columns.
  """
  label = jnp.asarray(integers(logits, batch, classes)).astype(jnp.int32)
  if label.ndim != 3:
    expected = 'integers [batch, height, width]'
    raise refused("batch['label']", expected, label, kind=ValueError)
  counts = label >= 0 if ignore is None else (label >= 0) & (label != ignore)
  weight = counts.astype(jnp.float32)
  if 'weight' in batch:
    weight *= batch['weight'][:, None, None].astype(jnp.float32)
  return jnp.where(counts, label, 0), weight


def per_token(logits, batch: Mapping[str, Any], classes: int):
  """Makes an example of every token: logits [n, classes] and their batch.

  Raises:
    ValueError: as for `integers`.
  """
  label = integers(logits, batch, classes)
  if label.ndim == 1:
    return logits, batch
  weight = jnp.asarray(batch.get('weight', 1.0), jnp.float32)
  weight = jnp.where(label < 0, 0, jnp.broadcast_to(weight, label.shape[::-1]).T)
  flat = {'label': jnp.maximum(label, 0).reshape(-1), 'weight': weight.reshape(-1)}
  return logits.reshape(-1, classes), flat
