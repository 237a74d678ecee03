"""Which folder may import which, and how long a file may be.

program <- surgery <- inference, report; gates <- models; training.method <- methods.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES = 250

# What the files of a folder must not import. Nothing imports experiments.
FORBIDDEN = {
  'program': ('flax', 'depthprune'),
  'surgery': ('flax', 'depthprune'),
  'gates': ('depthprune',),
  'models': ('depthprune',),
  'methods': ('depthprune.models', 'depthprune.surgery', 'depthprune.report'),
  'training': ('depthprune.report', 'depthprune.cli'),
  'inference': ('depthprune.report', 'depthprune.cli'),
  'report': ('depthprune.methods', 'depthprune.models', 'depthprune.cli'),
}
# The exceptions to these, in the direction of the arrows.
ALLOWED = {
  'program': ('depthprune.program',),
  'surgery': ('depthprune.program', 'depthprune.surgery'),
  'models': ('depthprune.gates', 'depthprune.models'),
}


def sources() -> list[Path]:
  return sorted((ROOT / 'depthprune').rglob('*.py'))


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


def within(name: str, packages: tuple[str, ...]) -> bool:
  return any(name == p or name.startswith(f'{p}.') for p in packages)


def offences(part: str, source: str) -> set[str]:
  """What the source of a file in depthprune/`part` imports and must not."""
  forbidden = (*FORBIDDEN.get(part, ()), 'experiments', 'tests')
  allowed = ALLOWED.get(part, ())
  return {
    name
    for name in imports(source)
    if within(name, forbidden) and not within(name, allowed)
  }


@pytest.mark.parametrize('path', sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
  part = path.relative_to(ROOT / 'depthprune').with_suffix('').parts[0]
  found = offences(part, path.read_text())
  assert not found, f'{part} must not import {", ".join(sorted(found))}'


@pytest.mark.parametrize(
  ('part', 'source'),
  [
    ('program', 'import flax.linen as nn'),
    ('program', 'def f():\n  from depthprune.surgery import cut'),
    ('surgery', 'from depthprune import training'),
    ('surgery', 'from depthprune.inference.latency import measure'),
    ('models', 'from depthprune.surgery.cut import prune'),
    ('models', 'import depthprune.methods.trainable_gates'),
    ('methods', 'from depthprune.models import build'),
    ('gates', 'from depthprune.models import arch'),
    ('training', 'from experiments import bench'),
  ],
)
def test_an_import_against_the_arrows_is_seen(part, source):
  assert offences(part, source)


def test_imports_along_the_arrows_are_not():
  assert not offences('surgery', 'from depthprune.program.couple import couple')
  assert not offences('models', 'from depthprune.gates import branch\nimport flax')
  assert not offences('methods', 'from depthprune.training.method import Method')
  assert not offences('report', 'from depthprune.surgery.cut import Pruned')


@pytest.mark.parametrize('path', sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_about_one_thing(path):
  lines = len(path.read_text().splitlines())
  assert lines <= LINES, f'{lines} lines, at most {LINES}: split it by what it is about'
