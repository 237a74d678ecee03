"""A network and data from files of the user's own, through the command line."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

import depthprune as dp
from depthprune import cli
from depthprune.data.dataset import DataError
from depthprune.run import data, network, own
from depthprune.run.config import Config, default, from_json
from depthprune.run.job import prepare
from depthprune.storage import checkpoint
from depthprune.train.options import ConfigError

NET = '''
import flax.linen as nn
from flax import nnx
import depthprune as dp
from layers_beside import Block

class Net(nn.Module):
  """A residual network whose mode has no default."""
  num_classes: int
  widths: tuple = (8, 8)

  @nn.compact
  def __call__(self, x, training):
    for width in self.widths:
      x = nn.Conv(width, (3, 3))(x)
      x = nn.relu(nn.BatchNorm(use_running_average=not training)(x))
      x = Block(width)(x, training)
    x = nn.Dropout(0.1, deterministic=not training)(x.mean((1, 2)))
    return nn.Dense(self.num_classes)(x)

class Plain(nn.Module):
  @nn.compact
  def __call__(self, x):
    return {'main': nn.Dense(3)(nn.relu(nn.Dense(8)(x.reshape(len(x), -1))))}

class Plainly(nn.Module):
  """A residual network without a word about this library."""
  classes: int = 3

  @nn.compact
  def __call__(self, x, *, deterministic=True):
    x = nn.relu(nn.Conv(8, (3, 3), name='stem')(x))
    for i in range(3):
      y = nn.BatchNorm(use_running_average=deterministic)(nn.Conv(8, (3, 3))(x))
      x = nn.relu(x + nn.Dropout(0.1, deterministic=deterministic)(y))
    return nn.Dense(self.classes)(x.mean((1, 2)))

class Unit(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(8, 8, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.drop = nnx.Dropout(0.1, rngs=rngs)

  def __call__(self, x):
    return x + self.drop(nnx.relu(self.norm(self.conv(x))))

class NNX(nnx.Module):
  def __init__(self, num_classes, rngs):
    self.stem = nnx.Conv(1, 8, (3, 3), rngs=rngs)
    self.units = nnx.List([Unit(rngs) for _ in range(2)])
    self.head = nnx.Linear(8, num_classes, rngs=rngs)

  def __call__(self, x):
    x = self.stem(x)
    for unit in self.units:
      x = unit(x)
    return self.head(x.mean((1, 2)))

class Wrong(nn.Module):
  kind: str
  classes: int = 3
  @nn.compact
  def __call__(self, x):
    if self.kind == 'fails':
      raise KeyError('no such thing')
    logits = nn.Dense(self.classes)(x.mean((1, 2)))
    return (logits, logits) if self.kind == 'tuple' else logits

def build(width=4):
  return Net(3, (width,))

def broken():
  raise RuntimeError('it is broken')

nothing = 3
'''
BESIDE = """
import flax.linen as nn
import depthprune as dp

class Block(nn.Module):
  width: int
  @nn.compact
  def __call__(self, x, training):
    h = nn.relu(nn.Conv(self.width, (3, 3))(x))
    return x + dp.branch(self, nn.Conv(self.width, (3, 3))(h))
"""
TAPS = """
import flax.linen as nn
from flax.core import FrozenDict

class Taps(nn.Module):
  classes: int = 3
  arch: FrozenDict = FrozenDict()
  dtype: str = 'float32'
  exits = property(lambda self: ('main',))
  taps = property(lambda self: ('a', 'b', 'c'))
  pool = property(lambda self: 'avg')
  widths = property(lambda self: {})

  @nn.compact
  def __call__(self, x, train=False, until=''):
    outputs = {}
    for name in self.taps:
      x = outputs[name] = nn.relu(nn.Conv(6, (3, 3), name=name)(x))
      if name == until:
        return outputs
    return {**outputs, 'main': nn.Dense(self.classes, name='out')(x.mean((1, 2)))}
"""
DATA = """
import numpy as np

def arrays():
  rng = np.random.default_rng(0)
  y = np.arange(96) % 3
  x = rng.integers(0, 60, (96, 8, 8, 1)) + 60 * y[:, None, None, None]
  train, test = slice(72), slice(72, None)
  labels = {'y_train': y[train] + 1, 'y_test': y[test] + 1}
  return {'x_train': x[train], 'x_test': x[test], **labels}

def dataset():
  from depthprune.data import arrays as read, images
  return images.divided('mine', read.source('mine', arrays()))

def broken():
  return np.zeros(3)[5]
