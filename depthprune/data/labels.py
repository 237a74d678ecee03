"""Labels of a user's own data: classes are numbered, and a test split is set apart."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from depthprune.data.dataset import DataError

SPLITS = {
  'train': ('train', 'training'),
  'validation': ('validation', 'val', 'valid', 'dev'),
  'test': ('test', 'testing'),
}
"""The splits, and the words for each in the names of folders, arrays and columns."""

_SHOWN = 5  # labels and classes that a message lists, at most


class Parts(NamedTuple):
  """Examples of a data set, split as they are stored.

  Attributes:
    items: {'train': [n, ...], ...}, arrays whose rows are examples, such as images,
      file names or texts.
    labels: {'train': int32 [n], ...}, numbers of the classes.
    names: names of the classes, () if they are numbered from 0 as they are.
    notes: sentences about the data that belong beside any result.
  """

  items: dict[str, np.ndarray]
  labels: dict[str, np.ndarray]
  names: tuple[str, ...]
  notes: tuple[str, ...]

  @property
  def classes(self) -> int:
    """Number of classes."""
    return int(self.labels['train'].max()) + 1


def split_of(word: str) -> str | None:
  """Returns 'train', 'validation' or 'test' for one of its words, else None."""
  return next((s for s, words in SPLITS.items() if word.lower() in words), None)


def number(
  name: str, items: Mapping[str, np.ndarray], given: Mapping[str, Any]
) -> Parts:
  """Numbers the classes: they are the distinct labels of the training split, sorted.

  Labels may be integers that start anywhere, whole floats, strings, or one-hot rows.

  Args:
    name: name of the data, for messages.
    items: examples of each split.
    given: labels of each split.

  Raises:
    DataError: there is no training example, the labels are of another kind or of
      another number than the examples, there is one class alone, or a label of another
      split is not a class of the training split.
  """
  if 'train' not in given or not len(items['train']):
    raise DataError(f'data {name}: expected examples to train on, got none')
  labels = {
    split: _flat(f'data {name}: {split} labels', y) for split, y in given.items()
  }
  for split, y in labels.items():
    if len(y) != len(items[split]):
      raise DataError(
        f'data {name}: expected a label for each example of the {split} split, got '
        f'{len(items[split])} examples and {len(y)} labels'
      )
  known = np.unique(labels['train'])
  if len(known) < 2:
    raise DataError(
      f'data {name}: expected two classes or more, got {known.tolist()[0]!r} alone'
    )
  for split, y in labels.items():
    beyond = [label for label in np.unique(y).tolist() if label not in known.tolist()]
    if beyond:
      raise DataError(
        f'data {name}: the {split} split has the {_listed("label", beyond)}, of which '
        f'the training split has none; its classes are {_listed("", known.tolist())}'
      )
  numbers = {s: np.searchsorted(known, y).astype(np.int32) for s, y in labels.items()}
  if np.array_equal(known, np.arange(len(known))):
    return Parts(dict(items), numbers, (), ())
  notes = ()
  if known.dtype.kind in 'iu':
    notes = (f'classes 0 to {len(known) - 1} are {_listed("label", known.tolist())}',)
  return Parts(dict(items), numbers, tuple(map(str, known.tolist())), notes)


def tested(name: str, parts: Parts, keys: Sequence[str] | None = None) -> Parts:
  """Returns the parts with a test split.

  Where none is stored, the validation split is the test split. Without that either, it
  is a quarter of every class, which depends on the names of the examples alone.

  Args:
    name: name of the data, for notes.
    parts: the parts, which have a training split.
    keys: names of the training examples; None takes their numbers.
  """
  items, labels, notes = dict(parts.items), dict(parts.labels), parts.notes
  if 'test' in items:
    return parts
  if 'validation' in items:
    items['test'], labels['test'] = items.pop('validation'), labels.pop('validation')
    note = f'{name} has no test split: its validation split is tested on'
    return parts._replace(items=items, labels=labels, notes=(*notes, note))
  label = labels['train']
  keys = [str(i) for i in range(len(label))] if keys is None else keys
  digest = np.array([hashlib.sha256(key.encode()).hexdigest() for key in keys])
  apart = np.zeros(len(label), bool)
  for each in range(parts.classes):
    rows = np.flatnonzero(label == each)
    most = min(max(1, len(rows) // 4), len(rows) - 1)
    apart[rows[np.argsort(digest[rows], kind='stable')[:most]]] = True
  for of in (items, labels):
    of['test'], of['train'] = of['train'][apart], of['train'][~apart]
  note = f'{name} has no test split: a quarter of every class is set apart'
  return parts._replace(items=items, labels=labels, notes=(*notes, note))


def untrained(names: Sequence[str], classes: int, label: np.ndarray) -> tuple[str, ...]:
  """Returns a note that names the classes without any training example, or ()."""
  missing = sorted({*range(classes)} - {*np.unique(label).tolist()})
  shown = [names[i] if names else i for i in missing]
  return (f'no training example of {_listed("class", shown)}',) if missing else ()


def _flat(where: str, given: Any) -> np.ndarray:
  """Returns labels [n] as integers or strings."""
  y: Any = np.asarray(given)
  if y.dtype.kind == 'O' and all(isinstance(label, str) for label in y.ravel()):
    y = y.astype(str)
  if y.dtype.kind == 'S':
    y = np.char.decode(y, 'utf-8')
  if y.ndim == 2 and y.shape[1] == 1:
    y = y[:, 0]
  if y.ndim == 2 and y.dtype.kind in 'biuf':
    wrong = np.flatnonzero(~(((y == 0) | (y == 1)).all(1) & (y.sum(1) == 1)))
    if len(wrong):
      raise DataError(
        f'{where}: expected one class an example, [n] or one-hot [n, classes], got '
        f'{y.shape[1]} numbers an example, in row {wrong[0]} {y[wrong[0]].tolist()}'
      )
    return y.argmax(1)
  if y.ndim != 1 or y.dtype.kind not in 'biufU':
    raise DataError(
      f'{where}: expected a class for each example, integers or strings [n], got '
      f'{y.dtype} {list(y.shape)}'
    )
  if y.dtype.kind == 'f':
    broken = np.flatnonzero(~(np.isfinite(y) & (y == np.round(y))))
    if len(broken):
      raise DataError(
        f'{where}: expected classes, whole numbers or strings, got {y[broken[0]]} in '
        f'row {broken[0]}'
      )
    y = y.astype(np.int64)
  return y.astype(np.int64) if y.dtype.kind == 'b' else y


def _listed(noun: str, values: Sequence[Any]) -> str:
  """Returns `labels 1, 2, 3`, or the first few and how many there are."""
  words = ', '.join(map(str, values[:_SHOWN]))
  more = f', ... ({len(values)})' if len(values) > _SHOWN else ''
  plural = {'label': 'labels', 'class': 'classes'}.get(noun, noun)
  return f'{noun if len(values) == 1 else plural} {words}{more}'.strip()
