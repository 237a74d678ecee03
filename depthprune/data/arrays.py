"""Arrays of a user's own: an .npz file, a table, or what a function returns.

What is accepted, for a training split, or with splits:

  {'x': ..., 'y': ...}, (x, y)                 also image, images, features, text, ...
  {'x_train', 'y_train', 'x_test', 'y_test'}   also train_images, val_labels, ...
  ((x, y), (x_test, y_test))                   a training and a test split

Examples are images [n, height, width, channels] or [n, height, width], rows of numbers
[n, features], or texts, an array or a list of strings or of pairs of them. Labels are
as `labels.number` takes them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from depthprune.data import labels
from depthprune.data.dataset import DataError
from depthprune.data.labels import Parts
from depthprune.data.text import TextSource
from depthprune.data.tfds import ImageSource, sized
from depthprune.storage import files

EXAMPLES = (
  *('x', 'image', 'images', 'data', 'features', 'input', 'inputs'),
  *('text', 'texts', 'sentence', 'sentences'),
)
"""The names that an array of examples may have."""

LABELS = ('y', 'label', 'labels', 'class', 'target', 'targets')
"""The names that an array of labels may have."""

_EXPECTED = (
  'x and y (or image and label), or x_train, y_train, x_test and y_test, and x_val and '
  'y_val if you have them'
)


def read_npz(path: str) -> dict[str, np.ndarray]:
  """Reads all arrays of an .npz file.

  Raises:
    DataError: there is no such file, it is damaged, or an array holds objects.
  """
  if not Path(path).is_file():
    raise DataError(f'data {path}: there is no such file')
  try:
    return files.read_npz(Path(path), DataError)
  except DataError as error:
    raise DataError(
      f'data {error}; arrays of objects, such as images of unlike sizes, go into a '
      'folder'
    ) from error


def source(
  name: str, given: Any, resize: int | None = None
) -> ImageSource | TextSource:
  """Returns a data set of arrays as one to be divided and batched.

  Args:
    name: name of the data, for messages.
    given: the arrays, see the module docstring.
    resize: side in pixels of the square that images are scaled and cropped to.

  Raises:
    DataError: the arrays are of another form; the message names them and says what was
      expected.
  """
  examples, given_labels = _by_split(name, given)
  texts = {split: _texts(x) for split, x in examples.items()}
  if all(x is not None for x in texts.values()):
    if resize is not None:
      raise DataError(f'data {name}: resize is for images, these are texts')
    parts = labels.number(name, texts, given_labels)  # pyright: ignore[reportArgumentType]
    return _text_source(labels.tested(name, parts))
  arrays = {split: _numbers(name, split, x) for split, x in examples.items()}
  kinds = {split: f'{x.dtype} {list(x.shape[1:])}' for split, x in arrays.items()}
  if len({*kinds.values()}) > 1:
    said = ', '.join(f'{split}: {kind}' for split, kind in kinds.items())
    raise DataError(
      f'data {name}: expected examples of one shape and type in all splits, got {said}'
    )
  parts = labels.tested(name, labels.number(name, arrays, given_labels))
  first = parts.items['train'][0]
  if resize is not None and first.ndim < 3:
    raise DataError(f'data {name}: resize is for images, these are rows of numbers')

  def read(split: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    image = parts.items[split][rows]
    if resize is not None and len(image):
      image = np.stack([sized(one, resize) for one in image])
    return {'image': image, 'label': parts.labels[split][rows]}

  return ImageSource(
    len(parts.items['train']),
    len(parts.items['test']),
    first.shape if resize is None else (resize, resize, first.shape[2]),
    parts.classes,
    255.0 if first.dtype == np.uint8 else 1.0,
    read,
    validation=len(parts.items.get('validation', ())),
    names=parts.names,
    notes=parts.notes,
  )


def _by_split(name: str, given: Any) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns ({split: examples}, {split: labels})."""
  if isinstance(given, tuple | list):
    pairs = [given] if not _is_pair(given) else list(given)
    if any(not isinstance(p, tuple | list) or len(p) != 2 for p in pairs):
      raise DataError(
        f'data {name}: expected (x, y) or ((x, y), (x_test, y_test)), got '
        f'{len(given)} values'
      )
    splits = ('train', 'test') if len(pairs) < 3 else ('train', 'validation', 'test')
    return (
      {split: x for split, (x, _) in zip(splits, pairs)},
      {split: y for split, (_, y) in zip(splits, pairs)},
    )
  if not isinstance(given, Mapping):
    raise DataError(
      f'data {name}: expected a dict of arrays ({_EXPECTED}) or a pair (x, y), got a '
      f'{type(given).__name__}'
    )
  found: dict[str, dict[str, str]] = {'examples': {}, 'labels': {}}
  for key in given:
    read = _key(str(key))
    if read is None:
      continue
    kind, split = read
    if split in found[kind]:
      raise DataError(
        f'data {name}: {found[kind][split]} and {key} may both be the {kind} of the '
        f'{split} split: leave one of them out'
      )
    found[kind][split] = key
  if (
    'train' not in found['examples']
    or found['examples'].keys() != found['labels'].keys()
  ):
    raise DataError(
      f'data {name}: expected the arrays {_EXPECTED}, got {", ".join(map(str, given))}'
    )
  of = lambda kind: {split: given[key] for split, key in found[kind].items()}
  return of('examples'), of('labels')


