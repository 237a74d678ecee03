"""The page of several runs, and of a sweep, which is the same page."""

import json
import re

import pytest

from depthprune.report import compare, sweep
from depthprune.report.run_files import RunError
from depthprune.run.config import default
from tests.report.runs import made_up_gates, made_up_result, write_run
from tests.report.test_page import read


@pytest.fixture
def smaller(tmp_path):
  """The same run with a harder target: it costs less, and is worse."""
  result = made_up_result()
  result['options'] |= {'target': 0.3}
  result['flops'] = {**result['flops'], 'after': 1_500_000}
  result['held_out'] = {'before': 0.9861, 'after': 0.95}
  result['accuracy'] = {'before': 0.9833, 'after': 0.941}
  return write_run(tmp_path / 'smaller', result, made_up_gates())


@pytest.fixture
def swept(tmp_path):
  """A sweep of two targets, whose first run is still there."""
  folder = tmp_path / 'sweep'
  folder.mkdir()
  result = made_up_result()
  write_run(folder / 'target0.5', result, made_up_gates())
  kept = {
    name: result[name] for name in sweep.SweepResult.__annotations__ if name in result
  }
  runs = [
    {'folder': f'target{target}', 'settings': {'target': target}, **found}
    for target, found in (
      (0.5, {'result': kept, 'refused': None}),
      (0.4, {'result': kept, 'refused': None}),
      (0.1, {'result': None, 'refused': 'no'}),
    )
  ]
  config = default('trainable_gates').to_json() | {'model': 'resnet20'}
  values = {'config': config, 'swept': {'target': [0.5, 0.4, 0.1]}, 'runs': runs}
  (folder / 'sweep.json').write_text(json.dumps(values | {'command': 'depthprune <s>'}))
  return folder


def rows(html: str) -> list[list[str]]:
  table = html[html.index('<tbody>') : html.index('</tbody>')]
  lines = re.findall('<tr>(.*?)</tr>', table)
  return [re.findall('<t[hd][^>]*>(.*?)</t[hd]>', line) for line in lines]


def test_runs_have_a_front_a_table_that_sorts_and_charts_side_by_side(
  run_directory, smaller, sidenet_run, tmp_path
):
  to = tmp_path / 'several.html'
  assert compare.write([run_directory, smaller, sidenet_run], to) == to
  html = to.read_text(encoding='utf-8')
  text = ' '.join(read(html).text)
  assert '<h1>Which of 3 runs is worth having?</h1>' in html
  said = (
    'On the front of test accuracy against cost: smaller (94.1 %, 1.50 M FLOPs), run'
  )
  assert said in text
  assert re.findall('<h2>(.*?)</h2>', html) == [
    *('Accuracy against cost', 'All of them', 'To note', 'Widths of the layers'),
    *('What is left of every layer', 'Gates over time', 'Training', 'Run'),
  ]
  head = re.findall('<th scope="col">(.*?)</th>', html)
  assert head[:4] == ['run', 'method', 'model', 'data']
  assert [row[0] for row in rows(html)] == ['run', 'smaller', 'sidenet']
  assert [row[-1] for row in rows(html)] == ['★', '★', '']
  assert rows(html)[2][1] == 'SideNets' and rows(html)[2][-2] == '1.39'
  assert 'wide numbers sortable' in html
  assert re.findall('<figcaption>(.*?)</figcaption>', html) == [
    *(*['run', 'smaller'] * 4, 'sidenet'),
  ]
  assert 'accuracies on different data cannot be compared: digits, cifar10' in text


def test_only_what_differs_has_a_column(run_directory, smaller, tmp_path):
  compare.write([run_directory, smaller], tmp_path / 'page.html')
  html = (tmp_path / 'page.html').read_text()
  head = re.findall('<th scope="col">(.*?)</th>', html)
  assert head[:3] == ['run', 'target', 'test'] and 'runs' not in head
  assert 'different data' not in html


def test_runs_of_one_name_are_told_apart_by_where_they_are(run_directory, tmp_path):
  (tmp_path / 'other').mkdir()
  other = write_run(tmp_path / 'other' / 'run', made_up_result(), [])
  compare.write([run_directory, other, run_directory], tmp_path / 'page.html')
  html = (tmp_path / 'page.html').read_text()
  names = f'{tmp_path.name}/run', 'other/run'
  assert [row[0] for row in rows(html)] == [*names]


def test_a_run_without_held_out_data_is_not_on_the_front(
  run_directory, result, tmp_path
):
  del result['held_out']
  (run_directory / 'result.json').write_text(json.dumps(result))
  compare.write([run_directory], tmp_path / 'page.html')
  html = (tmp_path / 'page.html').read_text()
  assert 'Nothing was measured on held-out data' in html
  assert [row[-1] for row in rows(html)] == ['']


def test_a_sweep_has_the_same_page(swept):
  written = compare.write_sweep(sweep.read(swept), swept)
  assert written == swept / 'report.html'
  html = written.read_text(encoding='utf-8')
  text = ' '.join(read(html).text)
  assert 'Trainable gates: which setting of resnet20 on digits is worth' in text
  assert 'target 0.5 (98.1 %, 2.53 M FLOPs)' in text
  assert 'target0.1: no' in text and 'depthprune &lt;s&gt;' in html
  assert [row[0] for row in rows(html)] == ['0.5', '0.4', '0.1']
  assert re.findall('<figcaption>(.*?)</figcaption>', html) == ['target0.5'] * 4


def test_a_sweep_stands_for_its_runs(swept, smaller, tmp_path):
  write_run(swept / 'target0.4', made_up_result(), [])
  compare.write([swept, smaller], tmp_path / 'page.html')
  html = (tmp_path / 'page.html').read_text()
  assert [row[0] for row in rows(html)] == ['target0.5', 'target0.4', 'smaller']


def test_what_is_no_run_is_said(run_directory, tmp_path):
  with pytest.raises(RunError, match='gone: expected the directory of a run'):
    compare.write([run_directory, tmp_path / 'gone'], tmp_path / 'page.html')
  assert not (tmp_path / 'page.html').exists()


def test_the_page_asks_for_nothing(run_directory, smaller, tmp_path):
  compare.write([run_directory, smaller], tmp_path / 'page.html')
  html = (tmp_path / 'page.html').read_text()
  assert all(a.startswith(('#', 'data:')) for a in read(html).addresses)
