"""Forged .npz files: an error that names the file, or the very same arrays."""

import io
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest

from depthprune.data.arrays import read_npz
from depthprune.data.dataset import DataError
from depthprune.models import pretrained

ARRAYS = {
  'x': np.arange(96, dtype=np.float32).reshape(8, 3, 4),
  'y': np.arange(8) % 3,
}
SHAPES = (
  '(8, 3, 4)',
  '(10**12,)',
  '(999999999999, 9)',
  '(-1,)',
  '(True,)',
  '8, 3',
  '()',
)
TYPES = ('<f4', '|O', '<U999999999', '>c16', '|V3', 'nobody', '')


def forge(path: Path, rng: random.Random) -> str:
  """Writes the arrays with one thing changed; returns what."""
  kind = rng.choice(['byte', 'byte', 'cut', 'header', 'member', 'suffix', 'bomb'])
  with path.open('wb') as file:
    (np.savez if rng.random() < 0.5 else np.savez_compressed)(file, **ARRAYS)
  content = path.read_bytes()
  at = rng.randrange(len(content))
  if kind == 'byte':
    path.write_bytes(content[:at] + rng.randbytes(1) + content[at + 1 :])
  elif kind == 'cut':
    path.write_bytes(content[:at])
  else:
    with zipfile.ZipFile(path, 'w') as file:
      file.writestr('x.npy', member(kind, rng))
      if kind == 'suffix':
        file.writestr('y.txt', 'nothing')
  return f'{kind} at {at}'


def member(kind: str, rng: random.Random) -> bytes:
  """One array of an .npz: another header, any bytes, or many equal numbers."""
  if kind == 'member':
    return rng.randbytes(99)
  stream = io.BytesIO()
  np.lib.format.write_array(stream, ARRAYS['x'])
  if kind != 'header':
    return stream.getvalue()
  text = stream.getvalue()
  shape, dtype = rng.choice(SHAPES), rng.choice(TYPES)
  text = text.replace(b'(8, 3, 4)', shape.encode()).replace(b'<f4', dtype.encode())
  header = text[10:128].rstrip().ljust(117) + b'\n'
  return text[:8] + len(header).to_bytes(2, 'little') + header + text[128:]


@pytest.mark.parametrize('seeds', [60, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
  ('read', 'error'), [(read_npz, DataError), (pretrained.read, ValueError)]
)
def test_any_byte_of_an_npz_is_checked(tmp_path, read, error, seeds):
  path, refused = tmp_path / 'data.npz', 0
  for seed in range(seeds):
    what = f'{seed}: {forge(path, random.Random(seed))}'
    try:
      found = read(str(path))
    except error as reason:
      refused += 1
      assert 'data.npz' in str(reason) and len(str(reason)) < 1000, what
    else:
      assert all(isinstance(x, np.ndarray) for x in found.values()), what
  assert refused > seeds / 3
