"""Block influence: by hand from the features, and what it says of a block."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.models.decoder import Decoder
from depthprune.program.coupling import couple
from depthprune.surgery.influence import block_influence
from tests import zoo

MODEL = Decoder(
  vocab=20, positions=12, width=8, depth=3, heads=4, groups=2, size=4, inner=6
)
X = zoo.tokens(4)
BLOCKS = {
  f'layer{i}': [f'layer{i}/attention/branch', f'layer{i}/mlp/branch'] for i in range(3)
}


@pytest.fixture(scope='module')
def variables():
  return zoo.randomised(jax.eval_shape(MODEL.init, jax.random.key(0), X))


@pytest.fixture(scope='module')
def coupling(variables):
  return couple(MODEL, variables, X[:1])


def by_hand(x, y):
  x, y = np.asarray(x, float), np.asarray(y, float)
  cos = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
  return float((1 - cos).mean())


def test_influence_is_that_of_the_features(variables, coupling):
  """In two batches of another size than that of the coupling."""
  outputs = MODEL.apply(variables, X)
  embedded = variables['params']['embed']['kernel'][X]
  features = [embedded, *(outputs[tap] for tap in MODEL.taps)]
  got = block_influence(coupling, variables, [X[:1], X[1:]], BLOCKS)
  assert [*got] == [*BLOCKS]
  expected = [by_hand(x, y) for x, y in pairwise(features)]
  np.testing.assert_allclose([*got.values()], expected, rtol=1e-4)
  assert min(expected) > 0.01


def test_every_branch_is_a_block_by_default(variables, coupling):
  shut = jax.tree.map(jnp.asarray, variables)
  shut['branches']['layer1']['mlp']['branch'] = jnp.float32(0)
  got = block_influence(coupling, shut, [X])
  branches = (branch for block in BLOCKS.values() for branch in block)
  assert [*got] == [branch.removesuffix('/branch') for branch in branches]
  assert got.pop('layer1/mlp') == pytest.approx(0, abs=1e-6)
  assert min(got.values()) > 1e-3


def test_what_cannot_be_measured_is_refused(variables, coupling):
  with pytest.raises(KeyError, match=r"no branch 'layer3/x'; there are: layer0/att"):
    block_influence(coupling, variables, [X], {'layer3': ['layer3/x']})
  with pytest.raises(ValueError, match='at least one batch'):
    block_influence(coupling, variables, [])
  with pytest.raises(ValueError, match='no branches to score; dp.trunk'):
    block_influence(couple(lambda v, x: x @ v, X, X.T), X, [X.T])
  with pytest.raises(ValueError, match=r'layer: .*layers1/mlp/branch begin or end in'):
    blocks = {'layer': ['layers0/attention/branch', 'layers1/mlp/branch']}
    stacked = MODEL.clone(scan=True, segments=3)
    arrays = stacked.init(jax.random.key(0), X)
    block_influence(couple(stacked, arrays, X), arrays, [X], blocks)


def test_layers_of_a_scan_have_the_influence_that_they_have_without_it(
  variables, coupling
):
  """In two batches, of two branches together and of each alone."""
  layers = [{n: c[f'layer{i}'] for n, c in variables.items()} for i in range(3)]
  stack = jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
  whole = {n: {k: v for k, v in c.items() if 'layer' not in k}
           for n, c in variables.items()}  # fmt: skip
  arrays = {n: {**whole[n], 'layers0': stack[n]} for n in whole}
  stacked = couple(MODEL.clone(scan=True), arrays, X[:1])
  both = {'layers0': [f'layers0/{part}/branch' for part in ('attention', 'mlp')]}
  got = block_influence(stacked, arrays, [X[:1], X[1:]], both)
  assert [*got] == [f'layers0[{i}]' for i in range(3)]
  expected = block_influence(coupling, variables, [X], BLOCKS)
  np.testing.assert_allclose([*got.values()], [*expected.values()], rtol=1e-4)
  alone = block_influence(stacked, arrays, [X])
  assert [*alone][2:4] == ['layers0/attention[2]', 'layers0/mlp[0]']
  unrolled = block_influence(coupling, variables, [X])
  for i in range(3):
    for part in ('attention', 'mlp'):
      got, want = alone[f'layers0/{part}[{i}]'], unrolled[f'layer{i}/{part}']
      assert got == pytest.approx(want, rel=1e-4)