def _is_pair(given: Sequence[Any]) -> bool:
  """Whether all entries are pairs (x, y), and `given` is not such a pair itself."""
  inside = lambda p: isinstance(p, tuple) and len(p) == 2
  return len(given) in (2, 3) and all(map(inside, given))


def _key(key: str) -> tuple[str, str] | None:
  """Returns ('examples' or 'labels', split) of an array's name, None for others."""
  word, split, text = key.lower(), 'train', key.lower()
  for sign in '_-./':
    text = text.replace(sign, '_')
  head, _, tail = text.partition('_')
  if of := labels.split_of(head):
    word, split = tail, of
  elif of := labels.split_of(text.rpartition('_')[2]):
    word, split = text.rpartition('_')[0], of
  for kind, words in (('examples', EXAMPLES), ('labels', LABELS)):
    if word in words:
      return kind, split
  return None


def _texts(x: Any) -> np.ndarray | None:
  """Returns texts [n] as objects, pairs as tuples; None for anything else."""
  if isinstance(x, np.ndarray) and x.dtype.kind == 'S':
    x = np.char.decode(x, 'utf-8', 'replace')
  rows = x.tolist() if isinstance(x, np.ndarray) and x.dtype.kind in 'UO' else x
  if not isinstance(rows, list | tuple) or not len(rows):
    return None
  pair = lambda r: isinstance(r, list | tuple) and [*map(type, r)] == [str, str]
  if not all(isinstance(row, str) for row in rows) and not all(map(pair, rows)):
    return None
  made = np.empty(len(rows), object)
  made[:] = [row if isinstance(row, str) else tuple(row) for row in rows]
  return made


def _text_source(parts: Parts) -> TextSource:
  items = parts.items
  first = items['train'][0]
  read = lambda split, rows: (items[split][rows].tolist(), parts.labels[split][rows])
  return TextSource(
    train=len(items['train']),
    test=len(items['test']),
    pair=isinstance(first, tuple),
    classes=parts.classes,
    columns=(),
    splits=tuple(items),
    read=read,
    validation=len(items.get('validation', ())),
    notes=parts.notes,
  )


def _numbers(name: str, split: str, given: Any) -> np.ndarray:
  """Returns uint8 or float32 [n, height, width, channels] or [n, features]."""
  where = f'data {name}: {split} examples'
  try:
    x = np.asarray(given)
  except ValueError as error:  # rows of unlike lengths
    raise DataError(
      f'{where}: expected one array, all examples of one shape: {error}'
    ) from error
  if x.dtype.kind not in 'biuf':
    raise DataError(
      f'{where}: expected numbers, all examples of one shape, got {x.dtype} '
      f'{list(x.shape)}'
    )
  x = x[..., None] if x.ndim == 3 else x
  if x.ndim not in (2, 4) or 0 in x.shape[1:]:
    raise DataError(
      f'{where}: expected images [n, height, width, channels], grey images [n, height, '
      f'width] or rows [n, features], got {list(np.shape(given))}'
    )
  if x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[3] > 4:
    raise DataError(
      f'{where}: got {list(x.shape)}, which looks like channels before height and '
      'width; expected [n, height, width, channels]: x.transpose(0, 2, 3, 1)'
    )
  if x.dtype.kind in 'biu':
    low, high = (int(x.min()), int(x.max())) if x.size else (0, 0)
    return x.astype(np.uint8 if low >= 0 and high < 256 and x.ndim > 2 else np.float32)
  broken = np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(1))
  if len(broken):
    raise DataError(f'{where}: example {broken[0]} has a number that is not finite')
  return x.astype(np.float32)
