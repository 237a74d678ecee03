"""Networks of other libraries, and what is said where a first call goes wrong."""

import inspect
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import depthprune as dp
from depthprune.program import modules
from depthprune.train.method import plain

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (3, 6))


class Plain(nnx.Module):
  def __init__(self, rngs):
    self.a = nnx.Linear(6, 16, rngs=rngs)
    self.norm = nnx.BatchNorm(16, rngs=rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)
    self.b = nnx.Linear(16, 4, rngs=rngs)

  def __call__(self, x):
    return self.b(self.drop(nnx.relu(self.norm(self.a(x)))))


class Tied(nnx.Module):
  def __init__(self, rngs):
    self.a = nnx.Linear(6, 8, rngs=rngs)
    self.b = self.again = nnx.Linear(8, 8, rngs=rngs)
    self.out = nnx.Linear(8, 2, rngs=rngs)

  def __call__(self, x):
    return self.out(jnp.tanh(self.again(jnp.tanh(self.b(jnp.tanh(self.a(x)))))))


class FixedHeads(nnx.Module):
  """Reshapes to sizes that stand in its code."""

  def __init__(self, rngs):
    self.a, self.b = nnx.Linear(6, 16, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)

  def __call__(self, x):
    heads = nnx.relu(self.a(x)).reshape(x.shape[0], 4, 4)
    return self.b(heads.reshape(x.shape[0], 16))


@jax.tree_util.register_pytree_node_class
class Tree:
  """A module that is a pytree with a function among its leaves, as Equinox's are."""

  def __init__(self, a, activation, b):
    self.a, self.activation, self.b = a, activation, b

  def __call__(self, x):
    return self.activation(x @ self.a) @ self.b

  def tree_flatten(self):
    return (self.a, self.activation, self.b), None

  @classmethod
  def tree_unflatten(cls, _, children):
    return cls(*children)


class Transformed(NamedTuple):
  """What haiku's transforms are."""

  init: Any
  apply: Any


class Wrapped:
  """What the Flax models of transformers are: a linen module and its call."""

  def __init__(self, module, params):
    self.module, self.params = module, params

  def __call__(self, x, params=None):
    return self.module.apply({'params': self.params if params is None else params}, x)


class Dense(nn.Module):
  normalised: bool = False

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(16)(x)
    if self.normalised:
      x = nn.BatchNorm(not train)(x)
    return nn.Dense(4)(nn.relu(x))


def halved(model, variables, *inputs, **kwargs):
  """Every second slice of every group cut; also checks that something was."""
  coupling = dp.couple(model, variables, *inputs, **kwargs)
  keep = {g: np.arange(x.size) % 2 == 0 for g, x in coupling.groups.items()}
  assert keep
  return dp.prune(
    model, variables, {'channels': keep}, inputs, coupling=coupling, **kwargs
  )


@pytest.mark.parametrize('given', ['state', 'module'])
def test_an_nnx_module_comes_back_small(given):
  net = Plain(nnx.Rngs(0))
  net.eval()
  variables = nnx.state(net) if given == 'state' else net
  small = halved(net, variables, X)
  assert type(small.variables) is type(variables) and type(small.model) is Plain
  assert small.model.a.kernel[...].shape == (6, 8)
  assert small.model.norm.mean[...].shape == (8,)
  np.testing.assert_allclose(small.model(X), small.apply(small.variables, X), atol=1e-6)
  small.model.train()
  before = small.model.norm.mean[...]
  assert jnp.isfinite(small.model(X)).all()  # trains on, with its own random keys
  assert not np.array_equal(before, small.model.norm.mean[...])


def test_arrays_that_an_nnx_module_shares_stay_shared():
  net = Tied(nnx.Rngs(0))
  small = halved(net, nnx.state(net), X)
  assert small.model.b is small.model.again
  np.testing.assert_allclose(small.model(X), small.apply(small.variables, X), atol=1e-6)
  with pytest.raises(TypeError, match=r'write nnx\.state\(module\)'):
    dp.couple(net, net, X)


@pytest.mark.parametrize(
  'variables',
  [
    lambda net: X,
    lambda net: nnx.state(net, nnx.Param),
    lambda net: nnx.to_pure_dict(nnx.state(net)),
  ],
  ids=['an input', 'parameters only', 'a dict'],
)
def test_an_nnx_module_needs_its_whole_state(variables):
  net = Plain(nnx.Rngs(0))
  with pytest.raises(
    TypeError, match=r'write \(module, nnx\.state\(module\), \*inputs'
  ):
    dp.couple(net, variables(net), X)


