"""A time to compile is one, also where jax keeps programs on disk."""

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from depthprune.timing import compilation


def test_it_compiles_although_the_program_is_kept(tmp_path):
  names = (
    'jax_enable_compilation_cache',
    'jax_compilation_cache_dir',
    'jax_persistent_cache_min_compile_time_secs',
  )
  before = {name: getattr(jax.config, name) for name in names}
  hits = []
  note = lambda event, **_: hits.append(event) if event.endswith('cache_hits') else None
  jax.monitoring.register_event_listener(note)
  try:
    for name, value in zip(names, (True, str(tmp_path), 0.0)):
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    lowered = lambda: jax.jit(lambda x: jnp.tanh(x) * 3).lower(jnp.ones(7))
    lowered().compile()
    kept = len([*tmp_path.iterdir()])
    assert kept
    assert compilation.compile_seconds(lowered()) > 0
    assert not hits
    with compilation.uncached():
      jax.jit(lambda x: jnp.tanh(x) * 4).lower(jnp.ones(7)).compile()
    assert len([*tmp_path.iterdir()]) == kept  # nor is it kept
    lowered().compile()
    assert hits and jax.config.jax_enable_compilation_cache
  finally:
    jax.monitoring.unregister_event_listener(note)
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
