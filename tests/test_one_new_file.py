"""A method is one new file, and so is a model: both from strings, through everything.

A copy of the package gets a sixth method, L0 regularisation, and a small model. Nothing
else in it changes, and the two are run, swept, reported, exported and tested as all
others are.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

L0 = '''
"""L0 regularisation: hard-concrete gates, closed where they are not worth their price.

Louizos, Welling, Kingma: "Learning Sparse Neural Networks through L0 Regularization"
(ICLR 2018, arXiv 1712.01312):

  s = sigmoid((log u - log(1 - u) + a) / beta)      u uniform, in training
  s = sigmoid(a)                                    in evaluation: no noise
  z = clip(s (zeta - gamma) + gamma, 0, 1)
  L = task + lambda mean sigmoid(a - beta log(-gamma / zeta))
"""

from __future__ import annotations

import dataclasses

from etils import epy

from depthprune.train.method import Method, apart
from depthprune.train.options import Epochs, finite
from depthprune.train.recipe import Chart, Recipe

with epy.lazy_imports():
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


def l0(coupling, price=1.0, gate_lr=1.0):
  """Closes the channels of a network that are not worth their price."""
  start = coupling.gates()['channels']

  def forward(theta, key=None, step=None):
    gates = {}
    for i, (group, a) in enumerate(theta['channels'].items()):
      noise = 0.0
      if key is not None:
        u = jax.random.uniform(jax.random.fold_in(key, i), a.shape, minval=1e-6)
        noise = jnp.log(u) - jnp.log1p(-u)
      s = jax.nn.sigmoid((a + noise) / (1.0 if key is None else BETA))
      gates[group] = jnp.clip(s * (ZETA - GAMMA) + GAMMA, 0, 1)
    return {'channels': gates}

  def penalty(theta, step):
    a = jnp.concatenate([*theta['channels'].values()])
    return price * jax.nn.sigmoid(a - BETA * np.log(-GAMMA / ZETA)).mean()

  def decide(theta, stats, evaluate):
    open_ = jax.tree.map(np.asarray, forward(theta)['channels'])
    return {'channels': {g: (z > 0) | (z == z.max()) for g, z in open_.items()}}

  return Method(
    decide=decide,
    penalty=penalty,
    init=lambda gates, outputs: {
      'channels': {g: 0.5 * jnp.arange(v.size, dtype=v.dtype) for g, v in start.items()}
    },
    forward=forward,
    transform=lambda tx: apart(tx, optax.sgd(gate_lr)),
    report=lambda theta: {
      'open': {g: (z > 0).sum() for g, z in forward(theta)['channels'].items()}
    },
  )


@dataclasses.dataclass(frozen=True)
class L0Options:
  """L0 regularisation."""

  price: float = 20.0
  """Nats that all channels together must be worth."""

  patience: int = 1
  """Decides nothing in training."""

  def __post_init__(self):
    finite(self, 'price', positive=False)

  @property
  def label(self):
    return f'price{self.price:g}'


def _sentence(result):
  before, after = (sum(w[i] for w in result.widths.values()) for i in (0, 1))
  return f'closed {before - after} of {before} channels'


RECIPE = Recipe(
  options=L0Options,
  build=lambda setting: l0(setting.coupling, setting.options.price),
  description='Learn by L0 regularisation which channels may go, and report.',
  epochs={'': Epochs(train=1, gates=4, finetune=1)},
  decides_only=('patience',),
  legend='cut: right after surgery; after: trained on',
  sentence=_sentence,
  charts=(Chart('Hard-concrete gates', 'channels', 'open', 'gates that are not 0'),),
)
'''

TWIGS = '''
"""Two layers and a head: the smallest network there is."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from depthprune.models.arch import Arch, complete
from depthprune.models.layers import classify
from depthprune.models.stages import check_tap


