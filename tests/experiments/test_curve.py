"""One-shot curves: what is done is not done again, and nothing else is left out."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from depthprune.methods.implosion import implosion
from depthprune.program.coupling import couple
from experiments.implosion.curve import KEYS, curve, order
from experiments.pieces import Rows

UNITS = [f'unit{i}' for i in range(4)]


def four_units(variables, x, train=False):
  for name in UNITS:
    x = x + variables['branches'][name] * jax.nn.relu(x @ variables['params'][name])
  return {'main': x}


class Deciding:
  """A judge to whom every unit is worth its number; counts what it is asked."""

  def __init__(self):
    self.asked = []

  def each(self, keeps):
    open_ = np.stack([keeps['branches'][name] for name in UNITS], -1)  # [n, units]
    self.asked.append(len(open_))
    return {'loss': (~open_).astype(float) @ np.arange(4.0)}


@pytest.fixture
def network(tmp_path):
  """What `order` and `curve` need of a Network."""
  variables = {
    'params': {name: np.ones((3, 3), np.float32) for name in UNITS},
    'branches': {name: np.float32(1) for name in UNITS},
  }
  coupling = couple(four_units, variables, np.ones((1, 3), np.float32))
  reporting = lambda keep: {'loss': 1.0, 'accuracy': 0.5}
  return SimpleNamespace(
    job=SimpleNamespace(folder=tmp_path),
    coupling=coupling,
    theta=implosion(coupling).init(coupling.gates(), {}),
    deciding=Deciding(),
    reporting=reporting,
  )


def names(gone):
  return [unit.name for unit in gone]


def test_an_order_goes_on_where_it_was_stopped(network):
  path = network.job.folder / 'order-greedy0.json'
  path.write_text(json.dumps({'order': ['unit2']}))
  assert names(order(network, 3, 'greedy')) == ['unit2', 'unit0', 'unit1']
  assert network.deciding.asked == [3, 2]
  assert json.loads(path.read_text())['order'] == ['unit2', 'unit0', 'unit1']
  assert names(order(network, 3, 'greedy')) == ['unit2', 'unit0', 'unit1']
  assert network.deciding.asked == [3, 2]


def test_orders_of_two_seeds_are_apart(network):
  found = [names(order(network, 4, 'random', seed)) for seed in range(4)]
  assert len(set(map(tuple, found))) > 1
  assert [names(order(network, 4, 'random', seed)) for seed in range(4)] == found


def test_a_curve_has_a_row_for_every_number_of_erased_units_once(network):
  to = network.job.folder / 'rows.json'
  gone = order(network, 3, 'drop')
  curve(Rows(to, {}, KEYS), network, gone[:2], 'drop')
  curve(Rows(to, {}, KEYS), network, gone, 'drop')
  rows = json.loads(to.read_text())['rows']
  assert [row['erased'] for row in rows] == [1, 2, 3]
  assert [row['unit'] for row in rows] == names(gone)
  assert np.all(np.diff([row['flops'] for row in rows]) < 0)
  assert {row['accuracy'] for row in rows} == {0.5}
