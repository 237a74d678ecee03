"""prune on our models: what is left, what is reported, and that it trains on."""

import collections
import json
import os
import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from depthprune.models.heads import Head, WithHeads
from depthprune.models.mlp import MLP
from depthprune.models.resnet import ResNet
from depthprune.program import cost
from depthprune.program.coupling import couple
from depthprune.program.trace import paths_of
from depthprune.surgery.oneshot import oneshot
from depthprune.surgery.prune import prune
from tests import masking as m
from tests import zoo

X = zoo.image(2)
RESNET = ResNet(depth=8, width=4, shortcut='B')
TX = optax.adamw(0.1)
CLOSED = 'stage2/block0/branch'


def arrays(model):
  return zoo.randomised(jax.eval_shape(model.init, jax.random.key(0), X))


@pytest.fixture(scope='module')
def resnet():
  """(variables, optimizer state, keep, Pruned): half of all channels and a branch."""
  variables = arrays(RESNET)
  variables['branches'] = jax.tree.map(jnp.ones_like, variables['branches'])
  coupling = couple(RESNET, variables, X)
  keep = m.random_keep(coupling) | {'branches': {CLOSED: np.asarray(False)}}
  state: Any = TX.init(variables['params'])
  slopes = jax.tree.map(lambda x: 1e-2 * x, zoo.randomised(variables['params'], 4))
  squares = jax.tree.map(lambda x: jnp.full_like(x, 0.01), slopes)
  adam = state[0]._replace(count=jnp.asarray(99), mu=slopes, nu=squares)
  state = (adam, *state[1:])
  return variables, state, keep, prune(RESNET, variables, keep, X, TX, state)


def test_the_report_is_json_and_its_numbers_are_those_of_the_arrays(resnet):
  variables, _, keep, pruned = resnet
  report = pruned.report
  assert json.loads(json.dumps(report)) == report
  old, new = paths_of(variables), paths_of(pruned.variables)
  for part, tree in (('before', variables), ('after', pruned.variables)):
    sizes = sum(a.size for a in jax.tree.leaves(tree['params']))
    assert report['params'][part] == sizes
  assert report['tensors'].keys() == new.keys()
  for path, tensor in report['tensors'].items():
    assert tensor['shape'] == [[*old[path].shape], [*new[path].shape]]
    left = [tensor['kept'].get(str(i), range(n)) for i, n in enumerate(old[path].shape)]
    np.testing.assert_array_equal(old[path][np.ix_(*left)], new[path])
  for group, kept in report['kept'].items():
    asked = np.flatnonzero(keep['channels'][group]).tolist()
    assert kept == asked and report['requested'][group] == len(kept)
    assert report['widths'][group] == [keep['channels'][group].size, len(kept)]
  for path, layer in report['layers'].items():
    (axis,) = layer['outputs']
    shapes = report['tensors'].get(path, {'shape': [old[path].shape, [0] * 4]})['shape']
    assert layer['width'] == [shape[axis] for shape in shapes]
  for when, total in enumerate(report['flops'].values()):
    assert sum(layer['flops'][when] for layer in report['layers'].values()) == total
  gone = 'stage2/block0/conv1:3'
  assert report['widths'].keys() - report['kept'].keys() == {gone}
  assert report['widths'][gone] == [8, 0]
  assert [b for b, kept in report['branches'].items() if not kept] == [CLOSED]
  assert report['exits'] == {'main': True} and report['inputs'] == [[2, 8, 8, 3]]
  assert report['notes'] == []


def test_its_repr_says_what_was_gained(resnet):
  pruned = resnet[-1]
  params, flops = (pruned.report[name] for name in ('params', 'flops'))
  lines = repr(pruned._replace(report=pruned.report | {'notes': ['a', 'b']})).split(
    '\n'
  )
  assert lines[0] == 'Pruned:' and lines[3:] == [
    '  exits: main',
    '  note: a',
    '  note: b',
  ]
  for line, count in zip(lines[1:3], (params, flops), strict=True):
    assert f': {count["before"]:,} -> {count["after"]:,} (' in line


