"""The pages in Chromium, where there is one: they fit a telephone and are not empty."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from depthprune.report import compare, page
from tests.report.cascades import made_up_sidenet
from tests.report.runs import (
  made_up_auxiliary,
  made_up_gates,
  made_up_implosion,
  made_up_netcut,
  made_up_result,
  write_run,
)

NAMES = 'chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
TELEPHONE, SCREEN = 390, 1200
CODE = """
const text = element => element.textContent.trim()
const seen = element => element.getBoundingClientRect().width > 0
function looked(frame) {
  const page = frame.contentDocument, {scrollWidth, clientWidth} = page.documentElement
  const all = name => [...page.querySelectorAll(name)]
  const charts = all('figure svg').filter(seen)
  const empty = charts.filter(svg => !svg.querySelector('image, [style*="--first"]'))
  const opened = () => all('details[name=layer][open] h3').map(text)
  const layers = all('summary.layer'), before = opened()
  if (layers.length) layers.at(-1).focus()
  const column = () => all('.sortable tbody th').map(text)
  const button = page.querySelector('.sortable th button')
  const sorted = [column()]
  for (const _ of [1, 2]) { button?.click(); sorted.push(column()) }
  return {
    overflow: scrollWidth - clientWidth, charts: charts.length,
    empty: empty.map(svg => text(svg.querySelector('title'))),
    before, after: opened(), last: layers.map(text).at(-1), sorted,
    sort: button?.parentElement.ariaSort,
  }
}
onload = () => {
  out.textContent = JSON.stringify([...document.querySelectorAll('iframe')].map(looked))
}
"""

pytestmark = pytest.mark.skipif(
  BROWSER is None, reason=f'there is no browser: none of {", ".join(NAMES)}'
)


def look(pages: list[str], width: int, tmp_path: Path) -> list[dict]:
  """Returns what a browser sees of pages in frames that are so many pixels wide."""
  frames = ''.join(
    f'<iframe width={width} height=900 srcdoc="{html.escape(each)}"></iframe>'
    for each in pages
  )
  frame = tmp_path / 'frames.html'
  frame.write_text(
    f'<meta charset=utf-8><pre id=out></pre>{frames}<script>{CODE}</script>'
  )
  command = [
    *(BROWSER, '--headless', '--no-sandbox', '--disable-gpu', '--dump-dom'),
    *(f'--user-data-dir={tmp_path / "browser"}', frame.as_uri()),
  ]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120)
  said = re.search('<pre id="out">(.+?)</pre>', done.stdout)
  assert said, done.stderr
  return json.loads(html.unescape(said[1]))


@pytest.fixture(scope='module')
def pages(tmp_path_factory) -> list[str]:
  """The page of a run of every method, and that of all of them."""
  folder = tmp_path_factory.mktemp('runs')
  made_up = {
    'gates': (made_up_result(), made_up_gates()),
    'netcut': made_up_netcut(),
    'implosion': made_up_implosion(),
    'auxiliary': made_up_auxiliary(),
    'sidenet': (made_up_sidenet(), []),
  }
  runs = [write_run(folder / name, *files) for name, files in made_up.items()]
  written = [*map(page.write, runs), compare.write(runs, folder / 'compare.html')]
  return [file.read_text(encoding='utf-8') for file in written]


@pytest.mark.parametrize('width', [TELEPHONE, SCREEN])
def test_the_pages_fit_and_no_chart_is_empty(width, pages, tmp_path):
  seen = look(pages, width, tmp_path)
  assert [each['overflow'] for each in seen] == [0] * 6
  assert [each['charts'] for each in seen] == [3, 2, 3, 2, 4, 16]
  assert [each['empty'] for each in seen] == [[]] * 6


def test_a_page_that_does_not_fit_and_a_chart_that_is_empty_are_seen(tmp_path):
  chart = '<figure><svg width=900 height=90><title>bare</title></svg></figure>'
  (seen,) = look([f'<!doctype html>{chart}'], TELEPHONE, tmp_path)
  assert seen['overflow'] > 500 and seen['empty'] == ['bare']


def test_a_layer_opens_when_it_has_the_focus_and_the_others_close(pages, tmp_path):
  seen, *_ = look(pages, SCREEN, tmp_path)
  assert seen['before'] == ['stage 3, block 2, first convolution']
  assert seen['after'] == [seen['last'].split('\n')[0]]


def test_a_table_sorts_in_both_directions(pages, tmp_path):
  *_, seen = look(pages, SCREEN, tmp_path)
  first, falling, rising = seen['sorted']
  assert first == ['gates', 'netcut', 'implosion', 'auxiliary', 'sidenet']
  assert rising == sorted(first) and falling == rising[::-1]
  assert seen['sort'] == 'ascending'