def test_a_module_whose_code_holds_sizes_has_no_small_module():
  net = FixedHeads(nnx.Rngs(0))
  coupling = dp.couple(net, nnx.state(net), X)
  name = next(iter(coupling.groups))
  keep = {name: np.arange(coupling.groups[name].size) % 2 == 0}
  small = dp.prune(net, nnx.state(net), {'channels': keep}, X)
  assert small.model is None and small.report['verify']['difference'] < 1e-5


def test_a_module_that_is_a_pytree_comes_back_small():
  weight = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
  net = Tree(weight(1, 6, 16), jnp.tanh, weight(2, 16, 4))
  arrays = Tree(net.a, None, net.b)
  small = halved(net, arrays, X)
  assert small.variables.activation is None and small.variables.a.shape == (6, 8)
  assert isinstance(small.model, Tree) and small.model.activation is jnp.tanh
  np.testing.assert_allclose(small.model(X), small.apply(small.variables, X), atol=1e-6)
  for wrong in (net, X, Tree(net.a, None, None)):
    with pytest.raises(TypeError, match='expected the arrays of the module Tree'):
      dp.couple(net, wrong, X)


def test_an_array_bound_to_a_function_is_not_its_variables():
  scale = jnp.arange(1.0, 5.0)
  fn = jax.tree_util.Partial(lambda scale, v, x: x @ v['a'] @ v['b'] * scale, scale)
  v = {'a': jnp.ones((6, 8)), 'b': jnp.ones((8, 4))}
  assert list(dp.couple(fn, v, X).groups) == ['a:1']


HEADS = {
  'key': (lambda params, rng, x: forward(params, x), False),
  'no key': (lambda params, x: forward(params, x), False),
  'state': (lambda params, state, rng, x: (forward(params, x), state), True),
  'state, no key': (lambda params, state, x: (forward(params, x), state), True),
}


def forward(params, x):
  return jax.nn.relu(x @ params['linear']['w']) @ params['linear_1']['w']


@pytest.mark.parametrize('kind', HEADS)
def test_haiku_transforms(kind):
  apply, stateful = HEADS[kind]
  w = lambda i, *shape: {'w': jax.random.normal(jax.random.key(i), shape)}
  params = {'linear': w(1, 6, 8), 'linear_1': w(2, 8, 3)}
  variables = {'params': params, 'state': {}} if stateful else params
  small = halved(Transformed(None, apply), variables, X)
  expected = small.variables['params'] if stateful else small.variables
  assert expected['linear']['w'].shape == (6, 4)
  np.testing.assert_allclose(
    small.apply(small.variables, X), forward(expected, X), rtol=1e-5
  )


def test_flax_models_of_transformers_take_their_parameters():
  module = Dense()
  params = module.init(jax.random.key(0), X)['params']
  model = Wrapped(module, params)
  small = halved(model, params, X)
  assert small.variables['Dense_0']['kernel'].shape == (6, 8)
  assert small.report['verify']['difference'] < 1e-5 and small.model is None


def test_a_linen_module_with_its_sizes_in_its_code_has_no_small_module():
  model = Dense()
  variables = model.init(jax.random.key(0), X)
  assert halved(model, variables, X).model is None
  coupling = dp.couple(model, variables, X)
  assert dp.prune(model, variables, {}, X, coupling=coupling).model is model


def test_what_to_write_where_a_first_call_fails():
  model = Dense(normalised=True)
  variables = model.init(jax.random.key(0), X)
  with pytest.raises(ValueError, match=r"write \{'params': params\}"):
    dp.couple(model, variables['params'], X)
  added = lambda v, x, y: model.apply(v, x + y)
  with pytest.raises(TypeError, match=r'one by one: \(model, variables, \*inputs\)'):
    dp.couple(added, variables, (X, X))
  with pytest.raises(ValueError, match=r"mutable=\['batch_stats'\]"):
    dp.couple(model, variables, X, train=True)
  first = lambda out: out[0]
  trained = {'train': True, 'mutable': ['batch_stats']}
  assert dp.couple(model, variables, X, fixed=first, **trained).groups


# ---- training and evaluation ---------------------------------------------------------


FLAGGED = ('train', 'training', 'is_training', 'deterministic', 'use_running_average')


def flagged(flag: str):
  """A function whose answer is doubled in training, as told by a flag of this name."""
  source = f'lambda v, x, *, {flag}: (x @ v["params"]["w"], {flag})'
  told = eval(source)

  def double(v, x, **kwargs):
    y, value = told(v, x, **kwargs)
    training = value == (flag not in ('deterministic', 'use_running_average'))
    return 2 * y if training else y

  double.__signature__ = inspect.signature(told)
  return double


