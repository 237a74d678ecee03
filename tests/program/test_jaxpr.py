"""Programs are the same where every equation is, and only there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.program import jaxpr as jx

X, W = jnp.ones((3, 3)), jnp.zeros((3, 3))
OFFSET = np.arange(3, dtype=np.float32)


def network(x, w):
  def turn(h, _):
    return jnp.tanh(h @ w), h.sum()

  h, sums = jax.lax.scan(turn, x, None, length=2)
  return jax.nn.relu(h - OFFSET) * 2, sums


def program(fn):
  return jx.trace(fn, (X, W)).program


def test_one_function_has_one_program():
  assert jx.same(program(network), program(network))
  assert jx.same(program(network), program(jax.jit(network)))  # calls are inlined


PAIRS = {
  'a literal': (lambda x, w: x * 2, lambda x, w: x * 3),
  'an input': (lambda x, w: x @ w, lambda x, w: w @ x),
  'an output': (lambda x, w: (x + 1, w), lambda x, w: (w, x + 1)),
  'a further equation': (lambda x, w: x @ w, lambda x, w: -(x @ w)),
  'the order of inputs': (lambda x, w: w - x @ w, lambda x, w: x @ w - w),
  'a parameter': (lambda x, w: w.sum(0), lambda x, w: w.sum(1)),
  'a constant': (lambda x, w: x + OFFSET, lambda x, w: x + OFFSET[::-1]),
  'a body': (
    lambda x, w: jax.lax.fori_loop(0, 2, lambda i, h: h @ w, x),
    lambda x, w: jax.lax.fori_loop(0, 2, lambda i, h: h @ w.T, x),
  ),
  'a type': (lambda x, w: x.astype(jnp.bfloat16), lambda x, w: x.astype(jnp.float16)),
}


@pytest.mark.parametrize('what', PAIRS)
def test_one_difference_is_enough(what):
  a, b = map(program, PAIRS[what])
  assert jx.same(a, a) and jx.same(b, b)
  assert not jx.same(a, b) and not jx.same(b, a)
