"""Every notebook teaches, uses public names only, and is stored as it was executed."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

import depthprune as dp
from colab.execute import execute
from depthprune.methods import names

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / 'colab').glob('*.ipynb'))
# One for each method, and the charts that it draws; gates are in the quickstart.
DRAWN = {'quickstart': 3, 'netcut': 2, 'implosion': 2, 'sidenet': 2, 'auxiliary': 2}
DRAWN |= {'own_network': 1}
LARGEST = 400_000  # bytes of a notebook, with its outputs

each_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
  return [cell for cell in notebook.cells if cell.cell_type == 'code']


def pictures(notebook: nbformat.NotebookNode) -> int:
  outputs = [output for cell in code(notebook) for output in cell.outputs]
  return sum('image/png' in output.get('data', {}) for output in outputs)


def parsed(path: Path) -> list[ast.AST]:
  """All nodes of the Python in a notebook."""
  nodes = []
  for cell in code(nbformat.read(path, as_version=4)):
    # Magics are not Python; each is a line of its own, perhaps alone in its block.
    lines = [
      line.replace(line.lstrip(), 'pass') if line.lstrip().startswith('%') else line
      for line in cell.source.splitlines()
    ]
    nodes += ast.walk(ast.parse('\n'.join(lines)))
  return nodes


def test_there_is_one_for_every_method_and_one_for_a_network_of_ones_own():
  assert {path.stem for path in NOTEBOOKS} == {*DRAWN}
  methods = {'quickstart' if m == 'trainable_gates' else m for m in names()}
  assert methods | {'own_network'} == {*DRAWN}


@each_notebook
def test_it_uses_public_names_only(path):
  for node in parsed(path):
    if isinstance(node, ast.ImportFrom):
      assert node.module and not node.module.startswith('depthprune')
    if isinstance(node, ast.Import):
      ours = [alias for alias in node.names if alias.name.startswith('depthprune')]
      assert all((a.name, a.asname) == ('depthprune', 'dp') for a in ours)
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == 'dp':
      assert node.attr in dp.__all__


@each_notebook
def test_it_defines_nothing_but_a_network_of_ones_own(path):
  defined = [n for n in parsed(path) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
  network = ['Net', '__call__'] if path.stem == 'own_network' else []
  assert [node.name for node in defined] == network


@each_notebook
def test_it_explains_every_cell_before_it_comes(path):
  first, *rest = nbformat.read(path, as_version=4).cells
  assert f'/blob/main/colab/{path.name})' in first.source  # the badge
  before = first
  for cell in rest:
    if cell.cell_type == 'code':
      assert before.cell_type == 'markdown'
    else:
      sentences = re.findall(r'[.!?](?=\s|$)', cell.source)
      assert 2 <= len(sentences) <= 6, cell.source
    before = cell


@each_notebook
def test_it_is_stored_with_its_outputs(path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  counts = [cell.execution_count for cell in code(notebook)]
  assert counts == [*range(1, len(counts) + 1)]
  assert pictures(notebook) == DRAWN[path.stem]
  outputs = [output for cell in code(notebook) for output in cell.outputs]
  kinds = {output.output_type for output in outputs}
  assert kinds <= {'stream', 'execute_result', 'display_data'}
  assert not any(output.get('name') == 'stderr' for output in outputs)
  text = path.read_text(encoding='utf-8')
  assert len(text) <= LARGEST
  for foreign in ('/tmp', '/home', '/work', 'Traceback', 'Warning', '\\u001b'):
    assert foreign not in text


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
def test_it_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  copy = tmp_path / path.name
  text = path.read_text(encoding='utf-8')
  if path.stem == 'quickstart':  # what is tested is the notebook, not the accuracy
    text = re.sub(r'epochs=\d+', 'epochs=1', text)
  copy.write_text(text, encoding='utf-8')
  assert pictures(execute(copy, tmp_path)) == DRAWN[path.stem]
  if path.stem != 'own_network':
    assert (tmp_path / 'runs' / path.stem / 'report.html').is_file()
