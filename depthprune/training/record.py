"""What a run leaves in its directory while it goes on: JSON files and JSON lines.

Of several processes one writes.
"""

import importlib.metadata
import json
import os
import shlex
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from depthprune.training import disk, hosts

PACKAGES = (
  'depthprune',
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'numpy',
  'grain',
  'pillow',
)


def write(path: Path, values: Mapping[str, Any]) -> None:
  """Writes one JSON object; the file is whole or absent, whenever the run is killed.

  Raises: WriteError where there is no room.
  """
  if not hosts.writes():
    return
  scratch = path.with_suffix('.partial')
  with disk.writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch.write_text(json.dumps(values, indent=1) + '\n')
    os.replace(scratch, path)


def read(path: Path) -> dict[str, Any] | None:
  """What `write` wrote; None where there is nothing, and, with a warning, where a
  machine that died broke it."""
  if not path.is_file():
    return None
  try:
    return json.loads(path.read_bytes())
  except ValueError as error:
    warnings.warn(f'{path}: damaged, and not looked at: {error}', stacklevel=2)
    return None


def append(path: Path, values: Mapping[str, Any]) -> None:
  """Adds one line; a reader takes the last line of a step that was repeated.

  Raises: WriteError where there is no room.
  """
  if not hosts.writes():
    return
  with disk.writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('ab+') as lines:
      if lines.tell():  # the last line may have been cut short
        lines.seek(-1, os.SEEK_END)
        lines.write(b'\n' * (lines.read(1) != b'\n'))
      lines.write(json.dumps(values).encode() + b'\n')


def plain(tree: Any) -> Any:
  """A tree of arrays as numbers and lists, for JSON."""
  return jax.tree.map(lambda x: np.asarray(x).tolist(), jax.device_get(tree))


def versions() -> dict[str, str]:
  """The installed versions of what a result depends on."""
  found = {'python': sys.version.split()[0]}
  for package in PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = 'not installed'
  return found


def command() -> str:
  """How this process was started, without the path to the interpreter."""
  spec = getattr(sys.modules['__main__'], '__spec__', None)
  if spec is not None:
    module = spec.name.removesuffix('.__main__')
    return shlex.join(['python', '-m', module, *sys.argv[1:]])
  return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
