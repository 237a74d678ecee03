"""Programs without what cannot matter: same values, fewer equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.program import jaxpr as jx
from depthprune.program.deadcode import dependent, simplify
from depthprune.program.evaluate import bind, interpret


def run(program, args):
  body = lambda program, args: interpret(
    program, args, lambda e, ins: bind(e, ins, e.params, body)
  )
  return body(program, args)


def names(program):
  return [e.name for e in program.equations]


W = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)), jnp.float32)
X = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3)), jnp.float32)

BRANCHES = {
  'residual': lambda g, w, x: x + g * (x @ w),
  'behind layout': lambda g, w, x: x + (g * (x @ w)).reshape(3, 2).reshape(2, 3),
  'subtracted': lambda g, w, x: x - g * (x @ w),
  'divided': lambda g, w, x: x + (g * (x @ w)) / (1 + x**2),
  'cast': lambda g, w, x: x + g.astype(jnp.bfloat16).astype(x.dtype) * (x @ w),
  'both sides': lambda g, w, x: x + (x @ (g * w)) @ w,
  'output itself': lambda g, w, x: g * (x @ w),
  'joined': lambda g, w, x: jnp.concatenate([x, g * (x @ w)]),
  'odd function': lambda g, w, x: x + jnp.tanh(g * (x @ w)),
  'even and shifted': lambda g, w, x: x + jnp.cos(g * (x @ w)),
  'gate first': lambda g, w, x: (g * x) @ w + x,
}


@pytest.mark.parametrize('number', [0, 1])
@pytest.mark.parametrize('name', BRANCHES)
def test_known_gates_keep_the_value(name, number):
  program = jx.trace(BRANCHES[name], (jnp.float32(0), W, X)).program
  less = simplify(program, {program.inputs[0]: number})
  args = [jnp.float32(number), W, X]
  np.testing.assert_array_equal(run(less, args)[0], run(program, args)[0])
  assert less.inputs == program.inputs
  if number == 0 and name != 'output itself':
    assert 'dot_general' not in names(less) or name == 'even and shifted'
  if name == 'residual':
    assert names(less) == ([] if number == 0 else ['dot_general', 'add'])


def test_a_closed_branch_frees_its_weights_only():
  def f(g, w, v, x):
    return (x + g * (x @ w)) @ v

  program = jx.trace(f, (jnp.float32(0), W, W, X)).program
  _, w, v, x = program.inputs
  needed = jx.live(simplify(program, {program.inputs[0]: 0}))[1]
  assert w not in needed and {v, x} <= needed


def test_dropped_outputs_take_what_only_they_need():
  def f(w, v, x):
    h = x @ w
    return h.sum(), jnp.sin(h @ v), h

  program = jx.trace(f, (W, W, X)).program
  less = simplify(program, {}, drop=[1])
  assert len(less.outputs) == 2 and 'sin' not in names(less)
  assert names(less).count('dot_general') == 1
  for a, b in zip(run(less, [W, W, X]), [*run(program, [W, W, X])][::2], strict=True):
    np.testing.assert_array_equal(a, b)


def test_constants_of_dead_equations_go():
  table = np.arange(6.0, dtype=np.float32).reshape(2, 3)
  f = lambda g, x: x + g * (x * jnp.asarray(table))
  program = jx.trace(f, (jnp.float32(0), X)).program
  assert not simplify(program, {program.inputs[0]: 0}).constants


def test_control_flow_is_kept_whole():
  def f(g, w, x):
    h, _ = jax.lax.scan(lambda h, _: (h @ w, None), x, None, length=2)
    return x + g * h

  program = jx.trace(f, (jnp.float32(0), W, X)).program
  assert names(simplify(program, {program.inputs[0]: 0})) == []
  assert 'scan' in names(simplify(program, {program.inputs[0]: 1}))


def test_dependent_values():
  f = lambda a, b: (a * 2.0, a + b, b * 3.0)
  program = jx.trace(f, (X, X)).program
  found = dependent(program, [program.inputs[0]])
  assert [v in found for v in program.outputs] == [True, True, False]
