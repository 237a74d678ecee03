"""What the papers claim, beside what was measured and the strongest control.

A line for each claim, from the result files: accuracy in %, mean ± standard deviation
over seeds. What has no rows is called "not run".
"""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.result_files import (
  Row,
  files_with,
  link,
  path_of,
  percent,
  read,
  table,
)
from experiments.trainable_gates.comparison import NAMES

NOT_RUN = 'not run'
FEW = {1: 'one seed', 2: 'two seeds'}


class Line(NamedTuple):
  """A claim: what the paper says, what was measured, the control, and how it ended."""

  claim: str
  measured: str = NOT_RUN
  control: str = '–'
  verdict: str = NOT_RUN


def verdicts() -> str:
  """The table of claims."""
  lines = [
    gates(
      'Trainable gates: ResNet-56 (CIFAR-10) at half of its FLOPs without a drop; here '
      'with 10,000 images and 2 epochs, 2.1 times fewer; goal 91',
      'resnet56_cifar10',
      full=False,
      target=round(1 / 2.1, 4),
      goal=0.91,
    ),
    gates(
      'Trainable gates: the same ResNet-56 with half an epoch in all; gates learn, '
      'what is left is refitted, and nothing is trained after the cut',
      'resnet56_half_an_epoch',
      full=False,
      target=round(1 / 2.1, 4),
    ),
    gates(
      'Trainable gates are worth their training: a pretrained ResNet-20 at half of its '
      'FLOPs, 15,000 images, above cuts by L1 norm with the same epochs, teacher and '
      'refit',
      'resnet20_cifar10',
      full=False,
      target=0.5,
    ),
    gates_small_drop(),
    gates(
      'Trainable gates: the same ResNet-56 on all images, 45 epochs, 2.1 and 2.57 '
      'times fewer FLOPs; goal 94.0 and 93.8',
      'resnet56_cifar10',
      full=True,
      target=round(1 / 2.1, 4),
      goal=0.94,
    ),
    implosion(
      'Network Implosion: layers go without a drop; here 6 of 27 units of a pretrained '
      'ResNet-56, 10,000 images, at a drop of at most half a point',
      'resnet56_distilled',
      full=False,
    ),
    implosion(
      'Network Implosion: 42.86 % of the layers of a ResNet on CIFAR-10 go without a '
      'drop; here 12 of 27 units of a pretrained ResNet-56',
      'resnet56_pretrained',
      full=True,
    ),
    netcut(),
    sidenet(
      'SideNet: a frozen ResNet-56 (CIFAR-10) does half of its work, at a drop of half '
      'a point',
      'resnet56',
      goal=0.5,
    ),
    sidenet('SideNet: the same for a ResNet-20, goal 42 %', 'resnet20', goal=0.42),
    auxiliary('one task', 'resnet8_fashion_mnist', True, 'accuracy'),
    auxiliary('segmentation', 'segnet_camvid', False, 'miou'),
    auxiliary('two tasks on one trunk', 'resnet8_multi_fashion', True, 'accuracy'),
  ]
  return table(('claim', 'measured', 'control', 'verdict'), lines)


def when_pruning_pays() -> str:
  """Pruned networks beside the same shape trained from scratch, wherever both are."""
  compared = [*_gates_and_scratch(), *_implosion_and_scratch()]
  ahead = lambda pretrained: [
    each.gain > 0 for each in compared if each.pretrained == pretrained
  ]
  count = lambda pretrained: f'{sum(ahead(pretrained))} of {len(ahead(pretrained))}'
  lines = [
    (
      f'{each.subject} ({each.source})',
      'yes' if each.pretrained else 'no',
      f'{100 * each.flops:.0f}',
      percent(each.pruned),
      percent(each.scratch),
      f'{100 * each.gain:+.2f}',
    )
    for each in compared
  ]
  head = ('', 'pretrained', 'FLOPs, %', 'pruned', 'same shape from scratch', 'gain')
  return (
    'A pruned network inherits what the large one has learnt, and one from scratch '
    'begins with nothing: so pruning pays where the large network was trained for much '
    'longer than you are going to train. If it is not trained yet, or only for a few '
    'epochs, train a small one. Networks from scratch have all epochs of the pruned '
    'ones, without those of pretraining. The pruned network was ahead in '
    f'{count(True)} comparisons from pretrained weights, and in {count(False)} from '
    f'networks that were trained for this.\n\n{table(head, lines)}'
  )


class Comparison(NamedTuple):
  """The pruned network and one from scratch: accuracies, FLOPs left as a part."""

  subject: str
  source: str
  pretrained: bool
  flops: float
  pruned: Sequence[float]
  scratch: Sequence[float]

  @property
  def gain(self) -> float:
    return statistics.mean(self.pruned) - statistics.mean(self.scratch)


def _gates_and_scratch() -> Iterator[Comparison]:
  for path, content in files_with('trainable_gates', 'target', 'method').items():
    rows = content['rows']
    for target in sorted({r['target'] for r in rows}, reverse=True):
      own = at(rows, target)
      yield from _compared(path, content, own, 'gates', target)


