"""Where texts come from: any TFDS text classification set, one text a row or a pair."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from depthprune.training import prepared
from depthprune.training.prepared import DataError

Text = str | tuple[str, str]

_BLOCK = 1024


class Source(NamedTuple):
  """A data set of texts before it is read.

  `read(split, rows)` gives the texts of rows of 'train' or 'test' and their labels,
  int32 [n]. `train` is 0 where there is no training split here, `test` where no split
  to test on is labelled. `columns` names the features, `splits` what is on disk. With
  `pair`, a row is two texts whose relation is asked for; otherwise it is one.
  """

  train: int
  test: int
  pair: bool
  classes: int
  columns: tuple[str, ...]
  splits: tuple[str, ...]
  read: Callable[[str, np.ndarray], tuple[list[Text], np.ndarray]]


def kind_of(name: str, download: bool = False) -> Literal['images', 'text']:
  """What a data set consists of, told from the types of its features.

  'images' also for a set of neither: `data.load` says what it expected. Raises
  DataError as `prepared.find`.
  """
  if name in prepared.OWN:
    return 'images'
  builder = prepared.find(name, download)
  images, texts, labels = _by_type(builder)
  return 'text' if texts and labels and not images else 'images'


def source(name: str, download: bool = False) -> Source:
  """The texts of the TFDS set called `name`, and their classes.

  A row of two texts is a pair, unless the set says that one of them is what its class
  is told from (`supervised_keys`): then the other, such as a title, goes in front of
  it with a space.

  Raises DataError for a name nobody knows, a set that is not prepared on this machine,
  and a set that is not of one text, or two, and a class.
  """
  builder = prepared.find(name, download)
  columns, label_key, pair = _columns(name, builder)
  opened = {s: prepared.open_split(name, builder, s) for s in builder.info.splits}
  found = {'train': opened['train']} if 'train' in opened else {}
  if named := prepared.tested(opened, label_key):
    found['test'] = opened[named]

  def read(split, rows):
    texts, label = [], np.empty(len(rows), np.int32)
    for start in range(0, len(rows), _BLOCK):
      records = found[split].__getitems__(rows[start : start + _BLOCK].tolist())
      for i, record in enumerate(records, start):
        words = tuple(_decoded(record[column]) for column in columns)
        texts.append(words if pair else ' '.join(words))
        label[i] = record[label_key]
    return texts, label

  train, test = (len(found.get(split, ())) for split in ('train', 'test'))
  classes = builder.info.features[label_key].num_classes
  return Source(train, test, pair, classes, columns, tuple(opened), read)


def _columns(name: str, builder: Any) -> tuple[tuple[str, ...], str, bool]:
  """(features with text, in the order of reading; that of the class; a pair?)."""
  _, texts, labels = _by_type(builder)
  keys = builder.info.supervised_keys or (None, None)
  told_from, label = keys[0], keys[1] if keys[1] in labels else (*labels, None)[0]
  if len(texts) not in (1, 2) or label is None:
    raise DataError(
      f'data {name!r}: expected one text, or two, and a class to tell from it, got '
      f'{dict(builder.info.features)}'
    )
  if told_from in texts:
    others = [text for text in texts if text != told_from]
    return (*others, told_from), label, False
  return tuple(texts), label, len(texts) == 2


def _by_type(builder: Any) -> tuple[list[str], list[str], list[str]]:
  """Names of the features that are images, texts and classes."""
  from tensorflow_datasets import features as kinds

  features = dict(builder.info.features)
  of = lambda kind: [k for k, f in features.items() if isinstance(f, kind)]
  return of(kinds.Image), of(kinds.Text), of(kinds.ClassLabel)


def _decoded(text: bytes | str) -> str:
  return text.decode('utf-8', 'replace') if isinstance(text, bytes) else text
