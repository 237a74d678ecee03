"""Timing: in turns, waited for, weights as arguments, and honest about overhead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer

from depthprune.timing import latency
from depthprune.timing.latency import Comparison, Network, Timing


def test_medians_and_quartiles():
  assert latency.timing(np.array([5.0, 1, 2, 4, 3])) == Timing(3, 2, 4, 5)


def matmuls(variables, x):
  for w in variables:
    x = jnp.tanh(x @ w)
  return {'main': x, 'tap': x}


def test_a_network_of_more_work_takes_longer():
  key = jax.random.key(0)
  large = [jax.random.normal(key, (256, 256))] * 8
  x = np.ones((1, 256), np.float32)
  (measured,) = latency.compare(
    Network(matmuls, large), Network(matmuls, large[:1]), x, batches=(64,), seconds=0.2
  )
  assert measured.batch == 64
  assert measured.distinct
  assert measured.speedup > 1.5


def test_batch_sizes_exits_and_weights_reach_the_program_as_they_should():
  shapes, weights = set(), set()

  def network(variables, x):
    shapes.add(x.shape)
    weights.add(isinstance(variables, Tracer))
    return {'main': x * variables, 'tap': x}

  program = latency._program(Network(network, jnp.float32(2)), ('main', 'gone'))
  assert list(program(jnp.ones(3))) == ['main']
  shapes.clear()
  measured = latency.compare(
    *2 * [Network(network, jnp.float32(2))],
    np.ones((3, 4), np.float32),
    batches=(7, 1),
    seconds=0,
  )
  assert [m.batch for m in measured] == [1, 7]
  assert shapes == {(1, 4), (3, 4), (7, 4)}  # 3 to see what counts examples
  assert weights == {True}


def test_inputs_that_do_not_count_examples_are_passed_as_they_are():
  shapes = set()

  def network(variables, batch, positions):
    shapes.add((batch['x'].shape, positions.shape))
    return batch['x'] * positions * variables

  example = {'x': np.ones((2, 4), np.float32)}, np.ones(4, np.float32)
  networks = 2 * [Network(network, jnp.float32(2))]
  latency.compare(*networks, *example, batches=(1, 3), seconds=0)
  assert {((1, 4), (4,)), ((3, 4), (4,))} <= shapes


@pytest.mark.parametrize('shape', [(), (0, 4)])
def test_an_example_without_images_is_refused(shape):
  network = Network(lambda variables, x: x, None)
  with pytest.raises(ValueError, match=r'batch in front, got shape .*images\[:1\]'):
    latency.compare(network, network, np.zeros(shape, np.float32))


def comparison(batch, before, after, faster=9):
  before, after = (Timing(ms, 0.95 * ms, 1.05 * ms, 9) for ms in (before, after))
  return Comparison(batch, before, after, faster)


def test_an_idle_device_is_said_to_be_idle():
  (note,) = latency.notes([comparison(1, 2.0, 1.0), comparison(128, 3.0, 1.3)])
  assert note.startswith('batch 128 takes only 1.3 x the time of one image')
  assert 'not saturated' in note


def test_a_busy_device_and_a_small_batch_need_no_note():
  busy = [comparison(1, 2.0, 1.0), comparison(2, 3.0, 2.1), comparison(128, 80, 50)]
  assert latency.notes(busy) == []
  assert latency.notes(busy[1:]) == []


@pytest.mark.parametrize(
  ('faster', 'distinct'), [(0, True), (1, True), (2, False), (7, False), (8, True)]
)
def test_a_speed_up_that_may_be_chance_is_said_to_be_none(faster, distinct):
  measured = comparison(128, 1.02, 1.0, faster)
  said = latency.notes([measured])
  assert measured.distinct == distinct
  assert (said == []) == distinct
  assert all(f'faster in {faster} of 9 turns' in note for note in said)


@pytest.mark.parametrize(
  ('after', 'spread', 'said'),
  [
    (6.0, 0.01, None),
    (6.15, 0.001, None),
    (8.0, 0.01, 'asked for, and missed: 80.0 % measured (quartiles 78.4 to 81.6 %)'),
    (4.0, 0.01, 'asked for, and missed: 40.0 % measured'),
    (6.0, 0.2, 'too noisy to say whether it was reached'),
    (8.0, 0.2, 'too noisy to say whether it was reached'),
  ],
)
def test_a_part_of_the_time_is_met_missed_or_drowned_in_noise(after, spread, said):
  around = lambda ms: Timing(ms, ms * (1 - spread), ms * (1 + spread), 9)
  measured = Comparison(8, around(10.0), around(after), 9)
  found = latency.missed(measured, 0.6)
  assert len(found) == (said is not None)
  if said:
    assert found[0].startswith('batch 8: 60 % of the time was asked for')
    assert said in found[0]


def test_json_has_the_medians_by_batch():
  entry = latency.to_json([comparison(1, 3.0, 1.5)])['1']
  assert (entry['before'], entry['after']) == (3.0, 1.5)
  assert entry['speedup'] == 2.0
  assert entry['after_quartiles'] == pytest.approx([1.425, 1.575])
  assert (entry['runs'], entry['notes']) == (9, [])


def test_the_device_is_named():
  assert latency.device().startswith('CPU')
  assert latency.device().endswith('cores')
