"""report.html: one file, nothing from outside, everything a run has to say."""

import json
import re
from html.parser import HTMLParser

import pytest

from depthprune.report import page, run_files, sentences, style, tables
from tests.report.cascades import cascade_of, made_up_sidenet
from tests.report.runs import typed

VOID = {'meta', 'br', 'hr', 'img', 'link', 'input'}


class Reader(HTMLParser):
  """Collects addresses and text, and checks that every element is closed."""

  def __init__(self):
    super().__init__()
    self.open, self.addresses, self.text = [], [], []

  def handle_starttag(self, tag, attrs):
    names = ('src', 'href', 'xlink:href', 'srcset', 'data', 'action')
    self.addresses += [value for name, value in attrs if name in names]
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    if tag not in VOID:
      self.open.pop()

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data.replace('\xa0', ' '))


def read(html: str) -> Reader:
  reader = Reader()
  reader.feed(html)
  assert reader.open == []
  return reader


def asks_for_nothing(html: str) -> None:
  for address in read(html).addresses:
    assert address.startswith(('#', 'data:')), address
  assert not re.search(r'@import|<link|url\((?!#)|fetch|XMLHttp|import\(', html)
  assert re.findall('<script[^>]*>', html) == ['<script>']


@pytest.fixture(scope='module')
def html(read_only_run) -> str:
  return page.write(read_only_run).read_text(encoding='utf-8')


def test_it_is_one_file_that_asks_for_nothing(html, read_only_run):
  asks_for_nothing(html)
  assert [p.name for p in read_only_run.iterdir() if 'html' in p.name] == [
    'report.html'
  ]


def test_it_says_what_the_tables_say(html, result):
  text = ' '.join(read(html).text)
  read_in = typed(result)
  for row in tables.costs(read_in).rows:
    assert all(cell in text for cell in row), row
  proven, notes = sentences.proven(read_in), sentences.notes(read_in)
  for said in (proven, result['command'], *notes):
    assert said in text
  assert 'Requested 50.0 % of the FLOPs, reached 49.95 %' in text


def charts(html: str) -> int:
  """The number of charts, each of which is there for a screen and for a telephone."""
  assert html.count('class="screen"') == html.count('class="phone"')
  return html.count('<figure>')


def test_it_draws_layers_curves_and_gates(html):
  assert charts(html) == 3
  assert all(f'<h2>{name}</h2>' in html for name in ('Training', 'Gates over time'))


def test_every_chart_has_a_role_a_title_and_a_description(html):
  figures = re.findall('<figure>.*?</figure>', html, re.DOTALL)
  drawn = [
    svg for figure in figures for svg in re.findall('<svg.*?</svg>', figure, re.S)
  ]
  assert len(drawn) == 6
  for svg in drawn:
    said = re.match(
      '<svg role="img"[^>]*><title>(.+?)</title><desc>(.+?)</desc>', svg, re.DOTALL
    )
    assert said and len(said[2]) > 40
    assert said[1] in ('What is left of every layer', 'Training', 'Gates over time')


def test_a_layer_has_a_name_for_people_and_that_of_the_program_in_its_tooltip(html):
  tooltip = 'title="params/stage3/block2/conv1/kernel"'
  assert f'{tooltip}><span class="name">stage 3, block 2, first convolution</s' in html
  assert '<title>stage3/block2/conv1:3</title>' in html  # of a label in a chart


def test_the_facts_of_a_layer_can_be_read_without_a_script(html):
  found = html[html.index('title="params/stage3/block1/conv1/kernel"') :]
  found = ' '.join(read('<summary ' + found[: found.index('</details>')]).text)
  for said in ('64 → 21 (32.8 % kept)', '724 k → 213 k', 'kept: 0–1, 45–63'):
    assert said in found
  assert html.count('<details name="layer" open>') == 1


def test_charts_without_data_are_left_out(run_directory):
  for name in ('history', 'gates'):
    (run_directory / f'{name}.jsonl').write_text('')
  assert charts(page.write(run_directory).read_text()) == 1  # of the layers


def test_texts_are_shown_side_by_side_as_they_were_written(run_directory, result):
  said = {'whole': ' a <i>statement</i>\n', 'cut': 'the </dd> &amp; the', 'healed': 'a'}
  result['samples'] = [{'prompt': 'if <b> is', **said}, {**said, 'prompt': 'p'}]
  result['samples'][1].pop('healed')
  (run_directory / 'result.json').write_text(json.dumps(result))
  html = page.write(run_directory).read_text(encoding='utf-8')
  reader = read(html)
  texts = [text for text in reader.text if text.strip()]
  start = texts.index('Samples of text')
  whole = said['whole'].strip()
  first = ['whole', whole, 'cut', said['cut'], 'trained after the cut', 'a']
  assert texts[start + 1 : start + 8] == ['if <b> is …', *first]
  assert texts[start + 8 : start + 13] == ['p …', *first[:4]]
  assert '<i>' not in html[html.index('Samples of text') :].split('</section>')[0]