@pytest.mark.parametrize('flag', FLAGGED)
def test_train_becomes_the_flag_that_a_function_has(flag):
  v = {'params': {'w': jnp.ones((6, 2))}}
  run = modules.runnable(flagged(flag))
  y = X @ v['params']['w']
  np.testing.assert_array_equal(run(v, X, train=False), y)
  np.testing.assert_array_equal(run(v, X, train=True, rngs={'dropout': KEY}), 2 * y)


LINEN = """
class Net(nn.Module):
  @nn.compact
  def __call__(self, x, *, FLAG):
    still = FLAG == ('FLAG' in ('deterministic', 'use_running_average'))
    x = nn.BatchNorm(use_running_average=still)(nn.Dense(8)(x))
    return nn.Dense(2)(nn.Dropout(0.5, deterministic=still)(x))
"""


def made_by(source: str, name: str):
  scope = {'nn': nn, '__name__': __name__}
  exec(source, scope)
  return scope[name]


@pytest.mark.parametrize('flag', FLAGGED)
def test_a_linen_module_trains_whatever_its_flag_is_called(flag):
  Net = made_by(LINEN.replace('FLAG', flag), 'Net')
  evaluation = {flag: flag in ('deterministic', 'use_running_average')}
  model = Net()
  variables = model.init(KEY, X, **evaluation)
  data = {'image': X, 'label': jnp.array([0, 1, 1])}
  method, tx = plain(), optax.sgd(0.1)
  state = dp.init_state(model, method, tx, variables, batch=data)
  step = dp.make_step(model, method, dp.classification(2), tx)
  after, _ = step(state, data, KEY)
  stats = after.model_state['batch_stats']['BatchNorm_0']['mean']
  assert np.abs(stats).max() > 0
  coupling = dp.couple(model, variables, X, train=False)
  assert len(coupling.groups) == 1
  fresh = dp.recalibrate(model, after.variables, [data])
  judge = dp.judge(model, method, dp.classification(2), after, [data], [data])
  assert np.isfinite(judge({})['loss'])
  want = X @ after.params['Dense_0']['kernel'] + after.params['Dense_0']['bias']
  got = fresh['batch_stats']['BatchNorm_0']['mean']
  np.testing.assert_allclose(got, want.mean(0), rtol=1e-4, atol=1e-5)


def test_without_a_flag_there_is_nothing_to_set():
  run = modules.runnable(lambda v, x: x @ v)
  w = jnp.ones((6, 2))
  np.testing.assert_array_equal(run(w, X, train=True, rngs={'dropout': KEY}), X @ w)
  with pytest.raises(TypeError, match='phase'):
    run(w, X, phase=1)


def test_a_module_keeps_the_mode_that_it_had():
  net = Plain(nnx.Rngs(0))
  run = modules.runnable(net)
  run(nnx.state(net), X, train=False)
  run(net, X, train=False)
  assert not net.drop.deterministic
  assert not net.norm.use_running_average


def test_an_nnx_module_draws_from_the_keys_that_are_given():
  """Before and after a cut, and under jit; without keys from its own."""
  net = Plain(nnx.Rngs(0))
  state = nnx.state(net)
  coupling = dp.couple(net, state, X, train=False)
  keep = dp.oneshot(coupling, state, '50%')
  small = dp.prune(net, state, keep, X, train=False)
  gated = dp.plug(net, coupling)
  for apply in (
    lambda **kwargs: small.apply(small.variables, X, **kwargs),
    lambda **kwargs: gated(state, coupling.gates(), X, **kwargs),
  ):
    drawn = jax.jit(lambda key, apply=apply: apply(train=True, rngs={'dropout': key}))
    first, again, other = map(drawn, map(jax.random.key, (1, 1, 2)))
    assert (first == again).all() and (first != other).any()
    assert (drawn(jax.random.PRNGKey(1)) == first).all()
    assert (apply(train=True) == apply(train=True)).all()


def test_a_module_whose_code_states_sizes_is_none_and_the_report_says_so():
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.a = nnx.Conv(3, 16, (3, 3), rngs=rngs)
      self.norm = nnx.GroupNorm(16, num_groups=4, rngs=rngs)
      self.b = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
      return self.b(nnx.relu(self.norm(self.a(x))).mean((1, 2)))

  net, x = Net(nnx.Rngs(0)), jnp.ones((1, 8, 8, 3))
  state = nnx.state(net)
  keep = dp.oneshot(dp.couple(net, state, x), state, '70%')
  small = dp.prune(net, state, keep, x)
  assert small.model is None and '`model` is None' in repr(small)
