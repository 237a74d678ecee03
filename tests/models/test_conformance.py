"""What every model must do: outputs, taps, `arch`, `until`, scan, compute type."""

import json
import re
from functools import cache, partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from depthprune.models import build, describe, names
from depthprune.models.bert import BERT
from depthprune.models.convnet import ConvNet
from depthprune.models.decoder import Decoder
from depthprune.models.heads import Head, WithHeads, multitask
from depthprune.models.mlp import MLP
from depthprune.models.mobilenet import MobileNetV2
from depthprune.models.resnet import ResNet
from depthprune.models.segnet import SegNet
from depthprune.models.vgg import VGG
from depthprune.models.vit import ViT
from tests import masking as m

SMALL = {
  'mlp': lambda **more: MLP(hidden=(6, 6, 6), **more),
  'convnet': lambda **more: ConvNet(layers=3, width=6, size=3, **more),
  'vgg': lambda **more: VGG(blocks=(1, 3, 2), width=4, **more),
  'resnet A': lambda **more: ResNet(depth=20, width=4, **more),
  'resnet B': lambda **more: ResNet(depth=14, width=4, shortcut='B', **more),
  'bottleneck': lambda **more: ResNet(
    depth=11, width=4, bottleneck=True, shortcut='B', **more
  ),
  'preact A': lambda **more: ResNet(depth=14, width=4, preact=True, **more),
  'preact B': lambda **more: ResNet(
    depth=11, width=4, bottleneck=True, shortcut='B', preact=True, **more
  ),
  'mobilenet': lambda **more: MobileNetV2(blocks=(1, 3), width=0.5, **more),
  'segnet': lambda **more: SegNet(blocks=(1, 2), width=4, **more),
  'vit': lambda **more: ViT(width=8, depth=4, heads=2, inner=12, segments=2, **more),
  'vit without token': lambda **more: ViT(
    width=8, depth=2, heads=2, inner=12, token=False, **more
  ),
  'bert': lambda **more: build('bert_tiny', segments=2, **more),
  'decoder': lambda **more: build('decoder_tiny', **more),
  'decoder with options': lambda **more: build(
    'decoder_tiny',
    tied=False,
    bias=True,
    query_norm=True,
    offset=1.0,
    scaled=True,
    activation='gelu',
    window=3,
    **more,
  ),
  'imagenet': lambda **more: build('resnet18', width=4, **more),
  'heads': lambda **more: WithHeads(
    ResNet(depth=14, width=4, shortcut='B', **more),
    {'early': Head('stage1/block1', hidden=5), 'late': Head('stage3/block1')},
  ),
  'multitask': lambda **more: multitask(
    MLP(hidden=(6, 6, 6), **more), {'left': 3, 'right': 4}
  ),
}
every_model = pytest.mark.parametrize('make', SMALL.values(), ids=SMALL)
DECODERS = ('decoder', 'decoder with options')  # the logits of which have no bias
WRAPPED = ('heads', 'multitask')  # heads on a trunk that is here by itself
every_name = pytest.mark.parametrize('name', SMALL)
LEAVES = ('kernel', 'scale', 'bias')
X = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
TEXT = jax.random.randint(jax.random.key(0), (2, 7), 0, 64)


def example(model, images=X):
  """What a model takes: images, or text."""
  return TEXT if isinstance(model, BERT | Decoder) else images


def features(outputs):
  """The outputs without the mask of a text."""
  return {name: value for name, value in outputs.items() if name != 'mask'}


@pytest.fixture(scope='module')
def whole(randomised):
  """name → the model, what it takes, random variables and the compiled network."""

  @cache
  def of(name):
    model = SMALL[name]()
    x = example(model)
    return model, x, randomised(model, x), jax.jit(model.apply)

  return of


def shapes(model):
  return jax.eval_shape(model.init, jax.random.key(0), example(model))


def flat(tree) -> dict[str, Any]:
  return cast(Any, flatten_dict(tree, sep='/'))


def kernel_widths(variables):
  """{path: outputs} of all kernels, the heads, and {path: how many} of branch gates."""
  params = flat(variables['params'])
  gates = flat(variables.get('branches', {}))
  kernels = {k.removesuffix('/kernel'): v.shape[-1] for k, v in params.items()}
  widths = {
    path: width for path, width in kernels.items() if f'{path}/kernel' in params
  }
  heads = {}
  for query in [path for path in widths if path.endswith('query')]:
    key = f'{query.removesuffix("query")}key'
    shape = params[f'{query}/kernel'].shape
    grouped = len(shape) > params[f'{key}/kernel'].ndim
    heads |= {f'{query}:{len(shape) - i}': shape[-i] for i in range(2, 3 + grouped)}
    if grouped:  # a rotation fixes the widths of queries and keys
      del widths[query], widths[key]
  return widths | heads | {path: gate.size for path, gate in gates.items()}


