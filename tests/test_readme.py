"""The README's Python runs as it stands, block after block, and is short."""

import re
from pathlib import Path

import jax

README = Path(__file__).parents[1] / 'README.md'
BLOCK = re.compile(r'^```python\n(.*?)^```$', re.DOTALL | re.MULTILINE)


def blocks() -> list[tuple[int, str]]:
  """(first line number, code) of every Python block."""
  text = README.read_text(encoding='utf-8')
  return [(text.count('\n', 0, m.start(1)) + 1, m[1]) for m in BLOCK.finditer(text)]


def test_the_blocks_run_in_order(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  names: dict = {'__name__': 'readme'}
  with jax.numpy_dtype_promotion('standard'):  # as a reader has it; optax.adam needs it
    for line, source in blocks():
      # Line numbers as in the README, so that a failure points into it.
      exec(compile('\n' * (line - 1) + source, str(README), 'exec'), names)
  assert names.keys() - {'__name__', '__builtins__'}


def test_the_first_block_is_the_quickstart_and_fits_in_25_lines():
  (_, quickstart), *_ = blocks()
  written = [line for line in quickstart.splitlines() if line.strip()]
  assert len(written) <= 25
  for step in ('couple', 'prune', 'save', 'load'):
    assert re.search(rf'\b{step}\(', quickstart), step
