"""Which folder may import which: an allow-list, read as a graph that has no circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / 'depthprune'
LINES = 600

# Folder (or file at the top): the folders that it may import besides itself.
ALLOWED = {
  'program': (),
  'gates': (),
  'distributed': (),
  'storage': ('distributed',),
  'timing': ('program',),
  'surgery': ('program', 'timing'),
  'models': ('gates', 'program', 'storage'),
  'data': ('program', 'storage', 'distributed'),
  'train': ('program', 'surgery', 'timing', 'storage', 'distributed', 'data'),
  'cascades': (
    *('program', 'surgery', 'timing', 'storage', 'distributed', 'data', 'models'),
  ),
  'methods': ('train', 'program', 'timing', 'gates'),
  'exports': ('program', 'surgery', 'models', 'storage', 'distributed', 'cascades'),
  'run': (
    *('program', 'gates', 'surgery', 'timing', 'storage', 'distributed'),
    *('models', 'data', 'train', 'cascades', 'methods', 'exports'),
  ),
  'version': (),
  '__main__': ('run', 'cli'),
  'report': ('run', 'train', 'methods', 'storage', 'cascades', 'timing'),
  'mistakes': ('run', 'methods'),
  'runs': ('run', 'report', 'methods', 'train'),
  'cli': ('mistakes', 'run', 'report', 'methods', 'exports', 'storage', 'distributed'),
}
# Libraries that a folder does without: a traced program knows nothing of Flax.
FOREIGN = {
  'program': ('jax', 'numpy'),
  'gates': ('jax', 'numpy', 'flax'),
}
STDLIB = __import__('sys').stdlib_module_names


def sources() -> list[Path]:
  """All files of the package but the one that lists its public names."""
  return sorted(p for p in PACKAGE.rglob('*.py') if p != PACKAGE / '__init__.py')


def part_of(path: Path) -> str:
  return path.relative_to(PACKAGE).with_suffix('').parts[0]


def imports(source: str) -> set[str]:
  """Full names of all that a file imports, inside functions too."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, 'imports are absolute, so that they can be searched for'
      found |= {f'{node.module}.{alias.name}' for alias in node.names}
  return found


def edges(source: str) -> set[str]:
  """The parts of this package that a file imports; 'tests' and the like included."""
  named = [name.split('.') for name in imports(source)]
  ours = {name[1] for name in named if name[0] == 'depthprune' and len(name) > 1}
  return ours | {name[0] for name in named if name[0] in ('experiments', 'tests')}


def offences(part: str, source: str) -> set[str]:
  """What a file of depthprune/`part` imports and must not."""
  found = edges(source) - {part, *ALLOWED[part]}
  if part in FOREIGN:
    roots = {name.split('.')[0] for name in imports(source)} - {'depthprune'}
    found |= roots - {*STDLIB, *FOREIGN[part]}
  return found


@pytest.mark.parametrize('path', sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_only_what_its_folder_may(path):
  part = part_of(path)
  found = offences(part, path.read_text())
  assert not found, f'{part} must not import {", ".join(sorted(found))}'


def test_no_two_folders_need_each_other():
  """Of the imports that there are, not only of those that are allowed."""
  graph: dict[str, set[str]] = {}
  for path in sources():
    part = part_of(path)
    graph.setdefault(part, set()).update(edges(path.read_text()) - {part})
  tuple(TopologicalSorter(graph).static_order())
  tuple(TopologicalSorter(ALLOWED).static_order())


def test_a_circle_is_seen():
  with pytest.raises(CycleError):
    tuple(TopologicalSorter({**ALLOWED, 'train': ('methods',)}).static_order())


@pytest.mark.parametrize(
  ('part', 'source'),
  [
    ('program', 'import flax.linen as nn'),
    ('program', 'def f():\n  from depthprune.surgery import prune'),
    ('surgery', 'from depthprune import train'),
    ('surgery', 'from depthprune.models.heads import Head'),
    ('models', 'from depthprune.surgery.prune import prune'),
    ('models', 'import depthprune.methods.trainable_gates'),
    ('methods', 'from depthprune.models import build'),
    ('gates', 'from depthprune.models import arch'),
    ('methods', 'from depthprune.storage.directory import write'),
    ('train', 'from depthprune.run.config import Config'),
    ('run', 'from depthprune.report import page'),
    ('cli', 'from experiments import bench'),
  ],
)
def test_an_import_that_is_not_allowed_is_seen(part, source):
  assert offences(part, source)


@pytest.mark.parametrize('path', sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_about_one_thing(path):
  lines = len(path.read_text().splitlines())
  assert lines <= LINES, f'{lines} lines, at most {LINES}: split it by what it is about'


@pytest.mark.parametrize(
  'path',
  [p for part in ALLOWED for p in sorted((TESTS / part).glob('test_*.py'))],
  ids=lambda p: f'{p.parent.name}/{p.name}',
)
def test_tests_lie_as_what_they_test(path):
  """tests/run/test_job_faults.py tests depthprune/run/job.py."""
  tested = path.stem.removeprefix('test_')
  files = {p.stem for p in (PACKAGE / path.parent.name).glob('*.py')} | {'conformance'}
  assert any(tested == f or tested.startswith(f'{f}_') for f in files)
