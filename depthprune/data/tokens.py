"""Tokenising texts with the tokenizer.json that belongs to a network.

The work is done by Hugging Face's `tokenizers`: 67,000 sentences take 3 s on one core.
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from depthprune.data.dataset import DataError

Text = str | tuple[str, str]
"""A text, or a pair of texts that are classified together."""

_BLOCK = 8192  # texts that are tokenised at once
_MULTIPLE = 8  # rows have room for a multiple of this number of tokens
_PADDING = ('[PAD]', '<pad>')


class Encoded(NamedTuple):
  """Tokenised texts, one per row, padded at the end.

  Attributes:
    tokens: int32 [n, room].
    mask: bool [n, room], False on padding.
    types: int32 [n, room], 0 or 1 for the first or second text of a pair; None for
      single texts.
    cut: number of texts that had too many tokens.
    empty: number of texts without a word of their own (or with such a part of a pair).
  """

  tokens: np.ndarray
  mask: np.ndarray
  types: np.ndarray | None
  cut: int
  empty: int


def read(path: str | Path) -> Any:
  """Reads a tokenizer.json.

  Returns:
    The `tokenizers.Tokenizer`.

  Raises:
    DataError: the package `tokenizers` is not installed; the file is absent, or is not
      a tokenizer.
  """
  try:
    from tokenizers import Tokenizer
  except ImportError as error:
    raise DataError(
      f'{path}: reading texts needs one more package ({error}): pip install '
      "'depthprune[text]'"
    ) from error
  if not Path(path).is_file():
    raise DataError(
      f'{path}: expected the tokenizer.json of the network, there is no such file; '
      'pass --tokenizer FILE, it comes with the weights'
    )
  try:
    tokenizer = Tokenizer.from_file(str(path))
  except Exception as error:  # the package raises no other kind
    raise DataError(
      f'{path}: expected a tokenizer.json as `tokenizers` writes it, got: {error}'
    ) from error
  return tokenizer


def check_tokenizer(path: str | Path, vocab: int | None = None) -> Any:
  """Reads a tokenizer.json and checks that it suits a network.

  Args:
    path: the tokenizer.json.
    vocab: number of rows of the network's embedding; None checks no numbers.

  Returns:
    The `tokenizers.Tokenizer`.

  Raises:
    DataError: the package `tokenizers` is not installed; the file is absent, is not a
      tokenizer or has no padding token; or a token's number is `vocab` or more.
  """
  tokenizer = read(path)
  padding(tokenizer, path)
  if vocab is not None and (last := largest(tokenizer)) >= vocab:
    raise DataError(
      f"{path}: expected token numbers below {vocab}, the rows of the network's "
      f'embedding, got numbers up to {last}: the two do not belong together; pass the '
      'tokenizer.json that came with the weights'
    )
  return tokenizer


def largest(tokenizer: Any) -> int:
  """Returns the largest number of a token."""
  return max(tokenizer.get_vocab(with_added_tokens=True).values())


def padding(tokenizer: Any, path: str | Path) -> int:
  """Returns the number of the padding token.

  Raises:
    DataError: the tokenizer has none.
  """
  if tokenizer.padding is not None:
    return tokenizer.padding['pad_id']
  for token in _PADDING:
    number = tokenizer.token_to_id(token)
    if number is not None:
      return number
  raise DataError(
    f'{path}: expected a padding token ({" or ".join(_PADDING)}) among its '
    f'{tokenizer.get_vocab_size()} tokens, got none; add it to the tokenizer'
  )


def encode(tokenizer: Any, texts: Sequence[Text], length: int, pad: int) -> Encoded:
  """Tokenises texts, or pairs of texts.

  Rows are as long as the longest text, rounded up to a multiple of 8 but at most to
  `length`.

  Args:
    tokenizer: a `tokenizers.Tokenizer`; its own settings for truncation and padding are
      overwritten.
    texts: all single texts, or all pairs.
    length: tokens that a text is cut to; in a pair the longer one is cut first.
    pad: number of the padding token.

  Raises:
    DataError: `length` leaves no room for a token of every text, or a text has no token
      at all.
  """
  pair = bool(texts) and not isinstance(texts[0], str)
  added = tokenizer.num_special_tokens_to_add(pair)
  least = added + 1 + pair
  if length < least:
    raise DataError(
      f'texts: expected a length of at least {least} tokens, as the tokenizer adds '
      f'{added} of its own, got {length}'
    )
  tokenizer.no_padding()
  tokenizer.enable_truncation(length)
  rows, types, cut, empty = [], [], 0, 0
  for start in range(0, len(texts), _BLOCK):  # encodings take much memory
    block = list(texts[start : start + _BLOCK])
    for text, encoding in zip(block, tokenizer.encode_batch(block), strict=True):
      rows.append(encoding.ids)
      cut += bool(encoding.overflowing)
      if pair:
        types.append(encoding.type_ids)
      parts = (text,) if isinstance(text, str) else text
      words = all(part.strip() for part in parts)
      empty += not words or len(encoding.ids) <= added
  if not all(rows):
    raise DataError(
      f'texts: number {rows.index([])} has no token: it is empty, and this tokenizer '
      'adds none ([CLS], [SEP]); remove it, or give the tokenizer a post-processor'
    )
  lengths = np.fromiter(map(len, rows), np.int32, len(rows))
  room = min(length, -(-lengths.max(initial=1) // _MULTIPLE) * _MULTIPLE)
  mask = np.arange(room) < lengths[:, None]
  which = _dense(types, mask, 0) if pair else None
  return Encoded(_dense(rows, mask, pad), mask, which, cut, empty)


def _dense(rows: Sequence[list[int]], mask: np.ndarray, fill: int) -> np.ndarray:
  """Returns int32 of the mask's shape: the rows where it is True, elsewhere `fill`."""
  dense = np.full(mask.shape, fill, np.int32)
  dense[mask] = np.fromiter(chain.from_iterable(rows), np.int32, int(mask.sum()))
  return dense
