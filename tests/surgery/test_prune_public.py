"""prune and trunk on architectures of transformers, haiku and equinox.

The libraries are installed once into a folder of pytest's cache, and each network is
built there by a process of its own: they are no dependencies of ours.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.zoo.public import NETWORKS

PACKAGES = """transformers==4.57.6 tokenizers==0.22.2 huggingface-hub==0.36.2
safetensors regex dm-haiku==0.0.17 jmp tabulate equinox==0.13.8 jaxtyping
wadler-lindig""".split()
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='session')
def libraries(request: pytest.FixtureRequest) -> Path:
  """A folder with the libraries, or a skip where they cannot be installed."""
  cache = request.config.cache.mkdir('public_networks')
  folder = cache / '-'.join(p for p in PACKAGES if '==' in p)
  if not folder.exists():
    new = tempfile.mkdtemp(dir=cache)
    pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps']
    done = subprocess.run(
      [*pip, '--target', new, *PACKAGES], capture_output=True, text=True
    )
    if done.returncode:
      pytest.skip(f'pip cannot install {PACKAGES[0]}: {done.stderr.strip()[-200:]}')
    if not folder.exists():  # unless another worker was faster
      Path(new).rename(folder)
  return folder


@pytest.mark.slow
@pytest.mark.parametrize('name', NETWORKS)
def test_public_networks_are_cut_exactly_and_lose_a_unit_exactly(name, libraries):
  paths = (str(ROOT), str(libraries), os.environ.get('PYTHONPATH', ''))
  done = subprocess.run(
    [sys.executable, '-m', 'tests.zoo.public', name],
    env={**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, paths))},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  seen = json.loads(done.stdout.splitlines()[-1])
  known, cut, trunk = NETWORKS[name], seen['cut'], seen['trunk']
  assert cut['difference'] <= 1e-5 and cut['verify']['difference'] <= 1e-5
  assert cut['verify']['moved'] > 1e-3
  assert cut['flops'] < (0.9 if known.exclude else 0.66)
  assert cut['cut'] and (not known.cut or known.cut in cut['cut'])
  assert cut['kind'] == known.kind and cut['own'] <= 1e-5
  units = [u.format(i) for u in known.units for i in range(1 + ('{}' in u))]
  assert sorted(trunk['units']) == sorted(units) and trunk['main'] <= 1e-5
  if units:
    assert trunk['erased'] <= 1e-6 < trunk['moved']
    assert trunk['params'] < 1 or name == 'albert'  # whose layers are all the same one
