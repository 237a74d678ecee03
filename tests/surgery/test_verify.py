"""verify: what cannot be cut exactly is refused by name; a wrong cut is caught."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.models.mlp import MLP
from depthprune.program import resize
from depthprune.program.coupling import couple
from depthprune.surgery import plan, verify
from depthprune.surgery.prune import InexactCut, prune
from depthprune.surgery.verify import HALF, SINGLE, agrees, randomised, relative
from tests import masking as m
from tests import zoo


class Normed(nn.Module):
  """Normalised over its width, by the textbook's variance."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(8, name='one')(x.mean((1, 2)))
    x = nn.LayerNorm(use_fast_variance=False)(x)
    return nn.Dense(4)(x)


INEXACT = {  # network, the group that is to blame, a tensor that has it
  'layer norm': (zoo.Case(Normed()), 'one:1', 'params/one/kernel'),
  'mixer': (zoo.INEXACT['mixer'], 'Conv_0:3', 'params/Conv_0/kernel'),
  'softmax': (zoo.INEXACT['channel softmax'], 'Conv_1:3', 'params/Conv_1/kernel'),
}


@pytest.mark.parametrize('name', INEXACT)
def test_where_masked_is_not_small_the_tensors_are_named(name):
  """Refused; on request cut nevertheless, and the difference reported."""
  case, group, tensor = INEXACT[name]
  variables, x = case.variables(), case.inputs(2)
  coupling = couple(case.model, variables, x)
  size = coupling.groups[group].size
  keep = {'channels': {group: np.arange(size) < size // 2}}
  cut = lambda **more: prune(case.model, variables, keep, x, coupling=coupling, **more)
  with pytest.raises(InexactCut) as error:
    cut()
  message = str(error.value)
  assert f'{group}: reduced over by' in message and tensor in message
  assert 'allow_inexact=True' in message
  pruned = cut(allow_inexact=True)
  verify = pruned.report['verify']
  assert verify['difference'] > verify['tolerance'] == SINGLE
  assert any(group in note and tensor in note for note in pruned.report['notes'])
  zeroed = case.apply(m.zeroed(coupling, variables, keep), x)
  got = pruned.apply(pruned.variables, x)
  assert got.shape == zeroed.shape and m.difference(zeroed, got) > SINGLE


def test_only_the_group_to_blame_is_named():
  case, group, _ = INEXACT['softmax']
  variables, x = case.variables(), case.inputs(2)
  coupling = couple(case.model, variables, x)
  other = next(g for g in coupling.groups if g != group)
  keep = m.random_keep(coupling)
  with pytest.raises(InexactCut) as error:
    prune(case.model, variables, keep, x, coupling=coupling)
  assert f'{group}: ' in str(error.value) and f'{other}: ' not in str(error.value)
  keep = {'channels': {other: keep['channels'][other]}}
  report = prune(case.model, variables, keep, x, coupling=coupling).report
  assert report['verify']['difference'] <= 1e-5


# ---- an ordinary network -------------------------------------------------------------

MODEL, X = MLP(hidden=(8, 6)), zoo.image(2)
VARIABLES = zoo.randomised(jax.eval_shape(MODEL.init, jax.random.key(0), X))
HALVED = {'channels': {'layer0/dense:1': np.arange(8) < 4}}


def wrong_slices(shape: tuple[int, ...]):
  """plan.take, but the slices of arrays of one shape are taken in another order."""
  take = plan.take

  def wrong(x, masks):
    if np.shape(x) == shape:
      masks = tuple(np.roll(mask, 1) for mask in masks)
    return take(x, masks)

  return wrong


def path_leaf(path):
  leaf = VARIABLES['params']
  for name in path.split('/'):
    leaf = leaf[name]
  return leaf


@pytest.mark.parametrize('path', ['layer0/dense/kernel', 'layer0/dense/bias'])
def test_an_array_cut_at_the_wrong_slices_is_caught(monkeypatch, path):
  monkeypatch.setattr(plan, 'take', wrong_slices(np.shape(path_leaf(path))))
  with pytest.raises(InexactCut, match=r'layer0/dense:1: off by'):
    prune(MODEL, VARIABLES, HALVED, X)


def test_a_wrong_size_in_the_program_is_caught(monkeypatch):
  """A slice of the program that is moved by one: no shape tells."""
  resize_slice = resize._resize_slice

  def moved(p, masks, sizes):
    resize_slice(p, masks, sizes)
    if not all(mask.all() for mask in masks):
      p['start_indices'] = tuple(max(i - 1, 0) for i in p['start_indices'])
      p['limit_indices'] = tuple(
        max(i - 1, 0) if start else i
        for start, i in zip(p['start_indices'], p['limit_indices'], strict=True)
      )

  def halves(p, x):
    h = jnp.tanh(x.mean((1, 2)) @ p['in'])
    return h[:, :3] @ p['left'] + h[:, 3:6] @ p['mid'] + h[:, 6:] @ p['right']

  shapes = {'in': (3, 9), 'left': (3, 2), 'mid': (3, 2), 'right': (3, 2)}
  case = zoo.Case(halves, shapes=shapes)
  coupling = couple(halves, case.variables(), X)
  keep = {'channels': {g: np.arange(3) != 1 for g in coupling.groups}}
  assert len(keep['channels']) == 3
  cut = lambda: prune(halves, case.variables(), keep, X, coupling=coupling)
  assert cut().report['verify']['difference'] <= 1e-5
  monkeypatch.setattr(resize, '_resize_slice', moved)
  with pytest.raises(InexactCut):
    cut()


def test_zeros_hide_nothing():
  """Fresh biases are 0, and a cut of them that is wrong would not show."""
  zero = jax.tree.map(jnp.zeros_like, VARIABLES)
  report = prune(MODEL, zero, HALVED, X).report
  assert report['verify']['moved'] > 1e-3 and report['notes'] == []
  noisy = jax.tree.leaves(randomised(zero))
  assert all((np.asarray(x) != 0).all() for x in noisy)


def test_what_closes_nothing_moves_nothing():
  report = prune(MODEL, VARIABLES, {}, X).report
  assert report['verify'] == {
    'difference': 0.0, 'settled': 0.0, 'moved': 0.0, 'tolerance': SINGLE,
  }  # fmt: skip
  assert report['notes'] == [] and report['requested'] == {}
  assert report['flops']['before'] == report['flops']['after']


def test_slices_that_nothing_reads_are_told():
  """Times zero: closing them cannot change the output, and a person should know."""
  f = lambda p, x: jnp.tanh(x.mean((1, 2)) @ p['in']) @ p['out'] * 0 + x.mean()
  p = zoo.Case(f, shapes={'in': (3, 6), 'out': (6, 2)}).variables()
  report = prune(f, p, {'channels': {'in:1': np.arange(6) < 3}}, X).report
  assert report['verify']['moved'] == 0
  assert report['notes'] == ['closing these slices does not change the output']


def test_half_precision_has_its_own_tolerance():
  model = MODEL.clone(dtype=jnp.bfloat16)
  verify = prune(model, VARIABLES, HALVED, X).report['verify']
  assert verify['tolerance'] == HALF > SINGLE
  assert verify['difference'] <= HALF and verify['moved'] > 1e-2
  assert prune(MODEL, VARIABLES, HALVED, X).report['verify']['tolerance'] == SINGLE


@pytest.mark.parametrize(
  ('dtype', 'off', 'same'),
  [
    (jnp.float32, 1e-6, True),
    (jnp.float32, 1e-3, False),
    (jnp.bfloat16, 2**-8, True),  # one rounding
    (jnp.bfloat16, 0.03, False),  # a mean over 32 channels, two of which are gone
    (jnp.float16, 2**-11, True),
    (jnp.float16, 0.03, False),
  ],
)
def test_a_small_module_may_differ_by_a_rounding_of_its_own_type(dtype, off, same):
  f = lambda p, x: jnp.tanh(x @ p['in']) @ p['out']
  p = zoo.Case(f, shapes={'in': (3, 6), 'out': (6, 2)}).variables()
  p = jax.tree.map(lambda x: x.astype(dtype), p)
  x = zoo.image(2).mean((1, 2)).astype(dtype)
  own = lambda p, x: (f(p, x).astype(jnp.float32) * (1 + off)).astype(dtype)
  assert agrees(couple(f, p, x), own, f, p) == same


def test_the_difference_is_relative_and_the_worst():
  a = {'x': jnp.asarray([1.0, -4.0]), 'y': jnp.asarray([0.1])}
  b = {'x': jnp.asarray([1.0, -3.0]), 'y': jnp.asarray([0.15])}
  assert relative(a, b) == pytest.approx(0.5)
  assert relative(a, a) == 0
  assert relative(a, {**a, 'y': jnp.asarray([jnp.nan])}) == np.inf


@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf])
@pytest.mark.parametrize('of', ['kept', 'closed', 'input'])
def test_a_network_whose_own_output_is_not_finite_is_told_so(of, bad):
  """It is not a group's fault, and no group is named."""
  f = lambda p, x: jnp.tanh(x @ p['a']) @ p['b']
  arrays = zoo.Case(f, shapes={'a': (3, 6), 'b': (6, 2)}).variables()
  x = zoo.image(2).mean((1, 2))
  if of == 'input':
    x = x.at[:].set(jnp.asarray([bad, -bad, bad]))
  else:  # rows of `a` meet in one unit, so that its inputs are inf - inf
    column = arrays['a'].at[:, 0 if of == 'kept' else 5]
    arrays['a'] = column.set(jnp.asarray([bad, -bad, bad]))
    x = jnp.abs(x)
  keep = {'channels': {'a:1': np.arange(6) < 3}}
  source = 'look at the inputs' if of == 'input' else 'the variables a'
  with pytest.raises(InexactCut, match="^the network's own output is not") as error:
    prune(f, arrays, keep, x)
  assert source in str(error.value) and 'allow_inexact=True' in str(error.value)
  assert 'a:1' not in str(error.value)
  report = prune(f, arrays, keep, x, allow_inexact=True).report
  assert any(source in note for note in report['notes'])


