"""Text classification data: tokenised once into memory, batched by length."""

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
from depthprune.data.tokens import Encoded, Text, largest

_BLOCK = 1024


class TextSource(NamedTuple):
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
  if name in tfds.OWN:
    return 'images'
  builder = tfds.find(name, download)
  images, texts, labels = _by_type(builder)
  return 'text' if texts and labels and not images else 'images'


def source(name: str, download: bool = False) -> TextSource:
  """The texts of the TFDS set called `name`, and their classes.

  A row of two texts is a pair, unless the set says that one of them is what its class
  is told from (`supervised_keys`): then the other, such as a title, goes in front of
  it with a space.

  Raises DataError for a name nobody knows, a set that is not prepared on this machine,
  and a set that is not of one text, or two, and a class.
  """
  builder = tfds.find(name, download)
  columns, label_key, pair = _columns(name, builder)
  opened = {s: tfds.open_split(name, builder, s) for s in builder.info.splits}
  found = {'train': opened['train']} if 'train' in opened else {}
  if named := tfds.tested(opened, label_key):
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
  return TextSource(train, test, pair, classes, columns, tuple(opened), read)


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


SMALLEST = 8
CHUNK = 50  # batches whose texts are sorted by length together


def buckets(length: int) -> tuple[int, ...]:
  """8, 16, 32 and so on, each below `length`, and then `length`."""
  powers = iter(SMALLEST << i for i in range(32))
  return (*(p for p in powers if p < length), length)


def lengths(split: Split) -> np.ndarray:
  """Tokens of every text, int32 [n]."""
  return split['mask'].sum(1, dtype=np.int32)


def bucket(split: Split, longest: int) -> int:
  """The smallest bucket of a split that holds `longest` tokens."""
  return next(b for b in buckets(split['tokens'].shape[1]) if b >= longest)


def _rows(split: Split, rows: np.ndarray, width: int) -> Split:
  return {k: v[rows] if v.ndim == 1 else v[rows, :width] for k, v in split.items()}


