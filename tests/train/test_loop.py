from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from depthprune.data.dataset import DataError
from depthprune.train.loop import NonFiniteLoss, bar, describe, fit
from depthprune.train.method import Method, plain, supervised
from depthprune.train.step import economical, init_state, make_step
from depthprune.train.task import classification

TASK = classification(3)
KEY = jax.random.key(0)


class Net(nn.Module):
  """A branch with a gate, batch statistics and dropout: all that a step must carry."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.BatchNorm(use_running_average=not train, name='norm')(nn.Dense(8)(x))
    gate = self.variable('branches', 'branch', jnp.ones, ()).value
    x = x + gate * nn.Dropout(0.1, deterministic=not train)(nn.relu(x))
    return {'hidden': x, 'main': nn.Dense(3)(x)}


def data():
  rng = np.random.default_rng(0)
  image = rng.normal(size=(24, 4)).astype(np.float32)
  return {
    'image': jnp.asarray(image),
    'label': jnp.asarray(np.arange(24) % 3, jnp.int32),
  }


def batch_at(split, step):
  rows = (jnp.asarray(step, jnp.int32) * 8 + jnp.arange(8)) % 24
  return {'image': split['image'][rows], 'label': split['label'][rows]}


def setting(method=None, tx=None, **more):
  method, tx = method or plain(), tx or optax.sgd(0.1, momentum=0.9)
  net = Net()
  variables = net.init(KEY, data()['image'][:1])
  batch = batch_at(data(), 0)
  state = init_state(net, method, tx, variables, batch=batch)
  return make_step(net, method, TASK, tx, **more), state, variables


def equal(a, b):
  return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


def test_a_step_learns_and_keeps_what_it_should():
  step, state, variables = setting()
  losses = []
  for _ in range(30):
    state, metrics = step(state, batch_at(data(), 0), KEY)
    losses.append(float(metrics['loss']))
  assert losses[-1] < 0.5 * losses[0]
  assert int(state.step) == 30 and state.step.dtype == jnp.int32
  assert not equal(state.model_state['batch_stats'], variables['batch_stats'])
  assert equal(state.model_state['branches'], variables['branches'])
  chex.assert_trees_all_equal_shapes_and_dtypes(dict(state.variables), dict(variables))


def test_what_is_computed_again_is_not_stored_and_is_the_same():
  states = []
  for remat in (False, True):
    step, state, variables = setting(remat=remat)
    assert ('remat' in str(step.trace(state, batch_at(data(), 0), KEY).jaxpr)) == remat
    for i in range(3):
      state, _ = step(state, batch_at(data(), i), KEY)
    states.append(state)
  chex.assert_trees_all_close(states[0].params, states[1].params, rtol=1e-6)

  def forward(params):
    x = data()['image']
    v, rngs = {**variables, 'params': params}, {'dropout': KEY}
    return Net().apply(v, x, train=True, mutable=['batch_stats'], rngs=rngs)[0]

  stored = lambda f: sum(
    x.size for x in jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(f, p)[1], params))
  )
  params = variables['params']
  assert stored(economical(forward)) < 0.7 * stored(forward)


def test_one_compilation_and_a_donated_state():
  traces = []

  def objective(*args):
    traces.append(1)
    return supervised(*args)

  step, state, _ = setting(plain()._replace(objective=objective))
  first = state.params['Dense_0']['kernel']
  for _ in range(3):
    state, _ = step(state, batch_at(data(), 0), KEY)
  assert len(traces) == 1
  assert first.is_deleted()


def test_init_state_copies_so_that_the_caller_keeps_his_arrays():
  step, state, variables = setting()
  step(state, batch_at(data(), 0), KEY)
  assert float(jnp.abs(variables['params']['Dense_0']['kernel']).sum()) > 0


@pytest.mark.parametrize('fused', [True, False])
def test_a_resumed_training_is_the_same_to_the_bit(fused):
  run = partial(fit, fused=fused, show=False)
  step, state, _ = setting()
  whole = run(step, state, KEY, batch_at, data(), steps=11, every=4)
  _, state, _ = setting()
  part = run(step, state, KEY, batch_at, data(), steps=7, every=3)
  resumed = run(step, part, KEY, batch_at, data(), steps=11, every=5)
  assert equal(whole, resumed)
  _, state, _ = setting()
  for i in range(11):
    state, _ = step(state, batch_at(data(), i), KEY)
  chex.assert_trees_all_close(whole, state, rtol=1e-5, atol=1e-6)


def test_fit_without_resident_data_asks_the_host_for_batches():
  step, state, _ = setting()
  asked = []

  def on_host(nothing, i):
    asked.append(i)
    return batch_at(data(), i)

  found = fit(step, state, KEY, on_host, steps=5, every=2, show=False)
  _, state, _ = setting()
  expected = fit(step, state, KEY, batch_at, data(), steps=5, every=2, show=False)
  assert asked == [0, 1, 2, 3, 4]
  chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


ROW = {'loss': 0.2134, 'accuracy': 0.981, 'flops': 0.62, 'target': 0.5, 'time': 1.7e9}
ROW |= {'step': 9e3, 'exit1': 0.3, 'images_per_second': 2510.0}


@pytest.mark.parametrize('label', ['gates', 'implosion-12', 'control-finetune'])
def test_a_progress_line_fits_with_the_whole_name(label, capsys, monkeypatch):
  monkeypatch.setenv('COLUMNS', '80')
  with bar(label, 0, 12000) as draw:
    draw(12000, ROW)
  (line,) = capsys.readouterr().out.splitlines()
  assert line.startswith(f'{label} ') and len(line) <= 80
  assert 'loss 0.213, accuracy 98.1 %' in line and '…' not in line


def test_what_a_progress_line_has_no_room_for_is_left_out_as_a_whole():
  said = 'loss 0.213, accuracy 98.1 %, flops 62 -> 50 %, exit1 0.3, 2,510 images/s'
  assert describe(ROW) == describe(ROW, len(said)) == said
  assert describe(ROW, len(said) - 1) == said.rpartition(', ')[0]
  assert describe(ROW, 11) == 'loss 0.213' and describe(ROW, 3) == ''


def test_callbacks_get_rows_at_absolute_multiples():
  step, state, _ = setting()
  rows = []
  see = lambda state, row: rows.append((int(state.step), row))
  fit(step, state, KEY, batch_at, data(), steps=7, every=3, callbacks=[see], show=False)
  assert [s for s, _ in rows] == [3, 6, 7] == [int(row['step']) for _, row in rows]
  assert {'loss', 'accuracy', 'images_per_second', 'time'} <= set(rows[0][1])
  assert all(row['images_per_second'] > 0 for _, row in rows)


def test_a_training_that_is_to_stop_has_a_row_after_the_step_in_progress():
  """At least one step is done, and a fused program does all up to its row."""
  step, state, _ = setting()
  asked, rows = [], []

  def stopping() -> bool:
    asked.append(None)
    return len(asked) >= 2

  see = lambda state, row: rows.append((int(state.step), int(row['step'])))
  more = {'steps': 7, 'every': 5, 'callbacks': [see], 'show': False}
  fit(step, state, KEY, batch_at, data(), fused=False, stopping=stopping, **more)
  assert rows == [(i, i) for i in (2, 3, 4, 5, 6, 7)]
  rows.clear()
  step, state, _ = setting()
  fit(step, state, KEY, batch_at, data(), fused=True, stopping=stopping, **more)
  assert rows == [(5, 5), (7, 7)]


def poisoned(at):
  """Batches whose images are NaN in one step."""
  bad = lambda i: jnp.where(jnp.asarray(i) == at, jnp.nan, 1.0)
  return lambda d, i: {**(b := batch_at(d, i)), 'image': b['image'] * bad(i)}


@pytest.mark.parametrize('fused', [True, False])
def test_a_loss_that_is_not_finite_names_its_step_and_reaches_no_callback(fused):
  step, state, _ = setting()
  seen = []
  see = lambda state, row: seen.append(int(state.step))
  with pytest.raises(NonFiniteLoss, match=r'gates: the loss is nan at step 5 .*before'):
    fit(
      step,
      state,
      KEY,
      poisoned(5),
      data(),
      steps=9,
      every=2,
      callbacks=[see],
      label='gates',
      show=False,
      fused=fused,
    )
  assert seen == [2, 4]


def test_a_parameter_that_is_not_finite_is_found_before_it_is_saved():
  step, state, _ = setting(tx=optax.sgd(lambda i: jnp.where(i == 3, jnp.inf, 0.1)))
  seen = []
  see = lambda state, row: seen.append(int(state.step))
  with pytest.raises(NonFiniteLoss, match='a parameter is not finite at step 4'):
    fit(
      step, state, KEY, batch_at, data(), steps=9, every=2, callbacks=[see], show=False
    )
  assert seen == [2]


@pytest.mark.parametrize(
  'tx',
  [
    optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1)),
    optax.polyak_sgd(0.1),
    optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10)),
    optax.lbfgs(),
  ],
  ids=['plateau', 'polyak', 'backtracking', 'lbfgs'],
)
@pytest.mark.parametrize('penalised', [False, True])
def test_the_optimizer_gets_the_loss_and_the_loss_as_a_function(tx, penalised):
  method = Method(
    init=lambda gates, outputs: gates,
    forward=lambda theta, key, step: theta,
    penalty=(lambda theta, step: theta['branches']['branch']) if penalised else None,
    trunk_train=False,
  )
  batch, losses = batch_at(data(), 0), []
  with jax.numpy_dtype_promotion('standard'):  # optax mixes floats and integers
    step, state, _ = setting(method, tx)
    for _ in range(5):
      state, metrics = step(state, batch, KEY)
      gate = state.theta['branches']['branch']
      losses.append(float(metrics['loss']) + penalised * float(gate))
  assert losses[-1] < losses[0]


def test_theta_gets_the_gradient_through_the_gates_and_directly():
  """d/dtheta of loss(gates(theta), theta), against jax.grad of the same by hand."""
  square = lambda theta, key, step: {'branches': {'branch': theta['w'] ** 2}}

  def objective(task, outputs, batch, theta, step):
    loss, metrics = supervised(task, outputs, batch, theta, step)
    return loss + theta['w'], metrics

  method = Method(
    objective,
    init=lambda gates, outputs: {'w': jnp.asarray(0.7)},
    forward=square,
    trunk_train=False,
    penalty=lambda theta, step: 3.0 * theta['w'],
  )
  step, state, variables = setting(method, optax.sgd(1.0))
  batch = batch_at(data(), 0)

  def loss(w):
    out = Net().apply({**variables, 'branches': {'branch': w**2}}, batch['image'])
    return TASK.loss(out['main'], batch) + w + 3.0 * w

  expected = 0.7 - jax.grad(loss)(0.7)
  state, _ = step(state, batch, KEY)
  np.testing.assert_allclose(state.theta['w'], expected, rtol=1e-5)
  assert equal(state.model_state, {k: variables[k] for k in state.model_state})


def mean_label(gates, gate_grads, outputs, batch):
  return {'label': batch['label'].astype(jnp.float32).mean()}


def test_observed_statistics_are_averaged():
  step, state, _ = setting(Method(observe=mean_label))
  for labels in (0, 2, 1):
    batch = {**batch_at(data(), 0), 'label': jnp.full(8, labels, jnp.int32)}
    state, _ = step(state, batch, KEY)
  assert float(state.stats['label']) == pytest.approx(1.0, rel=1e-6)
  with pytest.raises(ValueError, match='pass batch='):
    init_state(Net(), Method(observe=mean_label), optax.sgd(0.1), state.variables)


def test_after_a_mean_of_100_steps_the_newest_statistics_weigh_one_percent():
  step, state, _ = setting(Method(observe=mean_label))
  seen = np.random.default_rng(0).integers(3, size=(100, 8))
  for labels in seen:
    batch = {**batch_at(data(), 0), 'label': jnp.asarray(labels, jnp.int32)}
    state, _ = step(state, batch, KEY)
  expected = seen.mean()
  assert float(state.stats['label']) == pytest.approx(expected, rel=1e-5)
  batch['label'] = jnp.full(8, 2, jnp.int32)
  for at in (100, 101, 5000):
    state, _ = step(state.replace(step=jnp.int32(at)), batch, KEY)
    expected = 0.99 * expected + 0.01 * 2
    assert float(state.stats['label']) == pytest.approx(expected, rel=1e-5)


def test_teacher_arrays_are_arguments_of_the_step(compilations):
  from depthprune.train.distill import distill

  method = distill(plain(), weight=1.0)
  step, _, variables = setting(method, teacher=Net().apply)
  batch, other = batch_at(data(), 0), jax.tree.map(lambda x: 2 * x, variables)
  values = []
  for teacher in (variables, other):
    _, fresh, _ = setting(method)
    compilations.clear()
    values.append(float(step(fresh, batch, KEY, teacher)[1]['distillation']))
  assert values[0] != values[1] and not compilations


def test_channel_gates_without_a_coupling_are_refused():
  method = Method(forward=lambda *_: {'channels': {'Dense_0:1': jnp.ones(8)}})
  step, state, _ = setting(method)
  with pytest.raises(ValueError, match=r'pass coupling=couple'):
    step(state, batch_at(data(), 0), KEY)


def test_arrays_and_iterables_train_as_a_function_does():
  """The same batches, whoever makes them, give the same bits."""
  arrays = data()
  of = lambda i: batch_at(arrays, i)
  step, state, _ = setting()
  expected = fit(step, state, KEY, lambda _, i: of(i), steps=6, show=False)
  for source in (
    [of(i) for i in range(3)],
    iter([of(i) for i in range(6)]),
    [(of(i)['image'], np.asarray(of(i)['label'], np.int64)) for i in range(3)],
  ):
    step, state, _ = setting()
    assert equal(fit(step, state, KEY, source, steps=6, show=False), expected)
  step, state, _ = setting()
  with pytest.raises(DataError, match='ended after 3 batches, at step 3'):
    fit(step, state, KEY, iter([of(i) for i in range(3)]), steps=6, show=False)


def test_arrays_are_resumed_to_the_same_bits():
  pair = (data()['image'], data()['label'])

  def trained(*stops):
    step, state, _ = setting()
    for stop in stops:
      state = fit(step, state, KEY, pair, batch=5, steps=stop, show=False)
    return state

  assert equal(trained(9), trained(3, 4, 9))
  step, state, _ = setting()
  fused = fit(step, state, KEY, pair, batch=5, steps=9, show=False, fused=True)
  np.testing.assert_allclose(
    *(jax.tree.leaves(s.params)[0] for s in (fused, trained(9))), rtol=1e-5
  )
