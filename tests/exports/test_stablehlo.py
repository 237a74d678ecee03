"""What is exported runs elsewhere: the same numbers, at every batch, from files."""

import json
import sys
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export as jax_export
from safetensors.numpy import load_file

from depthprune.cascades.cascade import cascade
from depthprune.exports import networks, onnx
from depthprune.exports.networks import find, load_cascade, save_cascade
from depthprune.exports.onnx import ExportError
from depthprune.exports.stablehlo import export
from depthprune.models import build
from depthprune.models.auxiliary_path import beside
from depthprune.models.heads import Head, WithHeads
from depthprune.models.mlp import MLP
from depthprune.models.mobilenet import MobileNetV2
from depthprune.models.resnet import ResNet
from depthprune.models.segnet import SegNet
from depthprune.models.vgg import VGG
from depthprune.models.vit import ViT
from depthprune.program.coupling import couple
from depthprune.storage.checkpoint import CheckpointError
from depthprune.surgery.oneshot import oneshot
from depthprune.surgery.prune import prune
from tests import zoo

IMAGES = np.random.default_rng(0).normal(size=(5, 8, 8, 3)).astype(np.float32)
DRAW = np.random.default_rng(1)
TEXT = (
  DRAW.integers(1, 60, (5, 7)).astype(np.int32),
  np.arange(7) < [[7], [3], [5], [1], [6]],
)
TRUNK = MLP(classes=4, hidden=(7, 7, 7))
VECTORS = DRAW.normal(size=(12, 6)).astype(np.float32)
FAMILIES = {
  'mlp': (TRUNK, VECTORS),
  'resnet': (ResNet(depth=8, width=4), IMAGES),
  'imagenet': (ResNet(depth=18, width=4, imagenet=True, shortcut='B'), IMAGES),
  'vgg': (VGG(blocks=(1, 2), width=4), IMAGES),
  'mobilenet': (MobileNetV2(blocks=(1, 2), width=0.5), IMAGES),
  'segnet': (SegNet(blocks=(1, 2), width=4), IMAGES),
  'vit': (ViT(width=8, depth=2, heads=2, inner=12), IMAGES),
  'bert': (build('bert_tiny', depth=2), TEXT),
  'heads': (
    WithHeads(ResNet(depth=8, width=4), {'a': Head('stage1/block0', hidden=5)}),
    IMAGES,
  ),
}


def inputs_of(x):
  return tuple(jnp.asarray(i, i.dtype if i.dtype != np.float64 else np.float32)
               for i in (x if isinstance(x, tuple) else (x,)))  # fmt: skip


def pruned(model, x, target='60%', **keep):
  """A network with some of its channels cut, if there are any to cut."""
  x = tuple(i[:1] for i in inputs_of(x))
  variables = zoo.randomised(jax.eval_shape(model.init, jax.random.key(0), *x))
  coupling = couple(model, variables, *x)
  chosen = oneshot(coupling, variables, target) if target else {}
  return prune(model, variables, {**chosen, **keep}, x)


def run(folder, name, *inputs):
  """A program as somebody without depthprune runs it."""
  arrays = load_file(folder / 'network' / 'weights.safetensors')
  if name == 'cascade':
    arrays |= load_file(folder / 'cascade.safetensors')
  return program(folder, name).call(read(folder, name, arrays), *inputs)


def read(folder, name, arrays):
  """Those of the arrays that a program reads."""
  told = json.loads((folder / 'export.json').read_text())
  return {key: arrays[key] for key in told['programs'][name]['arrays']}


def program(folder, name):
  content = (folder / f'{name}.stablehlo').read_bytes()
  return jax_export.deserialize(bytearray(content))


def run_onnx(folder, name, *inputs):
  runtime = pytest.importorskip('onnxruntime')
  session = runtime.InferenceSession(folder / f'{name}.onnx')
  names = [x.name for x in session.get_inputs()]
  given = dict(zip(names, map(np.asarray, inputs), strict=True))
  return dict(
    zip([x.name for x in session.get_outputs()], session.run(None, given), strict=True)
  )