class Twigs(nn.Module):
  classes: int = 10
  arch: Arch = FrozenDict()
  dtype: str = 'float32'

  def __post_init__(self):
    self.arch = FrozenDict(self.arch)
    super().__post_init__()

  exits = property(lambda self: ('main',))
  taps = property(lambda self: ('twig0', 'twig1'))
  pool = property(lambda self: 'avg')
  widths = property(lambda self: {'twig0': 12, 'twig1': 8})

  @nn.compact
  def __call__(self, x, train=False, until=''):
    widths, outputs = complete(self.arch, self.widths, 'Twigs'), {}
    if until:
      check_tap(until, self.taps)
    x = x.reshape(x.shape[0], -1)
    for name in self.taps:
      x = outputs[name] = nn.relu(nn.Dense(widths[name], name=name)(x))
      if name == until:
        return outputs
    return {**outputs, 'main': classify(x, self.classes)}


def small():
  return Twigs(), jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)


twigs = Twigs
'''

SESSION = """
import sys
from depthprune import cli

for words in sys.argv[1:]:
  try:
    code = cli.main(words.split())
  except SystemExit as helped:
    code = helped.code
  if code:
    sys.exit(code)
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
  """A copy of the package and of the conformance tests, with two files more."""
  folder = tmp_path_factory.mktemp('copy')
  ignored = shutil.ignore_patterns('__pycache__')
  shutil.copytree(ROOT / 'depthprune', folder / 'depthprune', ignore=ignored)
  shutil.copytree(ROOT / 'tests/zoo', folder / 'tests/zoo', ignore=ignored)
  for name in ('conftest.py', 'masking.py', 'test_conformance.py'):
    shutil.copy(ROOT / 'tests' / name, folder / 'tests' / name)
  (folder / 'tests/methods').mkdir()
  name = 'tests/methods/test_conformance.py'
  shutil.copy(ROOT / name, folder / name)
  shutil.copy(ROOT / 'pyproject.toml', folder)
  (folder / 'depthprune/methods/l0.py').write_text(L0)
  (folder / 'depthprune/models/twigs.py').write_text(TWIGS)
  return folder


def python(folder: Path, *words: str) -> str:
  """What Python prints there, where `depthprune` is the copy."""
  environment = {**os.environ, 'PYTHONPATH': str(folder)}
  done = subprocess.run(
    [sys.executable, *words],
    cwd=folder,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  return done.stdout


def test_they_go_through_the_command_line(folder):
  run = 'run l0 --model twigs --data digits --subset 256 --batch 64'
  sweep = 'sweep l0 --model twigs --data digits --subset 64 --batch 32 --price 0 60'
  said = python(
    folder,
    *('-c', SESSION, 'run l0 --help', f'{run} --workdir a', f'{run} --workdir a'),
    *('report a', 'export a', f'{sweep} --workdir b'),
  )
  assert '--price FLOAT' in said and 'Nats that all channels' in said
  result = json.loads((folder / 'a/result.json').read_text())
  assert result['method'] == 'l0' and result['rounds'][0]['learned']['open']
  (before, after), *_ = result['widths'].values()
  assert 0 < after < before == 12
  closed = 20 - sum(after for _, after in result['widths'].values())
  assert f'closed {closed} of 20 channels' in said
  assert result['verify']['difference'] < 1e-4
  page = (folder / 'a/report.html').read_text()
  assert 'Hard-concrete gates' in page and f'Closed {closed} of 20 channels' in page
  assert (folder / 'a/exported/main.stablehlo').is_file()
  settings = json.loads((folder / 'b/sweep.json').read_text())['runs']
  assert [run['settings'] for run in settings] == [{'price': 0.0}, {'price': 60.0}]


def test_what_its_training_depends_on_is_its_own(folder):
  """Another price is another run; what only decides may be changed."""
  said = python(
    folder,
    '-c',
    'from depthprune.methods.l0 import L0Options\n'
    'from depthprune.run.config import default, relevant\n'
    'of = lambda **o: relevant(default("l0", L0Options(**o)).to_json())\n'
    'print(of(price=1.0) == of(price=2.0), of(patience=1) == of(patience=2))',
  )
  assert said.split() == ['False', 'True']


def test_they_pass_the_conformance_tests(folder):
  tests = ('tests/methods/test_conformance.py', 'tests/test_conformance.py')
  said = python(
    folder, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *tests, '-k', 'l0 or twigs'
  )
  assert '5 passed' in said