def test_names_cannot_break_the_page(run_directory, result):
  result['model'] = '<script>alert(1)</script>'
  result['command'] = 'depthprune "<b>" $title'
  (run_directory / 'result.json').write_text(json.dumps(result))
  layer = 'params/"><script>/kernel'
  result['layers'][layer] = {'outputs': [3], 'width': [64, 4], 'flops': [1e6, 1e3]}
  (run_directory / 'result.json').write_text(json.dumps(result))
  html = page.write(run_directory).read_text()
  assert html.count('<script') == 1
  assert 'depthprune "<b>" $title' in ' '.join(read(html).text)
  assert '&lt;b&gt;&#34; $title' in html


def test_a_method_that_there_is_not_is_named(run_directory, result):
  values = json.dumps(result | {'method': 'trainable_gate'})
  (run_directory / 'result.json').write_text(values)
  expected = "no method 'trainable_gate'; nearest: trainable_gates"
  with pytest.raises(ValueError, match=expected):
    page.write(run_directory)


def test_kept_channels_are_listed_as_ranges(html):
  text = ' '.join(read(html).text)
  assert 'kept: 0–1, 20–31' in text
  assert 'Removed: stage1/block2/branch.' in text


def test_a_run_from_when_there_was_one_method_has_the_same_page(
  run_directory, old_result, html
):
  (run_directory / 'result.json').write_text(json.dumps(old_result))
  assert page.write(run_directory).read_text(encoding='utf-8') == html


def test_netcut_shows_importance_and_what_was_decided(netcut_run):
  html = page.write(netcut_run).read_text(encoding='utf-8')
  text = ' '.join(read(html).text)
  assert 'Kept exit 3 of 20 (exit03) at β = 0.01' in text
  assert 'largest importance w 0.958, normalised entropy 0.167' in text
  titles = re.findall('<h2>(.*?)</h2>', html)
  assert titles == [
    *('Before and after', 'To note', 'Layers', 'Importance of the exits'),
    *('Training', 'Run'),
  ]
  assert charts(html) == 2


def test_implosion_shows_rounds_priorities_and_the_curve(implosion_run, implosion):
  html = page.write(implosion_run).read_text(encoding='utf-8')
  text = ' '.join(read(html).text)
  assert 'Erased 12 of 27 units in 3 rounds, chosen by priority; test accuracy' in text
  for round_ in implosion[0]['rounds']:
    assert ', '.join(round_['erased']) in text
  titles = re.findall('<h2>(.*?)</h2>', html)
  assert titles == [
    *('Before and after', 'To note', 'Rounds', 'Layers', 'Accuracy by erased units'),
    *('Priority of the units', 'Training', 'Run'),
  ]
  assert charts(html) == 3


def test_auxiliary_shows_the_connections_of_the_path(auxiliary_run):
  html = page.write(auxiliary_run).read_text(encoding='utf-8')
  text = ' '.join(read(html).text)
  assert 'Trained beside a path whose connections were searched (5 of 6 conn' in text
  assert re.findall('<h2>(.*?)</h2>', html) == [
    *('Before and after', 'To note', 'Layers', 'Connections of the path'),
    *('Training', 'Run'),
  ]
  assert charts(html) == 2


def test_every_role_of_a_chart_is_a_variable_of_the_page(html):
  for role in style.ROLES.values():
    assert html.count(f'--{role}: #') == 2, role  # light and dark


def test_the_same_run_gives_the_same_page(read_only_run, html):
  assert page.page(run_files.read(read_only_run)) == html


def test_a_cascade_shows_requests_curve_exits_and_reliability(sidenet_run, sidenet):
  html = page.write(sidenet_run).read_text(encoding='utf-8')
  text = ' '.join(read(html).text)
  said = 'Asked to lose at most 0.5 point: loses 0.31 point and saves 35.2 % of the '
  assert f'{said}FLOPs; test accuracy: MainNet 93.87 %, cascade 93.56 %.' in text
  assert re.findall('<h2>(.*?)</h2>', html) == [
    *('Before and after', 'Requested and reached', 'Accuracy against FLOPs', 'Exits'),
    *('Where examples leave', 'Reliability', 'Training', 'Run'),
  ]
  assert charts(html) == 4
  result, cascade = typed(sidenet), cascade_of(sidenet)
  for row in (*tables.requests(cascade).rows, *tables.exits(cascade).rows):
    assert all(cell in text for cell in row), row
  said = (
    *sentences.refused(cascade),
    *sentences.all_of(result),
    sentences.recipe_of(result).legend,
  )
  assert all(line in text for line in said)


def test_the_page_of_a_cascade_asks_for_nothing_either(sidenet_run):
  html = page.write(sidenet_run).read_text(encoding='utf-8')
  asks_for_nothing(html)
  assert page.page(run_files.read(sidenet_run)) == html


@pytest.mark.parametrize('exits', [1, 8])
def test_a_cascade_may_have_one_exit_or_eight_and_no_calibration(tmp_path, exits):
  result = made_up_sidenet(exits, '<b>{}/block{}')
  result['cascade']['calibration'] = {}
  (tmp_path / 'result.json').write_text(json.dumps(result))
  html = page.write(tmp_path).read_text(encoding='utf-8')
  assert html.count('&lt;b&gt;') == exits
  assert 'Reliability' not in html
  read(html)
