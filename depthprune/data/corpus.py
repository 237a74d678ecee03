"""Texts to write: rows of tokens, and the token that follows each of them.

A corpus is a file or a folder of plain text, or any data set of texts, whose classes
are not looked at. Its texts are divided first and then joined, so that no text is in
two splits.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.data import dataset, tokens
from depthprune.data.dataset import HERE, Batch, DataError, Placement, Split
from depthprune.data.packed import pack
from depthprune.data.text import TextSource

ENDS = '<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>', '<|im_end|>', '[SEP]'
"""Names of the token behind a text; the first that a tokenizer has is taken."""


class CorpusSampler(NamedTuple):
  """batch_at(split, step): the rows of a step, in an order that each epoch has anew."""

  key: jax.Array
  size: int
  on_host = False

  def __call__(self, split: Split | Batch, step: jax.Array | int) -> Batch:
    epoch, i = jnp.divmod(step, dataset.epoch_steps(split, self.size))
    order = dataset.shuffled(self.key, epoch, dataset.count(split))
    rows = jax.lax.dynamic_slice(order, (i * self.size,), (self.size,))
    return {name: jnp.asarray(x)[rows] for name, x in split.items()}

  def stepwise(self, place: Placement = HERE) -> Callable[[Split | Batch, int], Batch]:
    """Returns the same function, compiled."""
    return jax.jit(lambda split, step: place.whole(self(split, step)))


class Corpus(NamedTuple):
  """A `Dataset` of texts in memory, for a network that writes.

  A split is {'image': int32 [rows, length], what is read, 'label': int32 [rows,
  length], the token that follows each}.

  Attributes:
    classes: number of different tokens.
    length: tokens of a row.

  All other attributes are those of `Dataset`.
  """

  name: str
  train: Split
  held_out: Split
  test: Split
  classes: int
  length: int
  tokenizer: str | None
  notes: tuple[str, ...] = ()

  tasks = ()
  ignore = None
  normalisation = None
  names = ()
  augments = False
  streamed = False

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape (length,) of one row."""
    return (self.length,)

  def example(self) -> tuple[jax.Array, ...]:
    """Returns one made-up row of different tokens, int32 [1, length]."""
    return (jnp.arange(self.length, dtype=jnp.int32)[None] % self.classes,)

  def sampler(self, key: jax.Array, size: int, augment: bool) -> CorpusSampler:
    """Returns the sampler of training batches; texts are not augmented."""
    del augment
    return CorpusSampler(key, size)

  def batches(
    self, split: Split, size: int, place: Placement = HERE
  ) -> Iterator[Batch]:
    """Yields all rows of a split once; 'weight' is 0 on those that fill up the last."""
    for start in range(0, dataset.count(split), size):
      part = {name: x[start : start + size] for name, x in split.items()}
      rows = np.arange(size)
      inside = rows < dataset.count(part)
      full = {name: x[rows * inside] for name, x in part.items()}
      yield place.whole({**full, 'weight': inside.astype(np.float32)})

  def on_device(self, put: Callable[[Split], Batch] = jax.device_put) -> Batch:
    """Returns the training split on the device."""
    return put(self.train)

  def probe(self) -> dict[str, Split]:
    """Returns all arrays."""
    return {'train': self.train, 'held_out': self.held_out, 'test': self.test}


def source(path: str, suffixes: Sequence[str]) -> TextSource:
  """Returns the paragraphs of a file of text, or the files of a folder, as texts.

  Args:
    path: the file or the folder.
    suffixes: of the files in a folder that are read, such as '.txt'.

  Raises:
    DataError: there is no such file, or no text in it.
  """
  folder = Path(path)
  hidden = lambda f: any(part[0] == '.' for part in f.relative_to(folder).parts)
  of_text = lambda f: f.suffix.lower() in suffixes and f.is_file() and not hidden(f)
  files = sorted(filter(of_text, folder.rglob('*')))
  if folder.is_dir() and not files:
    raise DataError(f'data {path}: has no file of text ({", ".join(suffixes)})')
  try:
    read = [f.read_text('utf-8-sig', errors='replace') for f in files or [folder]]
  except OSError as error:
    raise DataError(
      f'data {path}: cannot be read as text ({error.strerror})'
    ) from error
  texts = read if files else read[0].split('\n\n')
  texts = [text for text in texts if text.strip()]
  if not texts:
    raise DataError(f'data {path}: there is no text in it')

  def some(split: str, rows: np.ndarray) -> tuple[list, np.ndarray]:
    del split
    return [texts[row] for row in rows], np.zeros(len(rows), np.int32)

  return TextSource(len(texts), 0, False, 1, (), ('train',), some)


def packed(
  name: str,
  texts: TextSource,
  tokenizer: Any,
  vocab: int,
  seed: int = 0,
  subset: int | None = None,
  length: int = 128,
) -> Corpus:
  """Divides texts, turns them into tokens and packs these into rows.

  Args:
    name: name of the data set.
    texts: where they come from; of pairs both texts are taken.
    tokenizer: the `tokenizers.Tokenizer` of the network.
    vocab: number of different tokens of the network.
    seed: chooses the held-out texts and the subset.
    subset: number of texts to train on; None takes all that are left.
    length: tokens of a row.

  Raises:
    DataError: the texts of a split fill no row, or the tokenizer has more tokens than
      the network.
  """
  largest = tokens.largest(tokenizer)
  if largest >= vocab:
    raise DataError(
      f'data {name!r}: the tokenizer has a token number {largest}, the network {vocab} '
      'tokens: pass the tokenizer that belongs to it'
    )
  if not texts.train:
    raise DataError(f"data {name!r}: expected a split 'train', got {[*texts.splits]}")
  sizes = texts.train, texts.test
  rows = dataset.divide(name, sizes, seed, None, subset, 'texts', texts.validation)
  ends = map(tokenizer.token_to_id, ENDS)
  end = next((number for number in ends if number is not None), 0)

  def split(part: str, of: str, chosen: np.ndarray) -> Split:
    read, _ = texts.read(of, chosen)
    joined = [text if isinstance(text, str) else ' '.join(text) for text in read]
    try:
      return pack(_encoded(tokenizer, joined), length, end)
    except ValueError as error:
      raise DataError(
        f'data {name!r}: the {part} split has {len(chosen)} whole texts (paragraphs '
        f'of a file, files of a folder): {error}'
      ) from error

  train = split('training', 'train', rows.train)
  held_out = split('held-out', rows.held_of, rows.held_out)
  test = split('test', rows.of, rows.test)
  return Corpus(name, train, held_out, test, vocab, length, None, texts.notes)


def _encoded(tokenizer: Any, texts: Sequence[str]) -> Iterator[list[int]]:
  tokenizer.no_padding()
  tokenizer.no_truncation()
  for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
    yield encoding.ids
