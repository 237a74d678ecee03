"""What is said of a claim follows from the rows, and is 'not run' without any."""

import json
from pathlib import Path

import pytest

from experiments import verdicts
from experiments.trainable_gates.ablation import ablation_tables
from experiments.verdicts import above, at_least, at_most


def write(path: Path, rows: list[dict], **config) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  config = {'model': 'resnet20', 'data': 'cifar10', **config}
  path.write_text(json.dumps({'config': config, 'rows': rows}))


def gates_row(method: str, seed: int, accuracy: float, target: float = 0.5) -> dict:
  row = {'method': method, 'seed': seed, 'target': target, 'accuracy': accuracy}
  return row | {'accuracy_unpruned': 0.92, 'flops': 1, 'flops_unpruned': 2}


def test_a_gain_counts_where_it_is_above_the_spread_of_the_differences():
  """Differences of 2, 3 and 4 points have a mean of 3 and a deviation of 1."""
  controls = [0.80, 0.81, 0.82]
  gained = above([0.82, 0.84, 0.86], controls)
  assert gained == 'reached: above the control by 3.00 ± 1.00 points'
  assert above([0.80, 0.82, 0.82], controls) == (
    'not reached: within the spread of it, by 0.33 ± 0.58 points'
  )
  assert above([0.79, 0.80, 0.81], controls).startswith(
    'not reached: below it, by 1.00'
  )
  assert above([0.82], [0.80]) == 'above the control by 2.00 points, one seed'
  assert above([0.82, 0.81], [0.80, 0.80]) == (
    'above the control by 1.50 ± 0.71 points, two seeds'
  )


def test_a_goal_is_reached_or_missed_by_so_many_points():
  assert at_least([0.91, 0.93], 0.92) == at_most([0.001, 0.009], 0.005) == 'reached'
  assert at_least([0.90, 0.91], 0.92) == 'not reached, by 1.50 points'
  assert at_most([0.006, 0.008], 0.005) == 'not reached, by 0.20 point'


def test_what_has_no_rows_was_not_run(results):
  lines = verdicts.verdicts().splitlines()[2:]
  assert len(lines) == 13 and all(line.endswith('not run |') for line in lines)


def test_gates_stand_beside_the_better_of_the_norms(results):
  rows = [gates_row('gates', seed, 0.900 + 0.001 * seed) for seed in range(3)]
  rows += [gates_row('l1', seed, 0.890 + 0.001 * seed) for seed in range(3)]
  rows += [gates_row('global', seed, 0.880) for seed in range(3)]
  write(results / 'trainable_gates/results/resnet20_cifar10.json', rows)
  line = verdicts.gates('claim', 'resnet20_cifar10', full=False, target=0.5)
  assert line.measured.startswith('90.10 ± 0.10 (')
  assert line.control == (
    'uncut 92.00 ± 0.00, uniform L1 89.10 ± 0.10, global L1 88.00 ± 0.00'
  )
  assert line.verdict == 'reached: above the control by 1.00 ± 0.00 points'


def test_a_small_drop_is_what_the_uncut_network_has_more(results):
  rows = [gates_row('gates', seed, 0.916, 0.73) for seed in range(3)]
  write(results / 'trainable_gates/results/resnet20_small_drop.json', rows)
  assert verdicts.gates_small_drop().verdict == 'not reached, by 0.10 point'


def test_heads_are_chosen_where_thresholds_were(results):
  """`more` saves most there, `learned` on the reporting half, and `each` overfits."""

  def asked(chosen: float, saved: float, lost: float) -> dict:
    test = {'accuracy': 0.92 - lost / 100, 'drop': lost, 'saved': saved}
    return {'saved_where_chosen': chosen, 'test': test}

  def row(variant: str, seed: int, shared: dict, learned: dict) -> dict:
    ways = {'shared': shared, 'learned': learned, 'each': asked(0.9, 0.9, 0.0)}
    return {'variant': variant, 'seed': seed, 'drops': {'0.5': ways}}

  few, more, learned = (
    asked(0.3, 0.3, 0.1),
    asked(0.45, 0.43, 0.6),
    asked(0.4, 0.5, 0.4),
  )
  rows = [row('few', seed, few, few) for seed in (0, 1)]
  rows += [row('more', seed, more, learned) for seed in (0, 1)]
  write(results / 'sidenet/results/resnet56_heads_full.json', rows)
  line = verdicts.sidenet('claim', 'resnet56', goal=0.42)
  assert line.measured.startswith('43.00 ± 0.00 % of the FLOPs saved, 0.60 ± 0.00')
  assert line.control == 'the network alone 92.00 ± 0.00'
  assert line.verdict == 'reached; of the drop: not reached, by 0.10 point'


@pytest.mark.parametrize(
  ('full', 'verdict'), [(False, 'reached'), (True, 'not reached')]
)
def test_units_that_go_may_cost_half_a_point_on_a_cpu_and_nothing_in_full(
  results, full, verdict
):
  row = {'method': 'greedy', 'seed': 0, 'accuracy': 0.926, 'accuracy_before': 0.93}
  rows = [row | {'held_out': 0.92}, {'method': 'scratch', 'accuracy': 0.9}]
  name = f'resnet56_distilled{"_full" * full}.json'
  write(results / 'implosion/results' / name, rows)
  line = verdicts.implosion('claim', 'resnet56_distilled', full)
  assert line.verdict.startswith(verdict)
  assert (
    'by greedy' in line.measured and 'from scratch 90.00 (one seed)' in line.control
  )


def test_pruning_is_compared_with_scratch_wherever_both_were_run(results):
  folder = results / 'trainable_gates/results'
  of = lambda pruned: [gates_row('gates', 0, pruned), gates_row('scratch', 0, 0.85)]
  write(folder / 'a.json', of(0.90), pretrained='weights.npz')
  write(folder / 'b.json', of(0.80), pretrained=None)
  write(folder / 'c.json', of(0.80)[:1], pretrained=None)
  text = verdicts.when_pruning_pays()
  assert 'ahead in 1 of 1 comparisons from pretrained weights, and in 0 of 1' in text
  ends = [line.split(' | ')[-1] for line in text.splitlines() if line.startswith('| r')]
  assert ends == ['+5.00 |', '-5.00 |']


def test_an_ablation_shows_what_each_change_gains_seed_by_seed(results):
  of = lambda changed, seed, accuracy: {
    'changed': changed, 'seed': seed, 'accuracy': accuracy, 'accuracy_cut': 0.8
  }  # fmt: skip
  rows = [of('nothing', 0, 0.85), of('nothing', 1, 0.86)]
  rows += [of('mixup', 0, 0.86), of('mixup', 1, 0.88)]
  options = {'target': 0.5}
  sizes = {'subset': 5000, 'gate_epochs': 1, 'finetune_epochs': 1}
  path = results / 'trainable_gates/results/ablation.json'
  write(path, rows, options=options, **sizes)
  assert (
    '| mixup | 80.00 ± 0.00 | 87.00 ± 1.41 | 1.50 ± 0.71 | 2 |' in ablation_tables()
  )
