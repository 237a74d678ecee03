"""Settings that hold for every test: strict promotion, two cores, real data."""

import gc
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# Two test processes share two cores. One thread each is faster than four fighting,
# and makes every sum run in one order. Tests compile many small programs and run each
# a few times, so LLVM gets one small module a program and optimises little, which takes
# a tenth of the time. Flags from outside come last, so they win; a word that is not a
# flag would end the list. Read by XLA when it starts, hence up here.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = ' '.join(
  (
    '--xla_cpu_multi_thread_eigen=false',
    '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true',
    # Gone with jaxlib 0.11, and XLA ends at a flag that it does not know.
    '--xla_cpu_use_fusion_emitters=false'
    * importlib.metadata.version('jaxlib').startswith('0.10.'),
    '--xla_cpu_parallel_codegen_split_count=1',
    os.environ.get('XLA_FLAGS', ''),
  )
).strip()

import jax
import pytest

jax.config.update('jax_numpy_dtype_promotion', 'strict')
# Tracing makes many objects and little garbage.
gc.set_threshold(100_000, 50, 100)


@pytest.fixture(scope='session')
def tfds_data_dir() -> Path:
  """The folder with prepared TFDS sets, or a skip that says how to get one."""
  shared = Path(__file__).parents[2] / 'shared' / 'data' / 'tfds'
  folder = Path(os.environ.get('TFDS_DATA_DIR', shared))
  if not folder.is_dir():
    pytest.skip(f'no TFDS data in {folder}: set TFDS_DATA_DIR')
  return folder


@pytest.fixture
def tfds_data(tfds_data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  """As `tfds_data_dir`, and TFDS_DATA_DIR set to it for the test."""
  monkeypatch.setenv('TFDS_DATA_DIR', str(tfds_data_dir))
  return tfds_data_dir


# Libraries whose networks are cut in tests and recipes, and what each brings along.
PACKAGES = {
  'equinox': ('equinox', 'jaxtyping', 'wadler-lindig'),
  'transformers': (
    *('transformers==4.57.6', 'tokenizers==0.22.2', 'huggingface-hub<1.0'),
    *('safetensors', 'regex'),
  ),
}


@pytest.fixture(scope='session')
def packages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
  """packages(name) -> a folder with that library, for `sys.path`; or a skip.

  They are no dependencies of ours and never installed beside them: a folder of their
  own, filled once a session.
  """
  folders: dict[str, Path] = {}

  def folder(name: str) -> Path:
    if name not in folders:
      target = tmp_path_factory.mktemp(name)
      command = (*(sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps'),
                 *('--target', str(target), *PACKAGES[name]))  # fmt: skip
      made = subprocess.run(command, capture_output=True, text=True)
      if made.returncode:
        pytest.skip(f'pip brings no {name}: {made.stderr.strip().splitlines()[-1:]}')
      folders[name] = target
    return folders[name]

  return folder
