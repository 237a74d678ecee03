"""Tables say what is in the result files, and a dash where there is none."""

import json
from types import SimpleNamespace

from experiments import result_files, tables
from experiments.implosion.oneshot import oneshot_tables
from experiments.implosion.retraining import retraining_tables
from experiments.netcut.sweep import netcut_tables
from experiments.sidenet.ablation import head_tables
from experiments.sidenet.comparison import sidenet_tables
from experiments.sidenet.small_networks import small_network_tables
from experiments.trainable_gates.comparison import gates_tables


def rows(text: str) -> dict[str, list[str]]:
  """{first cell: the others} of the Markdown table in a text."""
  lines = [line for line in text.splitlines() if line.startswith('| ')]
  cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
  return {first: rest for first, *rest in cells}


def test_without_result_files_there_is_a_dash(results):
  assert netcut_tables() == 'NetCut: –'
  assert oneshot_tables().endswith(': –')
  assert retraining_tables().endswith(': –')
  assert sidenet_tables() == 'SideNet: –' and small_network_tables().endswith(': –')
  assert head_tables().endswith(': –')
  assert gates_tables().endswith(': –')


def test_netcut_has_a_line_per_beta_and_aggregate(netcut_file):
  text = netcut_tables()
  assert '| seeds |' in text
  assert '[netcut/results/mlp.json](experiments/netcut/results/mlp.json)' in text
  lines = [line for line in text.splitlines() if line.startswith('| 0')]
  assert [line.split(' | ')[:3] for line in lines] == [
    ['| 0', 'log', '4.0 ± 0.0'],
    ['| 0.1', 'log', '1.0 ± 0.0'],
    ['| 0.1', 'linear', '2.0'],
  ]
  whole = lines[0].strip('| ').split(' | ')[4:]
  assert whole == [
    *('88.00 ± 0.00', '88.00 ± 0.07', '0.00 ± 0.07', '87.41', '20.00 ± 0.00', '–', '2'),
  ]


def test_a_depth_that_no_single_head_was_trained_at_has_no_control(netcut_file):
  line = '| 0.1 | linear | 2.0 | 0.90 | 88.00 | 87.95 | -0.05 | – | 10.00 |'
  assert line in netcut_tables()


def test_one_shot_has_a_line_per_importance_and_few_columns(implosion_files):
  lines = rows(oneshot_tables())
  assert lines['erased'] == ['0', '2', '4', '6', '8', '10', '12']
  assert lines['priority'][:2] == ['93.00', '89.00']
  assert lines['random'][:2] == ['93.00', '83.00 ± 0.00']
  assert lines['priority'][-1] == '69.00'
  assert 'priority with 12 units cut out, not only masked: 68.00 (' in oneshot_tables()


def test_retrained_stands_beside_its_controls(implosion_files):
  lines = rows(retraining_tables())
  assert lines['priority'] == [
    *('9 → 8', '30', '85.00 ± 0.00', '92.50 ± 0.71', '93.00 ± 0.00', '2'),
  ]
  assert lines['same shape from scratch'] == ['–', '30', '–', '–', '90.00', '1']
  assert 'uncut 94.00 ± 0.00 (' in retraining_tables()
  assert 'random erasure' in lines


def test_all_parts_are_made_from_the_committed_files():
  text = tables.text()
  assert 'make demo' in text
  for path in (result_files.HERE / 'netcut/results').glob('*.json'):
    if 'beta' in path.read_text():
      assert path.name in text


def test_sidenet_says_what_was_asked_and_what_was_reached(sidenet_file):
  text = sidenet_tables()
  lines = [line for line in text.splitlines() if line.startswith('| frozen')]
  assert [line.strip('| ').split(' | ') for line in lines] == [
    ['frozen', 'a drop ≤ 0.5 points', '0.45 ± 0.07', '0.45 ± 0.07', '40.00 ± 0.00',
     '37.0 to 42.0', '2'],
    ['frozen', 'risk ≤ 1 %', '0.80', '0.50', '40.00', '37.0 to 42.0', '1 of 2'],
  ]  # fmt: skip
  assert 'ECE of the exits 4.0 % before and 1.0 % after temperature' in text
  assert 'the network alone 93.00 ± 0.00 %; exits 80.0 %' in text
  assert 'executed at 1.50 ± 0.00× the speed of the network at batch 128, a CPU' in text


def test_what_is_lost_counts_from_the_network_that_was_given(sidenet_file):
  content = json.loads(sidenet_file.read_text())
  for row in content['rows']:
    row['original'] = {'held_out': 0.95, 'test': 0.94}
  content['notes'] = ['the device was shared']
  sidenet_file.write_text(json.dumps(content))
  text = sidenet_tables()
  assert '| frozen | a drop ≤ 0.5 points | 0.45 ± 0.07 | 1.45 ± 0.07 |' in text
  assert (
    'alone 93.00 ± 0.00 % (94.00 ± 0.00 % before it was trained with heads)' in text
  )
  assert text.endswith('Note: the device was shared.')


def test_gates_stand_beside_the_controls_that_there_are(results):
  gates = {'flops': 48, 'flops_unpruned': 100, 'accuracy_unpruned': 0.93}
  rows_ = [
    {'method': method, 'seed': seed, 'target': target, 'accuracy': accuracy, **gates}
    for method, accuracy in (('gates', 0.92), ('l1', 0.91))
    for seed in (0, 1)
    for target in (0.48, 0.39)
    if (method, target) != ('l1', 0.39)
  ]
  config = {'model': 'resnet56', 'data': 'cifar10', 'subset': None, 'pretrained': 'a'}
  config |= {'train_epochs': None, 'gate_epochs': 15, 'finetune_epochs': 30}
  path = results / 'trainable_gates/results/resnet56_cifar10_full.json'
  path.parent.mkdir(parents=True)
  path.write_text(json.dumps({'config': config, 'rows': rows_}))
  text = gates_tables()
  assert 'on cifar10, pretrained + 15 + 30 epochs, 2 seeds' in text
  assert 'unpruned 93.00 ± 0.00' in text
  assert rows(text) == {
    'FLOPs kept': ['48 %', '39 %'],
    '---': ['---', '---'],
    'trainable gates': ['92.00 ± 0.00', '92.00 ± 0.00'],
    'uniform L1': ['91.00 ± 0.00', '–'],
  }


def test_progress_has_a_dash_where_there_is_no_result(results, monkeypatch):
  one = results / 'paper/results/one_full.json'
  one.parent.mkdir(parents=True)
  one.write_text(json.dumps({'rows': [{}], 'device': 'a GPU'}))
  experiments = {f'paper.{name}': lambda arguments: [{}] for name in ('one', 'two')}
  failing = SimpleNamespace()  # no function
  monkeypatch.setattr(tables, 'find', lambda names: {**experiments, 'paper.a': failing})
  assert tables.progress_table().splitlines()[-3:] == [
    '| paper.one | 1 | 1 | a GPU |',
    '| paper.two | – | 1 | – |',
    '| paper.a | – | – | – |',
  ]