def test_a_few_outputs_that_are_nan_are_noted():
  f = lambda p, x: jnp.tanh(x @ p['a']) @ p['b']
  p = zoo.Case(f, shapes={'a': (3, 6), 'b': (6, 2)}).variables()
  x = zoo.image(2).mean((1, 2)).at[0].set(jnp.nan)
  [note] = prune(f, p, {'channels': {'a:1': np.arange(6) < 3}}, x).report['notes']
  assert note.startswith("the network's own output is not finite")


def test_outputs_that_are_not_finite_on_purpose_are_none_of_our_business():
  """A mask of -inf over classes that are not allowed."""
  f = lambda p, x: (
    jnp.tanh(x @ p['a']) @ p['b'] + jnp.asarray([0.0, -jnp.inf], jnp.float32)
  )
  p = zoo.Case(f, shapes={'a': (3, 6), 'b': (6, 2)}).variables()
  x = zoo.image(2).mean((1, 2))
  assert prune(f, p, {'channels': {'a:1': np.arange(6) < 3}}, x).report['notes'] == []


def test_complex_numbers_differ_in_both_parts():
  a, b = np.asarray([3.0, 4j]), np.asarray([3.0, 2j])
  assert relative(a, b) == pytest.approx(0.5)
  assert relative(a, np.asarray([3.0, complex(0, np.nan)])) == np.inf
  zero = {'w': jnp.zeros((3, 4), jnp.complex64)}
  noisy = randomised(zero)['w']
  assert noisy.dtype == jnp.complex64
  assert (noisy.real != 0).all() and (noisy.imag != 0).all()