def close(a, b, tolerance=1e-5):
  a, b = np.asarray(a), np.asarray(b)
  assert a.shape == b.shape
  np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize('family', FAMILIES)
def test_a_pruned_network_of_every_family_is_the_same_elsewhere(tmp_path, family):
  model, x = FAMILIES[family]
  network = pruned(model, x)
  told = export(tmp_path / 'it', network, onnx=True)
  assert {*told['programs']} == {*model.exits}
  assert told['platforms'] == ['cpu', 'cuda', 'tpu']
  inputs = inputs_of(x)
  expected = jax.jit(network.apply)(network.variables, *inputs)
  for name in model.exits:
    close(run(tmp_path / 'it', name, *inputs), expected[name])
    close(run_onnx(tmp_path / 'it', name, *inputs)['logits'], expected[name])
  back = networks.load(tmp_path / 'it' / 'network')
  assert back.arch == network.arch != {}
  jax.tree.map(np.testing.assert_array_equal, back.variables, network.variables)


# ---- cascades ------------------------------------------------------------------------

HEADS = {
  'a': Head('layer0', 4, hidden=5, norm=True),
  'b': Head('layer1', 4, after='a'),  # it reads an earlier answer
}
MODEL = WithHeads(TRUNK, HEADS)
TEXTS = WithHeads(build('bert_tiny', depth=2), {'a': Head('layer0', 2)})


def early(model=MODEL, x=VECTORS, confidence='probability', **more):
  """A network and a cascade of it that a half leaves at every exit."""
  network = pruned(model, x, target=None)
  x = inputs_of(x)
  made = partial(cascade, network.apply, network.variables, *(i[:1] for i in x))
  made = partial(made, confidence=confidence, **more)
  seen = made().predictions(None, *x)
  exits = zip(seen.exits[:-1], np.median(seen.scores, axis=1), strict=False)
  return network, made(thresholds={e: float(t) for e, t in exits})


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
  folder = tmp_path_factory.mktemp('cascade') / 'it'
  network, found = early()
  return folder, network, found, export(folder, network, found, onnx=True, batch=None)


@pytest.mark.parametrize('size', [1, 5, 12, 40])
def test_a_cascade_is_executed_elsewhere_at_any_batch(exported, size):
  folder, _, found, _ = exported
  x = np.resize(VECTORS, (size, 6))
  mine, theirs = found(x), run(folder, 'cascade', x)
  for name, value in mine._asdict().items():
    np.testing.assert_array_equal(theirs[name], value)
  if size == 12:
    assert {*np.asarray(mine.exit)} == {0, 1, 2} and mine.rows[2] < 12


def test_other_thresholds_need_no_other_program(exported):
  folder, _, found, _ = exported
  arrays = load_file(folder / 'network' / 'weights.safetensors')
  settings = load_file(folder / 'cascade.safetensors')
  settings['cascade/thresholds'] = np.full(2, -1, np.float32)
  arrays = read(folder, 'cascade', {**arrays, **settings})
  answer = program(folder, 'cascade').call(arrays, VECTORS)
  assert not answer['exit'].any() and list(answer['rows']) == [12, 0, 0]
  assert found(VECTORS).exit.any()


