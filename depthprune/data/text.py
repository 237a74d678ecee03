"""Text classification data sets: read from TFDS, tokenised into memory, batched.

Batches are as long as their longest text needs, in a few fixed lengths (`buckets`), so
that little is computed on padding and few programs are compiled.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.data import dataset, tfds, tokens
from depthprune.data.dataset import (
  HERE,
  Batch,
  DataError,
  Placement,
  Split,
  epoch_steps,
)
from depthprune.data.tokens import Text

SMALLEST = 8  # tokens of the shortest bucket
CHUNK = 50  # batches whose texts are sorted by length together


class TextSource(NamedTuple):
  """A data set of texts before it is read.

  Attributes:
    train: number of training texts, 0 without a training split.
    test: number of test texts, 0 without a labelled split to test on.
    pair: whether a row is two texts that are classified together.
    classes: number of classes.
    columns: names of the features that are texts, in the order in which they are read.
    splits: names of the splits on disk.
    read: (split, rows) -> (texts, labels int32 [n]).
    validation: number of texts of a validation split that is held out, else 0.
    notes: sentences about the data that belong beside any result.
  """

  train: int
  test: int
  pair: bool
  classes: int
  columns: tuple[str, ...]
  splits: tuple[str, ...]
  read: Callable[[str, np.ndarray], tuple[list[Text], np.ndarray]]
  validation: int = 0
  notes: tuple[str, ...] = ()


def kind_of(name: str, download: bool = False) -> Literal['images', 'text']:
  """Returns what a data set consists of, by the types of its features.

  A set of neither counts as 'images', as `images.load` explains what it expected.

  Raises:
    DataError: no set has that name, or it is not on this machine.
  """
  if name in tfds.OWN:
    return 'images'
  builder = tfds.find(name, download)
  images, texts, labels = _by_type(builder)
  return 'text' if texts and labels and not images else 'images'


def source(name: str, download: bool = False) -> TextSource:
  """Returns a TFDS set of texts and classes before it is read.

  A row of two texts is a pair, except where `supervised_keys` of the set names one of
  them as the input: then the other, such as a title, is put in front of it.

  Args:
    name: name of the set.
    download: whether TFDS may fetch a set that is not on this machine.

  Raises:
    DataError: no set has that name, it is not on this machine, or it does not consist
      of one or two texts and a class.
  """
  builder = tfds.find(name, download)
  columns, label_key, pair = _columns(name, builder)
  opened = {s: tfds.open_split(name, builder, s) for s in builder.info.splits}
  splits = {'train': opened['train']} if 'train' in opened else {}
  if test := tfds.tested(opened, label_key):
    splits['test'] = opened[test]

  def read(split, rows):
    texts, label = [], np.empty(len(rows), np.int32)
    for i, record in enumerate(tfds.decoded(splits[split], rows)):
      words = (record[column] for column in columns)
      words = tuple(
        w.decode('utf-8', 'replace') if isinstance(w, bytes) else w for w in words
      )
      texts.append(words if pair else ' '.join(words))
      label[i] = record[label_key]
    return texts, label

  return TextSource(
    train=len(splits.get('train', ())),
    test=len(splits.get('test', ())),
    pair=pair,
    classes=builder.info.features[label_key].num_classes,
    columns=columns,
    splits=tuple(opened),
    read=read,
  )


def _columns(name: str, builder: Any) -> tuple[tuple[str, ...], str, bool]:
  """Returns (text features in reading order, feature of the class, is it a pair)."""
  _, texts, labels = _by_type(builder)
  keys = builder.info.supervised_keys or (None, None)
  main, label = keys[0], keys[1] if keys[1] in labels else (*labels, None)[0]
  if len(texts) not in (1, 2) or label is None:
    raise DataError(
      f'data {name!r}: expected one text, or two, and a class to tell from it, got '
      f'{dict(builder.info.features)}'
    )
  if main in texts:
    return (*(text for text in texts if text != main), main), label, False
  return tuple(texts), label, len(texts) == 2


def _by_type(builder: Any) -> tuple[list[str], list[str], list[str]]:
  """Returns the names of the features that are images, texts and classes."""
  from tensorflow_datasets import features as kinds

  features = dict(builder.info.features)
  of = lambda kind: [k for k, f in features.items() if isinstance(f, kind)]
  return of(kinds.Image), of(kinds.Text), of(kinds.ClassLabel)


# ---- batches -------------------------------------------------------------------------


def buckets(length: int) -> tuple[int, ...]:
  """Returns the lengths that batches may have: 8, 16, 32, ... and then `length`."""
  powers = iter(SMALLEST << i for i in range(32))
  return (*(p for p in powers if p < length), length)


def lengths(split: Split) -> np.ndarray:
  """Returns the number of tokens of every text, int32 [n]."""
  return split['mask'].sum(1, dtype=np.int32)


def bucket(split: Split, longest: int) -> int:
  """Returns the smallest bucket of a split that holds `longest` tokens."""
  return next(b for b in buckets(split['tokens'].shape[1]) if b >= longest)


def _rows(split: Split, rows: np.ndarray, width: int) -> Split:
  return {k: v[rows] if v.ndim == 1 else v[rows, :width] for k, v in split.items()}


class TextSampler(NamedTuple):
  """batch_at(split, step) -> batch, a pure function of the key and the step.

  Every epoch goes through the texts in a new order. The order is cut into chunks of 50
  batches; each chunk is sorted by length and cut into batches, and then all batches of
  the epoch are shuffled.
  """

  key: jax.Array
  size: int
  on_host = True  # how long a batch is depends on the step, so it cannot be traced

  def __call__(self, split: Split, step: int) -> Batch:
    return self.stepwise()(split, int(step))

  def stepwise(self, place: Placement = HERE) -> Callable[[Split, int], Batch]:
    """Returns the same function, which orders the texts once per epoch."""
    orders: dict[int, np.ndarray] = {}

    def batch_at(split, step):
      epoch, at = divmod(step, epoch_steps(split, self.size))
      if epoch not in orders:
        orders.clear()
        orders[epoch] = self.order(lengths(split), epoch)
      rows = orders[epoch][at]
      longest = int(split['mask'][rows].sum(1).max())
      return place.whole(_rows(split, rows, bucket(split, longest)))

    return batch_at

  def order(self, length: np.ndarray, epoch: int) -> np.ndarray:
    """Returns the texts of every batch of an epoch, int [steps, size].

    Args:
      length: tokens of every text, int [n].
      epoch: number of the epoch.
    """
    # RandomState, because its streams are frozen for all versions of numpy.
    seed = [*np.asarray(jax.random.key_data(self.key)).ravel().tolist(), epoch]
    random, steps = np.random.RandomState(seed), len(length) // self.size
    rows = random.permutation(len(length))[: steps * self.size]
    chunk = CHUNK * self.size
    chunks = (rows[start : start + chunk] for start in range(0, len(rows), chunk))
    by_length = [c[np.argsort(length[c], kind='stable')] for c in chunks]
    batches = np.concatenate(by_length).reshape(steps, self.size)
    return batches[random.permutation(steps)]


def batches(split: Split, size: int) -> Iterator[Batch]:
  """Yields all texts of a split once, from short to long, for evaluation.

  Every batch has `size` rows and is as long as its bucket. The last one of a bucket
  repeats a text, with 'weight' 0 (float32 [batch]): a row of padding alone would have
  nothing to attend to.

  Raises:
    DataError: `size` is below 1.
  """
  if size < 1:
    raise DataError(f'data: expected at least one text in a batch, got {size}')
  length = lengths(split)
  widths = buckets(split['tokens'].shape[1])
  of = np.searchsorted(widths, length)
  for i, width in enumerate(widths):
    inside = np.flatnonzero(of == i)
    inside = inside[np.argsort(length[inside], kind='stable')]
    for start in range(0, len(inside), size):
      places = np.arange(start, start + size)
      rows = inside[places.clip(max=len(inside) - 1)]
      weight = (places < len(inside)).astype(np.float32)
      yield jax.device_put({**_rows(split, rows, width), 'weight': weight})


class TextSet(NamedTuple):
  """A `Dataset` of texts in memory.

  Attributes:
    length: tokens that a row has room for, in all splits.
    tokenizer: path of the tokenizer.json.
    vocab: one more than the largest number of a token.
    pad: number of the padding token.
    cut: number of texts that were cut to the largest length allowed.
    empty: number of texts without a word.
    source_notes: notes of the source, which come first among `notes`.

  All other attributes are those of `Dataset`.
  """

  name: str
  train: Split
  held_out: Split
  test: Split
  classes: int
  length: int
  tokenizer: str
  vocab: int
  pad: int
  cut: int
  empty: int
  source_notes: tuple[str, ...] = ()

  tasks = ()
  ignore = None
  normalisation = None  # tokens go into a network as they are
  names = ()
  augments = False
  streamed = False

  def example(self) -> tuple[jax.Array, ...]:
    """Returns one made-up text of different tokens, a quarter of it padding.

    They are (tokens int32 [1, length], mask bool [1, length]), followed by types int32
    [1, length] for pairs.
    """
    place = np.arange(self.length)
    mask = place < self.length - self.length // 4
    text = np.where(mask, place % self.vocab, self.pad)
    of_pair = (place >= self.length // 2) & mask
    inputs = (text.astype(np.int32), mask, of_pair.astype(np.int32))
    return tuple(jnp.asarray(x)[None] for x in inputs[: 2 + ('types' in self.train)])

  def sampler(self, key: jax.Array, size: int, augment: bool) -> TextSampler:
    """Returns the sampler of training batches; texts are not augmented."""
    del augment
    return TextSampler(key, size)

  def batches(
    self, split: Split, size: int, place: Placement = HERE
  ) -> Iterator[Batch]:
    """Yields all texts of a split once, from short to long, for evaluation."""
    return map(place.whole, batches(split, size))

  def on_device(self, put: Any = None) -> Split:
    """Returns the training split, which stays on the host."""
    del put
    return self.train

  def probe(self) -> dict[str, Split]:
    """Returns all arrays."""
    return {'train': self.train, 'held_out': self.held_out, 'test': self.test}

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape (length,) of one text."""
    return (self.length,)

  @property
  def notes(self) -> tuple[str, ...]:
    """Those of the source, how many texts were cut, and how many are empty."""
    count = sum(len(s['label']) for s in (self.train, self.held_out, self.test))
    cut = f'{self.cut} of {count} texts were cut to {self.length} tokens'
    empty = f'{self.empty} of {count} texts have no word (or one of a pair has none)'
    counted = (cut,) * bool(self.cut) + (empty,) * bool(self.empty)
    return (*self.source_notes, *counted)


