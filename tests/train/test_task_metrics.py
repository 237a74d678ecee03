"""Tasks beyond top-1: values by hand and by scikit-learn, padding, and what decides."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sklearn.metrics

from depthprune.methods.implosion import erasure
from depthprune.methods.netcut import netcut
from depthprune.train.evaluate import add_up
from depthprune.train.method import CutRefused
from depthprune.train.task import classification, combine, multilabel, regression

RNG = np.random.default_rng(0)


def scores_of(task, logits, label, size=7):
  """Over padded batches of `size`."""
  n, sums = len(label), []
  for start in range(0, n, size):
    rows = np.arange(start, start + size)
    batch = {
      'label': jnp.asarray(label[rows.clip(max=n - 1)]),
      'weight': jnp.asarray(rows < n, jnp.float32),
    }
    sums.append(task.sums(jnp.asarray(logits[rows.clip(max=n - 1)]), batch))
  return {k: float(v) for k, v in task.scores(add_up(sums)).items()}


# ---- classes -------------------------------------------------------------------------

LABEL = RNG.choice(3, 50, p=[0.8, 0.15, 0.05]).astype(np.int32)
LOGITS = (
  RNG.normal(size=(50, 3)).astype(np.float32) + np.eye(3, dtype=np.float32)[LABEL]
)


def test_every_token_counts_that_has_a_label():
  """As a classification of the labelled tokens alone, whatever the rank."""
  label = np.concatenate([LABEL[:20], [-1, -1, -100, -1]]).reshape(4, 2, 3)
  logits = np.concatenate([LOGITS[:20], LOGITS[20:24]]).reshape(4, 2, 3, 3)
  task, keep = classification(3, metric='f1'), label >= 0
  tokens = {'label': jnp.asarray(label)}
  flat = {'label': jnp.asarray(label[keep])}
  for part in (task.loss, lambda *x: task.metrics(*x)['accuracy']):
    want = part(jnp.asarray(logits[keep]), flat)
    np.testing.assert_allclose(part(jnp.asarray(logits), tokens), want, rtol=1e-6)
  assert scores_of(task, logits, label, size=3) == pytest.approx(
    scores_of(task, logits[keep], label[keep]), rel=1e-5
  )


@pytest.mark.parametrize(
  ('metric', 'expected'),
  [
    ('balanced_accuracy', sklearn.metrics.balanced_accuracy_score),
    ('f1', lambda y, x: sklearn.metrics.f1_score(y, x, average='macro')),
    (sklearn.metrics.cohen_kappa_score, sklearn.metrics.cohen_kappa_score),
  ],
)
def test_a_metric_of_ones_own_is_a_score_and_decides(metric, expected):
  task, plain = classification(3, metric=metric), classification(3)
  scores = scores_of(task, LOGITS, LABEL)
  assert scores[task.decides_by] == pytest.approx(expected(LABEL, LOGITS.argmax(1)))
  assert {k: scores[k] for k in ('loss', 'accuracy')} == scores_of(plain, LOGITS, LABEL)
  assert plain.decides_by == 'accuracy'


def test_class_weights_multiply_the_loss_of_an_example():
  weights = np.array([0.5, 1.0, 4.0])
  task = classification(3, class_weights=weights)
  each = optax.softmax_cross_entropy_with_integer_labels(LOGITS, LABEL)
  expected = float((np.asarray(each) * weights[LABEL]).mean())
  assert task.loss(LOGITS, {'label': LABEL}) == pytest.approx(expected, rel=1e-5)
  assert scores_of(task, LOGITS, LABEL)['loss'] == pytest.approx(expected, rel=1e-5)
  mixed = {
    'label': LABEL,
    'partner': LABEL[::-1],
    'share': np.full(50, 0.3, np.float32),
  }
  halves = [
    float(task.loss(LOGITS, {'label': of})) for of in (LABEL, LABEL[::-1].copy())
  ]
  expected = 0.3 * halves[0] + 0.7 * halves[1]
  assert task.loss(LOGITS, mixed) == pytest.approx(expected, rel=1e-5)
  for wrong in (weights[:2], -weights):
    with pytest.raises(ValueError, match='class_weights: expected 3 numbers'):
      classification(3, class_weights=wrong)
  with pytest.raises(ValueError, match="metric='auc': expected"):
    classification(3, metric='auc')


# ---- several labels ------------------------------------------------------------------

MANY = (RNG.random((60, 4)) < [0.5, 0.2, 0.1, 0.0]).astype(np.int32)
SURE = (RNG.normal(size=(60, 4)) + 1.5 * MANY - 0.5).astype(np.float32)


def test_several_labels_are_scored_as_by_scikit_learn():
  task = multilabel(4)
  scores = scores_of(task, SURE, MANY)
  answers = SURE > 0
  f1 = lambda **how: sklearn.metrics.f1_score(MANY, answers, zero_division=0, **how)
  assert scores['f1'] == pytest.approx(f1(average='macro'))
  assert scores['micro_f1'] == pytest.approx(f1(average='micro'))
  assert scores['accuracy'] == pytest.approx((answers == MANY).mean())
  assert scores['exact'] == pytest.approx(sklearn.metrics.accuracy_score(MANY, answers))
  each = [
    sklearn.metrics.average_precision_score(MANY[:, i], SURE[:, i]) for i in range(3)
  ]
  assert scores['map'] == pytest.approx(np.mean(each), abs=0.01)
  p = jax.nn.sigmoid(SURE)
  expected = -np.mean(MANY * np.log(p) + (1 - MANY) * np.log(1 - p))
  assert scores['loss'] == pytest.approx(float(expected), rel=1e-4)
  assert task.decides_by == 'f1' and multilabel(4, 'map').decides_by == 'map'


def test_rare_labels_can_weigh_more():
  weights = np.array([1.0, 2.0, 5.0, 1.0])
  p = np.asarray(jax.nn.sigmoid(SURE))
  expected = -np.mean(weights * MANY * np.log(p) + (1 - MANY) * np.log(1 - p))
  task = multilabel(4, weights=weights)
  assert task.loss(SURE, {'label': MANY}) == pytest.approx(float(expected), rel=1e-4)
  with pytest.raises(ValueError, match="metric='auc': expected one of accuracy, exact"):
    multilabel(4, 'auc')


# ---- numbers -------------------------------------------------------------------------

TRUTH = RNG.normal(1000, [1.0, 30.0], (40, 2)).astype(np.float32)
GUESS = (TRUTH + RNG.normal(0, [0.5, 60.0], (40, 2))).astype(np.float32)


def test_numbers_are_scored_as_by_scikit_learn():
  offset, scale = TRUTH.mean(0), TRUTH.std(0)
  task = regression(2, offset=offset, scale=scale)
  scores = scores_of(task, (GUESS - offset) / scale, TRUTH)
  sk = sklearn.metrics
  assert scores['mse'] == pytest.approx(sk.mean_squared_error(TRUTH, GUESS), rel=1e-3)
  assert scores['mae'] == pytest.approx(sk.mean_absolute_error(TRUTH, GUESS), rel=1e-3)
  assert scores['r2'] == pytest.approx(sk.r2_score(TRUTH, GUESS), rel=1e-3)
  error = (GUESS - TRUTH) / scale
  assert scores['loss'] == pytest.approx((error**2).mean(), rel=1e-3)
  assert task.decides_by == 'r2' and 'accuracy' not in scores


def test_one_number_has_an_axis_or_none():
  y, x = np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 4.0])
  task = regression()
  for label, answer in ((y, x), (y[:, None], x), (y, x[:, None])):
    scores = scores_of(task, answer, label)
    assert scores['mse'] == pytest.approx(1 / 3)
    assert scores['r2'] == pytest.approx(
      1 - 1 / ((4 + 1 + 25) / 9 + 5 / 3 - 1 / 3), abs=0.01
    )
  with pytest.raises(ValueError, match='need logits'):
    task.loss(jnp.zeros((3, 2)), {'label': y})


def test_huber_is_linear_beyond_its_limit():
  batch = {'label': jnp.asarray([0.0, 0.0])}
  assert regression(huber=1.0).loss(jnp.asarray([0.5, 3.0]), batch) == pytest.approx(
    (0.25 + 2 * 3 - 1) / 2
  )
  for wrong in ({'scale': 0.0}, {'huber': -1.0}):
    with pytest.raises(ValueError, match='expected scale and huber above 0'):
      regression(**wrong)


# ---- what decides --------------------------------------------------------------------


def test_tasks_that_decide_differently_are_averaged():
  both = combine({'kind': classification(3), 'size': regression(1)})
  assert (both.decides_by, both.softmax) == ('score', False)
  logits = {'kind': LOGITS, 'size': GUESS[:1].repeat(50, 0)[:, :1]}
  batch = {'label': {'kind': LABEL, 'size': TRUTH[:1].repeat(50, 0)[:, :1]}}
  scores = both.scores(both.sums(logits, batch))
  expected = (scores['accuracy_kind'] + scores['r2_size']) / 2
  assert scores['score'] == pytest.approx(float(expected)) and 'accuracy' not in scores
  same = combine({'a': classification(3), 'b': classification(3)})
  assert (same.decides_by, same.softmax) == ('accuracy', True)


class Judged:
  """Scores that a judge would return."""

  def __init__(self, decides_by, **of):
    self.decides_by, self.of = decides_by, of

  def __call__(self, keep):
    return self.of['cut' if keep else 'whole']

  def each(self, keeps):
    return self.of


def test_netcut_refuses_a_cut_by_what_decides():
  class Coupling:
    groups = axes = view = None
    exits = ('a', 'b')

  method = netcut(Coupling(), tolerance=1.0)  # pyright: ignore[reportArgumentType]
  theta = {'importance': jnp.asarray([1.0, 0.0])}
  scores = {
    'whole': {'accuracy': 0.95, 'balanced_accuracy': 0.9},
    'cut': {'accuracy': 0.95, 'balanced_accuracy': 0.5},
  }
  assert method.decide(theta, {}, Judged('accuracy', **scores))['exits']['a']
  with pytest.raises(CutRefused, match='held-out balanced accuracy falls from 90.00'):
    method.decide(theta, {}, Judged('balanced_accuracy', **scores))
  assert method.decide(theta, {}, lambda keep: {'accuracy': 0.9})['exits']['a']


def test_netcut_mixes_numbers_and_refuses_probabilities_of_them():
  class Coupling:
    groups = axes = view = None
    exits = ('a', 'b')

  outputs = {'a': jnp.asarray([[1.0]]), 'b': jnp.asarray([[3.0]])}
  theta = {'importance': jnp.zeros(2)}
  coupling, task = Coupling(), regression()
  batch = {'label': jnp.asarray([[2.0]])}
  of = lambda **how: netcut(coupling, **how)  # pyright: ignore[reportArgumentType]
  assert of().answer(task, outputs, theta) == 2.0
  loss, metrics = of().objective(task, outputs, batch, theta, 0)
  assert (loss, metrics['mae']) == (1.0, 0.0)
  for how in ({'aggregate': 'linear'}, {'gamma': 0.5}):
    with pytest.raises(ValueError, match='classes that exclude one another'):
      of(**how).objective(task, outputs, batch, theta, 0)


def test_implosion_erases_by_what_decides(monkeypatch):
  from typing import NamedTuple

  class Unit(NamedTuple):
    name: str

  units = [Unit('a'), Unit('b')]
  monkeypatch.setattr(  # not of the lazy name: what is undone there is lost
    'depthprune.program.units.closing', lambda gone, coupling: {'branches': {}}
  )
  scores = {'loss': np.array([1.0, 2.0]), 'f1': np.array([0.1, 0.9])}
  gone = lambda decides_by: erasure(
    None, units, 1, 'drop', {}, Judged(decides_by, **scores)
  )  # pyright: ignore[reportArgumentType]
  assert (gone('accuracy')[0].name, gone('f1')[0].name) == ('a', 'b')
