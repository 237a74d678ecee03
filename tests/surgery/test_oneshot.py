"""One-shot decisions: scores by hand, targets met, wrong arguments refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune import models
from depthprune.models.decoder import Decoder
from depthprune.program import cost
from depthprune.program.coupling import couple
from depthprune.program.gating import plug
from depthprune.program.rounding import Suited, possible
from depthprune.program.trace import paths_of
from depthprune.surgery.oneshot import oneshot, rank
from depthprune.surgery.prune import prune
from depthprune.surgery.settle import settle
from depthprune.timing import layers
from tests import zoo

X = jnp.asarray([[1.0, 2.0, -1.0]])
# Column sums of |A|: 1, 2, 3, 6. Of |B|: 1, 4, 7.
A = [[1.0, 0.6, 1.0, 2.0], [0.0, -0.7, 1.0, 2.0], [0.0, 0.7, -1.0, 2.0]]
B = [[1.0, 1.0, 1.0], [0.0, -1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]
C = [[-3.0, -1.0], [1.0, 1.0], [5.0, 2.0]]
ARRAYS = {name: jnp.asarray(x) for name, x in (('a', A), ('b', B), ('c', C))}


def net(p, x):
  return jax.nn.relu(jax.nn.relu(x @ p['a']) @ p['b']) @ p['c']


COUPLING = couple(net, ARRAYS, X)


def priced(na, nb):
  """FLOPs of the network with na and nb hidden units left. 2 per multiply-add."""
  return 2 * (3 * na + na * nb + nb * 2)


def widths(keep):
  return {g: int(k.sum()) for g, k in keep['channels'].items()}


def masks(*kept):
  return [np.asarray(k, bool).tolist() for k in kept]


def decided(*args, **kwargs):
  keep = oneshot(COUPLING, ARRAYS, *args, **kwargs)['channels']
  return masks(keep['a:1'], keep['b:1'])


def test_norms_are_those_of_the_kernel_that_writes():
  """Not of the one that reads: the rows of C would rank the units of B 0, 2, 1."""
  ones = rank(COUPLING, ARRAYS, 'l1')
  np.testing.assert_allclose(ones['a:1'], [1, 2, 3, 6], rtol=1e-6)
  np.testing.assert_allclose(ones['b:1'], [1, 4, 7], rtol=1e-6)
  twos = rank(COUPLING, ARRAYS, 'l2')
  np.testing.assert_allclose(twos['a:1'], np.sqrt([1, 1.34, 3, 12]), rtol=1e-6)
  np.testing.assert_allclose(twos['b:1'], np.sqrt([1, 4, 13]), rtol=1e-6)


def test_one_group_may_have_many_writers():
  """All that is added to a residual stream counts, reading sides do not."""
  arrays = {
    'in': jnp.asarray([[1.0, 2.0], [0.0, -2.0]]),
    'square': jnp.asarray([[10.0, 0.5], [0.0, 0.25]]),
    'out': jnp.asarray([[100.0], [0.0]]),
  }

  def residual(p, x):
    h = x @ p['in']
    return (h + jnp.tanh(h @ p['square'])) @ p['out']

  coupling = couple(residual, arrays, X[:, :2])
  np.testing.assert_allclose(rank(coupling, arrays, 'l1')['in:1'], [11, 4.75])


def test_global_closes_the_lowest_relative_to_their_group():
  """Over the mean: A 1/3, 2/3, 1, 2 and B 1/4, 1, 7/4. Order: b0, a0, a1, a2, b1."""
  everything = masks([1] * 4, [1] * 3)
  assert priced(4, 3) == cost.flops(COUPLING) == 60
  for n, kept in (
    (60, everything),
    (priced(4, 2), masks([1, 1, 1, 1], [0, 1, 1])),
    (priced(3, 2), masks([0, 1, 1, 1], [0, 1, 1])),
    (priced(2, 2), masks([0, 0, 1, 1], [0, 1, 1])),
    (priced(1, 2), masks([0, 0, 0, 1], [0, 1, 1])),
    (priced(1, 1), masks([0, 0, 0, 1], [0, 0, 1])),
  ):
    assert decided(n) == kept
    assert decided(n + 1.9 if n < 60 else n) == kept  # the nearest, not the one below


def test_l2_closes_in_another_order():
  """Over the mean: A .54, .63, .94, 1.88 and B .45, .91, 1.64: b1 goes before a2."""
  assert decided(priced(2, 1), score='l2') == masks([0, 0, 1, 1], [0, 0, 1])
  assert decided(priced(2, 1)) == masks([0, 0, 0, 1], [0, 1, 1])


def test_a_target_is_a_fraction_a_percentage_or_a_number():
  assert priced(2, 2) == 28
  for target in (28 / 60, '46.7%', ' 46 % ', 28, 28.0, '28'):
    assert decided(target) == masks([0, 0, 1, 1], [0, 1, 1])
  assert decided(1) == decided(1.0) == decided('100%') == masks([1] * 4, [1] * 3)


def test_parameters_as_target():
  """12 + 12 + 6 of them; half is 15, and 2·3 + 2·2 + 2·2 = 14 is the nearest."""
  keep = oneshot(COUPLING, ARRAYS, 0.5, of='params')
  assert cost.params(COUPLING) == 30 and cost.params(COUPLING, keep) == 14
  assert widths(keep) == {'a:1': 2, 'b:1': 2}


def test_uniform_closes_the_same_part_of_every_group():
  skewed = {**ARRAYS, 'b': ARRAYS['b'] * jnp.asarray([1e-3, 1e-3, 1.0])}
  keep = oneshot(COUPLING, skewed, priced(2, 2), scope='uniform')
  assert widths(keep) == {'a:1': 2, 'b:1': 2}
  assert masks(*keep['channels'].values()) == masks([0, 0, 1, 1], [0, 1, 1])
  keep = oneshot(COUPLING, skewed, priced(4, 1))
  assert widths(keep) == {'a:1': 4, 'b:1': 1}


def test_taylor_is_the_slope_of_the_loss_by_the_gate():
  """L = Σ out. Hidden units are 1, 0, 4, 4 and 1, 9, 17; the rows of C add to -4, 2, 7;
  row by row, B weighs these to 5, 12, 16, 16."""
  gated = plug(net, COUPLING)
  grads = jax.grad(lambda g: gated(ARRAYS, g, X).sum())(COUPLING.gates())
  scores = rank(COUPLING, ARRAYS, 'taylor', grads)
  np.testing.assert_allclose(scores['b:1'], [4, 18, 119], rtol=1e-5)
  np.testing.assert_allclose(scores['a:1'], [5, 0, 64, 64], rtol=1e-5)
  closed = masks([1, 0, 1, 1], [1, 1, 1])  # where L1 closes b0, at the same cost
  assert decided(priced(3, 3), score='taylor', grads=grads) == closed
  assert decided(priced(3, 3)) == masks([1, 1, 1, 1], [0, 1, 1])


def test_random_depends_on_the_key_alone():
  draw = lambda seed: decided(0.5, score='random', key=jax.random.key(seed))
  assert draw(1) == draw(1)
  assert len({str(draw(seed)) for seed in range(6)}) > 2


@pytest.fixture(scope='module')
def resnet20():
  model, x = models.build('resnet20'), jax.ShapeDtypeStruct((1, 16, 16, 3), 'f4')
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  variables = zoo.randomised(shapes)
  return couple(model, variables, x), variables


@pytest.mark.parametrize('of', ['flops', 'params'])
@pytest.mark.parametrize('scope', ['global', 'uniform'])
def test_targets_are_met_on_a_resnet20(resnet20, scope, of):
  coupling, variables = resnet20
  count = {'flops': cost.flops, 'params': cost.params}[of]
  total = count(coupling)
  for target in (0.75, 0.5, 0.25):
    keep = oneshot(coupling, variables, target, scope=scope, of=of)
    assert abs(count(coupling, keep) / total - target) <= 0.01
    assert all(k.dtype == bool and k.any() for k in keep['channels'].values())
    if scope == 'uniform':  # one fraction is within a slice of all of them
      parts = [(k.sum(), k.size) for k in keep['channels'].values()]
      assert max((n - 1) / s for n, s in parts) <= min((n + 1) / s for n, s in parts)


@pytest.mark.parametrize('scope', ['global', 'uniform'])
def test_rounded_widths_are_what_the_target_counts(resnet20, scope):
  """Rounded afterwards, the same target would be missed by more."""
  coupling, variables = resnet20
  total = cost.flops(coupling)
  keep = oneshot(coupling, variables, 0.5, scope=scope, round_to=4)
  settled = settle(coupling, keep, variables, round_to=4)
  assert settled.notes == ()
  assert all(n % 4 == 0 for n in widths(keep).values())
  reached = abs(cost.flops(coupling, settled.keep) / total - 0.5)
  plain = oneshot(coupling, variables, 0.5, scope=scope)
  late = settle(coupling, plain, variables, round_to=4).keep
  assert reached <= 0.03 < abs(cost.flops(coupling, late) / total - 0.5)


@pytest.mark.parametrize('of', ['flops', 'params'])
@pytest.mark.parametrize('scope', ['global', 'uniform'])
def test_auto_meets_targets_with_widths_that_suit_the_device(resnet20, scope, of):
  """Within a hundredth, and below one multiple only if the target is."""
  coupling, variables = resnet20
  count = {'flops': cost.flops, 'params': cost.params}[of]
  one = {g: np.arange(len(x)) < 8 for g, x in coupling.gates()['channels'].items()}
  least = count(coupling, {'channels': one}) / count(coupling)
  assert 0.1 < least < 0.25
  for target in (0.75, 0.5, 0.25, 0.1):
    keep = oneshot(coupling, variables, target, scope=scope, of=of, round_to='auto')
    assert abs(count(coupling, keep) / count(coupling) - target) <= 0.01
    for kept in keep['channels'].values():
      assert kept.sum() in possible(kept.size, 'auto')
    narrow = any(kept.sum() < 8 for kept in keep['channels'].values())
    assert narrow == (target < least)
    assert settle(coupling, keep, variables, round_to='auto').notes == ()


def test_auto_is_what_it_stands_for_on_this_device(resnet20):
  coupling, variables = resnet20
  auto, same, plain = (
    {g: kept.tolist() for g, kept in keep['channels'].items()}
    for by in ('auto', Suited(8), 1)
    for keep in [oneshot(coupling, variables, 0.4, round_to=by)]
  )
  assert auto == same != plain


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'target': 0}, r'target: expected a fraction in \(0, 1\]'),
    ({'target': -0.5}, r'target: expected a fraction in \(0, 1\]'),
    ({'target': '120%'}, "target: expected .*got '120%'"),
    ({'target': 61}, 'target: expected .* a number up to 60, got the number 61'),
    ({'target': float('nan')}, 'target: expected .*number nan'),
    ({'target': 0.1}, r'target 0.1 is 6 flops.* the floor is 12 \(0.200 of 60\)'),
    ({'target': '10%', 'of': 'params'}, r'is 3 params.* the floor is 6 \(0.200 of 30'),
    ({'score': 'l3'}, 'score: expected one of l1, l2, random, taylor'),
    ({'scope': 'local'}, 'scope: expected one of global, uniform'),
    ({'of': 'latency'}, 'of: expected one of flops, params, bytes, milliseconds'),
    ({'score': 'random'}, "score='random' needs key"),
    ({'score': 'taylor'}, "which score='taylor' needs"),
  ],
)
def test_wrong_arguments_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    oneshot(COUPLING, ARRAYS, **{'target': 0.5, **arguments})


def graded(**channels):
  return {'channels': {name[0] + ':1': np.asarray(g) for name, g in channels.items()}}


@pytest.mark.parametrize(
  ('grads', 'message'),
  [
    (graded(a=[1, 2, np.nan, 4], b=[1, 2, 3]), 'a:1: .* 1 of its 4 slices are not fin'),
    (graded(a=[1, 2, 3, 4], b=[-np.inf] * 3), 'b:1: the taylor scores of 3 of its 3'),
    (
      graded(a=[1, 2, 3], b=[1, 2, 3]),
      r'a:1: grads has shape \(3,\), its slices are 4',
    ),
    (graded(a=[1, 2, 3, 4], b=np.ones((3, 1))), r'b:1: grads has shape \(3, 1\)'),
    (graded(a=[1, 2, 3, 4]), r"b:1: grads\['channels'\] has no such entry; grads is"),
    ({'a:1': np.ones(4), 'b:1': np.ones(3)}, r"a:1: grads\['channels'\] has no such"),
  ],
)
@pytest.mark.parametrize('scope', ['global', 'uniform'])
def test_scores_that_do_not_fit_or_are_not_finite_are_refused(grads, message, scope):
  with pytest.raises(ValueError, match=message):
    oneshot(COUPLING, ARRAYS, 0.5, score='taylor', grads=grads, scope=scope)


@pytest.mark.parametrize('score', ['l1', 'l2'])
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(score, bad):
  arrays = {**ARRAYS, 'b': ARRAYS['b'].at[0, 1].set(bad)}
  with pytest.raises(ValueError, match=rf'b:1: the {score} scores of 1 of its 3 .*\(b'):
    oneshot(COUPLING, arrays, 0.5, score=score)


def test_complex_weights_count_by_their_modulus():
  phase = np.exp(1j * np.arange(12.0).reshape(3, 4))
  kernel = jnp.asarray(np.asarray(A) * phase, jnp.complex64)
  arrays = {'a': kernel, 'c': jnp.ones((4, 1), jnp.complex64)}
  coupling = couple(lambda p, x: (x @ p['a']) @ p['c'], arrays, X.astype(jnp.complex64))
  for score in ('l1', 'l2'):
    expected = rank(COUPLING, ARRAYS, score)['a:1']
    found = rank(coupling, arrays, score)['a:1']
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.dtype == np.float64


def test_a_target_in_milliseconds_counts_what_was_measured(monkeypatch):
  """Where only the units of A take time, half of it is half of them."""
  took = lambda session: np.array([1.0 + n.get('a:1', 0) for _, n in session.rows])
  monkeypatch.setattr(layers.Session, 'measure', lambda session, seconds: took(session))
  for of in ('milliseconds', layers.milliseconds(COUPLING, batch=4)):
    keep = oneshot(COUPLING, ARRAYS, 0.6, of=of)
    assert widths(keep)['a:1'] == 2
  with pytest.raises(ValueError, match=r'is 1.5 milliseconds.* the floor is 2 '):
    oneshot(COUPLING, ARRAYS, 0.3, of='milliseconds')


def test_a_network_without_hidden_channels_has_nothing_to_close():
  coupling = couple(lambda p, x: x @ p, jnp.ones((3, 2)), X)
  with pytest.raises(
    ValueError,
    match=r'no group of this network can be gated.*explain\(\).*fixed=lambda',
  ):
    oneshot(coupling, jnp.ones((3, 2)), 0.5)


# ---- what may be cut -----------------------------------------------------------------


def test_excluded_groups_are_whole_and_the_target_counts_them():
  keep = oneshot(COUPLING, ARRAYS, priced(4, 1), exclude=['a:1'])
  assert masks(*keep['channels'].values()) == masks([1] * 4, [0, 0, 1])
  assert cost.flops(COUPLING, keep) == priced(4, 1)
  small = prune(net, ARRAYS, keep, X)
  assert small.report['widths'] == {'a:1': [4, 4], 'b:1': [3, 1]}


@pytest.mark.parametrize(
  ('pattern', 'scope'),
  [('stage2/*', 'global'), ('stage1/block0', 'uniform'), ('head', 'global')],
)
def test_excluded_modules_keep_their_shapes(resnet20, pattern, scope):
  coupling, variables = resnet20
  keep = oneshot(coupling, variables, 0.7, scope=scope, exclude=pattern)
  assert abs(cost.flops(coupling, keep) / cost.flops(coupling) - 0.7) <= 0.02
  small = prune(coupling.model, variables, keep, coupling.inputs)
  below = f'params/{pattern.removesuffix("*").removesuffix("/")}/'
  before, after = paths_of(variables), paths_of(small.variables)
  kept = [path for path in before if path.startswith(below)]
  assert kept and all(after[path].shape == before[path].shape for path in kept)
  assert any(after[path].shape != x.shape for path, x in before.items())


@pytest.mark.parametrize('scope', ['global', 'uniform'])
@pytest.mark.parametrize('round_to', [1, 4])
def test_floors_and_ceilings_hold_at_every_target(resnet20, scope, round_to):
  coupling, variables = resnet20
  limits = {'at_least': {'stage3': '50%'}, 'at_most': {'stage1/*/conv1': 8}}
  total, seen = cost.flops(coupling), set()
  for target in (0.7, 0.5, 0.3):
    arguments = {'scope': scope, 'round_to': round_to, **limits}
    keep = oneshot(coupling, variables, target, **arguments)
    assert abs(cost.flops(coupling, keep) / total - target) <= 0.02 * round_to
    for group, n in widths(keep).items():
      assert n >= 32 or 'stage3' not in group
      assert n <= 8 or 'stage1' not in group
      assert n % round_to == 0
      seen.add(n)
  assert {8, 32} <= seen


def test_floors_hold_the_best_slices():
  """Without the floor, b0 and b1 go first (1/4 and 1 of the mean), then a0 to a2."""
  assert decided(priced(2, 2), at_least={'b': 3}) == masks([0, 0, 0, 1], [1, 1, 1])
  assert decided(priced(4, 1), at_most={'b': 1}) == masks([1] * 4, [0, 0, 1])


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'target': 0.3, 'at_least': 2}, r'is 18 flops; with what exclude .* 28 \(0.467 o'),
    ({'target': 0.3, 'exclude': '*'}, r'with what exclude .* the floor is 60 \(1.000'),
    ({'target': 0.9, 'at_most': 2}, r'with what at_most leaves the ceiling is 28 \(0.'),
    ({'target': 0.5, 'exclude': ['aa']}, "whole: 'aa' matches no group.*nearest: a"),
    ({'target': 0.5, 'at_least': {'c': 1}}, "'c' matches arrays that only read.*: b:1"),
    ({'target': {'x': 0.5}}, "target: 'x' matches no group"),
    ({'target': {'a': 0}}, 'target: expected a number of channels'),
    ({'target': 0.5, 'at_least': 3, 'at_most': 2}, 'a:1: no width is possible'),
  ],
)
def test_what_cannot_be_is_said(arguments, message):
  with pytest.raises(ValueError, match=message):
    oneshot(COUPLING, ARRAYS, **arguments)


def test_a_ratio_for_each_group():
  """The rest is whole; a part goes to the nearest width, floors and ceilings hold."""
  keep = oneshot(COUPLING, ARRAYS, {'a': 0.5})
  assert masks(*keep['channels'].values()) == masks([0, 0, 1, 1], [1] * 3)
  assert decided({'*': '50%'}) == masks([0, 0, 1, 1], [0, 1, 1])
  assert decided({'*': '50%', 'b:1': 1}) == masks([0, 0, 1, 1], [0, 0, 1])
  assert decided({'*': 1}, at_least={'a': 3}) == masks([0, 1, 1, 1], [0, 0, 1])


# ---- scores of one's own -------------------------------------------------------------

OWN = {'a:1': [4, 3, 2, 1], 'b:1': jnp.asarray([3, 2, 1])}


def test_a_score_of_ones_own_is_arrays_or_a_function():
  reversed_ = masks([1, 1, 0, 0], [1, 1, 0])
  assert decided(priced(2, 2), score=OWN) == reversed_
  assert decided(priced(2, 2), score=lambda coupling, variables: OWN) == reversed_

  def of_the_readers(coupling, arrays):
    readers = {'a:1': arrays['b'], 'b:1': arrays['c']}
    return {g: jnp.abs(w).sum(1) for g, w in readers.items()}

  found = rank(COUPLING, ARRAYS, of_the_readers)
  np.testing.assert_allclose(found['b:1'], [4, 2, 7])
  assert found['b:1'].dtype == np.float64


def test_negative_scores_keep_their_order():
  shifted = {g: np.asarray(s) - 10.0 for g, s in OWN.items()}
  assert decided(priced(2, 2), score=shifted, scope='uniform') == masks(
    [1, 1, 0, 0], [1, 1, 0]
  )
  keep = oneshot(COUPLING, ARRAYS, priced(2, 1), score=shifted)['channels']
  for kept in keep.values():
    assert np.all(np.diff(kept.astype(int)) <= 0)  # the first stay


def test_a_score_may_leave_out_what_is_excluded():
  keep = oneshot(
    COUPLING, ARRAYS, priced(4, 2), score={'b:1': [3, 2, 1]}, exclude='a:1'
  )
  assert masks(*keep['channels'].values()) == masks([1] * 4, [1, 1, 0])


@pytest.mark.parametrize(
  ('score', 'error', 'message'),
  [
    ({'a:1': [1, 2, 3, 4]}, ValueError, r'b:1: score has no such entry; score is {gro'),
    (
      {**OWN, 'b:1': [1, 2]},
      ValueError,
      r'b:1: score has shape \(2,\), its slices are',
    ),
    (
      {**OWN, 'b:1': [1, 2, np.nan]},
      ValueError,
      'b:1: the scores of 1 of its 3 slices',
    ),
    ({**OWN, 'd:1': [1]}, KeyError, 'd:1: no such group; nearest: '),
    (lambda coupling, variables: [1, 2], ValueError, r'score: expected {group: \[sli'),
  ],
)
def test_scores_of_ones_own_that_do_not_fit_are_refused(score, error, message):
  with pytest.raises(error, match=message):
    oneshot(COUPLING, ARRAYS, 0.5, score=score)


def test_a_cost_of_ones_own_is_called_by_its_name():
  """The larger of two costs, each as a part of what it may be: the tighter decides."""
  coupling = COUPLING

  def of_both(coupling, gates=None):
    parts = {cost.flops: 0.7, cost.params: 0.6}
    return max(of(coupling, gates) / of(coupling, None) / p for of, p in parts.items())

  keep = oneshot(coupling, ARRAYS, 0.6, of=of_both)
  shares = [of(coupling, keep) / of(coupling) for of in (cost.flops, cost.params)]
  assert shares[0] < 0.7 and abs(shares[1] - 0.6) < 0.05  # one weight is 0.03
  with pytest.raises(ValueError, match='of_both'):
    oneshot(coupling, ARRAYS, 0.0001, of=of_both)


def test_bytes_are_a_cost():
  coupling = COUPLING
  keep = oneshot(coupling, ARRAYS, '50%', of='bytes')
  assert cost.stored_bytes(coupling, keep) <= 0.5 * cost.stored_bytes(coupling)


def test_several_costs_are_all_met_and_one_of_them_barely():
  """30 parameters, 60 FLOPs and units that cost: a unit of A weighs more in 'heavy'."""

  def heavy(coupling, gates=None):
    kept = gates['channels'] if gates else {'a:1': np.ones(4), 'b:1': np.ones(3)}
    return 10 * int(kept['a:1'].sum()) + int(kept['b:1'].sum())

  for target, expected in (
    ({'params': 15, 'flops': 60}, {'a:1': 2, 'b:1': 2}),  # 14; one more unit is 19
    ({'params': 30, 'flops': 38}, {'a:1': 3, 'b:1': 2}),
    ({'flops': 45, heavy: 22}, {'a:1': 2, 'b:1': 2}),
    ({'flops': 27, heavy: 43}, {'a:1': 1, 'b:1': 2}),
    ({'params': '100%', 'flops': 1.0}, {'a:1': 4, 'b:1': 3}),
    ({'flops': 27}, {'a:1': 1, 'b:1': 2}),  # alone, 28 is nearer
  ):
    assert widths(oneshot(COUPLING, ARRAYS, target)) == expected
  assert widths(oneshot(COUPLING, ARRAYS, 27)) == {'a:1': 2, 'b:1': 2}


@pytest.mark.parametrize(
  ('target', 'message'),
  [
    (
      {'params': '90%', 'flops': '10%'},
      r'target flops=10% is 6 flops; .* the floor is 12 \(0.200 of 60\)',
    ),
    ({'params': 5, 'flops': 60}, 'target params=5 is 5 params; .* the floor is 6 '),
    ({'params': 2.0, 'flops': 61}, r"target\['flops'\]: expected .* up to 60"),
    ({'params': 0.5, 'a': 2}, 'of: expected one of flops, params, bytes, mill.*'),
  ],
)
def test_the_cost_that_cannot_be_met_is_named(target, message):
  with pytest.raises(ValueError, match=message):
    oneshot(COUPLING, ARRAYS, target)


@pytest.mark.parametrize('scan', [False, True])
def test_closed_branches_are_counted_with_all_that_goes(scan):
  """The target is that of the small network, in a stack with a layer less too."""
  model = Decoder(
    vocab=20, positions=8, width=8, depth=3, heads=4, groups=2, size=4, inner=12,
    scan=scan,
  )  # fmt: skip
  tokens = zoo.tokens(4)[:, :8]
  variables = zoo.randomised(jax.eval_shape(model.init, jax.random.key(0), tokens))
  coupling = couple(model, variables, tokens)
  layer, gone = ('layers0', [True, False, True]) if scan else ('layer1', False)
  branches = {f'{layer}/{part}/branch': np.array(gone) for part in ('attention', 'mlp')}
  keep = oneshot(
    coupling, variables, {'params': '50%'}, branches=branches, exclude='embed'
  )
  assert keep['branches'].keys() == branches.keys()
  small = prune(model, variables, keep, tokens)
  left = sum(x.size for x in jax.tree.leaves(small.variables['params']))
  whole = cost.params(coupling)
  assert cost.params(coupling, keep) == left
  assert 0.45 * whole < left <= 0.5 * whole
  if not scan:
    assert all(keep['channels'][g].all() for g in keep['channels'] if layer in g)
  with pytest.raises(ValueError, match='what at_most and branches leave the ceiling'):
    oneshot(coupling, variables, '99%', of='params', branches=branches)
  with pytest.raises(KeyError, match='no branch'):
    oneshot(coupling, variables, '99%', branches={'layer9/mlp/branch': np.array(False)})
  with pytest.raises(ValueError, match='milliseconds know the widths of layers alone'):
    measured = layers.Milliseconds(1, (), (), (np.zeros(2), np.zeros(2)), 1.0)
    oneshot(coupling, variables, 0.5, of=measured, branches=branches)
