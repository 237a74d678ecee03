"""Forged arrays, with checksums that match: refused, or the very same arrays."""

import json
import random
import shutil
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.storage import checkpoint
from depthprune.storage.checkpoint import CheckpointError
from tests.mutations import mutated, sign

TREE = {
  'params': {'kernel': jnp.arange(40.0).reshape(8, 5), 'bias': jnp.ones(5)},
  'steps': [np.int64(3), jnp.zeros((2, 3), jnp.bfloat16)],
}


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp('whole') / 'one'
  checkpoint.write(folder, 'arch.json', TREE, {})
  return folder


def forge(path: Path, rng: random.Random) -> str:
  """Changes one file of an orbax checkpoint; returns how."""
  content = path.read_bytes()
  at = rng.randrange(max(len(content), 1))
  kind = rng.choice(['entry', 'entry', 'byte', 'cut', 'zeroed', 'removed', 'longer'])
  if kind == 'entry' and content[:1] == b'{':
    what, values = mutated(json.loads(content), rng)
    path.write_text(json.dumps(values))
    return what
  changes = {
    'cut': content[:at],
    'zeroed': content[:at] + bytes(len(content) - at),
    'longer': content + rng.randbytes(9),
  }
  if kind == 'removed':
    path.unlink()
  else:
    byte = content[:at] + rng.randbytes(1) + content[at + 1 :]
    path.write_bytes(changes.get(kind, byte))
  return f'{kind} at {at}'


# Orbax leaves the errors of arrays that it read at the same time where they were.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('seeds', [20, pytest.param(200, marks=pytest.mark.slow)])
def test_any_file_of_orbax_is_checked(whole, tmp_path, seeds):
  same = {path: np.asarray(leaf) for path, leaf in checkpoint.paths(TREE).items()}
  refused = 0
  for seed in range(seeds):
    folder = Path(shutil.copytree(whole, tmp_path / str(seed)))
    rng = random.Random(seed)
    path = rng.choice(sorted(p for p in folder.rglob('arrays/**/*') if p.is_file()))
    what = f'{seed}: {path.name}: {forge(path, rng)}'
    record = json.loads((folder / 'arch.json').read_text())
    record['files'] = checkpoint.checksums(folder / 'arrays')
    sign(folder / 'arch.json', record)
    began = time.monotonic()
    try:
      leaves, _ = checkpoint.read(folder, 'arch.json')
    except CheckpointError as error:
      refused += 1
      assert len(str(error)) < 1000, what
    else:
      for name, array in same.items():
        assert leaves[name].dtype == array.dtype, what
        np.testing.assert_array_equal(leaves[name], array, what)
    assert time.monotonic() - began < 5, what
    shutil.rmtree(folder)
  assert refused > seeds / 4
