"""Messages about arguments: who was called, what was got, and never too long."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import depthprune as dp
from depthprune.program import arguments
from depthprune.program.coupling import couple

LAYERS = 40


class Normed(nn.Module):
  """Widths that are normalised over, so that none of them can be cut exactly."""

  @nn.compact
  def __call__(self, x):
    for i in range(LAYERS):
      x = nn.relu(nn.LayerNorm()(nn.Dense(8, name=f'layer{i}')(x)))
    return nn.Dense(3)(x)


def deep(variables, x):
  for i in range(LAYERS):
    x = jnp.tanh(x @ variables[f'layer{i}'])
  return x @ variables['head']


X = jax.random.normal(jax.random.key(0), (2, 8))
VARIABLES = {
  f'layer{i}': jax.random.normal(jax.random.key(i), (8, 8)) / 3 for i in range(LAYERS)
} | {'head': jnp.ones((8, 3))}


def half(coupling):
  return {'channels': {g: np.arange(x.size) < 4 for g, x in coupling.groups.items()}}


def is_short(error) -> bool:
  said = str(error)
  return len(said) <= arguments.CHARACTERS and len(said.splitlines()) <= arguments.LINES


def test_a_message_names_the_function_that_a_user_called():
  with pytest.raises(
    TypeError, match=r'^prune: model: expected a module or a function'
  ):
    dp.prune('resnet20', {}, {}, X)


def test_a_call_within_a_users_function_is_the_one_that_is_named():
  def calls_plug(variables, x):
    return dp.plug(deep, None)(variables, {}, x)  # pyright: ignore[reportArgumentType]

  with pytest.raises(TypeError, match=r'^plug: coupling: '):
    dp.couple(calls_plug, VARIABLES, X)


def test_a_report_of_many_groups_is_short_and_its_details_are_whole():
  network = Normed()
  variables = jax.eval_shape(network.init, jax.random.key(0), X)
  coupling = couple(network, variables, X)
  with pytest.raises(dp.InexactCut) as error:
    dp.prune(network, variables, half(coupling), X, coupling=coupling)
  assert is_short(error.value)
  assert str(error.value).splitlines()[-2].startswith('keep these groups whole')
  assert all(f'layer{i}:1' in error.value.details for i in range(LAYERS))


def test_a_failed_proof_of_a_deep_network_is_short(monkeypatch):
  coupling = couple(deep, VARIABLES, X)
  keep = half(coupling)
  from depthprune.surgery import prune as surgery

  right = surgery.index_plan

  def reversed_slices(coupling, keep):
    plan = dict(right(coupling, keep))
    return {p: (*m[:-1], m[-1][::-1]) if p != 'head' else m for p, m in plan.items()}

  monkeypatch.setattr(surgery, 'index_plan', reversed_slices)
  with pytest.raises(dp.InexactCut, match='masked and small network differ') as error:
    dp.prune(deep, VARIABLES, keep, X, coupling=coupling)
  assert is_short(error.value) and len(error.value.details) > len(str(error.value))


def test_many_arrays_that_are_not_finite_are_not_all_named():
  broken = {name: x.at[0, 0].set(jnp.nan) for name, x in VARIABLES.items()}
  coupling = couple(deep, broken, X)
  with pytest.raises(dp.InexactCut, match='pass finite weights') as error:
    dp.prune(deep, broken, half(coupling), X, coupling=coupling)
  assert is_short(error.value) and f'layer{LAYERS - 1}' in error.value.details


def test_a_long_error_of_the_network_itself_is_shortened():
  def refuses(variables, x):
    raise TypeError('first\n' + 'word ' * 3000 + '\nmore' * 50 + '\nlast')

  with pytest.raises(TypeError, match='^first') as error:
    dp.couple(refuses, VARIABLES, X)
  assert is_short(error.value) and 'last' in str(error.value)
  assert vars(error.value)['details'].count('word') == 3000


def test_a_short_error_of_the_network_itself_stays_as_it_is():
  def refuses(variables, x):
    raise RuntimeError('of the user')

  with pytest.raises(RuntimeError, match='^of the user'):
    dp.couple(refuses, VARIABLES, X)


def test_what_does_not_fit_is_named_once():
  coupling = couple(deep, VARIABLES, X)
  few = {'head': VARIABLES['head']}
  with pytest.raises(
    ValueError, match=r'layer0: .* no such array \(40 of 41 are'
  ) as error:
    dp.oneshot(coupling, few, 0.5)
  assert is_short(error.value)
  wide = {**VARIABLES, 'layer3': jnp.ones((8, 9))}
  with pytest.raises(ValueError, match=r'layer3: expected shape \[8, 8\].*\[8, 9\]'):
    dp.oneshot(coupling, wide, 0.5)


@pytest.mark.parametrize(
  ('value', 'text'),
  [
    (None, 'None'),
    (True, 'True'),
    (0.5, 'the number 0.5'),
    ('half', "'half'"),
    (np.ones((2, 3), np.float32), 'an array float32[2, 3]'),
    (jnp.ones(()), 'an array float32[]'),
    (dict, 'the class dict itself'),
    ({}, 'an empty dict'),
    ({f'layer{i}': 0 for i in range(9)}, 'a dict of layer0, layer1, '),
    ([1.0, 2.0], 'a list of float'),
    (deep, 'the function deep'),
    (object(), 'an object'),
  ],
)
def test_values_are_described_in_a_few_words(value, text):
  assert arguments.described(value).startswith(text)
  assert len(arguments.described(value)) < 100


@pytest.mark.parametrize(
  'value', [1, 2.5, np.float32(0.5), jnp.float32(2), np.int64(3)]
)
def test_numbers_of_all_libraries_are_numbers(value):
  assert arguments.number('n', value, least=0.5) is value


@pytest.mark.parametrize('value', ['1', None, True, [1.0], np.ones(2), jnp.ones(2)])
def test_what_is_no_number_is_refused(value):
  with pytest.raises(TypeError, match='n: expected a number of 0 or more'):
    arguments.number('n', value, least=0)


@pytest.mark.parametrize('value', [np.nan, np.inf, -1, 3])
def test_a_number_out_of_range_is_refused(value):
  with pytest.raises(ValueError, match='n: expected a finite number'):
    arguments.number('n', value, least=0, most=2)


@pytest.mark.parametrize('value', [jax.random.key(0), jax.random.PRNGKey(0)])
def test_both_kinds_of_keys_are_keys(value):
  assert arguments.key(value) is value
