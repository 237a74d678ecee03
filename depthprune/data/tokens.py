"""Texts to numbers, by the tokenizer.json that belongs to a network.

Rust does the work (Hugging Face's `tokenizers`): 67,000 sentences take 3 s on one core.
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from depthprune.data.dataset import DataError

Text = str | tuple[str, str]
"""A text, or a pair of texts whose relation is asked for."""

_BLOCK = 8192
_MULTIPLE = 8  # of tokens, that there is room for
_PADDING = ('[PAD]', '<pad>')


class Encoded(NamedTuple):
  """Texts as numbers: every row is one text, padded at its end.

  Attributes:
    tokens: int32 [n, room]. mask: bool [n, room], False on padding.
    types: int32 [n, room], which text of a pair a token is of; None for single ones.
    cut: how many had more than `length` tokens. empty: how many have none, or one of a
      pair none, but those that the tokenizer adds.
  """

  tokens: np.ndarray
  mask: np.ndarray
  types: np.ndarray | None
  cut: int
  empty: int


def check_tokenizer(path: str | Path, vocab: int | None = None) -> Any:
  """The `tokenizers.Tokenizer` in a tokenizer.json.

  `vocab` is how many rows the network's embedding has: a tokenizer with a larger number
  for one of its tokens belongs to another network.

  Raises DataError for that, a file that is not there or is no tokenizer, one without a
  padding token, and without the package `tokenizers`.
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
  padding(tokenizer, path)
  if vocab is not None and (last := largest(tokenizer)) >= vocab:
    raise DataError(
      f"{path}: expected token numbers below {vocab}, the rows of the network's "
      f'embedding, got numbers up to {last}: the two do not belong together; pass the '
      'tokenizer.json that came with the weights'
    )
  return tokenizer


def largest(tokenizer: Any) -> int:
  """The largest number that a token has."""
  return max(tokenizer.get_vocab(with_added_tokens=True).values())


def padding(tokenizer: Any, path: str | Path) -> int:
  """The number of the padding token; raises DataError where there is none."""
  if tokenizer.padding is not None:
    return tokenizer.padding['pad_id']
  found = [tokenizer.token_to_id(token) for token in _PADDING]
  known = [number for number in found if number is not None]
  if not known:
    raise DataError(
      f'{path}: expected a padding token ({" or ".join(_PADDING)}) among its '
      f'{tokenizer.get_vocab_size()} tokens, got none; add it to the tokenizer'
    )
  return known[0]


def encode(tokenizer: Any, texts: Sequence[Text], length: int, pad: int) -> Encoded:
  """Texts, or pairs of texts, cut to `length` tokens, of a pair the longer one first.

  There is room for the longest that is found, rounded up to a multiple of 8 if that is
  at most `length`. `pad` stands where a text has ended. How the tokenizer itself was
  set to cut and pad does not count, and is overwritten.

  Raises DataError where `length` leaves no room for a token of every text, and for a
  text that has no token at all.
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
  for start in range(0, len(texts), _BLOCK):  # their other fields take much memory
    block = list(texts[start : start + _BLOCK])
    for text, found in zip(block, tokenizer.encode_batch(block), strict=True):
      rows.append(found.ids)
      cut += bool(found.overflowing)
      if pair:
        types.append(found.type_ids)
      empty += not _speaks(text, found.ids, added)
  if not all(rows):
    raise DataError(
      f'texts: number {rows.index([])} has no token: it is empty, and this tokenizer '
      'adds none ([CLS], [SEP]); leave it out, or give the tokenizer a post-processor'
    )
  lengths = np.fromiter(map(len, rows), np.int32, len(rows))
  room = min(length, -(-lengths.max(initial=1) // _MULTIPLE) * _MULTIPLE)
  mask = np.arange(room) < lengths[:, None]
  which = _dense(types, mask, 0) if pair else None
  return Encoded(_dense(rows, mask, pad), mask, which, cut, empty)


def _speaks(text: Text, ids: list[int], added: int) -> bool:
  parts = (text,) if isinstance(text, str) else text
  return len(ids) > added and all(part.strip() for part in parts)


def _dense(rows: Sequence[list[int]], mask: np.ndarray, fill: int) -> np.ndarray:
  """int32 of the mask's shape: the rows where it is True, else `fill`."""
  dense = np.full(mask.shape, fill, np.int32)
  dense[mask] = np.fromiter(chain.from_iterable(rows), np.int32, int(mask.sum()))
  return dense
