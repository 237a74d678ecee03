"""Wrong calls of the public functions: one sentence that names the argument."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import depthprune as dp

MODEL = dp.models.build('mlp', hidden=(6, 5), classes=3)
X = jnp.ones((2, 4, 4, 1))
VARIABLES = MODEL.init(jax.random.key(0), X)
COUPLING = dp.couple(MODEL, VARIABLES, X)
METHOD = dp.trainable_gates(COUPLING, 0.5)
KEEP = dp.oneshot(COUPLING, VARIABLES, 0.5)
TX = optax.sgd(0.1)
OTHER = {'channels': {'nobody:1': np.ones(3, bool)}}
WRONG = {
  'a target for a keep': (lambda: dp.prune(MODEL, VARIABLES, 0.5, X), 'keep'),
  'a method for a keep': (lambda: dp.prune(MODEL, VARIABLES, METHOD, X), 'keep'),
  'a word for a keep': (lambda: dp.prune(MODEL, VARIABLES, '50%', X), 'keep'),
  'nothing for a keep': (lambda: dp.prune(MODEL, VARIABLES, None, X), 'keep'),
  'a part that is a list': (
    lambda: dp.prune(MODEL, VARIABLES, {'channels': [True]}, X),
    'keep',
  ),
  'another coupling': (lambda: dp.prune(MODEL, VARIABLES, OTHER, X), 'nobody:1'),
  'a word for a number': (
    lambda: dp.prune(MODEL, VARIABLES, KEEP, X, round_to='8'),
    'round_to',
  ),
  'a name for a model': (lambda: dp.couple('resnet20', VARIABLES, X), 'model'),
  'a module for variables': (lambda: dp.couple(MODEL, MODEL, X), 'variables'),
  'nothing for variables': (lambda: dp.couple(MODEL, None, X), 'variables'),
  'variables of prune': (lambda: dp.prune(MODEL, MODEL, KEEP, X), 'variables'),
  'half': (lambda: dp.oneshot(COUPLING, VARIABLES, 'half'), 'target'),
  'no target': (lambda: dp.oneshot(COUPLING, VARIABLES, None), 'target'),
  'a model for a coupling': (lambda: dp.oneshot(MODEL, VARIABLES, 0.5), 'coupling'),
  'another score': (lambda: dp.oneshot(COUPLING, VARIABLES, 0.5, score='l7'), 'score'),
  'arrays to save': (lambda: dp.save('nowhere', VARIABLES), 'pruned'),
  'a network for a cascade': (
    lambda: dp.save_cascade('nowhere', dp.prune(MODEL, VARIABLES, KEEP, X), None),
    'saved',
  ),
  'the name of a method': (lambda: dp.make_step(MODEL, 'gates', None, TX), 'method'),
  'the name of an optimizer': (
    lambda: dp.make_step(MODEL, METHOD, dp.classification(3), 'sgd'),
    'tx',
  ),
  'arguments in another order': (
    lambda: dp.init_state(MODEL, METHOD, VARIABLES, TX),
    'tx',
  ),
  'parameters without params': (
    lambda: dp.init_state(MODEL, METHOD, TX, VARIABLES['params']),
    'variables',
  ),
}


@pytest.mark.parametrize('what', WRONG)
def test_a_wrong_call_is_one_sentence(what):
  call, argument = WRONG[what]
  with pytest.raises((TypeError, ValueError, KeyError)) as error:
    call()
  said = str(error.value)
  assert argument in said and len(said.splitlines()) <= 10 and len(said) < 1000