def test_every_exit_is_a_program_of_its_own(exported):
  folder, network, _, told = exported
  expected = network.apply(network.variables, jnp.asarray(VECTORS))
  assert {*told['programs']} == {*expected, 'cascade'} == {'a', 'b', 'main', 'cascade'}
  for name, logits in expected.items():
    close(run(folder, name, VECTORS), logits)
    close(run_onnx(folder, name, VECTORS)['logits'], logits)
  # Weights are arguments: without them nothing is said.
  arrays = load_file(folder / 'network' / 'weights.safetensors')
  nothing = jax.tree.map(np.zeros_like, read(folder, 'main', arrays))
  assert not program(folder, 'main').call(nothing, VECTORS).any()
  # What lies behind an exit is not in its file.
  layers = lambda name: program(folder, name).mlir_module().count('stablehlo.dot_g')
  assert layers('a') / layers('main') == 3 / 4
  first = {'trunk/layer0/dense', 'head_a/hidden', 'head_a/out'}
  leaves = {f'params/{layer}/{leaf}' for layer in first for leaf in ('kernel', 'bias')}
  leaves |= {f'params/head_a/norm/{leaf}' for leaf in ('scale', 'bias')}
  leaves |= {f'batch_stats/head_a/norm/{leaf}' for leaf in ('mean', 'var')}
  assert {*told['programs']['a']['arrays']} == leaves


def test_a_cascade_in_onnx_has_one_size(exported):
  folder, _, found, told = exported
  assert told['programs']['cascade']['onnx_inputs'] == [[1, 6]]
  for i in range(12):
    x = VECTORS[i : i + 1]
    mine, theirs = found(x)._asdict(), run_onnx(folder, 'cascade', x)
    close(theirs['logits'], mine['logits'])
    assert int(theirs['exit'][0]) == int(mine['exit'][0])


def test_a_cascade_of_one_size_in_both_formats(tmp_path):
  network, found = early(confidence='patience', steps=3)
  told = export(tmp_path / 'it', network, found, onnx=True, batch=12)
  assert told['inputs'] == [{'name': 'input', 'shape': [12, 6], 'dtype': 'float32'}]
  mine = found(VECTORS)._asdict()
  close(run(tmp_path / 'it', 'cascade', VECTORS)['logits'], mine['logits'])
  theirs = run_onnx(tmp_path / 'it', 'cascade', VECTORS)
  close(theirs['logits'], mine['logits'])
  np.testing.assert_array_equal(theirs['exit'], mine['exit'])
  with pytest.raises(ValueError, match='12'):
    run(tmp_path / 'it', 'main', VECTORS[:5])


def test_what_is_broadcast_to_the_batch_is_one_program_too(tmp_path):
  def network_of(v, x):
    q = jnp.broadcast_to(v['q'], x.shape)  # nothing to do for one example
    x = jnp.tanh(x @ v['w']) + q
    return {'a': x, 'main': (jnp.tanh(x) + q) @ v['w']}

  shapes = {'w': (6, 6), 'q': (1, 6)}
  v = {k: DRAW.normal(size=size).astype(np.float32) for k, size in shapes.items()}
  network = prune(network_of, v, {}, VECTORS[:1])
  found = cascade(network_of, v, VECTORS[:1], thresholds={'a': 0.4})
  assert found.stages.least == 2
  export(tmp_path / 'it', network, found)
  for size in (1, 12):
    mine, theirs = (
      found(VECTORS[:size]),
      run(tmp_path / 'it', 'cascade', VECTORS[:size]),
    )
    np.testing.assert_array_equal(theirs['exit'], mine.exit)
    close(theirs['logits'], mine.logits)


def test_a_cascade_of_texts_masks_and_all(tmp_path):
  network, found = early(TEXTS, TEXT, steps=2)
  export(tmp_path / 'it', network, found)
  answer = run(tmp_path / 'it', 'cascade', *TEXT)
  np.testing.assert_array_equal(answer['exit'], found(*TEXT).exit)
  close(answer['logits'], found(*TEXT).logits)


def test_an_export_is_a_saved_cascade_and_network(exported, tmp_path):
  folder, _, found, told = exported
  assert json.loads((folder / 'export.json').read_text()) == told
  back = load_cascade(folder)
  jax.tree.map(np.testing.assert_array_equal, back(VECTORS), found(VECTORS))
  saved = find(folder)
  assert saved.cascade is not None and saved.folder == folder and saved.run is None
  export(tmp_path / 'again', saved.network, saved.cascade)
  x = VECTORS[:3]
  close(run(tmp_path / 'again', 'cascade', x)['logits'], found(x).logits)


