"""prune and trunk on architectures of transformers, haiku and equinox.

Each network is built in a process of its own, which sees these libraries: they are no
dependencies of ours.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.zoo.public import NETWORKS

LIBRARIES = 'transformers', 'haiku', 'equinox'
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize('name', NETWORKS)
def test_public_networks_are_cut_exactly_and_lose_a_unit_exactly(name, packages):
  folders = map(str, map(packages, LIBRARIES))
  paths = (str(ROOT), *folders, os.environ.get('PYTHONPATH', ''))
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
