"""Units: what is erasable is read off the program, in order of execution."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthprune.gates import branch
from depthprune.models.resnet import ResNet
from depthprune.program.coupling import couple
from depthprune.program.units import closing, units

X = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)


def coupled(model, x=X):
  return couple(model, jax.eval_shape(model.init, jax.random.key(0), x), x)


def half(x):
  return x.astype(jnp.bfloat16)


def summary(found):
  return {u.name: u.why_not for u in found}


# ---- networks ------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('shortcut', 'AB')
@pytest.mark.parametrize('preact', [False, True])
def test_units_of_a_resnet(preact, shortcut, dtype):
  model = ResNet(depth=14, width=4, shortcut=shortcut, dtype=dtype, preact=preact)
  found = units(coupled(model))
  resized = 'its shortcut is not the identity: it changes [.., {}] to [.., {}] ({})'
  assert summary(found) == {
    'stage1/block0': '',
    'stage1/block1': '',
    'stage2/block0': resized.format(4, 8, 'stage2/block0'),
    'stage2/block1': '',
    'stage3/block0': resized.format(8, 16, 'stage3/block0'),
    'stage3/block1': '',
  }
  assert [u.name for u in found] == sorted(u.name for u in found)
  assert {u.layer for u in found} == {None}
  assert [u.branches for u in found] == [(f'{u.name}/branch',) for u in found]


@pytest.mark.parametrize('shortcut', 'AB')
def test_the_first_bottleneck_widens_the_stream(shortcut):
  model = ResNet(depth=20, width=4, bottleneck=True, shortcut=shortcut)
  refused = {u.name for u in units(coupled(model)) if u.why_not}
  assert refused == {'stage1/block0', 'stage2/block0', 'stage3/block0'}


def test_layers_of_a_stack_are_units():
  found = units(coupled(ResNet(depth=20, width=4, scan=True)))
  names = [
    f'stage{i}/{name}'
    for i in (1, 2, 3)
    for name in ('block0', 'blocks[0]', 'blocks[1]')
  ]
  assert [u.name for u in found] == names
  assert {u.name for u in found if u.why_not} == {'stage2/block0', 'stage3/block0'}
  assert found[5] == ('stage2/blocks[1]', ('stage2/blocks/branch',), 1, '')


def test_a_stack_of_one_layer_has_an_index():
  found = units(coupled(ResNet(depth=14, width=4, scan=True)))
  assert found[1] == ('stage1/blocks[0]', ('stage1/blocks/branch',), 0, '')


class PreActivation(nn.Module):
  """x + gate · F(norm(x)), the projection from the normalised input."""

  @nn.compact
  def __call__(self, x):
    for i, (width, stride) in enumerate([(3, 1), (3, 1), (6, 1), (6, 2)]):
      x = PreActivationUnit(width, stride, name=f'block{i}')(x)
    return nn.Dense(4)(x.mean((1, 2)))


class PreActivationUnit(nn.Module):
  width: int
  stride: int

  @nn.compact
  def __call__(self, x):
    y = nn.relu(nn.LayerNorm()(x))
    stride = (self.stride, self.stride)
    if x.shape[-1] != self.width:
      x = nn.Conv(self.width, (1, 1), stride, name='shortcut')(y)
    elif self.stride > 1:
      x = x[:, :: self.stride, :: self.stride]
    y = nn.Conv(self.width, (3, 3), stride)(y)
    return x + branch(self, nn.Conv(self.width, (3, 3))(nn.relu(y)))


def test_pre_activation_units():
  why = 'its shortcut is not the identity: it changes '
  assert summary(units(coupled(PreActivation()))) == {
    'block0': '',
    'block1': '',
    'block2': f'{why}[.., 3] to [.., 6] (block2)',
    'block3': f'{why}[.., 8, 6] to [.., 4, 6] (block3)',
  }


class Block(nn.Module):
  """Two branches per block, as in a ViT; computed in bfloat16, summed in float32."""

  first: str = 'attention'
  project: bool = False

  @nn.compact
  def __call__(self, x, _=None):
    h = half(nn.LayerNorm()(x))
    y = nn.Dense(x.shape[-1], dtype=jnp.bfloat16)(h)
    x = x + Scaled(name=self.first)(y).astype(x.dtype)
    h = nn.Dense(12, dtype=jnp.bfloat16)(half(nn.LayerNorm()(x)))
    y = nn.Dense(x.shape[-1], dtype=jnp.bfloat16)(nn.gelu(h))
    x = nn.Dense(x.shape[-1], name='project')(x) if self.project else x
    return x + Scaled(name='mlp')(y).astype(x.dtype), None


class Scaled(nn.Module):
  @nn.compact
  def __call__(self, y):
    return branch(self, y)


class Blocks(nn.Module):
  """Blocks one by one, or as one scan."""

  scan: bool
  first: str = 'attention'
  project: bool = False

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(6)(x.reshape(2, 64, 3))
    if not self.scan:
      for i in range(3):
        x, _ = Block(self.first, self.project, name=f'block{i}')(x)
      return nn.Dense(4)(x.mean(1))
    stack = nn.scan(
      Block,
      variable_axes={'params': 0, 'branches': 0},
      split_rngs={'params': True},
      length=3,
    )
    x, _ = stack(self.first, self.project, name='blocks')(x, None)
    return nn.Dense(4)(x.mean(1))


@pytest.mark.parametrize('first', ['attention', 'token_mixer'])
def test_gates_of_a_block_come_in_order_of_execution_not_of_the_alphabet(first):
  found = units(coupled(Blocks(scan=False, first=first)))
  assert [u.name for u in found] == [
    f'block{i}/{part}' for i in range(3) for part in (first, 'mlp')
  ]
  assert not any(u.why_not for u in found)


@pytest.mark.parametrize('first', ['attention', 'token_mixer'])
def test_a_layer_with_two_gates_is_one_unit(first):
  found = units(coupled(Blocks(scan=True, first=first)))
  gates = (f'blocks/{first}/branch', 'blocks/mlp/branch')
  assert found == tuple((f'blocks[{i}]', gates, i, '') for i in range(3))


def test_a_layer_is_erasable_if_all_its_branches_are():
  unit_why = {
    u.name: u.why_not for u in units(coupled(Blocks(scan=False, project=True)))
  }
  assert [name for name, why in unit_why.items() if why] == [
    'block0/mlp', 'block1/mlp', 'block2/mlp'
  ]  # fmt: skip
  for unit in units(coupled(Blocks(scan=True, project=True))):
    assert re.fullmatch(
      r'its shortcut is not the identity: it passes through add in .*/project .*'
      r'\(blocks\)',
      unit.why_not,
    )


# ---- functions of others -------------------------------------------------------------


V = {
  'w': jax.ShapeDtypeStruct((5, 5), jnp.float32),
  'u': jax.ShapeDtypeStruct((5, 5), jnp.float32),
  'out': jax.ShapeDtypeStruct((5, 2), jnp.float32),
}
H = jax.ShapeDtypeStruct((5, 5), jnp.float32)


def of(f, gates=('gate',), shape=()):
  """The units of f(params, gates, x)."""
  gate = jax.ShapeDtypeStruct(shape, jnp.float32)
  variables = {'params': V, 'branches': dict.fromkeys(gates, gate)}
  coupling = couple(lambda v, x: f(v['params'], v['branches'], x), variables, H)
  return units(coupling), coupling


ERASABLE = {
  'gate on the left': lambda p, g, x: (x + g * (x @ p['w'])) @ p['out'],
  'gate on the right': lambda p, g, x: ((x @ p['w']) * g + x) @ p['out'],
  'behind layout': lambda p, g, x: (
    x.reshape(25).reshape(5, 5) + (g * (x @ p['w'])).reshape(25).reshape(5, 5)
  ),
  'cast shortcut': lambda p, g, x: (
    half(x) + g.astype(jnp.bfloat16) * half(half(x).astype(jnp.float32) @ p['w'])
  ),
  'cast gate': lambda p, g, x: x + (half(g) * half(x @ p['w'])).astype(x.dtype),
  'subtracted': lambda p, g, x: x - g * (x @ p['w']),
  'scaled': lambda p, g, x: x + 0.1 * jnp.tanh(g * (x @ p['w'])) / 3,
  'last layer behind the gate': lambda p, g, x: x + (g * jnp.sin(x)) @ p['w'],
  'beside another sum': lambda p, g, x: g * (x @ p['w']) + (x + x @ p['u']),
  'one of two products': lambda p, g, x: (x + g * (x @ p['w'])) + g * (x @ p['u']),
  'jitted': lambda p, g, x: jax.jit(lambda x: x + g * (x @ p['w']))(x),
}
REFUSED = {
  'projected': (
    lambda p, g, x: x @ p['u'] + g * (x @ p['w']),
    'its shortcut is not the identity: it passes through dot_general .*',
  ),
  'padded': (
    lambda p, g, x: jnp.pad(x, ((0, 0), (0, 5))) + g * jnp.tile(x @ p['w'], (1, 2)),
    r'.* not the identity: it changes \[.., 5\] to \[.., 10\]',
  ),
  'cut': (
    lambda p, g, x: x[::2] + g * (x @ p['w'])[::2],
    r'.* not the identity: it changes \[.., 5, 5\] to \[.., 3, 5\]',
  ),
  'activated': (
    lambda p, g, x: jnp.tanh(x) + g * (x @ p['w']),
    '.* not the identity: it passes through tanh .*',
  ),
  'a weight': (
    lambda p, g, x: p['u'] + g * (x @ p['w']),
    '.* not the identity: it is not computed from what the branch reads',
  ),
  'a sum of the input': (
    lambda p, g, x: (lambda t: p['u'] * t + g * (x * t @ p['w']))(x.sum()),
    '.* not the identity: it passes through mul.*',
  ),
  'alone': (
    lambda p, g, x: g * (x @ p['w']),
    'no shortcut is added to its branch: nothing would be left',
  ),
  'joined': (
    lambda p, g, x: jnp.concatenate([x, g * (x @ p['w'])]),
    'concatenate .* reads its branch before a shortcut is added to it',
  ),
  'shifted': (
    lambda p, g, x: x + jnp.cos(g * (x @ p['w'])),
    'cos .* reads its branch before a shortcut is added to it',
  ),
  'carried': (
    lambda p, g, x: jax.lax.scan(lambda c, _: (c * 0.5, None), g * x, length=3)[0],
    'scan .* reads its branch before a shortcut is added to it',
  ),
  'the second time': (
    lambda p, g, x: (x + g * (x @ p['w'])) @ p['u'] + g * x,
    '.* not the identity: it passes through dot_general .*',
  ),
  'unread': (lambda p, g, x: x @ p['out'], 'nothing reads its gate'),
}


@pytest.mark.parametrize('name', ERASABLE)
def test_any_function_of_this_form_is_a_unit(name):
  found, coupling = of(lambda p, g, x: ERASABLE[name](p, g['gate'], x))
  assert found == (('gate', ('gate',), None, ''),)
  decision = coupling.decision(closing(found, coupling))
  assert 'params/w' in decision.dead


@pytest.mark.parametrize('name', REFUSED)
def test_why_a_branch_cannot_be_erased(name):
  f, why = REFUSED[name]
  (unit,), _ = of(lambda p, g, x: f(p, g['gate'], x))
  assert unit.name == 'gate'
  assert re.fullmatch(rf'{why} \(gate\)', unit.why_not), unit.why_not


def test_a_gate_that_every_turn_of_a_loop_shares_is_one_unit():
  def f(p, g, x):
    turn = lambda x, _: (x + g['gate'] * (x @ p['w']), None)
    return jax.lax.scan(turn, x, length=3)[0]

  assert of(f)[0] == (('gate', ('gate',), None, ''),)


def test_what_no_output_needs_does_not_matter():
  def f(p, g, x):
    jnp.cos(g['gate'] * x)
    return x + g['gate'] * (x @ p['w'])

  assert of(f)[0][0].why_not == ''


def test_a_vector_is_one_gate_unless_a_loop_runs_over_it():
  found, coupling = of(lambda p, g, x: x + g['scale'] * (x @ p['w']), ['scale'], (5,))
  assert found == (('scale', ('scale',), None, ''),)
  keep = closing(found, coupling)
  np.testing.assert_array_equal(keep['branches']['scale'], np.zeros(5, bool))


def stacked(p, g, x):
  """Two loops over parts of one stack, and one over gates without a common folder."""
  layers = [jax.tree.map(lambda a, i=i: a[i : i + 2], g['a']) for i in (0, 2)]
  turn = lambda x, gate: (x + gate * (x @ p['w']), None)
  for part in layers:
    x, _ = jax.lax.scan(turn, x, part)
  both = lambda x, gates: (turn(turn(x, gates[0])[0], gates[1])[0], None)
  return jax.lax.scan(both, x, (g['c'], g['b']))[0]


def test_stacks_in_parts_and_without_a_common_name():
  found, _ = of(stacked, ['a', 'b', 'c'], (4,))
  assert [u.name for u in found] == [
    f'{name}[{i}]' for name in ('a', 'c+b') for i in range(4)
  ]
  assert {u.branches for u in found} == {('a',), ('c', 'b')}


def test_gates_cast_up_front_keep_the_order_of_their_sums():
  def f(p, g, x):
    g = jax.tree.map(half, g)
    for name in 'cab':
      x = x + (g[name] * half(x @ p['w'])).astype(x.dtype)
    return x

  assert [u.name for u in of(f, 'abcd')[0]] == ['c', 'a', 'b', 'd']


# ---- closing -------------------------------------------------------------------------

COUPLINGS = [coupled(ResNet(depth=20, width=2, scan=scan)) for scan in (False, True)]
COUPLINGS.append(coupled(Blocks(scan=True)))


@given(st.sampled_from(COUPLINGS), st.data())
def test_closing_closes_these_units_and_no_other(coupling, data):
  """As many gates are closed as the units have; two closings are one."""
  every = units(coupling)
  some, more = (data.draw(st.sets(st.sampled_from(every))) for _ in 'ab')
  keep = closing(some, coupling)['branches']
  closed = sum(np.sum(~kept) for kept in keep.values())
  assert closed == sum(len(u.branches) for u in some)
  assert {b: k.shape for b, k in keep.items()} == {
    b: coupling.branch_shape(b) for b in coupling.branches
  }
  for unit in every:
    index = ... if unit.layer is None else unit.layer
    assert all(np.all(keep[b][index]) == (unit not in some) for b in unit.branches)
  rest = closing(more, coupling)['branches']
  both = closing(some | more, coupling)['branches']
  jax.tree.map(
    np.testing.assert_array_equal, both, jax.tree.map(np.logical_and, keep, rest)
  )


@pytest.mark.parametrize('shortcut', 'AB')
def test_an_erased_unit_leaves_nothing_and_a_refused_one_its_projection(shortcut):
  coupling = coupled(ResNet(depth=14, width=4, shortcut=shortcut))
  for unit in units(coupling):
    dead = coupling.decision(closing([unit], coupling)).dead
    of_unit = {p for p in coupling.axes if f'/{unit.name}/' in p} - {
      f'branches/{unit.name}/branch'
    }
    left = {p for p in of_unit - dead if 'shortcut' in p}
    assert of_unit - dead == left and dead <= of_unit | {f'branches/{unit.name}/branch'}
    assert bool(left) == (bool(unit.why_not) and shortcut == 'B')
