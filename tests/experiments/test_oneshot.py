"""One-shot curves: what is done is not done again, and nothing is left out."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from depthprune.methods.implosion import implosion
from depthprune.program.coupling import couple
from experiments.implosion.oneshot import KEYS, cases, curve_row, order
from experiments.result_files import Rows
from experiments.run import Arguments, fill

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
  path = network.job.folder / 'rows.json'
  every = [case for case in cases(3, [('drop', 0)]) if case['erased']]
  make = lambda case: curve_row(network, case, 3)
  for some in (every[:2], every):
    left = fill(Rows(path, {}, KEYS), lambda some=some: some, make, Arguments())
    assert left == []
  rows = json.loads(path.read_text())['rows']
  assert [row['erased'] for row in rows] == [1, 2, 3]
  assert [row['unit'] for row in rows] == names(order(network, 3, 'drop'))
  assert np.all(np.diff([row['flops'] for row in rows]) < 0)
  assert {row['accuracy'] for row in rows} == {0.5}


def test_every_curve_is_whole_and_that_of_greedy_ends_with_a_cut():
  uncut, *curve = cases(2, [('random', 1), ('greedy', 0)])
  assert uncut == {'importance': 'none', 'seed': 0, 'erased': 0}
  assert [(*case.values(),) for case in curve] == [
    ('random', 1, 1),
    ('random', 1, 2),
    ('greedy', 0, 1),
    ('greedy', 0, 2),
    ('greedy', 0, 2, True),
  ]
