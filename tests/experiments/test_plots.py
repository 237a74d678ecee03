"""The charts beside the result files."""

from experiments import plots, result_files
from experiments.implosion.oneshot import by_importance


def test_every_result_file_of_a_depth_method_has_its_charts(
  netcut_file, implosion_files
):
  drawn = [path for path, _ in plots.figures()]
  shots, runs = implosion_files
  assert drawn == [
    netcut_file.with_name('mlp_beta.svg'),
    netcut_file.with_name('mlp_importance.svg'),
    shots.with_name('oneshot_erased.svg'),
    runs.with_name('resnet20_erased.svg'),
  ]


def test_side_nets_have_a_curve_and_diagrams(sidenet_file):
  drawn = [path for path, _ in plots.figures()]
  names = ('resnet56_curve.svg', 'resnet56_reliability.svg')
  assert drawn == [sidenet_file.with_name(name) for name in names]


def test_without_result_files_there_is_nothing_to_draw(results):
  assert list(plots.figures()) == []


def test_importance_is_that_of_the_first_seed_and_of_every_beta(netcut_file):
  rows = [
    r for r in result_files.read(netcut_file)['rows'] if r.get('aggregate') == 'log'
  ]
  rows += [row | {'seed': 2, 'kept': 9} for row in rows]
  histories = plots.histories(rows)
  assert list(histories) == ['β = 0', 'β = 0.1']
  lines, kept = histories['β = 0']
  assert kept == 'exit04'
  assert [line['step'] for line in lines] == [0, 10]
  assert list(lines[0]['importance'])[::19] == ['exit01', 'exit20']


def test_curves_gather_the_seeds_and_leave_out_the_control(implosion_files):
  shots, runs = (result_files.read(path)['rows'] for path in implosion_files)
  curves = by_importance(shots)
  assert list(curves) == ['priority', 'random']
  assert [len(curve[n]) for curve in curves.values() for n in (0, 12)] == [1, 1, 1, 2]
  curves = plots.retrained(runs)
  assert list(curves) == ['priority', 'random']
  assert curves['priority']['after'] == {0: [0.93, 0.93], 1: [0.92, 0.93]}