def test_the_cost_after_is_that_of_the_small_program(resnet):
  """Two ways to count: the full program under the decision, and what is really run."""
  variables, _, _, pruned = resnet
  small = couple(pruned.apply, pruned.variables, X)
  native = couple(pruned.model, pruned.variables, X)
  assert pruned.report['flops']['after'] == cost.flops(small) == cost.flops(native)
  assert pruned.report['params']['after'] == cost.params(small)
  assert pruned.report['peak_bytes']['after'] == cost.peak_bytes(small)
  full = couple(RESNET, variables, X)
  for name, of in (('flops', cost.flops), ('peak_bytes', cost.peak_bytes)):
    assert pruned.report[name]['before'] == of(full) > pruned.report[name]['after']


def test_nothing_of_a_closed_branch_or_a_gate_is_left(resnet):
  pruned = resnet[-1]
  assert pruned.variables.keys() == {'params', 'batch_stats'}
  unit = pruned.variables['params']['stage2']['block0']
  assert (
    unit.keys()
    == {'shortcut'}
    == pruned.variables['batch_stats']['stage2']['block0'].keys()
  )
  assert pruned.arch[CLOSED] == 0 and pruned.model.arch == pruned.arch
  assert pruned.coupling.groups.keys() > pruned.keep['channels'].keys()


def test_the_optimizer_state_is_cut_as_the_parameters_are(resnet):
  _, (adam, *_), _, pruned = resnet
  fresh = TX.init(pruned.variables['params'])
  assert jax.tree.map(jnp.shape, pruned.opt_state) == jax.tree.map(jnp.shape, fresh)
  old, new = paths_of(adam.mu), paths_of(pruned.opt_state[0].mu)
  for path, leaf in new.items():
    kept = pruned.report['tensors'][f'params/{path}']['kept']
    left = [kept.get(str(i), range(n)) for i, n in enumerate(old[path].shape)]
    np.testing.assert_array_equal(old[path][np.ix_(*left)], leaf)


def test_it_trains_on_where_it_stopped(resnet):
  """Another batch size, train mode, running statistics, the optimizer's own state."""
  pruned = resnet[-1]
  x, labels = zoo.image(6), jnp.arange(6)

  def loss(params, statistics):
    variables = {'params': params, 'batch_stats': statistics}
    out, new = pruned.apply(variables, x, train=True, mutable=['batch_stats'])
    each = optax.softmax_cross_entropy_with_integer_labels(out['main'], labels)
    return each.mean(), new['batch_stats']

  @m.quick
  def step(params, statistics, state):
    (value, statistics), slopes = jax.value_and_grad(loss, has_aux=True)(
      params, statistics
    )
    with jax.numpy_dtype_promotion('standard'):  # optax multiplies floats by integers
      updates, state = TX.update(slopes, state, params)
    return optax.apply_updates(params, updates), statistics, state, value

  at = pruned.variables['params'], pruned.variables['batch_stats'], pruned.opt_state
  losses = []
  for _ in range(20):
    *at, value = step(*at)
    losses.append(float(value))
  assert losses[-1] < 0.7 * losses[0]
  moved = jax.tree.map(
    lambda a, b: bool((a != b).any()), at[1], resnet[-1].variables['batch_stats']
  )
  assert all(jax.tree.leaves(moved))
  assert jax.tree.structure(at[1]) == jax.tree.structure(
    pruned.variables['batch_stats']
  )


