"""Times compilation, whatever jax keeps of earlier programs on disk."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextmanager
def uncached() -> Iterator[None]:
  """Makes jax compile within the context, and neither load nor keep programs."""
  enabled = jax.config.values['jax_enable_compilation_cache']
  jax.config.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()  # jax looks at the setting only once
  try:
    yield
  finally:
    jax.config.update('jax_enable_compilation_cache', enabled)
    compilation_cache.reset_cache()


def compile_seconds(lowered: jax.stages.Lowered) -> float:
  """Returns the seconds that XLA takes to compile a program."""
  with uncached():
    started = time.perf_counter()
    lowered.compile()
    return time.perf_counter() - started
