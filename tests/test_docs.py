"""The Python of README and guides runs as it stands, and their links lead somewhere."""

import re
from pathlib import Path

import jax
import pytest

import depthprune as dp

ROOT = Path(__file__).parents[1]
README = ROOT / 'README.md'
PAGES = README, *sorted((ROOT / 'docs').glob('*.md'))
BLOCK = re.compile(r'^```python\n(.*?)^```$', re.DOTALL | re.MULTILINE)
LINK = re.compile(r'\]\(([^)#\s]+)(?:#([^)]*))?\)')


def blocks(page: Path) -> list[tuple[int, str]]:
  """(first line number, code) of every Python block."""
  text = page.read_text(encoding='utf-8')
  return [(text.count('\n', 0, m.start(1)) + 1, m[1]) for m in BLOCK.finditer(text)]


@pytest.mark.parametrize('page', [p for p in PAGES if blocks(p)], ids=lambda p: p.stem)
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  names: dict = {'__name__': page.stem}
  with jax.numpy_dtype_promotion('standard'):  # as a reader has it; optax.adam needs it
    for line, source in blocks(page):
      # Line numbers as in the page, so that a failure points into it.
      exec(compile('\n' * (line - 1) + source, str(page), 'exec'), names)


def test_the_readme_is_short_and_says_what_its_first_example_prints(capsys):
  assert len(README.read_text(encoding='utf-8').splitlines()) <= 150
  (_, first), *_ = blocks(README)
  with jax.numpy_dtype_promotion('standard'):
    exec(first, {'__name__': 'readme'})
  before, after = map(float, re.findall(r'([\d.]+)%', capsys.readouterr().out)[-2:])
  assert before > 95 and after > 95  # on held-out images
  text = README.read_text(encoding='utf-8')
  said = re.search(r'([\d.]+) % and ([\d.]+) % of the test images', text)
  assert said and abs(float(said[1]) - before) <= 1 and abs(float(said[2]) - after) <= 1


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.stem)
def test_links_lead_to_files_and_headings(page):
  for target, heading in LINK.findall(page.read_text(encoding='utf-8')):
    if '://' in target:
      continue
    path = (page.parent / target).resolve()
    assert path.exists(), target
    if heading:
      text = path.read_text(encoding='utf-8')
      headings = re.findall(r'^#+ (.*)$', text, re.MULTILINE)
      assert heading in {slug(h) for h in headings}, heading


def slug(heading: str) -> str:
  """The anchor that GitHub and MyST give a heading."""
  return re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')


def test_every_public_name_is_in_the_reference():
  text = (ROOT / 'docs' / 'api.md').read_text(encoding='utf-8')
  named = set(re.findall(r'^ +depthprune\.(\w+)$', text, re.MULTILINE))
  assert named == {*dp.__all__}
