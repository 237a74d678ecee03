"""Exported programs take what their networks take: dicts, keys, scalars, keywords."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from depthprune.cascades.cascade import cascade
from depthprune.exports.networks import load_cascade
from depthprune.exports.stablehlo import export
from depthprune.program.coupling import couple
from depthprune.storage.checkpoint import CheckpointError
from depthprune.surgery.oneshot import oneshot
from depthprune.surgery.prune import prune
from tests.exports.test_stablehlo import (
  DRAW,
  VECTORS,
  close,
  program,
  read,
  run,
  run_onnx,
)


class Layers(NamedTuple):
  """An input of several arrays."""

  second: jax.Array
  first: jax.Array


WEIGHTS = {
  'w': DRAW.normal(size=(6, 8)).astype(np.float32),
  'out': DRAW.normal(size=(8, 3)).astype(np.float32),
}
KEY = jax.random.key(1)


def answers(v, x):
  return nn.relu(x @ v['w']) @ v['out']


def noisy(v, x, key):
  return answers(v, x + jax.random.normal(key, x.shape))


def masked(v, x, mask=None, rngs=None, scale=1):
  x = jnp.where(mask['of'], x, 0) + jax.random.normal(rngs['noise'], (6,))
  return answers(v, x * scale)


# The network, its inputs and keyword arguments for some examples, and the names.
INPUTS = {
  'dict': (lambda v, b: answers(v, b['x'] * b['scale']),
           lambda x: (({'x': x, 'scale': jnp.float32(2)},), {}),
           ['input.scale', 'input.x']),
  'tuple': (lambda v, b, n: answers(v, b[0] * n + b[1]),
            lambda x: (((x, x[0]), 2.0), {}),
            ['input0.0', 'input0.1']),
  'numbered': (lambda v, b, key: answers(v, b[1] + b[0] * jax.random.uniform(key)),
               lambda x: (({1: x, 0: x[:, :1]}, jax.random.PRNGKey(1)), {}),
               ['input0.0', 'input0.1', 'input1']),
  'positions': (lambda v, x, at: answers(v, x[:, at]),
                lambda x: ((x, jnp.arange(6)[::-1]), {}),
                ['input0', 'input1']),
  'by keyword': (masked,
                 lambda x: ((x,), {'mask': {'of': x > 0}, 'rngs': {'noise': KEY},
                                   'scale': 3}),
                 ['input', 'mask.of', 'rngs.noise']),
}  # fmt: skip


@pytest.mark.parametrize('kind', INPUTS)
def test_inputs_of_every_kind_are_those_of_the_program(tmp_path, kind):
  fn, call, names = INPUTS[kind]
  inputs, kwargs = call(VECTORS[:2])
  coupling = couple(fn, WEIGHTS, *inputs, **kwargs)
  keep = oneshot(coupling, WEIGHTS, '50%')
  network = prune(fn, WEIGHTS, keep, inputs, coupling=coupling, **kwargs)
  written = export(tmp_path / 'it', network, platforms=('cpu',))
  assert [entry['name'] for entry in written['inputs']] == names
  for size in (1, 5):
    inputs, kwargs = call(VECTORS[:size])
    expected = network.apply(network.variables, *inputs, **kwargs)
    inputs = [None if isinstance(x, float) else x for x in inputs]
    if kind == 'numbered':
      inputs[0] = {str(key): x for key, x in inputs[0].items()}
    kwargs.pop('scale', None)
    exported = program(tmp_path / 'it', 'main')
    arrays = load_file(tmp_path / 'it' / 'network' / 'weights.safetensors')
    arrays = read(tmp_path / 'it', 'main', arrays)
    close(exported.call(arrays, *inputs, **kwargs), expected)


def test_a_namedtuple_is_a_dict_of_its_fields_in_onnx_too(tmp_path):
  fn = lambda v, b: answers(v, b.first) - b.second
  example = Layers(VECTORS[:2, :3], VECTORS[:2])
  network = prune(fn, WEIGHTS, {}, example)
  written = export(tmp_path / 'it', network, onnx=True, platforms=('cpu',))
  assert [x['name'] for x in written['inputs']] == ['input.first', 'input.second']
  batch = Layers(VECTORS[:, :3], VECTORS)
  expected = fn(WEIGHTS, batch)
  close(run(tmp_path / 'it', 'main', batch._asdict()), expected)
  close(
    run_onnx(tmp_path / 'it', 'main', batch.first, batch.second)['logits'], expected
  )


def test_a_program_of_random_numbers_has_a_fixed_batch(tmp_path):
  network = prune(noisy, WEIGHTS, {}, (VECTORS[:2], KEY))
  written = export(tmp_path / 'it', network, batch=5, platforms=('cpu',))
  assert [x['shape'] for x in written['inputs']] == [[5, 6], []]
  close(
    run(tmp_path / 'it', 'main', VECTORS[:5], KEY), noisy(WEIGHTS, VECTORS[:5], KEY)
  )


def test_inputs_that_count_no_examples_keep_their_shapes(tmp_path):
  network = prune(
    lambda v, t: answers(v, v['w'][:, 0] * t), WEIGHTS, {}, jnp.float32(2)
  )
  assert export(tmp_path / 'it', network)['inputs'][0]['shape'] == []
  expected = network.apply(network.variables, jnp.float32(3))
  close(run(tmp_path / 'it', 'main', np.float32(3)), expected)


def test_a_cascade_of_shared_inputs_is_one_program(tmp_path):
  def exits(v, x, shift):
    h = nn.relu((x['x'] + shift) @ v['w'])
    return {'early': h @ v['out'], 'main': nn.relu(h + 1) @ v['out']}

  shift = np.arange(6, dtype=np.float32)
  example = {'x': VECTORS[:2]}, shift
  network = prune(exits, WEIGHTS, {}, example)
  found = cascade(exits, network.variables, *example, thresholds={'early': 0.6})
  for batch in (None, 12):
    export(tmp_path / 'it', network, found, batch=batch, platforms=('cpu',))
    mine = found({'x': VECTORS}, shift)
    theirs = run(tmp_path / 'it', 'cascade', {'x': VECTORS}, shift)
    np.testing.assert_array_equal(theirs['exit'], mine.exit)
    close(theirs['logits'], mine.logits)
  back = load_cascade(tmp_path / 'it', exits)
  np.testing.assert_array_equal(back({'x': VECTORS}, shift).exit, mine.exit)


def test_a_cascade_is_not_saved_with_arrays_by_keyword(tmp_path):
  def exits(v, x, shift):
    return {'early': x @ v['w'], 'main': nn.relu((x + shift) @ v['w'])}

  shift = jnp.ones(6)
  network = prune(exits, WEIGHTS, {}, VECTORS[:2], shift=shift)
  found = cascade(exits, network.variables, VECTORS[:2], shift=shift)
  with pytest.raises(CheckpointError, match='shift is an array by keyword.*lambda v'):
    export(tmp_path / 'it', network, found)
