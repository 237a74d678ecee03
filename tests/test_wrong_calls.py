"""Wrong calls of the public functions: one sentence that names the argument."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

import depthprune as dp


class Exits(nn.Module):
  """Two exits, and batch statistics."""

  width: int = 6

  @nn.compact
  def __call__(self, x, train=False):
    x = x.reshape(len(x), -1)
    x = nn.BatchNorm(use_running_average=not train)(nn.Dense(self.width)(x))
    early = nn.Dense(3)(nn.relu(x))
    return {'early': early, 'main': nn.Dense(3)(nn.relu(nn.Dense(5)(nn.relu(x))))}


class Net(nnx.Module):
  def __init__(self, rngs):
    self.a = nnx.Linear(16, 6, rngs=rngs)
    self.b = nnx.Linear(6, 3, rngs=rngs)

  def __call__(self, x):
    return self.b(nnx.relu(self.a(x.reshape(len(x), -1))))


KEY, TX, TASK = jax.random.key(0), optax.sgd(0.1), dp.classification(3)
MODEL = dp.models.build('mlp', hidden=(6, 5), classes=3)
X, Y = jnp.ones((2, 4, 4, 1)), np.array([0, 1])
VARIABLES = MODEL.init(KEY, X)
COUPLING = dp.couple(MODEL, VARIABLES, X)
METHOD = dp.trainable_gates(COUPLING, 0.5)
KEEP = dp.oneshot(COUPLING, VARIABLES, 0.5)
PRUNED = dp.prune(MODEL, VARIABLES, KEEP, X, coupling=COUPLING)
EXITS, NET = Exits(), Net(nnx.Rngs(0))
EXITS_VARIABLES = EXITS.init(KEY, X)
EXITS_COUPLING = dp.couple(EXITS, EXITS_VARIABLES, X)
CASCADE = dp.cascade(EXITS, EXITS_VARIABLES, X)
STEP = dp.make_step(MODEL, METHOD, TASK, TX, COUPLING)
BATCH = {'image': X, 'label': Y}
OTHER = {'channels': {'nobody:1': np.ones(3, bool)}}


def state():
  return dp.init_state(MODEL, METHOD, TX, VARIABLES, COUPLING)


def used():
  """A state that a training step was given."""
  old = state()
  STEP(old, BATCH, KEY)
  return old


def deleted(variables=VARIABLES):
  """Arrays that a training step was given."""
  arrays = jax.tree.map(jnp.array, variables)
  jax.tree.map(lambda x: x.delete(), arrays)
  return arrays


def spent():
  """An iterator that has ended."""
  batches = iter([BATCH])
  next(batches)
  return batches


def judged(held_out, of=MODEL, method=METHOD, task=TASK, coupling=COUPLING):
  return dp.judge(of, method, task, state(), held_out, coupling=coupling)


def fitted(data=BATCH, step=STEP, key=KEY, **how):
  return dp.fit(
    step, state(), key, data, **{'steps': 2, 'batch': 2, 'show': False, **how}
  )


def shrunk(**how):
  usual = {'build': lambda coupling: METHOD, 'train': lambda step, state, stage: state}
  usual |= {'task': TASK, 'tx': TX, 'held_out': BATCH}
  return dp.shrink(MODEL, VARIABLES, X, **{**usual, **how})


def stepped(label=Y, **entries):
  return STEP(state(), {'image': X, 'label': label, **entries}, KEY)


def recalibrated(batches):
  return dp.recalibrate(EXITS, EXITS_VARIABLES, batches)


# What is wrong: (the call, what the message says of the argument).
WRONG = {
  # ---- surgery
  'a target for a keep': (lambda: dp.prune(MODEL, VARIABLES, 0.5, X), 'prune: keep:'),
  'a method for a keep': (lambda: dp.prune(MODEL, VARIABLES, METHOD, X), 'keep:'),
  'a word for a keep': (lambda: dp.prune(MODEL, VARIABLES, '50%', X), 'keep:'),
  'nothing for a keep': (lambda: dp.prune(MODEL, VARIABLES, None, X), 'keep:'),
  'a part that is a list': (
    lambda: dp.prune(MODEL, VARIABLES, {'channels': [True]}, X),
    "keep['channels']:",
  ),
  'channels alone': (
    lambda: dp.prune(MODEL, VARIABLES, KEEP['channels'], X),
    "keep has the entry 'layer0/dense:1'",
  ),
  'gates for a keep': (
    lambda: dp.prune(MODEL, VARIABLES, COUPLING.gates(), X),
    'expected bool',
  ),
  'another coupling': (lambda: dp.prune(MODEL, VARIABLES, OTHER, X), 'nobody:1'),
  'the coupling of another network': (
    lambda: dp.prune(MODEL, VARIABLES, KEEP, X, coupling=EXITS_COUPLING),
    'variables:',
  ),
  'the model for its coupling': (
    lambda: dp.prune(MODEL, VARIABLES, KEEP, X, coupling=MODEL),
    'prune: coupling:',
  ),
  'keep and example swapped': (lambda: dp.prune(MODEL, VARIABLES, X, KEEP), 'keep:'),
  'no example': (lambda: dp.prune(MODEL, VARIABLES, KEEP, None), 'inputs:'),
  'a word for a number': (
    lambda: dp.prune(MODEL, VARIABLES, KEEP, X, round_to='8'),
    'prune: round_to:',
  ),
  'a multiple of nothing': (
    lambda: dp.prune(MODEL, VARIABLES, KEEP, X, round_to=0),
    'round_to:',
  ),
  'an optimizer by name': (
    lambda: dp.prune(MODEL, VARIABLES, KEEP, X, tx='sgd', opt_state=1),
    'tx:',
  ),
  'one number for all gates': (
    lambda: dp.prune(MODEL, VARIABLES, KEEP, X, gates=0.5),
    'gates:',
  ),
  'variables that were donated': (
    lambda: dp.prune(MODEL, deleted(), KEEP, X),
    'variables: the array params/',
  ),
  'half': (lambda: dp.oneshot(COUPLING, VARIABLES, 'half'), 'oneshot: target:'),
  'no target': (lambda: dp.oneshot(COUPLING, VARIABLES, None), 'target:'),
  'a target that is no number': (
    lambda: dp.oneshot(COUPLING, VARIABLES, float('nan')),
    'target:',
  ),
  'a target above all': (lambda: dp.oneshot(COUPLING, VARIABLES, '150%'), 'target:'),
  'a model for a coupling': (
    lambda: dp.oneshot(MODEL, VARIABLES, 0.5),
    'oneshot: coupling:',
  ),
  'variables of another network': (
    lambda: dp.oneshot(COUPLING, EXITS_VARIABLES, 0.5),
    'oneshot: variables: params/head/bias: expected shape [3]',
  ),
  'variables without params': (
    lambda: dp.oneshot(COUPLING, VARIABLES['params'], 0.5),
    'variables:',
  ),
  'another score': (
    lambda: dp.oneshot(COUPLING, VARIABLES, 0.5, score='l7'),
    'oneshot: score:',
  ),
  'a seed for a key': (
    lambda: dp.oneshot(COUPLING, VARIABLES, 0.5, score='random', key=0),
    'oneshot: key:',
  ),
  'a pattern that is a number': (
    lambda: dp.oneshot(COUPLING, VARIABLES, 0.5, exclude=5),
    'exclude:',
  ),
  'activations of a model': (
    lambda: dp.activations(MODEL, VARIABLES, [X]),
    'activations: coupling:',
  ),
  'one array for batches': (
    lambda: dp.activations(COUPLING, VARIABLES, X),
    'activations: batches:',
  ),
  'no batches of activations': (
    lambda: dp.activations(COUPLING, VARIABLES, spent()),
    'batches:',
  ),
  'None for batches': (lambda: dp.activations(COUPLING, VARIABLES, None), 'batches:'),
  # ---- reading a network
  'a name for a model': (lambda: dp.couple('resnet20', VARIABLES, X), 'couple: model:'),
  'a class for a model': (lambda: dp.couple(Exits, VARIABLES, X), 'Exits(...)'),
  'a module for variables': (lambda: dp.couple(MODEL, MODEL, X), 'couple: variables:'),
  'nothing for variables': (lambda: dp.couple(MODEL, None, X), 'variables:'),
  'a list for variables': (lambda: dp.couple(MODEL, [VARIABLES], X), 'variables:'),
  'a state of NNX for linen': (
    lambda: dp.couple(MODEL, nnx.state(NET), X),
    'couple: variables:',
  ),
  'nothing for an NNX state': (lambda: dp.couple(NET, None, X), 'couple: variables:'),
  'variables of prune': (lambda: dp.prune(MODEL, MODEL, KEEP, X), 'prune: variables:'),
  'model and variables swapped': (lambda: dp.couple(VARIABLES, MODEL, X), 'model:'),
  'no level params': (lambda: dp.couple(MODEL, VARIABLES['params'], X), "'params'"),
  'variables of another module': (
    lambda: dp.couple(MODEL, EXITS_VARIABLES, X),
    'variables: they do not fit',
  ),
  'an input of another size': (
    lambda: dp.couple(MODEL, VARIABLES, jnp.ones((2, 5, 5, 1))),
    'variables: they do not fit this network at these inputs',
  ),
  'no inputs': (lambda: dp.couple(MODEL, VARIABLES), 'couple: inputs:'),
  'a number for an input': (lambda: dp.couple(MODEL, VARIABLES, 3), 'couple: inputs:'),
  'the name of an output': (
    lambda: dp.couple(EXITS, EXITS_VARIABLES, X, fixed='main'),
    'couple: fixed:',
  ),
  'trunk of a name': (lambda: dp.trunk('resnet20', VARIABLES, X), 'trunk: model:'),
  'trunk of another module': (
    lambda: dp.trunk(MODEL, EXITS_VARIABLES, X),
    'trunk: variables:',
  ),
  'taps without variables': (lambda: dp.taps(MODEL, None, X), 'taps: variables:'),
  'taps, swapped': (lambda: dp.taps(VARIABLES, MODEL, X), 'taps: model:'),
  'split of a name': (lambda: dp.split('net', VARIABLES, X), 'split: model:'),
  'split without variables': (lambda: dp.split(EXITS, None, X), 'split: variables:'),
  'the cost of a model': (lambda: dp.cost.flops(MODEL), 'flops: coupling:'),
  'the cost at a target': (lambda: dp.cost.flops(COUPLING, 0.5), 'flops: gates:'),
  'the cost of half a gate': (
    lambda: dp.cost.params(COUPLING, {'channels': {'layer0/dense:1': np.ones(3)}}),
    'layer0/dense:1: gate has shape (3,)',
  ),
  'milliseconds of a model': (
    lambda: dp.milliseconds(MODEL),
    'milliseconds: coupling:',
  ),
  'a batch in letters': (
    lambda: dp.milliseconds(COUPLING, '8'),
    'milliseconds: batch:',
  ),
  'plug without a coupling': (lambda: dp.plug(MODEL, VARIABLES), 'plug: coupling:'),
  'plug, swapped': (lambda: dp.plug(COUPLING, MODEL), 'plug: model:'),
  'no gates': (lambda: dp.plug(MODEL, COUPLING)(VARIABLES, X), 'plug: gates:'),
  'slim without a coupling': (
    lambda: dp.slim(MODEL, VARIABLES, KEEP),
    'slim: coupling:',
  ),
  'slim to a target': (lambda: dp.slim(MODEL, COUPLING, 0.5), 'slim: keep:'),
  'a list for a gate': (lambda: dp.straight_through([0.1]), 'straight_through: w:'),
  'a branch of no module': (lambda: dp.branch(X, MODEL), 'branch: module:'),
  'a model of no name': (lambda: dp.models.build(None), 'build: name:'),
  # ---- methods
  'gates of a model': (
    lambda: dp.trainable_gates(MODEL, 0.5),
    'trainable_gates: coupling:',
  ),
  'implosion of a model': (lambda: dp.implosion(MODEL, 3), 'implosion: coupling:'),
  'half a depth': (lambda: dp.implosion(COUPLING, 'half'), 'implosion: depth:'),
  'netcut of a model': (lambda: dp.netcut(EXITS), 'netcut: coupling:'),
  'netcut of one exit': (lambda: dp.netcut(COUPLING), 'netcut: expected a network'),
  'a price in letters': (lambda: dp.netcut(EXITS_COUPLING, 'low'), 'netcut: beta:'),
  'sidenet of a model': (lambda: dp.sidenet(EXITS), 'sidenet: coupling:'),
  'auxiliary of a model': (lambda: dp.auxiliary(EXITS), 'auxiliary: coupling:'),
  'a weight in letters': (
    lambda: dp.auxiliary(EXITS_COUPLING, weight='1'),
    'auxiliary: weight:',
  ),
  'a strength in letters': (
    lambda: dp.trainable_gates(COUPLING, strength='200'),
    'trainable_gates: strength:',
  ),
  'scores of nobody': (
    lambda: dp.trainable_gates(COUPLING, scores={'nobody:1': np.ones(3)}),
    'nobody:1',
  ),
  'distillation by name': (lambda: dp.distill('gates'), 'distill: method:'),
  'a temperature in letters': (
    lambda: dp.distill(METHOD, '4'),
    'distill: temperature:',
  ),
  **{
    f'gates to {target!r}': (
      lambda target=target: dp.trainable_gates(COUPLING, target),
      'trainable_gates: target:',
    )
    for target in ('half', 0, 1.5, float('nan'), -0.5, '150%', None, True, [0.5])
  },
  # ---- tasks
  'classes in letters': (lambda: dp.classification('3'), 'classification: classes:'),
  'names for a number': (lambda: dp.classification(['a', 'b']), 'classes:'),
  'smoothing above 1': (lambda: dp.classification(3, 1.5), 'label_smoothing:'),
  'weights by name': (
    lambda: dp.classification(3, class_weights='balanced'),
    'class_weights:',
  ),
  'pixels in letters': (lambda: dp.segmentation('3'), 'segmentation: classes:'),
  'two weights for three': (lambda: dp.multilabel(3, weights=[1, 2]), 'weights:'),
  'numbers in letters': (lambda: dp.regression('1'), 'regression: outputs:'),
  # ---- training
  'the name of a method': (lambda: dp.make_step(MODEL, 'gates', TASK, TX), 'method:'),
  'a method that was not called': (
    lambda: dp.make_step(MODEL, dp.trainable_gates, TASK, TX),
    'method:',
  ),
  'the name of a task': (
    lambda: dp.make_step(MODEL, METHOD, 'classification', TX),
    'make_step: task:',
  ),
  'a task that was not called': (
    lambda: dp.make_step(MODEL, METHOD, dp.classification, TX),
    'task:',
  ),
  'the name of an optimizer': (lambda: dp.make_step(MODEL, METHOD, TASK, 'sgd'), 'tx:'),
  'an optimizer that was not called': (
    lambda: dp.make_step(MODEL, METHOD, TASK, optax.sgd),
    'tx:',
  ),
  'a model for a coupling of a step': (
    lambda: dp.make_step(MODEL, METHOD, TASK, TX, MODEL),
    'make_step: coupling:',
  ),
  'a network for a teacher': (
    lambda: dp.make_step(MODEL, METHOD, TASK, TX, COUPLING, teacher=MODEL),
    'teacher:',
  ),
  'arguments in another order': (
    lambda: dp.init_state(MODEL, METHOD, VARIABLES, TX),
    'init_state: tx:',
  ),
  'parameters without params': (
    lambda: dp.init_state(MODEL, METHOD, TX, VARIABLES['params']),
    'init_state: variables:',
  ),
  'a state of arrays that are gone': (
    lambda: dp.init_state(MODEL, METHOD, TX, deleted(), COUPLING),
    'variables: the array params/',
  ),
  'a state that was used': (lambda: STEP(used(), BATCH, KEY), 'state, metrics = step('),
  'a used state to judge': (
    lambda: dp.judge(MODEL, METHOD, TASK, used(), BATCH, coupling=COUPLING),
    'judge: state:',
  ),
  'a used state to fit': (
    lambda: dp.fit(STEP, used(), KEY, BATCH, steps=4, batch=2, show=False),
    'fit: state:',
  ),
  'variables for a state': (lambda: STEP(VARIABLES, BATCH, KEY), 'state:'),
  'a pair for a batch': (
    lambda: STEP(state(), (X, Y), KEY),
    "{'image': x, 'label': y}",
  ),
  'an array for a batch': (lambda: STEP(state(), X, KEY), 'batch:'),
  'other names in a batch': (lambda: STEP(state(), {'x': X, 'y': Y}, KEY), 'got x, y'),
  'no labels': (lambda: STEP(state(), {'image': X}, KEY), 'batch:'),
  'no inputs in a batch': (lambda: STEP(state(), {'label': Y}, KEY), 'batch:'),
  'a seed for the key of a step': (lambda: STEP(state(), BATCH, 0), 'key:'),
  'labels that are floats': (lambda: stepped(np.zeros(2, np.float32)), 'astype(int)'),
  'labels that are one-hot': (lambda: stepped(np.eye(3)[:2]), 'argmax(-1)'),
  'labels in a column': (lambda: stepped(np.zeros((2, 1), int)), "batch['label']:"),
  'too few labels': (lambda: stepped(Y[:1]), "batch['label']:"),
  'labels in a list': (lambda: stepped([0, 1]), "batch['label']:"),
  'labels out of range': (lambda: stepped(np.array([0, 7])), 'got 0 to 7'),
  'images of another size': (
    lambda: stepped(image=jnp.ones((2, 5, 5, 1))),
    'do not fit this network at these inputs',
  ),
  'a task of other classes': (
    lambda: dp.make_step(MODEL, METHOD, dp.classification(9), TX, COUPLING)(
      state(), BATCH, KEY
    ),
    'task:',
  ),
  'no teacher in the step': (
    lambda: dp.make_step(MODEL, METHOD, TASK, TX, COUPLING, teacher=MODEL.apply)(
      state(), BATCH, KEY
    ),
    'teacher_variables:',
  ),
  'step and state swapped': (
    lambda: dp.fit(state(), STEP, KEY, BATCH, steps=2, show=False),
    'fit: step:',
  ),
  'a seed to fit': (lambda: fitted(key=0), 'fit: key:'),
  'nothing to fit': (lambda: fitted([]), 'data: ended after 0 batches'),
  'a spent iterator to fit': (lambda: fitted(spent()), 'data: ended after 0 batches'),
  'steps in letters': (lambda: fitted(steps='2'), 'fit: steps:'),
  'a log line after nothing': (lambda: fitted(every=0), 'fit: every:'),
  'labels to fit out of range': (lambda: fitted((X, np.array([0, 9]))), 'got 0 to 9'),
  'a list of arrays to fit': (lambda: fitted([X, X]), 'data:'),
  'a function without a batch': (lambda: fitted(lambda data, i: None), 'batch'),
  'held-out batches of nothing': (lambda: judged([]), 'judge: held_out:'),
  'a spent iterator to judge': (lambda: judged(spent()), 'judge: held_out:'),
  'held-out data without labels': (lambda: judged([{'image': X}]), 'label'),
  'held-out labels out of range': (lambda: judged((X, np.array([0, 9]))), 'got 0 to 9'),
  'a judge in another order': (
    lambda: dp.judge(MODEL, TASK, METHOD, state(), BATCH),
    'judge: method:',
  ),
  'a judge without a coupling': (lambda: judged(BATCH, coupling=None), 'coupling:'),
  'a target to judge': (lambda: judged(BATCH)(0.5), 'keep:'),
  'a short gate to judge': (
    lambda: judged(BATCH)({'channels': {'layer0/dense:1': np.ones(2, bool)}}),
    'layer0/dense:1: has shape (2,)',
  ),
  'a dict to recalibrate': (lambda: recalibrated(BATCH), 'recalibrate: batches:'),
  'an array to recalibrate': (lambda: recalibrated(X), 'recalibrate: batches:'),
  'pairs to recalibrate': (lambda: recalibrated([(X, Y)]), 'recalibrate: batch:'),
  'a spent iterator to recalibrate': (lambda: recalibrated(spent()), 'batch'),
  'nothing to recalibrate': (
    lambda: dp.recalibrate(MODEL, VARIABLES, [BATCH]),
    'recalibrate: variables:',
  ),
  'recalibrate, swapped': (
    lambda: dp.recalibrate(EXITS_VARIABLES, EXITS, [BATCH]),
    'recalibrate: variables:',
  ),
  'arrays to recalibrate that are gone': (
    lambda: dp.recalibrate(EXITS, deleted(EXITS_VARIABLES), [BATCH]),
    'recalibrate: variables: the array',
  ),
  'a method that is not built': (lambda: shrunk(build=METHOD), 'shrink: build:'),
  'a build of nothing': (lambda: shrunk(build=lambda coupling: None), 'method:'),
  'a training of nothing': (
    lambda: shrunk(train=lambda step, state, stage: None),
    'shrink: train:',
  ),
  'a spent iterator to shrink': (lambda: shrunk(held_out=spent()), 'shrink: held_out:'),
  'a penalty on a name': (
    lambda: dp.add_penalty('sgd', lambda p, step: 0.0),
    'add_penalty: tx:',
  ),
  'a penalty that is a number': (lambda: dp.add_penalty(TX, 0.1), 'penalty:'),
  'openness that is a tree': (lambda: dp.spare_closed(TX, {}), 'openness:'),
  'an optimizer of a number': (lambda: dp.optimizer(METHOD, 0.1), 'optimizer: tx:'),
  # ---- cascades and files
  'a cascade of a name': (lambda: dp.cascade('net', VARIABLES, X), 'cascade: model:'),
  'one threshold for all': (
    lambda: dp.cascade(EXITS, EXITS_VARIABLES, X, thresholds=0.5),
    'cascade: thresholds:',
  ),
  'a threshold in letters': (
    lambda: dp.cascade(EXITS, EXITS_VARIABLES, X, thresholds={'early': 'high'}),
    "thresholds['early']:",
  ),
  'a cascade of arrays that are gone': (
    lambda: dp.cascade(EXITS, deleted(EXITS_VARIABLES), X),
    'variables: the array',
  ),
  'labels after the inputs': (lambda: CASCADE.predictions(X, Y), 'labels:'),
  'labels of other examples': (lambda: CASCADE.predictions(Y[:1], X), 'labels:'),
  'inputs of another size': (lambda: CASCADE(jnp.ones((2, 5, 5, 1))), 'do not fit'),
  'arrays to save': (lambda: dp.save('nowhere', VARIABLES), 'save: pruned:'),
  'save, swapped': (lambda: dp.save(PRUNED, 'nowhere'), 'save: pruned:'),
  'a path that is a number': (lambda: dp.save(3, PRUNED), 'save: path:'),
  'a normalisation by name': (
    lambda: dp.save('nowhere', PRUNED, normalisation='imagenet'),
    'save: normalisation:',
  ),
  'a network for a cascade': (
    lambda: dp.save_cascade('nowhere', PRUNED, None),
    'save_cascade: saved:',
  ),
  'arrays for a network': (
    lambda: dp.save_cascade('nowhere', CASCADE, EXITS_VARIABLES),
    'save_cascade: network:',
  ),
  'a folder that is not there': (lambda: dp.load('nowhere'), 'nowhere'),
  'a model for a path': (lambda: dp.load(MODEL), 'load: path:'),
  'a cascade that is not there': (lambda: dp.load_cascade('nowhere'), 'nowhere'),
  'a cascade for a path': (lambda: dp.load_cascade(CASCADE), 'load_cascade: path:'),
  'arrays to export': (lambda: dp.export('nowhere', VARIABLES), 'export: network:'),
  'export, swapped': (lambda: dp.export(PRUNED, 'nowhere'), 'export: path:'),
  'a platform of no kind': (
    lambda: dp.export('nowhere', PRUNED, platforms=('gpuu',)),
    'platforms:',
  ),
}


@pytest.mark.parametrize('what', WRONG)
def test_a_wrong_call_is_one_sentence(what, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  call, says = WRONG[what]
  with pytest.raises((TypeError, ValueError, KeyError)) as error:
    call()
  said = str(error.value.args[0])
  assert says in said and len(said.splitlines()) <= 2 and len(said) < 500
  assert not [*tmp_path.iterdir()], 'nothing is written'


def test_what_a_library_takes_for_an_array_is_taken():
  on_host = jax.tree.map(np.asarray, VARIABLES)
  coupling = dp.couple(MODEL, on_host, np.asarray(X))
  assert coupling.groups == COUPLING.groups
  lists = {'channels': {g: [*map(bool, k)] for g, k in KEEP['channels'].items()}}
  assert dp.cost.flops(COUPLING, lists) == dp.cost.flops(COUPLING, KEEP)
  assert dp.prune(MODEL, on_host, lists, np.asarray(X)).report['widths']
  gates = {'channels': {g: [0.5] * x.size for g, x in COUPLING.groups.items()}}
  assert dp.plug(MODEL, COUPLING)(VARIABLES, gates, X)['main'].shape == (2, 3)


def test_frozen_variables_are_variables(compilations):
  frozen = freeze(EXITS_VARIABLES)
  new = dp.recalibrate(EXITS, frozen, [BATCH])
  assert isinstance(new, Mapping) and 'batch_stats' in new
  coupling = dp.couple(EXITS, frozen, X)
  pruned = dp.prune(EXITS, frozen, dp.oneshot(coupling, frozen, 0.5), X)
  assert pruned.report['widths']['Dense_0:1'][1] < 6
  plain = dp.Method()
  step = dp.make_step(EXITS, plain, TASK, TX)
  trained = dp.init_state(EXITS, plain, TX, frozen)
  for _ in range(2):
    compilations.clear()
    trained, _ = step(trained, BATCH, KEY)
  assert not compilations  # what it returns is what it takes


def test_a_percentage_is_a_target_of_gates():
  assert dp.trainable_gates(COUPLING, '50%').rounds == 1
