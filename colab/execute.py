"""Runs the notebooks of this folder from top to bottom and stores their outputs.

  python colab/execute.py                # all of them, a minute or two each
  python colab/execute.py netcut         # one

Run it by `make notebooks` when a notebook or what it shows has changed. Each starts in
an empty folder. Progress bars, times and versions are not stored, so that a notebook
differs only where its results do.
"""

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
  """Returns a notebook with its outputs after running it in a folder."""
  notebook = nbformat.read(path, as_version=4)
  place = {'metadata': {'path': str(folder)}}
  NotebookClient(notebook, timeout=900, resources=place, record_timing=False).execute()
  for cell in notebook.cells:
    if cell.cell_type == 'code':
      cell.outputs = [output for output in cell.outputs if not _passing(output)]
  notebook.metadata.language_info = {'name': 'python'}
  return notebook


def _passing(output: nbformat.NotebookNode) -> bool:
  """Whether an output says what goes on: a progress bar, or a line for who waits."""
  bar = output.output_type == 'display_data' and 'image/png' not in output.data
  return bar or output.get('name') == 'stderr'


if __name__ == '__main__':
  for path in sorted(HERE.glob('*.ipynb')):
    if not sys.argv[1:] or path.stem in sys.argv[1:]:
      print(path.name, flush=True)
      with tempfile.TemporaryDirectory() as folder:
        nbformat.write(execute(path, Path(folder)), path)