# ---- what a run left, and what cannot be exported ------------------------------------


def test_find_looks_where_runs_and_exports_write(tmp_path):
  network, found = early()
  save_cascade(tmp_path / 'side' / 'cascade', found, network)
  networks.save(tmp_path / 'thin' / 'pruned', network)
  for run_of in ('side', 'thin'):
    (tmp_path / run_of / 'config.json').write_text('{}')
  side, thin = find(tmp_path / 'side'), find(tmp_path / 'thin' / 'pruned')
  assert side.cascade is not None and side.run == tmp_path / 'side'
  assert thin.cascade is None and thin.run == tmp_path / 'thin'
  with pytest.raises(CheckpointError, match='goes on when it is started again'):
    find(tmp_path)


class Foreign(nn.Module):
  """Somebody's network, with all that may hold the number of examples."""

  @nn.compact
  def __call__(self, x):
    y = nn.relu(nn.Dense(8)(x.reshape(x.shape[0], 2, 3)))
    start = jnp.broadcast_to(
      self.param('start', nn.initializers.ones, (8,)), (x.shape[0], 1, 8)
    )
    y = jnp.concatenate([start, y + jnp.zeros((x.shape[0], 2, 8))], axis=1)
    y = nn.MultiHeadDotProductAttention(2)(y)[:, 0]
    y = nn.gelu(nn.Dense(6)(y.reshape(-1, 8)))
    return nn.Dense(3)(jnp.where(jnp.arange(x.shape[0])[:, None] >= 0, y, 0.0))


def test_a_cut_network_of_somebody_else_is_one_program_too(tmp_path):
  network = pruned(Foreign(), VECTORS, '60%')
  assert not network.arch and network.report['flops']['after'] > 0
  export(tmp_path / 'it', network, onnx=True)
  for size in (1, 2, 12):
    x = VECTORS[:size]
    expected = network.apply(network.variables, x)
    close(run(tmp_path / 'it', 'main', x), expected)
    close(run_onnx(tmp_path / 'it', 'main', x)['logits'], expected)


def test_a_cascade_of_somebody_elses_network_is_one_program_too(tmp_path):
  def network_of(v, x):
    x = nn.relu(x @ v['a'])
    return {'early': x @ v['b'], 'main': nn.relu(x @ v['c']) @ v['b']}

  shapes = {'a': (6, 8), 'b': (8, 3), 'c': (8, 8)}
  v = {k: DRAW.normal(size=size).astype(np.float32) for k, size in shapes.items()}
  coupling = couple(network_of, v, VECTORS[:1])
  keep = oneshot(coupling, v, '60%')
  network = prune(network_of, v, keep, VECTORS[:1], coupling=coupling)
  found = cascade(
    network.apply, network.variables, VECTORS[:1], thresholds={'early': 0.6}
  )
  export(tmp_path / 'it', network, found)
  for size in (1, 12):
    mine = found(VECTORS[:size])
    theirs = run(tmp_path / 'it', 'cascade', VECTORS[:size])
    np.testing.assert_array_equal(theirs['exit'], mine.exit)
    close(theirs['logits'], mine.logits)