class TextSampler(NamedTuple):
  """batch_at(split, step): the training batch of a step, pure in (key, step).

  Every epoch goes through the texts in an order of its own, what does not fill a batch
  takes its turn in another. The order is cut into chunks of 50 batches; each is sorted
  by length and cut into batches, and all batches of the epoch are shuffled.
  """

  key: jax.Array
  size: int
  on_host = True  # how long a batch is depends on the step, so it cannot be traced

  def __call__(self, split: Split, step: int) -> Batch:
    return self.stepwise()(split, int(step))

  def stepwise(self, place: Placement = HERE) -> Callable[[Split, int], Batch]:
    """The same for many steps: an epoch is put in order once."""
    found: dict[int, np.ndarray] = {}

    def batch_at(split, step):
      epoch, at = divmod(step, epoch_steps(split, self.size))
      if epoch not in found:
        found.clear()
        found[epoch] = self.order(lengths(split), epoch)
      rows = found[epoch][at]
      longest = int(split['mask'][rows].sum(1).max())
      return place.whole(_rows(split, rows, bucket(split, longest)))

    return batch_at

  def order(self, length: np.ndarray, epoch: int) -> np.ndarray:
    """The texts of every batch of an epoch, int [steps, size], by their lengths [n]."""
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
  """All texts once, from short to long, for evaluation.

  Every batch has `size` rows and is as long as its bucket. The last of a bucket repeats
  a text, with 'weight' 0 (float32 [batch]), for padding alone has nothing to attend to.

  Raises DataError for a size below 1.
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
    name: as TFDS has it.
    train, held_out, test: the splits, all of one length.
    classes: how many there are.
    length: tokens that a row has room for: of the longest text, rounded up.
    tokenizer: the tokenizer.json. vocab: its number of tokens, the largest number and
      one. pad: number of the padding token.
    cut: texts that were cut to the length asked for. empty: texts without a word.
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

  tasks = ()
  ignore = None
  names = ()
  augments = False
  streamed = False

  def example(self) -> tuple[jax.Array, ...]:
    """One made-up text as long as there is room for, a quarter of it padding.

    (tokens int32 [1, length], mask bool [1, length]), and of pairs types int32 [1,
    length]. Its tokens differ, so that a probe of the network sees that they do.
    """
    place = np.arange(self.length)
    mask = place < self.length - self.length // 4
    text = np.where(mask, place % self.vocab, self.pad)
    of_pair = (place >= self.length // 2) & mask
    found = (text.astype(np.int32), mask, of_pair.astype(np.int32))
    return tuple(jnp.asarray(x)[None] for x in found[: 2 + ('types' in self.train)])

  def sampler(self, key: jax.Array, size: int, augment: bool) -> TextSampler:
    """(train, step) -> training batch; texts are not augmented."""
    del augment
    return TextSampler(key, size)

  def batches(
    self, split: Split, size: int, place: Placement = HERE
  ) -> Iterator[Batch]:
    """All texts of a split once, for evaluation."""
    return map(place.whole, batches(split, size))

  def on_device(self, put: Any = None) -> Split:
    """The training texts, where the sampler reads them: on the host."""
    del put
    return self.train

  def probe(self) -> dict[str, Split]:
    """All arrays."""
    return {'train': self.train, 'held_out': self.held_out, 'test': self.test}

  @property
  def shape(self) -> tuple[int, ...]:
    """Of one text, (length,)."""
    return (self.length,)

  @property
  def normalisation(self) -> None:
    """Tokens go into a network as they are."""
    return None

  @property
  def notes(self) -> tuple[str, ...]:
    """What a reader of results must know of the data."""
    count = sum(len(s['label']) for s in (self.train, self.held_out, self.test))
    cut = f'{self.cut} of {count} texts were cut to {self.length} tokens'
    empty = f'{self.empty} of {count} texts have no word (or one of a pair has none)'
    return (cut,) * bool(self.cut) + (empty,) * bool(self.empty)


def load(
  name: str,
  tokenizer_path: str | Path,
  seed: int = 0,
  held_out: int | None = None,
  subset: int | None = None,
  length: int = 128,
  download: bool = False,
) -> TextSet:
  """Reads and tokenises any TFDS text classification set, such as 'glue/sst2'.

  Splits are chosen as `data.load` does; where test labels are kept from the public, as
  GLUE's are, the validation split is the test. TextSet have at most `length` tokens; what
  is longer is cut, and counted. Two texts whose relation is asked for are a pair.

  Raises DataError where the set is unknown, absent, without a training split, or not
  one of text classification, and for a tokenizer as `tokens.check_tokenizer` does.
  """
  tokenizer = tokens.check_tokenizer(tokenizer_path)
  texts = source(name, download)
  if not texts.train:
    raise DataError(f"data {name!r}: expected a split 'train', got {[*texts.splits]}")
  sizes = texts.train, texts.test
  rows = dataset.divide(name, sizes, seed, held_out, subset, 'texts')
  parts = ('train', rows.train), ('train', rows.held_out), (rows.of, rows.test)
  read = [texts.read(of, chosen) for of, chosen in parts]
  pad = tokens.padding(tokenizer, tokenizer_path)
  every = [text for part, _ in read for text in part]
  found = tokens.encode(tokenizer, every, length, pad)
  train, held, test = _split(found, [label for _, label in read])
  return TextSet(
    name,
    train,
    held,
    test,
    texts.classes,
    length=found.tokens.shape[1],
    tokenizer=str(tokenizer_path),
    vocab=largest(tokenizer) + 1,
    pad=pad,
    cut=found.cut,
    empty=found.empty,
  )


def _split(found: Encoded, labels: list[np.ndarray]) -> list[Split]:
  """The rows, which are those of one split behind another, each split by itself."""
  arrays = {'tokens': found.tokens, 'mask': found.mask, 'types': found.types}
  arrays = {name: array for name, array in arrays.items() if array is not None}
  ends = np.cumsum([len(label) for label in labels])
  return [
    {**{k: v[end - len(label) : end] for k, v in arrays.items()}, 'label': label}
    for end, label in zip(ends, labels, strict=True)
  ]
