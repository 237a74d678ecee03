"""The recipes of docs/recipes run as they stand, and their sections are short."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / 'docs' / 'recipes').glob('*.py'))
LINES = 40  # of a section, at most
NEEDS = {'equinox': 'equinox', 'huggingface': 'transformers'}  # first word of the name


def run(source: str, folder: Path, packages: tuple[Path, ...] = ()) -> str:
  """Runs a program in a folder, and returns what it prints."""
  script = folder / 'recipe.py'
  script.write_text(source, encoding='utf-8')
  path = os.pathsep.join(map(str, (*packages, ROOT)))
  made = subprocess.run(
    [sys.executable, script],
    cwd=folder, env={**os.environ, 'PYTHONPATH': path}, capture_output=True, text=True,
  )  # fmt: skip
  assert made.returncode == 0, made.stderr[-3000:]
  return made.stdout


@pytest.mark.slow
@pytest.mark.parametrize('recipe', RECIPES, ids=lambda p: p.stem)
def test_a_recipe_runs(recipe, tmp_path, request):
  needed = NEEDS.get(recipe.stem.split('_')[0])
  packages = (request.getfixturevalue('packages')(needed),) if needed else ()
  printed = run(recipe.read_text(encoding='utf-8'), tmp_path, packages)
  assert 'Pruned:' in printed


def test_a_recipe_runs_with_few_steps(tmp_path):
  """The shortest of them, so that the fast tests notice a name that has gone."""
  source = (ROOT / 'docs/recipes/graph.py').read_text(encoding='utf-8')
  source, loops = re.subn(r'(for \w+ in range|steps=)\(?\d+\)?', shortened, source)
  assert loops >= 3
  assert run(source, tmp_path).count('Pruned:') == 3


def shortened(found: re.Match) -> str:
  """'steps=200' as 'steps=2', and 'for i in range(300)' as 'for i in range(2)'."""
  return f'{found[1]}2' if found[1] == 'steps=' else f'{found[1]}(2)'


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda p: p.stem)
def test_sections_are_short(recipe):
  head, *sections = re.split(r'^# %% ', recipe.read_text('utf-8'), flags=re.MULTILINE)
  assert head.startswith('"""') and len(sections) >= 4
  for section in sections:
    title, *lines = section.rstrip().split('\n')
    assert len(lines) < LINES, f'{title}: {len(lines) + 1} lines, at most {LINES}'
