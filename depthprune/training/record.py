"""What a run leaves in its directory while it goes on: JSON files and JSON lines.

Of several processes one writes.
"""

import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from depthprune.training import hosts

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
  """Writes one JSON object; the file is whole or absent, whenever the run is killed."""
  if not hosts.writes():
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  scratch = path.with_suffix('.partial')
  scratch.write_text(json.dumps(values, indent=1) + '\n')
  os.replace(scratch, path)


def append(path: Path, values: Mapping[str, Any]) -> None:
  """Adds one line; a reader takes the last line of a step that was repeated."""
  if not hosts.writes():
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('a') as lines:
    lines.write(json.dumps(values) + '\n')


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
    return ' '.join(['python -m', spec.name.removesuffix('.__main__'), *sys.argv[1:]])
  return ' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])
