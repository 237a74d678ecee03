"""Sphinx: `make docs` builds docs/_build with warnings as errors."""

import contextlib
import re

from etils import epy

# Annotations are read here, and what was imported lazily is no type yet.
epy.lazy_imports = contextlib.nullcontext

from depthprune.version import __version__  # noqa: E402

project = 'depthprune'
release = __version__
extensions = [
  'myst_parser',
  'sphinx.ext.autodoc',
  'sphinx.ext.autosummary',
  'sphinx.ext.napoleon',
]
html_theme = 'furo'
html_title = f'depthprune {release}'
exclude_patterns = ['_build', 'recipes']
autosummary_imported_members = True
autodoc_typehints = 'none'
myst_heading_anchors = 3


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
