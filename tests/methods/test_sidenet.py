"""SideNets: only they are trained, by the sum of their losses; or all together."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from depthprune.methods.sidenet import early, side_paths, sidenet
from depthprune.models.decoder import Decoder
from depthprune.models.heads import Head, Unembedding, WithHeads
from depthprune.models.resnet import ResNet
from depthprune.program.coupling import couple
from depthprune.train.language import language_model
from depthprune.train.step import init_state, make_step
from depthprune.train.task import classification
from tests import zoo

HEADS = {'a': Head('stage1/block0', hidden=5, pool='grid4'), 'b': Head('stage2/block0')}
MODEL = WithHeads(ResNet(depth=8, width=4), HEADS)
X = jax.random.normal(jax.random.key(0), (6, 8, 8, 3))
BATCH = {'image': X, 'label': jnp.arange(6) % 10}
VARIABLES = zoo.randomised(jax.eval_shape(MODEL.init, jax.random.key(1), X))
COUPLING = couple(MODEL, VARIABLES, X)
TASK = classification(10)


def trained(regime, steps=3):
  method, tx = sidenet(COUPLING, regime), optax.sgd(0.1)
  state = init_state(MODEL, method, tx, VARIABLES, batch=BATCH)
  step = make_step(MODEL, method, TASK, tx)
  for _ in range(steps):
    state, metrics = step(state, BATCH, jax.random.key(2))
  return state, metrics


def same(a, b) -> bool:
  return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def test_what_main_does_not_read_is_the_side_nets():
  assert early(COUPLING) == ('a', 'b')
  assert {path.split('/')[1] for path in side_paths(COUPLING)} == {'head_a', 'head_b'}
  assert len(side_paths(COUPLING)) == 6


def test_any_network_with_exits_may_have_side_nets():
  shapes = {'stem': (3, 4), 'side': (4, 2), 'head': (4, 2)}
  w = {'params': {name: jnp.ones(shape) for name, shape in shapes.items()}}

  def net(v, x):
    h = jnp.tanh(x @ v['params']['stem'])
    return {'early': h @ v['params']['side'], 'main': h @ v['params']['head']}

  coupling = couple(net, w, jnp.ones((1, 3)))
  assert side_paths(coupling) == {'params/side'}


def test_frozen_is_frozen_to_the_bit_and_the_heads_learn():
  state, metrics = trained('frozen')
  assert same(state.params['trunk'], VARIABLES['params']['trunk'])
  assert same(state.model_state, {k: v for k, v in VARIABLES.items() if k != 'params'})
  for name in ('head_a', 'head_b'):
    assert not same(state.params[name], VARIABLES['params'][name])
  assert {'accuracy', 'accuracy_a', 'accuracy_b', 'loss'} <= metrics.keys()


def test_joint_moves_everything_and_the_statistics():
  state, _ = trained('joint')
  assert not same(state.params['trunk']['stem'], VARIABLES['params']['trunk']['stem'])
  stats = VARIABLES['batch_stats']['trunk']['stem']
  assert not same(state.model_state['batch_stats']['trunk']['stem'], stats)


@pytest.mark.parametrize(('regime', 'names'), [('frozen', 'ab'), ('joint', 'ab+')])
def test_the_loss_is_the_sum_over_what_is_trained(regime, names):
  method = sidenet(COUPLING, regime)
  outputs = {k: v for k, v in MODEL.apply(VARIABLES, X).items() if k in MODEL.exits}
  loss, _ = method.objective(TASK, outputs, BATCH, {}, 0)
  exits = ['main' if name == '+' else name for name in names]
  log_p = {name: jax.nn.log_softmax(outputs[name]) for name in exits}
  rows = np.arange(6), np.asarray(BATCH['label'])
  expected = -sum(float(np.asarray(log_p[name])[rows].mean()) for name in exits)
  assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('regime', ['frozen', 'joint'])
def test_heads_learn_from_the_answer_of_the_main_net(regime):
  outputs = {k: v for k, v in MODEL.apply(VARIABLES, X).items() if k in MODEL.exits}
  loss = lambda outputs, a: sidenet(COUPLING, regime, taught=a).objective(
    TASK, outputs, BATCH, {}, 0
  )[0]
  z = np.asarray(outputs['main'], np.float64) / 2
  p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
  log_p = {name: np.asarray(jax.nn.log_softmax(outputs[name])) for name in outputs}
  soft = -sum((p * log_p[name]).sum(-1).mean() for name in 'ab')
  own = float(TASK.loss(outputs['main'], BATCH)) if regime == 'joint' else 0.0
  hard = float(loss(outputs, 0.0)) - own
  expected = own + 0.25 * hard + 0.75 * soft
  assert float(loss(outputs, 0.75)) == pytest.approx(expected, rel=1e-5)
  # It teaches, and learns nothing from it.
  slopes = jax.grad(loss)(outputs, 1.0)
  mine = jax.grad(lambda z: TASK.loss(z, BATCH))(outputs['main'])
  told = mine if regime == 'joint' else jnp.zeros_like(mine)
  np.testing.assert_allclose(slopes['main'], told, atol=1e-7)
  assert slopes['a'].any()


def test_nothing_is_cut():
  keep = sidenet(COUPLING).decide({}, {}, None)
  assert keep == {'exits': {'a': True, 'b': True, 'main': True}}


def in_training(variables, x, train):
  outputs, _ = MODEL.apply(variables, x, train=train, mutable=['batch_stats'])
  return {name: outputs[name] for name in MODEL.exits}


def test_refused():
  plain = {k: v['trunk'] for k, v in VARIABLES.items()}
  with pytest.raises(ValueError, match="'main' and others, got main"):
    sidenet(couple(MODEL.trunk, plain, X))
  with pytest.raises(ValueError, match="regime='warm': expected one of frozen, joint"):
    sidenet(COUPLING, 'warm')
  with pytest.raises(ValueError, match='taught: .* at most 1'):
    sidenet(COUPLING, taught=1.5)
  with pytest.raises(ValueError, match='training mode.*train=False'):
    sidenet(couple(in_training, VARIABLES, X, train=True))


# ---- language models -----------------------------------------------------------------

WRITER = Decoder(
  vocab=12, positions=8, width=8, depth=3, heads=2, groups=1, size=4, inner=6
)
WRITES = WithHeads(
  WRITER, {'a': Unembedding('layer0', hidden=16), 'b': Unembedding('layer1', hidden=4)}
)
TOKENS = zoo.tokens(16, 8) % 12
TEXTS = {'image': TOKENS, 'label': jnp.roll(TOKENS, -1, 1).at[:, -1].set(-1)}


@pytest.fixture(scope='module')
def writer():
  """(coupling, variables) of a trunk of random weights with heads as they begin."""
  variables = WRITES.init(jax.random.key(0), TOKENS)
  trunk = {k: v['trunk'] for k, v in variables.items()}
  for name, tree in zoo.randomised(trunk).items():
    variables[name]['trunk'] = tree
  return couple(WRITES, variables, TOKENS), variables


def agreement(variables, name):
  outputs = WRITES.apply(variables, TOKENS)
  return float((outputs[name].argmax(-1) == outputs['main'].argmax(-1)).mean())


@pytest.mark.parametrize('taught', [0.0, 1.0])
@jax.numpy_dtype_promotion('standard')  # optax.adam needs it
def test_the_heads_of_a_decoder_learn_and_it_stays_as_it_is(taught, writer):
  coupling, variables = writer
  task, tx = language_model(), optax.adam(0.02)
  method = sidenet(coupling, taught=taught)
  state = init_state(WRITES, method, tx, variables)
  step = make_step(WRITES, method, task, tx)
  losses = []
  for _ in range(60):
    state, metrics = step(state, TEXTS, jax.random.key(2))
    losses.append(float(metrics['loss']))
  assert same(state.params['trunk'], variables['params']['trunk'])
  assert same(state.model_state, {k: v for k, v in variables.items() if k != 'params'})
  assert losses[-1] < losses[0]
  if taught:
    before, after = (agreement(v, 'a') for v in (variables, state.variables))
    assert after > before + 0.1


def test_every_token_teaches_the_same(writer):
  """The loss is the mean over texts and tokens, without the padding of a batch."""
  coupling, variables = writer
  answers = WRITES.apply(variables, TOKENS)
  outputs = {name: answers[name] for name in ('a', 'b', 'main')}
  weight = jnp.arange(16) < 11
  batch = {**TEXTS, 'weight': weight.astype(jnp.float32)}
  method = sidenet(coupling, taught=1.0)
  loss, metrics = method.objective(language_model(), outputs, batch, {}, 0)
  p = np.asarray(jax.nn.softmax(outputs['main'] / 2), np.float64)
  log_p = [np.asarray(jax.nn.log_softmax(outputs[name])) for name in 'ab']
  expected = -sum((p * each).sum(-1)[:11].mean() for each in log_p)
  assert float(loss) == pytest.approx(expected, rel=1e-5)
  assert {'accuracy', 'accuracy_a', 'accuracy_b'} == {*metrics}