class Halves(nn.Module):
  """Which examples it reads depends on how many there are."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(nn.Dense(8)(x[: len(x) // 2] if len(x) > 5 else x))


# What follows the number of examples in a way that is seen, and what does not.
FOLLOWS = {
  'mean': lambda h: h - h.mean(0),
  'tile': lambda h: h + jnp.tile(jnp.arange(8.0), (h.shape[0], 1)),
  'chosen': lambda h: h + h[jnp.arange(h.shape[0]), jnp.argmax(h, 1)][:, None],
  'nan': lambda h: jnp.where(jnp.isnan(h), jnp.nan, h),
}
HIDES = {
  'squared': lambda h: h / h.shape[0] ** 2,
  'loop': lambda h: jax.lax.fori_loop(0, h.shape[0], lambda i, h: h + 1.0, h),
  'alone': lambda h: h / jnp.ones((h.shape[0],)).sum(),
  'parity': lambda h: h * (1 + h.shape[0] % 2),
  'noise': lambda h: h + jax.random.normal(jax.random.key(0), h.shape).sum(),
}


class Counts(nn.Module):
  """What it says depends on how many examples there are."""

  how: str

  @nn.compact
  def __call__(self, x):
    h = nn.Dense(8)(nn.relu(nn.Dense(8)(x)))
    return nn.Dense(3)((FOLLOWS | HIDES)[self.how](h))


@pytest.mark.parametrize('how', FOLLOWS)
def test_a_number_that_is_that_of_the_examples_follows_it(how):
  network = pruned(Counts(how), VECTORS, '60%')
  (batch,) = jax_export.symbolic_shape('batch')
  shape = jax.ShapeDtypeStruct((batch, 6), jnp.float32)
  found = jax_export.export(jax.jit(network.apply))(network.variables, shape)
  for size in (1, 2, 12):
    x = VECTORS[:size]
    close(found.call(network.variables, x), network.apply(network.variables, x))


@pytest.mark.parametrize('how', HIDES)
def test_a_number_that_is_none_of_the_examples_is_refused_naming_its_line(how):
  network = pruned(Counts(how), VECTORS, '60%')
  (batch,) = jax_export.symbolic_shape('batch')
  shape = jax.ShapeDtypeStruct((batch, 6), jnp.float32)
  with pytest.raises(ValueError, match=r'depends? on the size of an input'):
    jax.eval_shape(network.apply, network.variables, shape)


@pytest.mark.parametrize('target', [None, '60%'])
def test_what_is_another_network_at_another_batch_has_to_have_one(tmp_path, target):
  network = pruned(Halves(), VECTORS, target)
  with pytest.raises(ExportError, match='cannot be traced for any batch size'):
    export(tmp_path / 'it', network)
  assert not [*tmp_path.iterdir()]
  export(tmp_path / 'it', network, batch=12)
  assert run(tmp_path / 'it', 'main', VECTORS).shape == (6, 3)
  if target:
    with pytest.raises(ExportError, match='main: .*depends on the size of an input'):
      export(tmp_path / 'counts', pruned(Counts('squared'), VECTORS, target))
  with pytest.raises(ExportError, match='>= 1, got 0'):
    export(tmp_path / 'it', network, batch=0)


def test_every_kind_of_answer_has_names_in_onnx(tmp_path):
  def network_of(v, x):
    x = nn.relu(x @ v['w'])
    return {'4': (x @ v['w'], x), 'a/b': x}

  v = {'w': DRAW.normal(size=(6, 6)).astype(np.float32)}
  network = prune(network_of, v, {}, VECTORS[:1])
  told = export(tmp_path / 'it', network, onnx=True)
  assert {p['onnx'] for p in told['programs'].values()} == {'4.onnx', 'a.b.onnx'}
  answers = run_onnx(tmp_path / 'it', '4', VECTORS)
  for one, other in zip(answers.values(), network.apply(v, VECTORS)['4'], strict=True):
    close(one, other)


def test_a_path_beside_the_network_is_not_exported(tmp_path):
  model = WithHeads(TRUNK, {'aux': beside(TRUNK.taps, classes=4, width=5)})
  network = pruned(model, VECTORS, target=None, exits={'aux': False})
  assert [*export(tmp_path / 'it', network)['programs']] == ['main']


def test_other_files_are_left_alone(tmp_path):
  (tmp_path / 'thesis.txt').write_text('years of work')
  with pytest.raises(ExportError, match='got other files'):
    export(tmp_path, pruned(TRUNK, VECTORS))
  assert [*tmp_path.iterdir()] == [tmp_path / 'thesis.txt']
  with pytest.raises(ExportError, match='got other files'):
    export(tmp_path / 'thesis.txt', pruned(TRUNK, VECTORS))


def test_an_earlier_export_is_replaced_whole(tmp_path):
  """And what a killed export has left beside it is removed."""
  network, found = early()
  export(tmp_path / 'it', network, found)
  (tmp_path / '.unfinished-it-x1').mkdir()
  export(tmp_path / 'it', network)
  left = {path.name for path in (tmp_path / 'it').iterdir()}
  exits = {f'{name}.stablehlo' for name in ('a', 'b', 'main')}
  assert left == {'network', 'export.json'} | exits
  assert [*tmp_path.iterdir()] == [tmp_path / 'it']


X = (jax.ShapeDtypeStruct((2, 3), jnp.float32),)
PROBE = [np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)]


def test_onnx_says_what_it_cannot_say(monkeypatch):
  pytest.importorskip('onnxruntime')
  said = lambda f: onnx.convert(lambda x: {'y': f(x)}, X, ['x'], PROBE)
  with pytest.raises(ExportError, match=r'cannot convert.*callback.*StableHLO has'):
    said(lambda x: jax.pure_callback(np.sin, X[0], x))
  with pytest.raises(ExportError, match='made what onnxruntime cannot run'):
    said(lambda x: x + jax.random.uniform(jax.random.key(0), (2, 3)))
  monkeypatch.setattr(onnx, '_distance', lambda mine, theirs: float('nan'))
  with pytest.raises(ExportError, match='made another network, nan apart'):
    said(jnp.tanh)
  monkeypatch.setitem(sys.modules, 'jax2onnx', None)
  with pytest.raises(ExportError, match=r"pip install 'depthprune\[onnx\]'"):
    said(jnp.tanh)


def test_the_converter_leaves_jax_as_it_was():
  pytest.importorskip('onnxruntime')
  onnx.convert(lambda x: {'y': jnp.tanh(x)}, X, ['x'], PROBE)
  for module in (jnp, jax.lax, jax.nn, nn):
    homes = {name: getattr(f, '__module__', '') for name, f in vars(module).items()}
    assert [name for name, home in homes.items() if 'jax2onnx' in str(home)] == []


def chosen(x):
  branches = [jnp.tanh, jnp.sin, lambda x: x + 1, lambda x: -x]
  return jax.lax.switch(jnp.int32(x[0, 0, 0, 0] > 9) + 2, branches, x)


WORDS_OF_OURS = {
  'max': lambda x: nn.max_pool(x, (3, 3), (2, 2), 'SAME'),
  'mean': lambda x: nn.pool(x, 0.0, jax.lax.add, (3, 2), (2, 1), 'SAME') / 6,
  'pad': lambda x: jnp.pad(x, ((0, 0), (1, 0), (0, 2), (1, 1)), constant_values=-3),
  'switch': chosen,
}


@pytest.mark.parametrize('word', WORDS_OF_OURS)
def test_what_stands_for_an_equation_is_equal_to_it(word):
  fn, (batch,) = WORDS_OF_OURS[word], jax_export.symbolic_shape('batch')
  shape = jax.ShapeDtypeStruct((batch, 8, 8, 3), jnp.float32)
  x = -1 - np.abs(IMAGES)  # a pool that is padded with zeros would show
  _, far = onnx.convert(lambda x: {'y': fn(x)}, [shape], ['x'], [x])
  assert far < 1e-6


@pytest.mark.parametrize(
  ('mine', 'theirs', 'far'),
  [
    ([1.0, 2.0], [1.0, 2.5], 0.25),
    ([0.1], [0.2], 0.1),
    ([np.nan, 1], [np.nan, 1], 0),
    ([np.nan], [1], np.inf),
    ([1.0], [[1.0]], np.inf),
  ],
)
def test_distance_is_of_the_largest_and_misses_no_nan(mine, theirs, far):
  assert onnx._distance(np.array(mine), np.array(theirs)) == pytest.approx(far)
