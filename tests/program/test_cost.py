"""Costs against counts by hand, the cut program's own cost, and XLA."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from depthprune.models import build
from depthprune.models.heads import Head, WithHeads
from depthprune.models.resnet import ResNet
from depthprune.program import cost
from depthprune.program.coupling import couple
from depthprune.program.resize import slim
from tests import masking as m
from tests.zoo import NETWORKS, image
from tests.zoo.functions import convolve
from tests.zoo.images import conv
from tests.zoo.sequences import ScannedViT

X = jax.ShapeDtypeStruct((4, 8), jnp.float32)


def arrays(**shapes):
  return {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}


def coupled(model, x):
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  return couple(model, shapes, x)


def macs(model, x) -> float:
  return cost.flops(coupled(model, x)) / 2


# ---- by hand -------------------------------------------------------------------------


@pytest.mark.parametrize('depth, millions', [(20, 40.55), (56, 125.49)])
def test_cifar_resnets(depth, millions):
  """3x3 kernels at 32, 16, 8 pixels and 16, 32, 64 channels; option A costs nothing."""
  n = depth // 6 - (depth % 6 == 0)
  equal = 9 * 16 * 16 * 32 * 32  # every convolution of equal widths costs the same
  expected = (
    9 * 3 * 16 * 32 * 32 + 640 + 2 * n * equal + 2 * (equal / 2 + (2 * n - 1) * equal)
  )
  reached = macs(build(f'resnet{depth}'), jnp.ones((1, 32, 32, 3)))
  assert reached == expected
  assert round(reached / 1e6, 2) == millions


def test_parameters_of_an_nnx_module_are_its_params():
  """Statistics, caches and counters of random keys are read too, and are none."""
  rngs = nnx.Rngs(0)
  norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
  layers = nnx.Linear(3, 8, rngs=rngs), norm, nnx.Dropout(0.1, rngs=rngs)
  network = nnx.Sequential(*layers)
  coupling = couple(network, nnx.state(network), jnp.ones((2, 3)))
  assert any('mean' in path for path in coupling.axes)
  assert cost.params(coupling) == 3 * 8 + 8 + 8 + 8


def test_parameters_are_those_of_the_arrays():
  model = build('resnet20')
  coupling = coupled(model, jnp.ones((1, 32, 32, 3)))
  assert cost.params(coupling) == sum(
    x.size for x in jax.tree.leaves(coupling.variables['params'])
  )
  case = NETWORKS['torch style']
  coupling = couple(case.model, case.variables(), case.inputs(1))
  assert cost.params(coupling) == 3 * 10 + 10 + 10 * 8 + 8 + 8 * 4 + 4


@pytest.mark.parametrize(
  'layer, hw, expected',
  [
    (conv(5, 3), 6, 6 * 6 * 9 * 4 * 5),
    (conv(8, 3, 2, feature_group_count=2), 8, 4 * 4 * 9 * 2 * 8),
    (conv(4, 3, feature_group_count=4), 8, 8 * 8 * 9 * 4),
    (conv(8, 3, feature_group_count=4), 8, 8 * 8 * 9 * 8),
    (conv(5, 3, kernel_dilation=(2, 2), padding='VALID'), 9, 5 * 5 * 9 * 4 * 5),
    (nn.ConvTranspose(5, (3, 3), (2, 2), 'VALID', use_bias=False), 6, 36 * 9 * 4 * 5),
    (nn.ConvTranspose(5, (2, 2), (2, 2), use_bias=False), 6, 36 * 4 * 4 * 5),
  ],
  ids=['dense', 'grouped', 'depthwise', 'multiplied', 'dilated', 'up 3', 'up 2'],
)  # fmt: skip
def test_one_convolution(layer, hw, expected):
  assert macs(layer, jnp.ones((1, hw, hw, 4))) == expected
  assert macs(layer, jnp.ones((3, hw, hw, 4))) == 3 * expected


def test_attention():
  length, width = 7, 12
  layer = nn.MultiHeadDotProductAttention(num_heads=3, use_bias=False)
  expected = 4 * length * width**2 + 2 * length**2 * width
  assert macs(layer, jnp.ones((1, length, width))) == expected


def test_every_row_of_a_ragged_product_meets_one_group():
  f = lambda v, x: lax.ragged_dot(x, v['up'], jnp.array([2, 3, 1], jnp.int32))
  coupling = couple(f, {'up': jnp.ones((3, 4, 5))}, jnp.ones((6, 4)))
  assert cost.flops(coupling) == 2 * 6 * 4 * 5
  assert cost.layers(coupling) == {'up': ((2,), 5, 2 * 6 * 4 * 5)}


def test_control_flow():
  """A scan costs its body times its length, `cond` its dearest branch, `while` once."""
  p = arrays(w=(8, 8), v=(8, 2))

  def scanned(p, x):
    return lax.scan(lambda h, _: (h @ p['w'], None), x, None, length=5)[0]

  def either(p, x):
    cheap, dear = (lambda x: x, lambda x: x @ p['w'] @ p['w'])
    return lax.cond(x.sum() > 0, cheap, dear, x) @ p['v']

  def looped(p, x):
    return lax.while_loop(lambda h: h.sum() < 9, lambda h: h @ p['w'], x)

  square, out = 2 * 4 * 8 * 8, 2 * 4 * 8 * 2
  assert cost.flops(couple(scanned, p, X)) == 5 * square
  assert cost.flops(couple(either, p, X)) == 2 * square + out
  assert cost.flops(couple(looped, p, X)) == square


@pytest.mark.parametrize('dearest', range(3))
def test_the_dearest_branch_counts_wherever_it_stands(dearest):
  """Branches that cost 1, 2 and 3 products, in every order: whole, cut and gated."""
  p = arrays(w=(8, 6), v=(6, 8))

  def network(p, x):
    def times(n):
      return lambda x: functools.reduce(
        lambda x, _: jnp.tanh(x @ p['w']) @ p['v'], range(n), x
      )

    branches = [times(n) for n in np.roll([3, 1, 2], dearest)]
    return lax.switch(jnp.int32(x[0, 0]), branches, x)

  coupling = couple(network, p, X)
  both = 2 * 2 * 4 * 8  # of one width: a product into it and one out of it
  assert cost.flops(coupling) == 3 * both * 6
  kept = np.arange(6) < 2
  assert cost.flops(coupling, {'channels': {'w:1': kept}}) == 3 * both * 2
  of_gates = lambda gate: cost.flops(coupling, {'channels': {'w:1': gate}})
  assert of_gates(jnp.full(6, 0.5)) == 3 * both * 3
  np.testing.assert_array_equal(jax.grad(of_gates)(jnp.full(6, 0.5)), 3 * both)


@pytest.mark.parametrize('of', [cost.flops, cost.params])
def test_scanned_equals_unrolled_to_the_unit(of):
  x = image(1)
  one, two = (coupled(ScannedViT(scan=s), x) for s in (True, False))
  assert of(one) == of(two) > 0
  one, two = (coupled(ResNet(20, width=4, scan=s), x) for s in (True, False))
  assert of(one) == of(two) > 0


def test_the_peak_of_a_toy():
  """x [4, 8], h [4, 16] and tanh(h) of 4 bytes: the last two together are the most."""
  f = lambda p, x: jnp.tanh(x @ p['w']) @ p['v']
  coupling = couple(f, arrays(w=(8, 16), v=(16, 2)), X)
  assert cost.peak_bytes(coupling) == 2 * 4 * 16 * 4
  kept = {'channels': {'w:1': np.arange(16) < 3}}
  assert cost.peak_bytes(coupling, kept) == 4 * 8 * 4 + 4 * 3 * 4  # now x and h


def test_xla_counts_the_same_where_it_counts_contractions():
  def f(p, x):
    h = jax.nn.relu(lax.conv_general_dilated(
      x, p['one'], (1, 1), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    ))  # fmt: skip
    h = jax.nn.relu(convolve(h, p['two']))
    return h.reshape(len(h), -1) @ p['out']

  p = arrays(one=(3, 3, 24, 32), two=(1, 1, 32, 64), out=(6 * 6 * 64, 96))
  x = jax.ShapeDtypeStruct((2, 8, 8, 24), jnp.float32)
  theirs = jax.jit(f).lower(p, x).compile().cost_analysis()
  assert abs(cost.flops(couple(f, p, x)) / theirs['flops'] - 1) < 0.01


# ---- of decisions --------------------------------------------------------------------


@pytest.mark.parametrize('name', NETWORKS)
def test_cost_of_a_decision_is_that_of_the_cut_program(name):
  case = NETWORKS[name]
  variables, x = case.variables(), case.inputs(1)
  coupling = couple(case.model, variables, x)
  keep = m.random_keep(coupling, seed=1)
  small = m.smaller(coupling, variables, keep)
  cut = couple(slim(case.model, coupling, keep), small, x)
  assert cost.flops(coupling, keep) == cost.flops(cut) < cost.flops(coupling)
  assert cost.params(coupling, keep) == cost.params(cut) < cost.params(coupling)
  assert type(cost.flops(coupling, keep)) is int
  for decision in (None, keep):
    layers = cost.layers(coupling, decision).values()
    assert sum(layer.flops for layer in layers) == cost.flops(coupling, decision)
  for of in (cost.flops, cost.params):  # soft gates of 0 and 1 say the same
    open_ = m.random_keep(coupling, seed=1, gated=True)
    soft = of(coupling, m.as_gates(open_))
    assert math.isclose(float(soft), of(coupling, open_), rel_tol=1e-5)


def test_layers_are_arrays_with_their_widths_wherever_they_are_called():
  """`w` twice in the dearest branch, transposed once; a product of two activations."""
  p = arrays(w=(8, 6), v=(2, 6), heads=(8, 2, 3))

  def network(p, x):
    there_and_back = lambda x: jnp.tanh(x @ p['w']) @ p['w'].T
    x = lax.cond(x.sum() > 0, there_and_back, jnp.tanh, x)
    scores = jnp.einsum('xhd,yhd->xyh', jnp.tensordot(x, p['heads'], 1), x[:, None, :3])
    return jnp.tanh(x @ p['w']) @ p['v'].T, scores

  coupling = couple(network, p, X)
  keep = {'channels': {'w:1': np.arange(6) < 4}}
  one = 2 * 4 * 8 * 6
  layers = cost.layers(coupling)
  assert layers['w'].flops == 3 * one and layers['heads'] == ((1, 2), 6, one)
  assert layers['v'] == ((0,), 2, 2 * 4 * 6 * 2)
  left = cost.layers(coupling, keep)
  assert left['w'].flops == 3 * one * 4 // 6 and left['heads'] == layers['heads']
  (rest,) = layers.keys() - p
  assert layers[rest].outputs == ()


@pytest.mark.parametrize('name', ['densenet', 'resnext', 'vit fused', 'vgg', 'gru'])
@pytest.mark.parametrize('of', [cost.flops, cost.params])
def test_slopes_are_finite_differences(of, name):
  """The cost is at most quadratic in a gate, so central differences are exact."""
  case = NETWORKS[name]
  coupling = couple(case.model, case.variables(), case.inputs(1))
  draw = np.random.default_rng(0)
  gates = {
    g: jnp.asarray(draw.uniform(0.2, 0.9, w.size), jnp.float32)
    for g, w in coupling.gates()['channels'].items()
  }
  f = lambda gates: of(coupling, {'channels': gates})
  slopes = jax.grad(f)(gates)
  assert all((slope > 0).all() for slope in slopes.values())
  for group in [*gates][:5]:
    up, down = ({**gates, group: gates[group].at[0].add(d)} for d in (1.0, -1.0))
    assert math.isclose((f(up) - f(down)) / 2, slopes[group][0], rel_tol=1e-3)


def test_branches_and_their_gates():
  model = ResNet(8, width=4, shortcut='B')
  coupling = coupled(model, image(1))
  total = cost.flops(coupling)
  branch = 'stage1/block0/branch'
  inside = 2 * 2 * 9 * 4 * 4 * 8 * 8
  closed = {'branches': {branch: np.array(False)}}
  assert cost.flops(coupling, closed) == total - inside
  assert cost.params(coupling, closed) == cost.params(coupling) - 2 * (9 * 16 + 8)
  soft = {'branches': {branch: jnp.float32(0.25)}}
  assert float(cost.flops(coupling, soft)) == total - 0.75 * inside
  slope = jax.grad(lambda g: cost.flops(coupling, {'branches': {branch: g}}))
  assert slope(jnp.float32(0.25)) == inside


def test_layers_and_exits():
  stack = coupled(ResNet(20, width=4, scan=True), image(1))
  gate = {'branches': {'stage1/blocks/branch': np.array([True, False])}}
  total, one = cost.flops(stack), 2 * 2 * 9 * 4 * 4 * 8 * 8
  [layers] = [g.name for g in stack.groups.values() if g.kind == 'layer'][:1]
  gone = {'channels': {layers: np.array([True, False])}, **gate}
  assert cost.flops(stack, gone) == total - one
  trunk = ResNet(8, width=4)
  heads = coupled(WithHeads(trunk, {'early': Head('stage1/block0')}), image(1))
  alone = cost.flops(coupled(trunk, image(1)))
  assert cost.flops(heads) == alone + 2 * 4 * 10
  assert cost.flops(heads, {'exits': {'early': False}}) == alone


# ---- rounding ------------------------------------------------------------------------


def test_rounded_gates_count_what_is_built_and_pass_the_slope_through():
  gates = {'channels': {'a': jnp.ones(32).at[19:].set(0.0)}}
  count = lambda gates: cost.rounded(gates, 8)['channels']['a'].sum()
  assert math.isclose(count(gates), 16, rel_tol=1e-6)
  slope = jax.grad(count)(gates)['channels']['a']
  np.testing.assert_array_equal(slope, np.ones(32))


def test_bytes_are_those_of_the_arrays_and_of_the_cache_that_is_left():
  """Fewer groups of queries make the weights and the cache smaller, by hand."""
  model = build('decoder_tiny')
  tokens = jnp.zeros((2, 4), jnp.int32)
  cache = model.empty_cache(batch=2, length=8)
  variables = model.init(jax.random.key(0), tokens)
  coupling = couple(model, variables, tokens, cache=cache)
  size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
  whole = size(variables['params']) + size(cache)
  assert cost.stored_bytes(coupling) == whole
  without = couple(model, variables, tokens)
  assert cost.stored_bytes(without) == size(variables['params'])
  group = 'layer0/attention/query:1'
  keep = {'channels': {group: np.array([True, False])}}
  heads, width, per_head = 2, 16, 4
  weights = (heads + 1 + 1 + heads) * width * per_head  # query, key, value, out
  kept = 2 * 8 * (per_head + per_head)  # of the batch and the length of the cache
  assert whole - cost.stored_bytes(coupling, keep) == 4 * (weights + kept)
  gates = {'channels': {group: jnp.array([1.0, 0.0])}}
  assert cost.stored_bytes(coupling, gates) == cost.stored_bytes(coupling, keep)
