"""Programs without what cannot matter: same values, fewer equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.program import jaxpr as jx
from depthprune.program.deadcode import dependent, simplify
from depthprune.program.jaxpr import bind, interpret


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


def two_branches(gates, ws, x):
  """A stack of layers with two gated branches each, and what each layer saw."""

  def layer(x, layer):
    (g, h), (w, v) = layer
    seen = x @ w
    return x + g * seen + h * (x @ v), seen.sum()

  return jax.lax.scan(layer, x, (gates, ws))


STACK = ((jnp.ones(2), jnp.full(2, 0.5)), (jnp.stack([W, W.T]), jnp.stack([W.T, W])), X)


def test_a_branch_closed_in_every_turn_frees_its_stack():
  """Inside the scan too, as long as nobody reads what its turns leave behind."""
  program = jx.trace(two_branches, STACK).program
  g, h, w, v, x = program.inputs
  for drop, freed in (([1], True), ([], False)):
    less = simplify(program, {g: 0}, drop)
    [scan] = less.equations
    inside = [e.name for e in scan.bodies[0].equations]
    assert (w not in jx.live(less)[1]) == freed and {h, v, x} <= jx.live(less)[1]
    assert inside.count('dot_general') == (1 if freed else 2)
    args = [None if freed and a is w else a for a in program.inputs]
    gates, (ws, vs), start = STACK
    arrays = dict(zip(program.inputs, (*gates, ws, vs, start)))
    got = run(less, [arrays.get(a) for a in args])
    expected = two_branches((jnp.zeros(2), gates[1]), (ws, vs), start)
    for a, b in zip(got, expected):
      np.testing.assert_allclose(a, b, rtol=1e-6)


def test_what_a_turn_leaves_behind_depends_on_what_it_reads():
  program = jx.trace(two_branches, STACK).program
  g, _, w, v, _ = program.inputs
  less = simplify(program, {g: 0})
  depends = lambda value: [o in dependent(less, [value]) for o in less.outputs]
  assert depends(w) == [False, True]
  assert depends(v) == [True, True]  # through what is carried to the next turn


def test_dependent_values():
  f = lambda a, b: (a * 2.0, a + b, b * 3.0)
  program = jx.trace(f, (X, X)).program
  found = dependent(program, [program.inputs[0]])
  assert [v in found for v in program.outputs] == [True, True, False]