def load(
  name: str,
  tokenizer_path: str | Path,
  seed: int = 0,
  held_out: int | None = None,
  subset: int | None = None,
  length: int = 128,
  download: bool = False,
) -> TextSet:
  """Reads and tokenises a TFDS set for text classification, such as 'glue/sst2'.

  Splits are chosen as by `images.load`. Where test labels are not public, as in GLUE,
  the validation split is the test split.

  Args:
    name: name of the set.
    tokenizer_path: the tokenizer.json that belongs to the network.
    seed: chooses the held-out texts and the subset out of the training texts.
    held_out: number of held-out texts; None takes a tenth, at most 5000.
    subset: number of texts to train on; None takes all that are left.
    length: tokens that longer texts are cut to.
    download: whether TFDS may fetch a set that is not in TFDS_DATA_DIR.

  Raises:
    DataError: the set is unknown, absent, of another kind or has no training split; or
      the tokenizer is refused by `tokens.check_tokenizer`.
  """
  tokens.check_tokenizer(tokenizer_path)  # before a large set is opened
  texts = source(name, download)
  return encoded(name, texts, tokenizer_path, seed, held_out, subset, length)


def encoded(
  name: str,
  texts: TextSource,
  tokenizer_path: str | Path,
  seed: int = 0,
  held_out: int | None = None,
  subset: int | None = None,
  length: int = 128,
) -> TextSet:
  """Divides and tokenises texts; arguments, and what is raised, as for `load`."""
  tokenizer = tokens.check_tokenizer(tokenizer_path)
  if not texts.train:
    raise DataError(f"data {name!r}: expected a split 'train', got {[*texts.splits]}")
  sizes = texts.train, texts.test
  rows = dataset.divide(name, sizes, seed, held_out, subset, 'texts', texts.validation)
  parts = ('train', rows.train), (rows.held_of, rows.held_out), (rows.of, rows.test)
  read = [texts.read(of, chosen) for of, chosen in parts]
  pad = tokens.padding(tokenizer, tokenizer_path)
  # All splits are encoded together, so that their rows have one length.
  every = [text for part, _ in read for text in part]
  made = tokens.encode(tokenizer, every, length, pad)
  arrays = {'tokens': made.tokens, 'mask': made.mask, 'types': made.types}
  arrays = {name: array for name, array in arrays.items() if array is not None}
  splits, start = [], 0
  for _, label in read:
    of_split = slice(start, start + len(label))
    splits.append({**{k: v[of_split] for k, v in arrays.items()}, 'label': label})
    start += len(label)
  return TextSet(
    name,
    *splits,
    classes=texts.classes,
    length=made.tokens.shape[1],
    tokenizer=str(tokenizer_path),
    vocab=tokens.largest(tokenizer) + 1,
    pad=pad,
    cut=made.cut,
    empty=made.empty,
    source_notes=texts.notes,
  )
