"""Every notebook runs from top to bottom, defines nothing and carries no output."""

import ast
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from depthprune.methods import names

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / 'colab').glob('*.ipynb'))
# One for each method, and the charts that it draws; gates are in the quickstart.
DRAWN = {'quickstart': 3, 'netcut': 2, 'implosion': 3, 'sidenet': 2, 'auxiliary': 2}


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
  return [cell for cell in notebook.cells if cell.cell_type == 'code']


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_it_imports_the_library_and_defines_nothing(path):
  for cell in code(nbformat.read(path, as_version=4)):
    # Magics are not Python; each is a line of its own, perhaps alone in its block.
    lines = [
      line.replace(line.lstrip(), 'pass') if line.lstrip().startswith('%') else line
      for line in cell.source.splitlines()
    ]
    for node in ast.walk(ast.parse('\n'.join(lines))):
      assert not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_valid_and_committed_without_output(path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  for cell in code(notebook):
    assert cell.outputs == []
    assert cell.execution_count is None


# The kernel's own machinery warns about what is not ours to change.
@pytest.mark.filterwarnings('default')
@pytest.mark.parametrize(
  'path',
  [
    pytest.param(path, marks=[pytest.mark.slow] * (path.stem != 'quickstart'))
    for path in NOTEBOOKS
  ],
  ids=lambda path: path.stem,
)
def test_it_runs_from_top_to_bottom(path, tmp_path):
  notebook = nbformat.read(path, as_version=4)
  client = NotebookClient(
    notebook, timeout=600, resources={'metadata': {'path': str(tmp_path)}}
  )
  # One epoch a stage: what is tested is the notebook, not the accuracy.
  client.execute(env=os.environ | {'PYTHONPATH': str(ROOT), 'DEPTHPRUNE_EPOCHS': '1'})
  drawn = [
    output
    for cell in code(notebook)
    for output in cell.outputs
    if 'image/png' in output.get('data', {})
  ]
  assert len(drawn) == DRAWN[path.stem]
  assert (tmp_path / path.stem / 'report.html').is_file()


def test_there_is_one_for_every_method():
  assert {path.stem for path in NOTEBOOKS} == {*DRAWN}
  methods = {'quickstart' if m == 'trainable_gates' else m for m in names()}
  assert methods == {*DRAWN}
