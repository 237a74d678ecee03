"""Compiled programs are kept on disk, so that the next run of the kind starts sooner.

It is jax's persistent compilation cache, in the user's cache directory. jax reads and
writes it; this file chooses the folder, bounds it, and decides where it is left alone.
"""

import hashlib
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import jax
import jaxlib.version
import numpy as np
from jax.experimental import serialize_executable

MOST_BYTES = 2 * 10**9  # of all programs together
ROOM_BYTES = 5 * 10**8  # on a disk with less room than this, nothing is written
LEAST = 'jax_persistent_cache_min_compile_time_secs'
LEAST_S = 0.2  # a program that compiles faster is not kept
CPU_INFO = Path('/proc/cpuinfo')


def keep_programs() -> Path | None:
  """Makes jax keep compiled programs in the user's cache directory.

  That is `$XDG_CACHE_HOME/depthprune/programs`, or the same in `~/.cache`. What was
  longest not read is removed when it exceeds 2 GB. Settings of jax itself win: with
  JAX_COMPILATION_CACHE_DIR programs are kept there, with
  JAX_ENABLE_COMPILATION_CACHE=false nowhere.

  Nothing is kept either where the folder cannot be written, the disk is nearly full, a
  program cannot be loaded again (https://github.com/jax-ml/jax/issues/38445), or
  several processes form one run, of which one would write while others read.

  Returns:
    The folder, or None where programs are not kept, or not by this function.
  """
  if not jax.config.values['jax_enable_compilation_cache'] or jax.process_count() > 1:
    return None
  try:
    folder = programs_folder()
    asked = jax.config.values['jax_compilation_cache_dir']
    if asked not in (None, str(folder)) or not _loads_again():
      return None
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass  # a folder that cannot be written raises
    trim(folder.parent, MOST_BYTES)
    if shutil.disk_usage(folder).free < ROOM_BYTES:
      return None
  except (OSError, RuntimeError):  # RuntimeError: the user has no home
    return None
  jax.config.update('jax_compilation_cache_dir', str(folder))
  if LEAST.upper() not in os.environ:
    jax.config.update(LEAST, LEAST_S)
  # A program that cannot be read is compiled, one that cannot be written is not kept.
  said = 'Error (reading|writing) persistent compilation cache'
  warnings.filterwarnings('ignore', said, UserWarning)
  return folder


def programs_folder() -> Path:
  """Returns the folder of the programs for this kind of machine and version of jax.

  Programs for a CPU use the instructions that it has, so that those of one machine may
  crash another with the same home directory.

  Raises:
    RuntimeError: the user has no home.
  """
  home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
  described = [platform.machine(), platform.processor()]
  if CPU_INFO.is_file():
    lines = CPU_INFO.read_text().splitlines()
    kinds = 'model name', 'flags', 'Features'  # x86, x86, ARM
    described += sorted({line for line in lines if line.startswith(kinds)})
  machine = hashlib.sha256('\n'.join(described).encode()).hexdigest()[:12]
  version = f'jaxlib{jaxlib.version.__version__}'
  return Path(home) / 'depthprune' / 'programs' / f'{version}-{machine}'


def trim(folder: Path, most: int) -> None:
  """Removes the files in a folder that were longest not read, down to `most` bytes."""
  found: list[tuple[float, int, Path]] = []
  for path in folder.rglob('*'):
    with suppress(FileNotFoundError):  # another run removes it at this moment
      if path.is_file():
        stat = path.stat()
        found.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
  size = sum(bytes for _, bytes, _ in found)
  for _, bytes, path in sorted(found):
    if size <= most:
      return
    path.unlink(missing_ok=True)
    size -= bytes


def _loads_again() -> bool:
  """Whether a program can be loaded on the machine that has compiled it."""
  with_one: Callable = lambda x: x + 1
  compiled = jax.jit(with_one).lower(np.float32(0)).compile()
  try:
    serialize_executable.deserialize_and_load(*serialize_executable.serialize(compiled))
  except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError):
    return False
  return True
