"""SideNets on a network that was pruned before, and on one that was quantised."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import depthprune as dp
from depthprune import models
from depthprune.cascades.predictions import leave
from depthprune.cascades.race import race
from depthprune.exports import networks
from depthprune.methods.sidenet import SideNetOptions
from depthprune.run import early_exit, rounds
from depthprune.run import heads as sides
from depthprune.run.config import default
from depthprune.run.job import Job, prepare
from depthprune.train.result import to_json

# qwix 0.1.8 asks flax for a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:'VariableState' was removed")

CONFIG = dataclasses.replace(
  default('sidenet'),
  options=SideNetOptions(hidden=16, budget=0.8, views=1, decide_on='train'),
  model='mlp',
  subset=128,
  batch=64,
  train_epochs=0,
  gate_epochs=2,
)


@pytest.fixture(scope='module', autouse=True)
def promotion():
  with jax.numpy_dtype_promotion('standard'):  # as a user has it; qwix needs it
    yield


@pytest.fixture(scope='module')
def digits(tmp_path_factory) -> tuple[Job, Any, Any]:
  """(job, an MLP, its variables)."""
  config = dataclasses.replace(CONFIG, workdir=str(tmp_path_factory.mktemp('digits')))
  job, model = prepare(config, show=False), models.build('mlp')
  shapes = jax.eval_shape(model.init, jax.random.key(0), *job.inputs)
  rng = np.random.RandomState(0)
  draw = lambda s: jnp.asarray(rng.normal(0, 1.4 / s.shape[0] ** 0.5, s.shape), s.dtype)
  return job, model, jax.tree.map(draw, shapes)


@pytest.fixture(scope='module')
def pruned(digits):
  """(what was cut, the SideNets on it, the result): a run from its folder."""
  job, model, variables = digits
  coupling = dp.couple(model, variables, *job.inputs)
  keep = dp.oneshot(coupling, variables, 0.6)
  small = dp.prune(model, variables, keep, job.inputs, coupling=coupling)
  networks.save(job.folder / 'pruned', small, job.images.normalisation)
  config = dataclasses.replace(
    CONFIG,
    pretrained=str(job.folder / 'pruned'),
    workdir=str(job.folder / 'on_pruned'),
  )
  kept = []

  def train(job):
    kept.append(sides.train(job))
    return kept[0]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(early_exit, 'race', partial(race, seconds=0.1))
    patch.setattr(early_exit, 'train', train)
    result = to_json(rounds.run(config, show=False))
  return small, kept[0], result


@pytest.fixture(scope='module')
def int8(digits):
  """(its variables, the SideNets on it): weights and inputs of all layers int8."""
  qwix = pytest.importorskip('qwix', reason="no qwix: pip install 'qwix>=0.1.8'")
  job, model, variables = digits
  rule = qwix.QuantizationRule(weight_qtype=jnp.int8, act_qtype=jnp.int8)
  quantised = qwix.quantize_model(model, qwix.PtqProvider([rule]))
  shapes = jax.eval_shape(quantised.init, jax.random.key(0), *job.inputs)
  params = qwix.quantize_params(variables['params'], shapes['params'])
  variables = {**variables, 'params': params}
  job = job._replace(folder=job.folder / 'on_int8')
  whole = sides.with_sides(sides.cascade_plan(CONFIG), quantised, job)
  return variables, sides.fit_heads(job, whole, sides.with_trunk(job, whole, variables))


def same(tree, expected):
  jax.tree.map(np.testing.assert_array_equal, tree, expected)


def executes_as_simulated(job: Job, trained: sides.Trained):
  """With a threshold that half of the images pass."""
  batch = next(job.batches(job.images.test))
  rows = slice(len(batch['label']))
  logits = trained.test.logits[:, rows]
  scores = np.asarray(jax.nn.softmax(logits[:-1]).max(-1))
  middle = np.sort(scores[0])[rows.stop // 2 :][:2].mean()
  expected = leave(scores, [middle])
  early = dp.cascade(
    trained.model,
    trained.variables,
    *job.inputs,
    thresholds={'exit1': float(middle)},
    exits=trained.exits,
  )
  answer = early(batch['image'])
  np.testing.assert_array_equal(answer.exit, expected)
  assert 0.4 < expected.mean() < 0.6
  said = logits[expected, np.arange(rows.stop)]
  np.testing.assert_allclose(answer.logits, said, rtol=1e-4, atol=1e-4)


def test_sidenets_on_a_pruned_trunk_leave_it_as_it_was_cut(pruned):
  small, trained, _ = pruned
  assert dict(trained.model.trunk.arch) == small.arch != {}
  assert trained.model.trunk == small.model
  for name, tree in small.variables.items():
    same(trained.variables[name]['trunk'], tree)


def test_what_is_saved_is_of_the_network_that_was_pruned(pruned):
  small, _, result = pruned
  flops = small.report['flops']
  assert result['flops']['before'] == flops['after'] < flops['before']
  assert result['flops']['after'] <= 0.8 * flops['after'] * 1.05


def test_a_cascade_on_a_pruned_trunk_executes_as_simulated(pruned, digits):
  _, trained, result = pruned
  executed = result['cascade']['executed']
  assert executed['differ'] == 0
  assert executed['one']['speedup'] > 0 and {*executed['one']['merged']} <= {'exit1'}
  assert [few['batch'] for few in executed['few']] == [
    n for n in (8, 32) if n < executed['batch']
  ]
  executes_as_simulated(digits[0], trained)


def test_a_cascade_on_a_pruned_trunk_is_loaded_from_its_folder(pruned, digits):
  _, trained, result = pruned
  loaded = dp.load_cascade(digits[0].folder / 'on_pruned' / 'cascade')
  said = dict(zip(trained.exits, trained.test.logits, strict=True))
  assert list(loaded.stages.flops)[-1] == result['cascade']['cost']['main']
  same(loaded.variables['params']['trunk'], trained.variables['params']['trunk'])
  assert {*loaded.exits} <= {*said}


def test_sidenets_on_an_int8_trunk_leave_it_int8_and_are_float(int8):
  variables, trained = int8
  params = trained.variables['params']
  same(params['trunk'], variables['params'])
  kernel = params['trunk']['layer0']['dense']['kernel']
  assert kernel.array.qvalue.dtype == jnp.int8
  heads = {k: v for k, v in params.items() if k != 'trunk'}
  assert heads and {x.dtype for x in jax.tree.leaves(heads)} == {jnp.dtype('float32')}


def test_an_int8_trunk_multiplies_integers_and_counts_as_many_flops(int8, digits):
  variables, trained = int8
  job, model, full = digits
  program = jax.make_jaxpr(trained.model.trunk.apply)(variables, *job.inputs)
  sums = [e for e in program.jaxpr.eqns if e.primitive.name == 'dot_general']
  assert {v.aval.dtype for e in sums for v in e.invars} == {jnp.dtype('int8')}
  stages = dp.split(trained.model, trained.variables, *job.inputs)
  assert len(sums) == 3 and stages.whole == dp.cost.flops(
    dp.couple(model, full, *job.inputs)
  )


def test_a_cascade_on_an_int8_trunk_executes_as_simulated(int8, digits):
  executes_as_simulated(digits[0], int8[1])
