"""NetCut: every equation against hand-computed values, the toy, costs and refusals."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthprune.methods.netcut import cost_of_exits, netcut
from depthprune.models.heads import every_tap
from depthprune.models.mlp import MLP
from depthprune.program.coupling import couple
from depthprune.train.loop import fit
from depthprune.train.method import CutRefused, optimizer
from depthprune.train.step import init_state, make_step
from depthprune.train.task import classification

X = jax.random.normal(jax.random.key(0), (8, 3))
BATCH = {'image': X, 'label': jnp.arange(8) % 3}
TASK = classification(3)
MODEL = every_tap(MLP(classes=3, hidden=(5, 4, 4)))
VARIABLES = MODEL.init(jax.random.key(1), X)
COUPLING = couple(MODEL, VARIABLES, X[:1])
EXITS = ('exit1', 'exit2', 'exit3')
LOGITS = {e: jax.random.normal(jax.random.key(i), (8, 3)) for i, e in enumerate(EXITS)}
V = jnp.float32([0.3, -0.2, 0.9])
THETA = {'importance': V}


def numbers(log_p=True):
  """w [3] and (log-)probabilities [3, 8, 3] of the heads, in float64."""
  w = np.exp(np.float64(V)) / np.exp(np.float64(V)).sum()
  z = np.stack([np.float64(LOGITS[e]) for e in EXITS])
  p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
  return w, np.log(p) if log_p else p


def objective(method, theta=THETA):
  return method.objective(TASK, LOGITS, BATCH, theta, jnp.int32(0))


def penalty_of(method):
  assert method.penalty is not None
  return method.penalty


def test_the_loss_of_log_is_that_of_the_mixture_and_linear_in_w():
  w, log_p = numbers()
  s = np.einsum('k,kbc->bc', w, log_p)
  expected = -s[np.arange(8), BATCH['label']].mean()
  loss, metrics = objective(netcut(COUPLING, beta=0.5))
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  ce = [TASK.loss(LOGITS[e], BATCH) for e in EXITS]
  np.testing.assert_allclose(loss, w @ np.stack(ce), rtol=1e-5)
  np.testing.assert_allclose(metrics['expected_cost'], w @ [1, 2, 3], rtol=1e-6)
  accuracy = (s.argmax(-1) == BATCH['label']).mean()
  np.testing.assert_allclose(metrics['accuracy'], accuracy)


@pytest.mark.parametrize('gamma', [0.9, 1.0])
def test_gamma_adds_a_share_of_the_normaliser(gamma):
  w, log_p = numbers()
  s = np.einsum('k,kbc->bc', w, log_p)
  s = s - gamma * np.log(np.exp(s).sum(-1, keepdims=True))
  expected = -s[np.arange(8), BATCH['label']].mean()
  loss, _ = objective(netcut(COUPLING, gamma=gamma))
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  if gamma == 1:
    np.testing.assert_allclose(
      objective(netcut(COUPLING, aggregate='geometric'))[0], expected, rtol=1e-5
    )


def test_linear_mixes_probabilities():
  w, p = numbers(log_p=False)
  mixed = np.einsum('k,kbc->bc', w, p)
  method = netcut(COUPLING, aggregate='linear')
  loss, _ = objective(method)
  expected = -np.log(mixed[np.arange(8), BATCH['label']]).mean()
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  answer = method.answer(TASK, LOGITS, THETA)
  np.testing.assert_allclose(np.exp(answer), mixed, rtol=1e-5)


def test_the_penalty_is_beta_times_the_expected_cost_and_moves_importance_alone():
  w, _ = numbers()
  method = netcut(COUPLING, beta=0.3, cost=np.array([1.0, 4.0, 6.0]))
  penalty = penalty_of(method)(THETA, jnp.int32(0))
  np.testing.assert_allclose(penalty, 0.3 * (w @ [1, 4, 6]), rtol=1e-6)
  trained = {'params': {'a': jnp.ones(2)}, 'theta': THETA}
  with jax.numpy_dtype_promotion('standard'):  # optax.adam needs it
    tx = optimizer(method, optax.sgd(1.0))
    zero = jax.tree.map(jnp.zeros_like, trained)
    updates, _ = tx.update(zero, tx.init(trained), trained)
  np.testing.assert_array_equal(updates['params']['a'], 0)
  assert (np.sign(updates['theta']['importance']) == [1, 1, -1]).all()


def toy(method, steps=3000):
  """max w after training v alone, with six fixed heads of given cross-entropy."""
  theta = method.init({}, {})
  tx = optax.adam(0.01)

  @jax.jit
  def step(theta, state):
    loss = lambda theta: (
      method.objective(TASK6, HEADS, LABELS, theta, jnp.int32(0))[0]
      + penalty_of(method)(theta, jnp.int32(0))
    )
    updates, state = tx.update(jax.grad(loss)(theta), state)
    return optax.apply_updates(theta, updates), state

  with jax.numpy_dtype_promotion('standard'):
    state = tx.init(theta)
    for _ in range(steps):
      theta, state = step(theta, state)
  return np.asarray(jax.nn.softmax(theta['importance']))


CE = (2.41, 1.71, 1.07, 0.752, 0.749, 0.807)
TASK6 = classification(10)
LABELS = {'image': jnp.zeros((400, 1)), 'label': jnp.arange(400) % 10}


def head(key: int, target: float) -> jax.Array:
  """Random logits [400, 10] that prefer the label enough for this cross-entropy."""
  noise = 1.5 * jax.random.normal(jax.random.key(key), (400, 10))
  label = jax.nn.one_hot(LABELS['label'], 10)
  low, high = -20.0, 20.0
  for _ in range(60):
    middle = (low + high) / 2
    found = float(TASK6.loss(noise + middle * label, LABELS))
    low, high = (middle, high) if found > target else (low, middle)
  return noise + low * label


HEADS = {f'exit{i}': head(i, ce) for i, ce in enumerate(CE, 1)}
SIX = every_tap(MLP(classes=10, hidden=(3,) * 6))
SIX_COUPLING = couple(SIX, SIX.init(jax.random.key(0), X[:1]), X[:1])


def test_only_log_settles_on_one_head_however_small_its_lead():
  w = toy(netcut(SIX_COUPLING, beta=0.0))
  assert w.argmax() == 4 and w.max() >= 0.95
  w = toy(netcut(SIX_COUPLING, beta=0.0, aggregate='linear'), steps=1500)
  assert w.max() <= 0.45


@settings(deadline=None, max_examples=8)
@given(st.floats(0, 0.6), st.floats(0, 0.6))
def test_a_higher_price_never_keeps_more(a, b):
  depths = []
  for beta in sorted((a, b)):
    method = netcut(SIX_COUPLING, beta=beta)
    vertices = [loss_of_head(method, k) for k in range(6)]
    expected = np.array(CE) + beta * np.arange(1, 7)
    np.testing.assert_allclose(vertices, expected, atol=2e-3)
    depths.append(int(np.argmin(vertices)))
  assert depths[1] <= depths[0]


def loss_of_head(method, k: int) -> float:
  """The whole loss with all importance on one of six heads."""
  theta = {'importance': 100.0 * jax.nn.one_hot(k, 6)}
  loss, _ = method.objective(TASK6, HEADS, LABELS, theta, jnp.int32(0))
  return float(loss + penalty_of(method)(theta, jnp.int32(0)))


def test_costs_are_scaled_to_the_number_of_exits():
  np.testing.assert_array_equal(cost_of_exits(COUPLING, 'index'), [1, 2, 3])
  flops = np.array([3 * 5 + 5 * 3, 3 * 5 + 5 * 4 + 4 * 3, 3 * 5 + 5 * 4 + 16 + 4 * 3])
  np.testing.assert_allclose(cost_of_exits(COUPLING, 'flops'), 3 * flops / flops[-1])
  params = np.array([20 + 18, 20 + 24 + 15, 20 + 24 + 20 + 15])
  np.testing.assert_allclose(cost_of_exits(COUPLING, 'params'), 3 * params / params[-1])


def test_milliseconds_are_measured():
  wide = every_tap(MLP(classes=3, hidden=(512,) * 6))
  coupling = couple(wide, jax.eval_shape(wide.init, jax.random.key(0), X), X[:1])
  c = cost_of_exits(coupling, 'milliseconds')
  assert c.shape == (6,) and c[-1] == 6 and 0 < c[0] < c[-1] and c[1] < 4


class Judged:
  """Accuracy before and after any cut, as a Judge would find it."""

  def __init__(self, before, after):
    self.before, self.after = before, after

  def __call__(self, keep):
    return {'accuracy': self.after if keep else self.before}


def test_the_head_of_largest_importance_is_kept():
  theta = {'importance': np.array([0, 2.0, 1])}
  keep = netcut(COUPLING).decide(theta, {}, Judged(1, 1))
  assert keep == {'exits': {'exit1': False, 'exit2': True, 'exit3': False}}


def test_a_cut_that_costs_too_much_is_refused_unless_forced():
  theta = {'importance': np.zeros(3)}
  for method in (netcut(COUPLING, tolerance=2.0), netcut(COUPLING, force=True)):
    assert method.decide(theta, {}, Judged(0.9, 0.885))['exits']['exit1']
  at_most = netcut(COUPLING, tolerance=25.0)
  assert at_most.decide(theta, {}, Judged(0.75, 0.5))['exits']['exit1']
  with pytest.raises(
    CutRefused, match=r'exit1.*0\.33.*90\.00 to 88\.50 %, by more than 0\.5'
  ):
    netcut(COUPLING).decide(theta, {}, Judged(0.9, 0.885))


def test_the_report_gives_importance_its_maximum_and_entropy():
  w, _ = numbers()
  said = netcut(COUPLING).report(THETA)
  np.testing.assert_allclose(list(said['importance'].values()), w, rtol=1e-5)
  np.testing.assert_allclose(said['max_importance'], w.max(), rtol=1e-5)
  entropy = -(w * np.log(w)).sum() / np.log(3)
  np.testing.assert_allclose(said['entropy'], entropy, rtol=1e-5)
  assert float(netcut(COUPLING).report({'importance': jnp.zeros(3)})['entropy']) == (
    pytest.approx(1)
  )


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    ({'beta': -0.1}, 'beta must be finite and not negative, got -0.1'),
    ({'beta': float('nan')}, 'beta must be finite'),
    ({'gamma': float('inf')}, 'gamma must be finite'),
    ({'aggregate': 'Log'}, "aggregate='Log': expected one of log, linear"),
    ({'cost': 'flop'}, "cost='flop': expected one of index, flops"),
    ({'gamma': 1.0, 'aggregate': 'linear'}, "gamma is for aggregate='log'"),
    ({'cost': np.ones(2)}, r'cost has shape \(2,\), expected \(3,\)'),
    ({'cost': np.array([1, -1, 2])}, 'cost must be finite and not negative'),
  ],
)
def test_wrong_values_are_refused(wrong, message):
  with pytest.raises(ValueError, match=message):
    netcut(COUPLING, **wrong)


def test_a_network_without_exits_is_refused_with_advice():
  plain = nn.Dense(3)
  coupling = couple(plain, plain.init(jax.random.key(0), X), X)
  with pytest.raises(ValueError, match='two or more exits, got 0; .*every_tap'):
    netcut(coupling)


def test_training_finds_the_depth_that_is_worth_its_price():
  """Linearly separable data need one layer, and a high price says so."""
  method = netcut(COUPLING, beta=0.5, importance_lr=0.05)
  labels = (X @ jax.random.normal(jax.random.key(5), (3, 3))).argmax(-1)
  batch = {'image': X, 'label': labels.astype(jnp.int32)}
  with jax.numpy_dtype_promotion('standard'):
    state = init_state(MODEL, method, optax.adam(0.01), VARIABLES, batch=batch)
    step = make_step(MODEL, method, TASK, optax.adam(0.01))
    state = fit(
      step, state, jax.random.key(0), lambda _, i: batch, steps=200, show=False
    )
  w = np.asarray(jax.nn.softmax(state.theta['importance']))
  assert w.argmax() == 0 and w.max() > 0.9
