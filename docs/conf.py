"""Sphinx: `make docs` builds docs/_build/html with warnings as errors."""

import contextlib
import re
import shutil
from pathlib import Path

from etils import epy

# Annotations are read here, and what was imported lazily is no type yet.
epy.lazy_imports = contextlib.nullcontext

from depthprune.version import __version__  # noqa: E402

project = 'depthprune'
release = __version__
extensions = [
  'myst_nb',
  'sphinx.ext.autodoc',
  'sphinx.ext.autosummary',
  'sphinx.ext.napoleon',
]
nb_execution_mode = 'off'  # `make notebooks` stores what they show
html_extra_path = ['groups_light.svg', 'groups_dark.svg']  # named in HTML, not Markdown
html_theme = 'furo'
html_title = f'depthprune {release}'
exclude_patterns = ['_build', 'recipes']
autosummary_imported_members = True
autodoc_typehints = 'none'
myst_heading_anchors = 3

# Sphinx reads pages below this folder only.
ROOT = Path(__file__).parents[1]
shutil.copytree(
  ROOT / 'colab',
  ROOT / 'docs' / 'notebooks',
  ignore=shutil.ignore_patterns('*.py', '.*'),
  dirs_exist_ok=True,
)


def as_rst(app, what, name, obj, options, lines: list[str]) -> None:
  """Turns a docstring, which is written for a terminal, into reStructuredText.

  `code` gets two backticks, the star of *args is itself, and what is indented below a
  paragraph is a program.
  """
  found = []
  for i, line in enumerate(lines):
    begins = line.startswith('  ') and i > 1 and not lines[i - 1].strip()
    if begins and not lines[i - 2].startswith(' ') and not lines[i - 2].endswith('::'):
      found += ['::', '']
    found.append(line)
  text = re.sub(r'(?<![`\w])`([^`]+)`(?!`)', r'``\1``', '\n'.join(found))
  parts = re.split(r'(``.*?``)', text, flags=re.DOTALL)
  parts[::2] = [re.sub(r'([*|])', r'\\\1', x) for x in parts[::2]]
  lines[:] = ''.join(parts).split('\n')


def setup(app) -> None:
  app.connect('autodoc-process-docstring', as_rst, priority=400)  # before napoleon
