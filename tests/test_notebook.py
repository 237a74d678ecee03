"""Every notebook runs from top to bottom, defines nothing and carries no output."""

import ast
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / 'colab').glob('*.ipynb'))


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
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
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
  assert len(drawn) == 3
  assert (tmp_path / 'quickstart' / 'report.html').is_file()


def test_there_is_one_to_start_with():
  assert 'quickstart' in [path.stem for path in NOTEBOOKS]
