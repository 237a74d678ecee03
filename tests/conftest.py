"""Settings that hold for every test: strict promotion, two cores, real data."""

import gc
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Two test processes share two cores. One thread each is faster than four fighting,
# and makes every sum run in one order. Tests compile many small programs and run each
# a few times, so LLVM gets one small module a program and optimises little, which takes
# a tenth of the time. Flags from outside come last, so they win; a word that is not a
# flag would end the list. Read by XLA when it starts, hence up here.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'  # in the cache of who runs them
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


@pytest.fixture
def compilations() -> Iterator[list[str]]:
  """A list that grows by one for every program that is compiled."""
  found: list[str] = []

  def note(event: str, seconds: float, **_):
    if event == '/jax/core/compile/backend_compile_duration':
      found.append(event)

  jax.monitoring.register_event_duration_secs_listener(note)
  yield found
  jax.monitoring.unregister_event_duration_listener(note)


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
  'equinox': ('equinox==0.13.8', 'jaxtyping', 'wadler-lindig'),
  'haiku': ('dm-haiku==0.0.17', 'jmp', 'tabulate'),
  'transformers': (
    *('transformers==4.57.6', 'tokenizers==0.22.2', 'huggingface-hub==0.36.2'),
    *('safetensors', 'regex'),
  ),
  'torch': (
    *('torch==2.13.0', 'sympy', 'mpmath', 'networkx', 'fsspec', 'filelock'),
    *('typing_extensions', 'tqdm', 'requests', 'pyyaml'),
  ),
}


@pytest.fixture(scope='session')
def packages(request: pytest.FixtureRequest) -> Callable[[str], Path]:
  """packages(name) -> a folder with that library, for `sys.path`; or a skip.

  They are no dependencies of ours and never installed beside them: each has a folder in
  pytest's cache, filled once.
  """
  cache = request.config.cache.mkdir('packages')

  def folder(name: str) -> Path:
    found = cache / '-'.join(p for p in PACKAGES[name] if '==' in p)
    if not found.exists():
      new = tempfile.mkdtemp(dir=cache)
      command = (*(sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps'),
                 *('--target', new, *PACKAGES[name]))  # fmt: skip
      made = subprocess.run(command, capture_output=True, text=True)
      if made.returncode:
        pytest.skip(f'pip brings no {name}: {made.stderr.strip().splitlines()[-1:]}')
      if not found.exists():  # unless another worker was faster
        Path(new).rename(found)
    return found

  return folder