@pytest.mark.parametrize('shaped', [False, True])
def test_a_change_of_the_imaginary_part_alone_is_seen(shaped):
  def f(p, x):
    h = jnp.tanh((x @ p['a']).real) @ p['b']
    return jax.lax.complex(jnp.zeros_like(h), h)

  p = zoo.Case(f, shapes={'a': (3, 6), 'b': (6, 2)}).variables()
  p['a'] = jax.lax.complex(p['a'], p['a'])
  x = zoo.image(2).mean((1, 2)).astype(jnp.complex64)
  x = jax.ShapeDtypeStruct(x.shape, x.dtype) if shaped else x
  report = prune(f, p, {'channels': {'a:1': np.arange(6) < 3}}, x).report
  assert report['verify']['moved'] > 1e-3 and report['notes'] == []
  assert report['verify']['difference'] <= 1e-5


def test_a_probe_that_overflows_is_drawn_nearer_to_the_network():
  """50 layers of positive weights: 30 % of noise in each makes it infinite."""

  def f(v, x):
    for w in v['layers']:
      x = x @ w
    return x @ v['out']

  layers = list(jnp.full((50, 16, 16), 5.4 / 16))
  v, x = {'layers': layers, 'out': jnp.ones((16, 3))}, jnp.ones((2, 16))
  assert np.isfinite(f(v, x)).all() and not np.isfinite(f(randomised(v), x)).all()
  pruned = prune(f, v, {'channels': {'layers/20:1': np.arange(16) < 15}}, x)
  assert pruned.report['verify']['difference'] < 1e-5
  assert pruned.report['verify']['moved'] > 0.01