def without_logits(widths):
  return {
    path: width
    for path, width in widths.items()
    if not re.search(r'(^|/)head$|^head_\w+/out$|^exit/', path)
  }


@pytest.mark.parametrize('name', names())
def test_named_models_have_float32_logits_and_every_tap(name):
  texts = name.startswith('decoder')
  model = build(name, **{'vocab' if texts else 'classes': 7})
  x = example(model, jnp.ones((2, 32, 32, 3)))
  outputs, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
  assert set(features(outputs)) == {*model.taps, 'main'} and model.exits == ('main',)
  places = (32, 32) if isinstance(model, SegNet) else TEXT.shape[1:] if texts else ()
  assert outputs['main'].shape == (2, *places, 7)
  assert outputs['main'].dtype == jnp.float32
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize('scan', [False, True])
@every_model
def test_widths_are_those_of_the_arrays(make, scan):
  model = make(scan=scan)
  assert without_logits(kernel_widths(shapes(model))) == without_logits(model.widths)


@pytest.mark.parametrize('name', [name for name in SMALL if not name.endswith(' A')])
def test_arch_gives_exactly_its_shapes_and_trains(name, randomised):
  """Every kernel half as wide, so that streams agree, and some branches removed."""
  model = SMALL[name]()
  half = {key: max(w // 2, 1) for key, w in without_logits(model.widths).items()}
  units = [key for key in half if key.endswith('/branch')]
  arch = half | {key: int(i % 3 > 0) for i, key in enumerate(units)}
  exits = {key: value for key, value in model.arch.items() if key.startswith('exit/')}
  removed = tuple(key.removesuffix('branch') for key in units if not arch[key])
  small = model.clone(arch=arch | exits)
  x = example(model)
  variables = randomised(small, x)
  assert without_logits(kernel_widths(variables)) == {
    key: width
    for key, width in arch.items()
    if not key.startswith(removed) or 'shortcut' in key
  }

  def loss(params):
    trained = {**variables, 'params': params}
    outputs, _ = small.apply(trained, x, train=True, mutable='batch_stats')
    return sum(jnp.square(outputs[name]).sum() for name in small.exits)

  slopes = jax.jit(jax.grad(loss))(variables['params'])
  assert all(jnp.isfinite(slope).all() for slope in jax.tree.leaves(slopes))
  assert jnp.any(flat(slopes)[f'{next(iter(half))}/kernel'] != 0)


@every_model
def test_unknown_arch_keys_are_refused_with_the_nearest(make):
  model = make()
  key = next(iter(model.widths))
  with pytest.raises(ValueError, match=f"no key '{key}x'.*Nearest: .*{key}"):
    shapes(model.clone(arch={f'{key}x': 1}))
  with pytest.raises(ValueError, match=rf"arch\['{key}'\] is 99; expected .* from 1"):
    shapes(model.clone(arch={key: 99}))


@pytest.mark.parametrize('name', [name for name in SMALL if name not in WRAPPED])
def test_until_ends_the_network_at_that_tap(name, whole):
  model, x, variables, run = whole(name)
  full = run(variables, x)
  middle = model.taps[len(model.taps) // 2]

  def part(tap):
    init = partial(model.init, until=tap)
    return flat(jax.eval_shape(init, jax.random.key(0), x)['params'])

  outputs = jax.jit(partial(model.apply, until=middle))(variables, x)
  assert set(features(outputs)) == set(model.taps[: len(model.taps) // 2 + 1])
  np.testing.assert_allclose(outputs[middle], full[middle], rtol=1e-6)
  assert part(middle).keys() < part('').keys()
  head = {
    f'{module}/{leaf}' for module in ('head', 'norm', 'pooler') for leaf in LEAVES
  }
  behind = part('').keys() - part(model.taps[-1]).keys()
  last = {'norm/scale'} if name in DECODERS else {'head/kernel', 'head/bias'}
  assert last <= behind <= head
  with pytest.raises(ValueError, match=rf"no tap '{middle}x'.*Nearest: .*{middle}"):
    part(f'{middle}x')


def stacked(tree, segments=0):
  """The tree of a scanned model, from that of the unrolled one.

  segments: how many stacks there are of all blocks; 0 for one without the first."""
  if not isinstance(tree, dict):
    return tree
  tree = {name: stacked(part) for name, part in tree.items()}
  for kind in ('block', 'layer'):
    found = [int(name.removeprefix(kind)) for name in tree if name.startswith(kind)]
    rows = np.sort(np.array(found, int))  # the gates of a stage may have no first one
    rows = rows.reshape(segments, -1) if segments else rows[rows > 0]
    stacks = {f'{kind}s{i}': row for i, row in enumerate(rows)}
    for name, row in (stacks if segments else {f'{kind}s': rows}).items():
      if row.size:
        parts = [tree.pop(f'{kind}{i}') for i in row]
        tree[name] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
  return tree


@pytest.mark.parametrize('train', [False, True])
@every_model
def test_scanned_equals_unrolled(make, train, randomised):
  unrolled, scanned = make(), make(scan=True)
  x = example(unrolled)
  variables = randomised(unrolled, x)
  segments = getattr(scanned, 'segments', 0)
  pack = lambda tree: {k: stacked(v, segments) for k, v in tree.items()}
  expected_shapes = jax.tree.map(jnp.shape, shapes(scanned))
  assert jax.tree.map(jnp.shape, pack(variables)) == expected_shapes

  def run(model, variables):
    return jax.jit(model.apply, static_argnames=('train', 'mutable'))(
      variables, x, train=train, mutable=('batch_stats',)
    )

  (one, one_stats), (two, two_stats) = (
    run(unrolled, variables),
    run(scanned, pack(variables)),
  )
  assert set(features(two)) == {*scanned.taps, *scanned.exits} <= set(one)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)
  jax.tree.map(close, {name: one[name] for name in two}, two)
  jax.tree.map(close, pack(one_stats), two_stats)


@pytest.mark.parametrize('left', [0, 1])
def test_a_scanned_stack_has_as_many_layers_as_arch_says(left, randomised):
  model = ResNet(depth=20, width=4, scan=True)
  variables = randomised(model, X)
  small = model.clone(arch={'stage2/blocks/branch': left})

  def first(path, leaf):
    return leaf[:left] if 'stage2/blocks/' in path else leaf

  full = flat(variables)
  cut = {path: first(path, leaf) for path, leaf in full.items()}
  cut = {path: leaf for path, leaf in cut.items() if leaf.size}
  small_shapes = flat(shapes(small))
  assert {k: v.shape for k, v in cut.items()} == {
    k: v.shape for k, v in small_shapes.items()
  }
  gate = 'branches/stage2/blocks/branch'
  masked = unflatten_dict({**full, gate: full[gate].at[left:].set(0)}, sep='/')
  expected = jax.jit(model.apply)(masked, X)['main']
  reached = jax.jit(small.apply)(unflatten_dict(cut, sep='/'), X)['main']
  np.testing.assert_allclose(reached, expected, rtol=1e-5, atol=1e-5)


@every_name
def test_bfloat16_computes_so_and_keeps_float32_parameters_and_logits(name, whole):
  full, x, variables, run = whole(name)
  half = SMALL[name](dtype=jnp.bfloat16)
  expected = run(variables, x)
  assert jax.tree.map(jnp.dtype, shapes(half)) == jax.tree.map(jnp.dtype, shapes(full))
  outputs = jax.jit(half.apply)(variables, x)
  for name in (*half.taps, *half.exits):
    assert outputs[name].dtype == (jnp.float32 if name in half.exits else jnp.bfloat16)
    scale = jnp.abs(expected[name]).max()
    error = jnp.abs(outputs[name].astype(jnp.float32) - expected[name]).max() / scale
    assert error < 0.1
  assert error > 0


@every_name
def test_runs_without_the_collection_of_branch_gates(name, whole):
  model, x, variables, _ = whole(name)
  bare = {name: tree for name, tree in variables.items() if name != 'branches'}
  gates = jax.tree.map(jnp.ones_like, variables.get('branches', {}))
  run = m.quick(model.apply)
  outputs, again = run({**bare, 'branches': gates}, x), run(bare, x)
  jax.tree.map(np.testing.assert_array_equal, again, outputs)


@every_model
def test_a_description_is_json_and_builds_an_equal_model(make):
  model = make(dtype=jnp.bfloat16)
  key = next(iter(model.widths))
  model = model.clone(arch={key: 2})
  description = json.loads(json.dumps(describe(model)))
  assert build(description['name'], **description['fields']) == model
  assert hash(model) == hash(model.clone())


def test_wrong_names_are_refused_with_the_nearest():
  with pytest.raises(ValueError, match=r"'resnet21'\. Nearest: .*resnet20"):
    build('resnet21')
  for name in ('resnet.Resnet', 'os.system', 'nothing.here'):
    with pytest.raises(ValueError, match='no model'):
      build(name)
  with pytest.raises(ValueError, match='not a model of depthprune'):
    describe(nn.Dense(3))


@pytest.mark.parametrize(
  'name', ['pretrained.read', 'mlp.partial', 'heads.WithHeads.__init__', 'mlp.Any',
           'heads.partial', 'arch.complete', 'mlp.FrozenDict']
)  # fmt: skip
def test_a_file_names_classes_of_models_and_nothing_else(name):
  with pytest.raises(ValueError, match='no model'):
    build(name)