"""
FEW = '--train-epochs 1 --gate-epochs 1 --finetune-epochs 1 --batch 24'


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
  """The files, with the same images as a folder of PNGs and as an .npz."""
  folder = tmp_path_factory.mktemp('mine')
  for name, content in {
    'own_net': NET,
    'layers_beside': BESIDE,
    'own_taps': TAPS,
    'own_data': DATA,
  }.items():
    (folder / f'{name}.py').write_text(content)
  made = own.load(f'{folder}/own_data.py:arrays')()
  np.savez(folder / 'mine.npz', **made)
  image = pytest.importorskip('PIL.Image')
  for split in ('train', 'test'):
    for i, (x, y) in enumerate(zip(made[f'x_{split}'], made[f'y_{split}'])):
      path = folder / 'pngs' / split / f'c{y}' / f'{i}.png'
      path.parent.mkdir(parents=True, exist_ok=True)
      image.fromarray(x[..., 0].astype(np.uint8)).save(path)
  return folder


def python(folder: Path, *words: str) -> subprocess.CompletedProcess:
  """Runs the command line in that folder, as a person would."""
  environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[2])}
  command = [sys.executable, '-m', 'depthprune.cli', *words]
  return subprocess.run(
    command, cwd=folder, env=environment, capture_output=True, text=True
  )


def config_of(folder: Path, method: str = 'gates', **fields) -> Config:
  fields = {'model': f'{folder}/own_net.py:Net', 'data': f'{folder}/mine.npz', **fields}
  return default(method, **fields)


# ---- names ---------------------------------------------------------------------------


def test_paths_become_absolute_and_names_stay(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'pngs').mkdir()
  (tmp_path / 'digits').mkdir()
  (tmp_path / 'set' / '1.0.0').mkdir(parents=True)
  (tmp_path / 'set' / '1.0.0' / 'dataset_info.json').touch()
  here = default('gates', model='net.py:Net', data='pngs')
  assert (here.model, here.data) == (f'{tmp_path}/net.py:Net', f'{tmp_path}/pngs')
  assert str(here.path).startswith('runs/trainable_gates-net.py:Net-pngs-')
  for name in ('digits', 'set', 'cifar10', 'glue/sst2', 'mnist:3.0.1'):
    assert default('gates', data=name).data == name
  assert default('gates', data='./digits').data == f'{tmp_path}/digits'
  assert default('gates', data='a.csv').data == f'{tmp_path}/a.csv'
  with pytest.raises(ConfigError, match=r'net.py: expected FILE.py:NAME'):
    default('gates', model='net.py')


def test_what_a_file_contains_is_part_of_the_config(tmp_path):
  file = tmp_path / 'net.py'
  file.write_text('a = 1')
  config = default('gates', model=f'{file}:a', data=str(tmp_path))
  first = config.to_json()
  assert from_json(first) == config
  assert config.to_json() == first
  file.write_text('a = 2')
  second = config.to_json()
  differ = {k for k in first if first[k] != second[k]}
  assert differ == {'model_file_sha256'}
  (tmp_path / 'more.png').touch()
  assert config.to_json()['data_file_sha256'] != first['data_file_sha256']
  names = default('gates').to_json()
  assert not [k for k in names if k.endswith('sha256')]


def test_arguments_of_a_network():
  read = own.arguments
  assert read(['a=1', 'b=x', 'c=[1,2]', 'd=True', 'e=0.5', 'f=null', 'g=a=b']) == {
    **{'a': 1, 'b': 'x', 'c': (1, 2), 'd': True, 'e': 0.5, 'f': None, 'g': 'a=b'}
  }
  assert read(['{"a": [1, [2]], "b": {"c": [3]}}', 'd=1']) == {
    **{'a': (1, (2,)), 'b': {'c': (3,)}, 'd': 1}
  }
  for words, said in {
    ('a',): 'KEY=VALUE or a JSON object',
    ('a b=1',): 'KEY=VALUE',
    ('{"a"',): 'not a JSON object',
    ('a=1', '{"a": 2}'): 'a is given twice',
  }.items():
    with pytest.raises(ConfigError, match=said):
      default('gates', model_args=words)


# ---- networks ------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('name', 'fields', 'said'),
  [
    ('gone.py:Net', {}, r'gone.py:Net: there is no file'),
    ('own_net.py:Nett', {}, r'has no Nett; nearest: Net'),
    ('own_net.py:nothing', {}, 'expected a class, got a int'),
    ('own_net.py:broken', {}, r'RuntimeError: it is broken \(.*own_net.py, line'),
    ('own_net.py:Net', {'model_args': ('depth=3',)}, 'takes no depth.*num_classes'),
    ('own_net.py:Net', {'bfloat16': True}, 'takes no dtype'),
    ('own_data.py:arrays', {}, 'expected a module of flax.*dict'),
  ],
)
def test_networks_that_cannot_be_made_are_refused(folder, name, fields, said):
  with pytest.raises(ConfigError, match=said):
    network.network(config_of(folder, model=f'{folder}/{name}', **fields), 3)


def test_a_file_that_cannot_be_imported_says_where(tmp_path):
  (tmp_path / 'bad_net.py').write_text('import flax\n1 / 0\n')
  with pytest.raises(ConfigError, match=r'ZeroDivisionError: .*bad_net.py, line 2'):
    own.load(f'{tmp_path}/bad_net.py:Net')


def test_two_files_of_one_name_and_a_file_that_changes(tmp_path):
  for i in (1, 2):
    (tmp_path / str(i)).mkdir()
    (tmp_path / str(i) / 'same_name.py').write_text(f'value = {i}')
    assert own.load(f'{tmp_path}/{i}/same_name.py:value') == i
  assert own.load(f'{tmp_path}/1/same_name.py:value') == 1
  (tmp_path / '1' / 'same_name.py').write_text('value = 11')
  assert own.load(f'{tmp_path}/1/same_name.py:value') == 11
  (tmp_path / 'json.py').write_text('value = "not the standard one"')
  assert own.load(f'{tmp_path}/json.py:value').startswith('not')
  assert json.loads('1') == 1


def test_the_number_of_classes_and_the_mode_are_filled_in(folder):
  x = jax.numpy.ones((2, 8, 8, 1))
  config = config_of(folder, model_args=('widths=[4]',))
  module = network.network(config, 3)
  assert module.num_classes == 3 and module.widths == (4,)
  model = network.network(config, 3, x)
  variables = model.init(jax.random.key(0), x)
  logits, changed = model.apply(
    variables,
    x,
    train=True,
    mutable=['batch_stats'],
    rngs={'dropout': jax.random.key(1)},
  )
  assert logits['main'].shape == (2, 3) and 'batch_stats' in changed
  want = module.apply(variables, x, training=False)
  np.testing.assert_array_equal(model.apply(variables, x)['main'], want)
  np.testing.assert_array_equal(model.apply(variables, x, training=False)['main'], want)
  given = network.network(config_of(folder, model_args=('num_classes=5',)), 3)
  assert given.num_classes == 5
  plain = network.network(config_of(folder, model=f'{folder}/own_net.py:Plain'), 3, x)
  assert plain.classes == 3
  assert network.network(config_of(folder, model=f'{folder}/own_net.py:build'), 3)


def test_arguments_reach_networks_of_ours_too():
  config = default('gates', model='mlp', model_args=('hidden=[5,6]',))
  assert network.network(config, 3).hidden == (5, 6)
  for wrong, said in (
    ('hiden=[5]', 'model_args: mlp takes no hiden; nearest: hidden'),
    ('hidden=5', 'model_args: hidden: expected a list, got 5'),
    ('hidden=["a"]', 'model_args: hidden'),
  ):
    with pytest.raises(ConfigError, match=said):
      network.network(default('gates', model='mlp', model_args=(wrong,)), 3)


@pytest.mark.parametrize(
  ('args', 'said'),
  [
    (('kind=fails',), r"Wrong: its call failed on .* KeyError: 'no such thing'"),
    (('kind=tuple',), 'own_net.py:Wrong: .* the network returns a tuple: expected'),
    (
      ('kind=', 'classes=4'),
      'has 3 classes, but own_net.py:Wrong answers.*--model-arg',
    ),
  ],
)
def test_answers_of_another_form_are_refused(folder, tmp_path, args, said):
  config = config_of(
    folder, model=f'{folder}/own_net.py:Wrong', model_args=args, workdir=str(tmp_path)
  )
  job = prepare(config, show=False)
  with pytest.raises(DataError, match=said):
    network.check_answer(job, network.network(config, 3, *job.inputs))


def test_weights_of_its_own_are_read(folder, tmp_path):
  path = tmp_path / 'weights.npz'
  config = config_of(folder, pretrained=str(path), workdir=str(tmp_path / 'run'))
  x = np.zeros((1, 8, 8, 1), np.float32)
  model = network.network(config, 3, x)
  variables = model.init(jax.random.key(7), x)
  flat = checkpoint.paths(variables)
  np.savez(path, **flat)
  job = prepare(config, show=False)
  read = network.initial_variables(job, model)
  jax.tree.map(np.testing.assert_array_equal, read, variables)
  np.savez(path, **{k: v for k, v in flat.items() if 'Dense' not in k})
  with pytest.raises(checkpoint.CheckpointError, match='params/Dense_0/bias: expected'):
    network.initial_variables(job, model)


# ---- data ----------------------------------------------------------------------------


def test_the_same_images_from_a_folder_an_npz_and_a_function(folder):
  names = ('pngs', 'mine.npz', 'own_data.py:arrays', 'own_data.py:dataset')
  sets = [data.read(config_of(folder, data=f'{folder}/{name}')) for name in names]
  for each in sets:
    assert (each.classes, each.shape) == (3, (8, 8, 1))
    assert [len(s['label']) for s in (each.train, each.held_out, each.test)] == [
      65,
      7,
      24,
    ]
    label, image = each.test['label'], each.test['image']
    assert (label == image.mean((1, 2, 3)) // 60).all()
  png, npz = sets[0].normalisation, sets[1].normalisation
  assert abs(png.mean[0] - npz.mean[0]) < 0.02
  assert sets[0].names == ('c1', 'c2', 'c3') and sets[1].names == ('1', '2', '3')
  assert any('classes 0 to 2 are labels 1, 2, 3' in note for note in sets[1].notes)


def test_texts_from_a_table_need_their_tokenizer(folder, tmp_path):
  path = tmp_path / 'mine.csv'
  path.write_text('text,label\n' + ''.join(f'word {i},{i % 2}\n' for i in range(12)))
  with pytest.raises(DataError, match='pass --tokenizer FILE'):
    data.read(default('sidenet', model='bert_minilm', data=str(path)))
  with pytest.raises(DataError, match='resize is for images'):
    data.read(default('sidenet', model='bert_minilm', data=str(path), resize=3))


@pytest.mark.parametrize(
  ('fields', 'said'),
  [
    (
      {'data': 'own_data.py:broken'},
      r'function failed: IndexError: .*own_data.py, line',
    ),
    ({'data': 'none'}, 'none: expected a folder, there is none'),
    ({'data': 'none.npz'}, 'none.npz: there is no such file'),
    ({'data': 'own_data.py:dataset', 'subset': 5}, 'subset: the Dataset is taken as'),
    ({'data': 'mine.npz', 'stream': 'always'}, 'to be streamed'),
  ],
)
def test_data_that_cannot_be_read_is_refused(folder, fields, said):
  with pytest.raises(DataError, match=said):
    data.read(config_of(folder, **{**fields, 'data': f'{folder}/{fields["data"]}'}))


# ---- whole runs ----------------------------------------------------------------------


def test_a_run_from_the_command_line(folder):
  """A folder of images and a network from a file: run, changed, exported, loaded."""
  words = f'run gates --model own_net.py:Net --data pngs --target 60% {FEW} --workdir a'
  done = python(folder, *words.split())
  assert done.returncode == 0, done.stderr[-2000:]
  assert 'own_net.py:Net on pngs' in done.stdout
  result = json.loads((folder / 'a/result.json').read_text())
  assert (result['model'], result['data']) == ('own_net.py:Net', 'pngs')
  assert result['verify']['difference'] < 1e-4
  assert result['flops']['after'] < result['flops']['before']
  net = own.load(f'{folder}/own_net.py:Net')
  small = dp.load(folder / 'a/pruned', net(num_classes=3))
  x = np.ones((2, 8, 8, 1), np.float32)
  assert small.apply(small.variables, x, training=False)['main'].shape == (2, 3)
  assert cli.main(['export', str(folder / 'a')]) == 0
  assert (folder / 'a/exported/main.stablehlo').is_file()
  bench = ['bench', str(folder / 'a'), '--batches', '4', '--seconds', '0.05']
  assert cli.main([*bench, '--to', str(folder / 'bench.json')]) == 0
  (measured,) = json.loads((folder / 'bench.json').read_text())['networks']
  assert measured['flops']['before'] == result['flops']['before']
  assert cli.main(['report', str(folder / 'a')]) == 0
  # A network that has changed since is another one.
  file = folder / 'own_net.py'
  file.write_text(f'{NET}\n# changed\n')
  try:
    again = python(folder, *words.split())
    assert again.returncode == cli.WRONG_INPUT
    assert 'model_file_sha256' in again.stderr
    with pytest.raises(ConfigError, match='has changed since'):
      network.of_run(folder / 'a')
  finally:
    file.write_text(NET)


@pytest.mark.parametrize(
  ('method', 'net', 'more'),
  [
    pytest.param('implosion', 'own_net.py:Net', '--depth 1', marks=pytest.mark.slow),
    ('implosion', 'own_net.py:Plainly', '--depth 1'),
    ('netcut', 'own_net.py:NNX', '--force'),
    pytest.param('gates', 'own_net.py:NNX', '', marks=pytest.mark.slow),
    pytest.param('netcut', 'own_net.py:Plainly', '--force', marks=pytest.mark.slow),
    pytest.param('netcut', 'own_taps.py:Taps', '--force', marks=pytest.mark.slow),
    pytest.param('sidenet', 'own_net.py:Net', '', marks=pytest.mark.slow),
    pytest.param('auxiliary', 'own_net.py:Plainly', '', marks=pytest.mark.slow),
  ],
)
def test_the_other_methods(folder, method, net, more):
  few = (
    FEW.replace('--train-epochs 1', '') if method in ('netcut', 'auxiliary') else FEW
  )
  folder_of_run = folder / f'{method}-{net[-4:]}'
  words = [
    *f'run {method} --model {folder}/{net} --data {folder}/mine.npz {few}'.split(),
    *f'--workdir {folder_of_run} {more}'.split(),
  ]
  with jax.numpy_dtype_promotion('standard'):  # optax.adam
    assert cli.main(words) == 0
  for command in ('export', 'report'):
    assert cli.main([command, str(folder_of_run)]) == 0
  assert any((folder_of_run / 'exported').glob('*.stablehlo'))


@pytest.mark.slow
def test_a_run_that_is_killed_continues_to_the_same_bits(folder):
  """It is killed by SIGKILL as soon as a stage has saved."""
  net, args = f'{folder}/own_net.py:Net', '--train-epochs 2 --gate-epochs 2 --batch 24'
  words = f'run gates --model {net} --data {folder}/mine.npz {args}'.split()
  script = """
    import os, signal, sys
    from depthprune import cli
    from depthprune.storage.keeper import Keeper
    save = Keeper.save
    def killed(self, step, *given, **named):
      save(self, step, *given, **named)
      self.wait()
      os.kill(os.getpid(), signal.SIGKILL)
    Keeper.save = killed
    sys.exit(cli.main(sys.argv[1:]))
  """
  environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[2])}
  command = [sys.executable, '-c', textwrap.dedent(script), *words]
  done = subprocess.run(
    [*command, '--workdir', str(folder / 'killed')],
    env=environment,
    capture_output=True,
  )
  assert done.returncode == -9
  for name in ('killed', 'whole'):
    assert cli.main([*words, '--workdir', str(folder / name)]) == 0
  one, other = (
    dp.load(folder / name / 'pruned', own.load(net)(3)) for name in ('killed', 'whole')
  )
  jax.tree.map(np.testing.assert_array_equal, one.variables, other.variables)


def unbalanced(folder) -> str:
  """Two of three classes are rare."""
  rng = np.random.default_rng(1)
  y = rng.choice(3, 300, p=[0.8, 0.1, 0.1])
  x = rng.integers(0, 90, (300, 8, 8, 1)) + 60 * y[:, None, None, None]
  np.savez(folder / 'rare.npz', x=x.astype(np.uint8), y=y)
  return str(folder / 'rare.npz')


def test_classes_weigh_the_same_and_a_metric_decides(folder, tmp_path):
  fields = {'metric': 'f1', 'class_weights': 'balanced', 'workdir': str(tmp_path)}
  job = prepare(config_of(folder, data=unbalanced(folder), **fields), show=False)
  assert job.task.decides_by == 'f1'
  label = job.images.train['label']
  one = lambda k: float(
    job.task.loss(np.zeros((1, 3), np.float32), {'label': np.array([k])})
  )
  expected = [np.log(3) * len(label) / (3 * (label == k).sum()) for k in range(3)]
  np.testing.assert_allclose([one(k) for k in range(3)], expected, rtol=1e-5)


@pytest.mark.slow
def test_a_cascade_for_a_metric_of_its_own(folder):
  data_, net = unbalanced(folder), f'{folder}/own_taps.py:Taps'
  words = f'run sidenet --model {net} --data {data_} {FEW} --metric balanced_accuracy'
  path = folder / 'rare'
  with jax.numpy_dtype_promotion('standard'):
    assert cli.main([*words.split(), '--workdir', str(path)]) == 0
  result = json.loads((path / 'result.json').read_text())
  scores = result['scores']
  assert {*scores['before']} == {'balanced_accuracy'} == {*scores['after']}
  assert 'balanced accuracy, test' in (path / 'report.html').read_text()