def test_what_was_pruned_is_pruned_again(resnet):
  """The second time through `arch`: widths are counted from the first model."""
  *_, first = resnet
  coupling = couple(first.model, first.variables, X)
  keep = m.random_keep(coupling, seed=5)
  second = prune(first.model, first.variables, keep, X, coupling=coupling)
  assert (
    second.report['verify']['difference'] <= 1e-5 < second.report['verify']['moved']
  )
  assert second.report['flops']['before'] == first.report['flops']['after']
  assert second.arch.keys() >= first.arch.keys() and second.arch[CLOSED] == 0
  native = RESNET.clone(arch=second.arch)
  fresh = jax.eval_shape(native.init, jax.random.key(0), X)
  shapes = jax.tree.map(jnp.shape, {**fresh, 'branches': 0} | {'branches': 0})
  assert shapes == jax.tree.map(jnp.shape, {**second.variables, 'branches': 0})


def test_a_dropped_exit_is_gone_and_the_others_are_as_before():
  heads = {'early': Head('layer0', hidden=4), 'late': Head('layer1')}
  model = WithHeads(MLP(hidden=(6, 5)), heads)
  variables = arrays(model)
  pruned = prune(model, variables, {'exits': {'main': False, 'late': False}}, X)
  assert pruned.model.exits == ('early',) and pruned.arch == {
    'exit/main': 0,
    'exit/late': 0,
  }
  assert pruned.report['exits'] == {'main': False, 'early': True, 'late': False}
  assert pruned.variables['params'].keys() == {'trunk', 'head_early'}
  assert pruned.variables['params']['trunk'].keys() == {'layer0'}
  out = pruned.apply(pruned.variables, X)
  assert out.keys() == {'early'}
  before = model.apply(variables, X)['early']
  np.testing.assert_allclose(out['early'], before, rtol=1e-5)
  native = pruned.model.apply(pruned.variables, X)
  np.testing.assert_allclose(native['early'], before, rtol=1e-5)


@pytest.fixture(scope='module')
def mlp():
  model = MLP(hidden=(8, 6))
  variables = arrays(model)
  return model, variables, couple(model, variables, X)


@pytest.mark.parametrize('names', [('z', 'a'), (4, 3), ('a/b', 'a')])
def test_exits_have_any_name_and_any_order(names):
  def f(v, x):
    h = jnp.tanh(x.mean((1, 2)) @ v['in'])
    said = h @ v['first'], jnp.tanh(h) @ v['other']
    return collections.OrderedDict(zip(names, said, strict=True))

  v = zoo.Case(f, shapes={'in': (3, 5), 'first': (5, 2), 'other': (5, 4)}).variables()
  x = zoo.image(2)
  for gone, leaf in zip(names, ('first', 'other'), strict=True):
    pruned = prune(f, v, {'exits': {gone: False}}, x)
    assert set(v) - set(pruned.variables) == {leaf}
    said, whole = pruned.apply(pruned.variables, x), f(v, x)
    assert [*said] == [name for name in names if name != gone]
    for name in said:
      np.testing.assert_allclose(said[name], whole[name], rtol=1e-5)


def test_a_field_of_the_same_name_as_ours_is_somebody_elses():
  class Net(nn.Module):
    arch: str = 'small'

    @nn.compact
    def __call__(self, x):
      return nn.Dense(3)(nn.relu(nn.Dense(8)(x.mean((1, 2)))))

  x = zoo.image(2)
  v = zoo.randomised(jax.eval_shape(Net().init, jax.random.key(0), x))
  pruned = prune(Net(), v, oneshot(couple(Net(), v, x), v, 0.5), x)
  assert pruned.arch == {} and pruned.apply(pruned.variables, x).shape == (2, 3)


