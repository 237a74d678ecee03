"""The comparison of heads: what each variant reads, and its table."""

import json

import numpy as np

from depthprune.data.features import FeatureSet
from depthprune.models import build
from depthprune.models.heads import Head, WithHeads
from experiments.sidenet import ablation
from tests.experiments.test_tables import rows

TRUNK = build('resnet8')
TAPS = TRUNK.taps


def test_a_variant_reads_the_features_of_its_own_taps():
  every = WithHeads(TRUNK, {f'exit{i}': Head(tap) for i, tap in enumerate(TAPS, 1)})
  some = WithHeads(TRUNK, {'exit1': Head(TAPS[1]), 'exit2': Head(TAPS[2])})
  read = {'main': np.zeros(1)} | {f'exit{i}': np.full(1, i) for i in (1, 2, 3)}
  split = {'features': read, 'label': np.zeros(1)}
  found = ablation.of_taps(FeatureSet('x', split, split, split, 10), every, some)
  for part in (found.train, found.held_out, found.test):
    features = part['features']
    assert features.keys() == {'main', 'exit1', 'exit2'}
    assert (features['exit1'], features['exit2']) == ([2], [3])


def test_the_table_has_what_was_chosen_beside_what_was_reached(results):
  assert ablation.head_tables() == 'Heads of SideNets: –'
  reach = lambda lost, saved: {
    'saved_where_chosen': 0.42,
    'saved_at_best': 0.45,
    'test': {'drop': lost, 'saved': saved},
  }
  drop = lambda seed: {
    'shared': reach(0.4 + seed / 10, 0.4 + seed / 100),
    'each': reach(0.8, 0.43),
    'learned': reach(0.5, 0.44),
    **({} if seed else {'cross': reach(0.45, 0.47)}),  # of one row alone
  }
  content = {
    'config': {
      'model': 'resnet20', 'data': 'cifar10', 'subset': 20_000, 'gate_epochs': 8,
      'options': {'views': 3},
    },
    'rows': [
      {'variant': 'plain', 'seed': s, 'heads': 0.016, 'drops': {'0.5': drop(s)}}
      for s in (0, 1)
    ],
  }  # fmt: skip
  path = results / 'sidenet' / 'results' / 'resnet20_heads.json'
  path.parent.mkdir(parents=True)
  path.write_text(json.dumps(content))
  found = ablation.head_tables()
  assert '(20,000 training examples, each augmented 2×, 8 epochs)' in found
  assert rows(found)['plain'] == [
    *('1.60 ± 0.00', '42.00 ± 0.00', '0.45 ± 0.07', '40.50 ± 0.71'),
    *('45.00 ± 0.00', '0.80 ± 0.00', '43.00 ± 0.00', '0.50 ± 0.00', '44.00 ± 0.00'),
    *('–', '–', '2'),
  ]
