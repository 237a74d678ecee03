"""The states of all optimizers of optax are cut with the variables they belong to."""

import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from depthprune.surgery.plan import cut, cut_optimizer
from tests.zoo import randomised

PARAMS = randomised(
  jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
    {
      'conv': {'kernel': (3, 3, 3, 8), 'bias': (8,)},
      'tall': {'kernel': (8, 6), 'scale': (6,)},
      'wide': {'kernel': (6, 12)},
      'square': {'kernel': (12, 12)},
      'out': {'kernel': (12, 4)},
    },
    is_leaf=lambda x: isinstance(x, tuple),
  ),
  0,
)
KEPT = {n: np.arange(n) % 3 > 0 for n in (6, 8, 12)}  # along every axis of that size


def factories():
  """(name, function without arguments) of whatever makes an optimizer by itself."""
  for module in (optax, optax.contrib):
    for name, make in inspect.getmembers(module, inspect.isfunction):
      parameters = inspect.signature(make).parameters.values()
      needed = {
        p.name: 0.01
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
      }
      returned = inspect.signature(make).return_annotation
      if {*needed} <= {'learning_rate'} and 'GradientTransformation' in str(returned):
        yield (
          f'{module.__name__}.{name}',
          lambda make=make, needed=needed: make(**needed),
        )


WRAPPED = {
  'mechanize': lambda: optax.contrib.mechanize(optax.adam(0.1)),
  'schedule_free': lambda: optax.contrib.schedule_free(optax.sgd(0.1, 0.9), 0.1),
  'sam': lambda: optax.contrib.sam(optax.sgd(0.1, 0.9), optax.sgd(0.1, 0.9)),
  'split_real_and_imaginary': lambda: optax.contrib.split_real_and_imaginary(
    optax.adam(0.1)
  ),
  'galore of rank 2': lambda: optax.contrib.galore(0.1, rank=2),
  'adafactor, small factors': lambda: optax.adafactor(0.1, min_dim_size_to_factor=4),
  'ema': lambda: optax.ema(0.9),
  'trace': lambda: optax.trace(0.9),
  'MultiSteps': lambda: optax.MultiSteps(optax.adam(0.1), 2),
  'apply_if_finite': lambda: optax.apply_if_finite(optax.adam(0.1), 3),
  'inject_hyperparams': lambda: optax.inject_hyperparams(optax.adam)(0.1),
  'conditionally_mask': lambda: optax.conditionally_mask(
    optax.adam(0.1), lambda step, **_: step > 0
  ),
  'zoom': lambda: optax.chain(optax.sgd(0.1), optax.scale_by_zoom_linesearch(3)),
  'backtracking': lambda: optax.chain(
    optax.sgd(0.1), optax.scale_by_backtracking_linesearch(3)
  ),
  'flatten': lambda: optax.flatten(optax.adam(0.1)),
  'freeze': lambda: optax.chain(
    optax.freeze(jax.tree.map(lambda x: x.ndim < 2, PARAMS)), optax.adam(0.1)
  ),
}
EVERY = {k: v for k, v in factories() if 'chain' not in k} | WRAPPED


@pytest.fixture(autouse=True)
def promotion():
  """optax multiplies floats by integers, and warns of what it will rename."""
  with jax.numpy_dtype_promotion('standard'), warnings.catch_warnings():
    warnings.simplefilter('ignore')
    yield


def masks(x) -> tuple:
  return tuple(KEPT.get(n, np.ones(n, bool)) for n in x.shape)


PLAN = {
  f'{layer}/{name}': masks(x)
  for layer, arrays in PARAMS.items()
  for name, x in arrays.items()
}
SMALL = cut(PARAMS, PLAN)


def shapes(state) -> list:
  leaves, tree = jax.tree.flatten(state)
  return [tree, *((jnp.shape(x), jnp.result_type(x)) for x in leaves)]


def numbered(state):
  """The state with other numbers in every leaf, so that no slice equals another."""
  count = iter(range(1000))
  return jax.tree.map(
    lambda x: (
      (next(count) * 1000 + jnp.arange(x.size)).reshape(x.shape).astype(x.dtype)
      if jnp.issubdtype(jnp.result_type(x), jnp.number)
      else x
    ),
    state,
  )


def test_optax_has_many_optimizers():
  assert len(EVERY) > 70 and {'optax.adamw', 'optax.contrib.muon'} <= {*EVERY}


@pytest.mark.parametrize('name', EVERY)
def test_the_state_is_that_of_the_small_variables(name):
  tx = EVERY[name]()
  state = numbered(tx.init(PARAMS))
  small, _ = cut_optimizer(tx, state, PARAMS, SMALL, PLAN, '')
  assert shapes(small) == shapes(tx.init(SMALL))


# Of these optax itself does not find the statistics of a variable.
UNKNOWN = 'lbfgs', 'noisy_sgd', 'sm3', 'contrib.muon', 'zoom', 'backtracking', 'flatten'


@pytest.mark.parametrize('name', [n for n in EVERY if not n.endswith(UNKNOWN)])
def test_what_optax_calls_a_statistic_is_cut_like_its_variable(name):
  tx = EVERY[name]()
  state = numbered(tx.init(PARAMS))
  small, anew = cut_optimizer(tx, state, PARAMS, SMALL, PLAN, '')
  alike = lambda leaf, x: leaf[np.ix_(*masks(x))] if leaf.shape == x.shape else leaf
  expected = optax.tree_map_params(tx, alike, state, PARAMS)
  if shapes(expected) == shapes(tx.init(SMALL)):
    assert not anew
    jax.tree.map(np.testing.assert_array_equal, small, expected)
  else:
    assert anew


QUICK = 'adam', 'rprop', 'lbfgs', 'sm3', 'contrib.prodigy', 'contrib.galore'
ASKS = 'hutchinson', 'sophia', 'scale_by_muon', 'sam'  # for more than a gradient


def rare(names):
  quick = [f'optax.{name}' for name in QUICK]
  return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize(
  'name', rare([n for n in EVERY if not any(word in n for word in ASKS)])
)
def test_training_goes_on(name):
  """Two steps, the cut, and a third of finite numbers that change every variable."""
  tx = optax.with_extra_args_support(EVERY[name]())
  loss = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p))

  def step(params, state, seed):
    more = {'value': loss(params), 'grad': params, 'value_fn': loss}
    gradient = randomised(params, seed)
    updates, state = jax.jit(lambda *a: tx.update(*a, **more))(gradient, state, params)
    return optax.apply_updates(params, updates), state

  params, state = PARAMS, tx.init(PARAMS)
  for seed in range(2):
    params, state = step(params, state, seed)
  small = cut(params, PLAN)
  state, _ = cut_optimizer(tx, state, params, small, PLAN, '')
  trained, _ = step(small, state, 2)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(trained))