def test_widths_are_rounded_and_that_is_said(mlp):
  model, variables, coupling = mlp
  keep = {'channels': {'layer0/dense:1': np.arange(8) < 7}}
  pruned = prune(model, variables, keep, X, round_to=4, coupling=coupling)
  assert pruned.arch == {'layer0/dense': 4}
  assert pruned.report['requested'] == {'layer0/dense:1': 7}
  assert pruned.report['widths'] == {'layer0/dense:1': [8, 4], 'layer1/dense:1': [6, 6]}
  [note] = pruned.report['notes']
  assert note == 'layer0/dense:1: 7 became 4, a multiple of 4 (of 8)'
  assert pruned.report['verify']['settled'] > 1e-3
  small = couple(
    pruned.apply, pruned.variables, X
  )  # what was built, not what was asked
  assert pruned.report['flops']['after'] == cost.flops(small)
  assert pruned.report['params']['after'] == cost.params(small)


def test_a_wider_network_s_state_or_another_optimizer_s_is_refused(mlp):
  model, variables, coupling = mlp
  keep, params = m.random_keep(coupling), variables['params']
  cut = lambda **more: prune(model, variables, keep, X, coupling=coupling, **more)
  with pytest.raises(ValueError, match='opt_state was given without the tx'):
    cut(opt_state=TX.init(params))
  adam = optax.adam(0.1)
  with pytest.raises(ValueError, match='opt_state is not that of tx over .*: 0/'):
    cut(tx=adam, opt_state=optax.sgd(0.1, momentum=0.9).init(params))
  with pytest.raises(
    ValueError, match='opt_state is not that of tx over these variables: 0/count'
  ):
    cut(tx=optax.sgd(0.1), opt_state=adam.init(params))
  wider = arrays(MLP(hidden=(9, 6)))['params']
  with pytest.raises(
    ValueError, match=r'mu/layer0/dense/bias: expected \(8,\), got \(9,\)'
  ):
    cut(tx=adam, opt_state=adam.init(wider))


ON_A_MESH = """
import jax, jax.numpy as jnp, numpy as np, optax
import depthprune as dp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

def net(v, x):
  return jax.nn.relu(jax.nn.relu(x @ v['a']) @ v['b']) @ v['c']

key = jax.random.key(0)
shapes = {'a': (6, 16), 'b': (16, 12), 'c': (12, 4)}
v = {k: jax.random.normal(key, shape) for k, shape in shapes.items()}
x = jax.random.normal(key, (8, 6))
keep = {'channels': {'a:1': np.arange(16) < 8, 'b:1': np.arange(12) < 7}}
expected = dp.prune(net, v, keep, x)
tx = optax.sgd(0.1, momentum=0.9)
for kind in (AxisType.Explicit, AxisType.Auto):
  mesh = jax.make_mesh((4,), ('data',), axis_types=(kind,))
  for of_a, of_c, of_x in (
    (P(), P(), P()), (P(), P(), P('data')),
    (P(None, 'data'), P(), P()), (P(), P(None, 'data'), P()),
  ):
    put = lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec))
    on = {'a': put(v['a'], of_a), 'b': put(v['b'], P()), 'c': put(v['c'], of_c)}
    data = put(x, of_x)
    state = tx.init(on)
    for coupling in (None, dp.couple(net, v, x)):
      small = dp.prune(net, on, keep, data, tx, state, coupling=coupling)
      for tree in (small.variables, small.opt_state):
        assert all(a.sharding.mesh == mesh for a in jax.tree.leaves(tree))
      assert small.variables['a'].sharding.spec == of_a
      for k, array in expected.variables.items():
        np.testing.assert_array_equal(small.variables[k], array)
    if 'data' not in of_a:
      loss = lambda v: jnp.square(small.apply(v, data)).mean()
      slopes = jax.jit(jax.grad(loss))(small.variables)
      tx.update(slopes, small.opt_state, small.variables)
print('done')
"""


def test_arrays_on_a_mesh_are_cut_and_stay_on_it():
  """Its axes are explicit or automatic; arrays are whole or split over four devices."""
  flags = '--xla_force_host_platform_device_count=4'
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}
  run = [sys.executable, '-c', ON_A_MESH]
  done = subprocess.run(run, env=env, capture_output=True, text=True, check=False)
  assert done.stdout == 'done\n', done.stderr[-2000:]