def test_the_first_probe_is_the_noisy_one_where_nothing_overflows():
  """A slice that is zero in the network is seen by the noise, so its loss is too."""
  f = lambda v, x: jnp.tanh(x @ v['a']) @ v['b']
  v = {'a': jnp.ones((4, 6)).at[:, 3].set(0), 'b': jnp.ones((6, 2))}
  report = prune(
    f, v, {'channels': {'a:1': np.arange(6) != 3}}, jnp.ones((2, 4))
  ).report
  assert report['verify']['moved'] > 1e-3


def test_a_long_wait_is_explained_and_a_short_one_is_not(monkeypatch, capsys):
  cut = lambda: prune(MODEL, VARIABLES, HALVED, X)
  monkeypatch.setattr(verify, 'PATIENCE_S', 600)
  cut()
  assert capsys.readouterr().err == ''
  monkeypatch.setattr(verify, 'PATIENCE_S', 0)
  cut()
  assert capsys.readouterr().err == f'{verify.WAITING}\n'


def test_a_network_that_makes_much_of_rounding_may_differ_by_it():
  """Its layers triple every error, as masked and small add up in another order."""

  def net(p, x):
    h = x @ p['a'] @ p['b']
    for _ in range(9):
      h = jnp.sin(3 * h)
    return h

  p = {'a': jax.random.normal(jax.random.key(0), (5, 64)) / 2}
  p['b'] = jax.random.normal(jax.random.key(1), (64, 4)) / 8
  x = jax.random.normal(jax.random.key(2), (32, 5))
  keep = {'channels': {'a:1': np.arange(64) % 3 > 0}}
  proof = prune(net, p, keep, x).report['verify']
  assert proof['difference'] <= proof['tolerance'] <= 1e-3


@pytest.mark.parametrize('is_wrong', [False, True])
def test_a_probe_that_shows_rounding_alone_is_drawn_nearer_too(is_wrong, monkeypatch):
  """Noise in `w`, which is 0, turns the sine a thousand times; less noise does not."""

  def net(v, x):
    h = x @ v['a'] @ v['b']
    return h + jnp.sin(1e6 * v['w'] * h)

  v = {'a': jax.random.normal(jax.random.key(0), (5, 64)) / 2, 'w': jnp.zeros(4)}
  v['b'] = jax.random.normal(jax.random.key(1), (64, 4)) / 8
  x = jax.random.normal(jax.random.key(2), (32, 5))
  cut = lambda: prune(net, v, {'channels': {'a:1': np.arange(64) % 3 > 0}}, x)
  if not is_wrong:
    proof = cut().report['verify']
    assert proof['difference'] <= proof['tolerance'] == SINGLE
    return
  monkeypatch.setattr(plan, 'take', wrong_slices((5, 64)))
  with pytest.raises(InexactCut):
    cut()


@pytest.mark.parametrize('path', ['', 'z', 'y'])
def test_zeros_hide_nothing_where_noise_makes_all_of_rounding(path, monkeypatch):
  """The probe keeps `w`, which is not cut, as it is: any noise there is chaos."""

  def net(v, x):
    h = x @ v['a']
    chaos = h
    for _ in range(6):
      chaos = jnp.sin(30 * chaos @ v['c'])
    return h + 100 * chaos @ v['w'] + x @ v['z'] @ v['y']

  shapes = {'a': (5, 4), 'c': (4, 4), 'z': (5, 48)}
  keys = jax.random.split(jax.random.key(0), 4)
  v = {name: jax.random.normal(k, shapes[name]) for name, k in zip(shapes, keys)}
  v |= {'w': jnp.zeros((4, 4)), 'y': jnp.zeros((48, 4))}
  x = jax.random.normal(keys[3], (32, 5))
  cut = lambda: prune(net, v, {'channels': {'z:1': np.arange(48) % 3 > 0}}, x)
  if not path:
    proof = cut().report['verify']
    assert proof['difference'] <= proof['tolerance'] == SINGLE
    return
  monkeypatch.setattr(plan, 'take', wrong_slices(v[path].shape))
  with pytest.raises(InexactCut):
    cut()
