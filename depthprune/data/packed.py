"""Texts one after the other, cut into rows of one length, for language models."""

from collections.abc import Iterable, Sequence

import numpy as np


def pack(
  texts: Iterable[Sequence[int]], length: int, separator: int
) -> dict[str, np.ndarray]:
  """Joins texts and cuts what comes out into rows, so that no token is padding.

  Args:
    texts: the tokens of each text.
    length: number of tokens that a network reads at once.
    separator: the token behind every text, usually the one that ends a text.

  Returns:
    {'image': int32 [rows, length], what a network reads, 'label': int32 [rows, length],
    the token that follows each}. What is left at the end and fills no row is dropped.

  Raises:
    ValueError: the texts fill no row.
  """
  joined = [token for text in texts for token in (*text, separator)]
  rows = (len(joined) - 1) // length
  if rows < 1:
    raise ValueError(
      f'pack: texts: expected more than {length} tokens, got {len(joined)}; shorten '
      'the rows or add texts'
    )
  tokens = np.asarray(joined[: rows * length + 1], np.int32)
  shaped = lambda x: x.reshape(rows, length)
  return {'image': shaped(tokens[:-1]), 'label': shaped(tokens[1:])}
