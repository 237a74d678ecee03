"""Text classification data: tokenised once into memory, batched by length."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.training import buckets, sentences, splits, tokens
from depthprune.training.buckets import Split, TextSampler
from depthprune.training.prepared import DataError
from depthprune.training.tokens import Encoded, largest


class Texts(NamedTuple):
  """One data set of texts in memory: what `data.Dataset` is for images.

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

  def batches(self, split: Split, size: int) -> Iterator[dict[str, jax.Array]]:
    """All texts of a split once, for evaluation."""
    return buckets.batches(split, size)

  def on_device(self, put: Any = None) -> Split:
    """The training texts, where the sampler reads them: on the host."""
    del put
    return self.train

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
) -> Texts:
  """Reads and tokenises any TFDS text classification set, such as 'glue/sst2'.

  Splits are chosen as `data.load` does; where test labels are kept from the public, as
  GLUE's are, the validation split is the test. Texts have at most `length` tokens; what
  is longer is cut, and counted. Two texts whose relation is asked for are a pair.

  Raises DataError where the set is unknown, absent, without a training split, or not
  one of text classification, and for a tokenizer as `tokens.check_tokenizer` does.
  """
  tokenizer = tokens.check_tokenizer(tokenizer_path)
  source = sentences.source(name, download)
  if not source.train:
    raise DataError(f"data {name!r}: expected a split 'train', got {[*source.splits]}")
  sizes = source.train, source.test
  rows = splits.divide(name, sizes, seed, held_out, subset, 'texts')
  parts = ('train', rows.train), ('train', rows.held_out), (rows.of, rows.test)
  read = [source.read(of, chosen) for of, chosen in parts]
  pad = tokens.padding(tokenizer, tokenizer_path)
  every = [text for texts, _ in read for text in texts]
  found = tokens.encode(tokenizer, every, length, pad)
  train, held, test = _split(found, [label for _, label in read])
  return Texts(
    name,
    train,
    held,
    test,
    source.classes,
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