def _implosion_and_scratch() -> Iterator[Comparison]:
  for path, content in files_with('implosion', 'method', 'accuracy').items():
    rows = content['rows']
    first = rows[0]
    share = first['flops'] / first['flops_full'] if 'flops_full' in first else 0.0
    yield from _compared(path, content, rows, first['method'], share)


def _compared(
  path: Path, content: dict, rows: Sequence[Row], method: str, flops: float
) -> Iterator[Comparison]:
  of = lambda name: [r['accuracy'] for r in rows if r['method'] == name]
  pruned, scratch = of(method), of('scratch')
  if pruned and scratch:
    config = content['config']
    subject = f'{config["model"]} on {config["data"]}'
    is_pretrained = config.get('pretrained') is not None
    yield Comparison(subject, rows_at(path), is_pretrained, flops, pruned, scratch)


# ---- one function for each kind of claim ---------------------------------------------


def gates(
  claim: str, name: str, full: bool, target: float, goal: float | None = None
) -> Line:
  """Gates beside the best of the cuts without training, at one target."""
  rows, source = rows_of('trainable_gates', name, full)
  rows = at(rows, target)
  own = {m: [r for r in rows if r['method'] == m] for m in NAMES}
  trained = own['gates']
  if not trained:
    return Line(claim)
  controls = {m: own[m] for m in ('l1', 'global', 'torch_pruning') if own[m]}
  best = max(controls, key=lambda m: mean_of(controls[m]), default='')
  beside = [f'{NAMES[m]} {accuracy(own[m])}' for m in (*controls, 'uncut') if own[m]]
  verdict = [at_least([r['accuracy'] for r in trained], goal)] if goal else []
  if best:
    by_seed = {r['seed']: r['accuracy'] for r in controls[best]}
    pairs = [
      (r['accuracy'], by_seed[r['seed']]) for r in trained if r['seed'] in by_seed
    ]
    verdict.append(above(*zip(*pairs, strict=True)) if pairs else 'other seeds')
  uncut = (
    f'uncut {percent({r["seed"]: r["accuracy_unpruned"] for r in trained}.values())}'
  )
  return Line(
    claim,
    measured=f'{accuracy(trained)} ({source})',
    control=', '.join([uncut, *beside]),
    verdict='; '.join(verdict),
  )


def gates_small_drop() -> Line:
  claim = (
    'Trainable gates: a pretrained ResNet-20 at 73 % of its FLOPs loses at most 0.3 '
    'point (a commercial toolkit: 0.6)'
  )
  rows, source = rows_of('trainable_gates', 'resnet20_small_drop', full=False)
  trained = [r for r in at(rows, 0.73) if r['method'] == 'gates']
  if not trained:
    return Line(claim)
  lost = [r['accuracy_unpruned'] - r['accuracy'] for r in trained]
  uncut = f'uncut {percent(r["accuracy_unpruned"] for r in trained)}'
  measured = f'{accuracy(trained)} ({source})'
  return Line(claim, measured, uncut, at_most(lost, 0.003))


def implosion(claim: str, name: str, full: bool) -> Line:
  rows, source = rows_of('implosion', name, full)
  methods = dict.fromkeys(r['method'] for r in rows)
  erased = {m: [r for r in rows if r['method'] == m] for m in methods}
  scratch, random = erased.pop('scratch', []), erased.pop('random', [])
  if not erased:
    return Line(claim)
  best = max(erased, key=lambda m: held_out(erased[m]))
  own = erased[best]
  lost = [r['accuracy_before'] - r['accuracy'] for r in own]
  controls = {'same shape from scratch': scratch, 'random units': random}
  beside = [f'{name} {accuracy(rs)}' for name, rs in controls.items() if rs]
  uncut = f'uncut {percent(r["accuracy_before"] for r in own)}'
  return Line(
    claim,
    f'{accuracy(own)}, by {best} ({source})',
    ', '.join([uncut, *beside]),
    at_most(lost, 0.005 if not full else 0.0),
  )


def netcut() -> Line:
  """At the price of depth for which most of the accuracy stays: the largest."""
  claim = (
    'NetCut: training finds the depth that a task needs, and the cut needs no '
    'retraining; here an MLP of 20 layers on fashion_mnist'
  )
  rows, source = rows_of('netcut', 'mlp_fashion_mnist', full=False)
  own = [r for r in rows if (r.get('aggregate'), r.get('gamma')) == ('log', 0.0)]
  if not own:
    return Line(claim)
  own = [r for r in own if r['beta'] == max(r['beta'] for r in own)]
  depths = {r['kept'] for r in own}
  single = [r for r in rows if r['method'] == 'single' and r['depth'] in depths]
  lost = [r['accuracy_before'] - r['accuracy_cut'] for r in own]
  kept = '/'.join(map(str, sorted(depths)))
  measured = percent(r['accuracy_cut'] for r in own)
  control = f'before the cut {percent(r["accuracy_before"] for r in own)}'
  if single:
    control += f', trained with that depth alone {accuracy(single)}'
  return Line(
    claim,
    f'{measured} at depth {kept}, {percent(r["flops"] / r["flops_full"] for r in own)} '
    f'% of the FLOPs ({source})',
    control,
    at_most(lost, 0.001),
  )


def sidenet(claim: str, name: str, goal: float) -> Line:
  """The FLOPs that are saved where a drop of half a point is asked for.

  Where kinds of heads were compared, it is the kind that saves most on the data that
  choose thresholds, by a way to choose that keeps to a drop on other data.
  """
  rows, source = rows_of('sidenet', f'{name}_heads', full=True)
  ways: dict[tuple[str, str], list[Row]] = {}
  for row in rows:
    for way, reached in row['drops']['0.5'].items():
      if way != 'each':
        ways.setdefault((row['variant'], way), []).append(reached)
  if ways:
    mean = lambda asked: statistics.mean(one['saved_where_chosen'] for one in asked)
    asked = max(ways.values(), key=mean)
  else:
    found = [rows_of('sidenet', f'{name}_cifar10', full) for full in (True, False)]
    rows, source = next((f for f in found if f[0]), ([], ''))
    frozen = [r['requests'] for r in rows if r['regime'] == 'frozen']
    requested = lambda q: (q['kind'], q['requested']) == ('drop', 0.5) and q['test']
    asked = [q for requests in frozen for q in requests if requested(q)]
  tests = [one['test'] for one in asked]
  if not tests:
    return Line(claim)
  saved = [test['saved'] for test in tests]
  lost = [test['drop'] / 100 for test in tests]
  alone = percent(test['accuracy'] + drop for test, drop in zip(tests, lost))
  return Line(
    claim,
    f'{percent(saved)} % of the FLOPs saved, {percent(lost)} points lost ({source})',
    f'the network alone {alone}',
    f'{at_least(saved, goal)}; of the drop: {at_most(lost, 0.005)}',
  )


def auxiliary(what: str, name: str, full: bool, score: str) -> Line:
  claim = f'A wider path while training makes a compact network better: {what}'
  rows, source = rows_of('auxiliary', name, full)
  value = {(r['method'], r['seed']): r['scores'][score] for r in rows}
  seeds = [seed for method, seed in value if method == 'search']
  if not seeds:
    return Line(claim)
  searched = [value['search', seed] for seed in seeds]
  longer = [value['longer', seed] for seed in seeds]
  unit = ' mean IoU' * (score == 'miou')
  return Line(
    claim,
    f'{percent(searched)}{unit} ({source})',
    f'the compact network alone, trained with as much compute: {percent(longer)}',
    above(searched, longer),
  )


# ---- words ---------------------------------------------------------------------------


def above(values: Iterable[float], controls: Iterable[float]) -> str:
  """Whether the first are above the second, by more than the spread of differences."""
  gains = [100 * (a - b) for a, b in zip(values, controls, strict=True)]
  mean, deviation = statistics.mean(gains), deviation_of(gains)
  spread = f' ± {deviation:.2f}' if len(gains) > 1 else ''
  by = f'by {abs(mean):.2f}{spread} points'
  if len(gains) in FEW:  # which decide nothing
    where = 'above' if mean > 0 else 'below'
    return f'{where} the control {by}, {FEW[len(gains)]}'
  if mean > deviation:
    return f'reached: above the control {by}'
  return f'not reached: {"below" if mean < 0 else "within the spread of"} it, {by}'


def at_most(lost: Iterable[float], allowed: float) -> str:
  """Whether a drop, as a fraction, is small enough in the mean."""
  return _against(100 * (allowed - statistics.mean(lost)))


def at_least(values: Iterable[float], goal: float) -> str:
  """Whether fractions reach a goal in the mean."""
  return _against(100 * (statistics.mean(values) - goal))


def _against(margin: float) -> str:
  if margin > -0.005:
    return 'reached'
  return f'not reached, by {-margin:.2f} point{"" if -margin <= 1 else "s"}'


def deviation_of(values: Sequence[float]) -> float:
  return statistics.stdev(values) if len(values) > 1 else 0.0


def accuracy(rows: Sequence[Row]) -> str:
  few = f' ({FEW[len(rows)]})' if len(rows) in FEW else ''
  return percent(r['accuracy'] for r in rows) + few


def mean_of(rows: Sequence[Row]) -> float:
  return statistics.mean(r['accuracy'] for r in rows)


def held_out(rows: Sequence[Row]) -> float:
  return statistics.mean(r['held_out'] for r in rows)


def at(rows: Sequence[Row], target: float) -> list[Row]:
  return [row for row in rows if row['target'] == target]


def rows_of(paper: str, name: str, full: bool) -> tuple[list[Row], str]:
  """The rows of an experiment, none if it has not run, and a link to them."""
  path = path_of(paper, name, full)
  if not path.is_file():
    return [], ''
  return read(path)['rows'], rows_at(path)


def rows_at(path: Path) -> str:
  """A short link, as many stand in a table."""
  return f'[rows]{link(path).partition("]")[2]}'
