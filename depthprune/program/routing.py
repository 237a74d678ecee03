"""Experts: slices of an axis that compete for every token, by the logits of a router.

A router is a contraction [tokens, width] x [width, experts] whose results, the logits,
are compared by top_k, argmax or a softmax. Removing an expert is the same as setting
its logit to -inf: no token chooses it, a softmax gives it 0, and the shares of the
others are what they are without it. So its column of the router is cut with its
weights, although sums and maxima over the experts are taken.

The indices of chosen experts are followed to where they are compared (one-hot codes),
looked up, counted or sorted by. After a cut both sides number the experts that are
left.
"""

from __future__ import annotations

import numpy as np

from depthprune.program import axes as ax
from depthprune.program import jaxpr as jx

EXPERT = 'its slices compete for every token: they are closed by -inf in the router'
FOLLOWED = frozenset(  # element by element, back from what is compared to the router
  """add add_any convert_element_type copy div exp logistic max min mul reduce_precision
  select_n stop_gradient sub tanh""".split()
)
MOVES = frozenset('broadcast_in_dim copy reshape slice squeeze transpose'.split())
WRAPS = frozenset(('lt', 'ge'))  # comparisons with 0, for indices from the end


def compete(facts: ax.Facts, v: jx.Value, axis: int) -> bool:
  """Finds and records the routers whose logits compete along an axis of a value.

  Returns whether the whole value comes from routers.
  """
  target = ax.norm(facts.dims[v][axis])
  if not isinstance(target, ax.Var) or target.pins:
    return False
  routers = _routers(facts, v, target, {})
  facts.routers.update(routers or {})
  return bool(routers)


def _routers(
  facts: ax.Facts, v: jx.Value, target: ax.Var, seen: dict[jx.Value, dict | None]
) -> dict[jx.Equation, int] | None:
  """Returns {router: its axis} of values, {} where they come from none.

  None says that something else makes them, or that -inf in a router might not make them
  the only lowest: it is subtracted, cut off, or multiplied with what may be negative.
  """
  if v in seen:
    return seen[v]
  at = [i for i, d in enumerate(facts.dims[v]) if ax.norm(d) is target]
  e, found = facts.made.get(v), None
  if not at or v not in facts.activations:
    found = {}  # a statistic of all slices, or a bias
  elif e is not None and e.name == 'dot_general' and len(at) == 1:
    found = {e: at[0]}
  elif e is not None and e.name == 'eq' and any(u in facts.chosen for u in e.inputs):
    found = {}  # a code of those that were chosen before
  elif e is not None and e.name in FOLLOWED | MOVES:
    parts = [_routers(facts, u, target, seen) for u in e.inputs]
    falls = e.name in ('sub', 'div') and bool(parts[1])
    falls |= e.name == 'max' and not all(parts)  # all below a bound are alike
    signed = (e.name == 'mul' and all(parts)) or any(map(_is_negative, e.inputs))
    if None not in parts and not falls and not (signed and e.name in ('mul', 'div')):
      found = {router: i for part in parts for router, i in (part or {}).items()}
  seen[v] = found
  return found


def _is_negative(v: jx.Value) -> bool:
  return isinstance(v, jx.Literal) and np.ndim(v.val) == 0 and bool(v.val < 0)


def softmax_input(facts: ax.Facts, e: jx.Equation) -> jx.Value | None:
  """Returns the logits of a softmax whose sum is this equation, or None."""
  exp = facts.made.get(e.inputs[0])
  if e.name != 'reduce_sum' or len(e.params['axes']) != 1 or exp is None:
    return None
  shifted = facts.made.get(exp.inputs[0]) if exp.name == 'exp' else None
  return None if shifted is None or shifted.name != 'sub' else shifted.inputs[0]


def follow(facts: ax.Facts, e: jx.Equation):
  """Follows the indices of chosen slices; other uses of them pin the axis."""
  for v in e.inputs:
    axis = facts.chosen.get(v)
    if axis is None:
      continue
    others = [u for u in e.inputs if u is not v]
    numbers = not jx.differentiable(e.outputs[0])
    if e.name == 'eq' and others and others[0] in facts.counted:
      counted = facts.counted[others[0]]
      if counted.size == axis.size and _is_count(facts, others[0]):
        ax.unify(axis, counted, e)
        continue
      ax.pin(counted, 'iota')
    elif e.name in MOVES | {'convert_element_type'} and numbers:
      facts.chosen[e.outputs[0]] = axis
      continue
    elif e.name in WRAPS and _equal(facts, others, 0):
      continue
    elif (e.name == 'max' and _equal(facts, others, 0)) or (
      # Where an index is negative, it counts from the end: it never is.
      e.name == 'add' and _equal(facts, others, axis.size)
    ):
      facts.chosen[e.outputs[0]] = axis
      continue
    elif e.name == 'sort':  # the order is the same for those that are left
      facts.chosen[e.outputs[e.inputs.index(v)]] = axis
      continue
    elif e.name == 'select_n' and all(
      facts.chosen.get(u) is axis for u in e.inputs[1:]
    ):
      facts.chosen[e.outputs[0]] = axis
      continue
    elif e.inputs.index(v) == 1 and addressed(facts, e) is not None:
      continue
    ax.pin(axis, f'its chosen slices are told apart by {e.where}')


def addressed(facts: ax.Facts, e: jx.Equation) -> int | None:
  """Which axis a gather or scatter addresses by the indices of chosen slices alone."""
  if e.name != 'gather' and not e.name.startswith('scatter'):
    return None
  dn, axis = e.params['dimension_numbers'], facts.chosen.get(e.inputs[1])
  if e.name == 'gather':
    at, alone = dn.start_index_map, dn.collapsed_slice_dims
  else:
    at, alone = dn.scatter_dims_to_operand_dims, dn.inserted_window_dims
  if axis is None or len(at) != 1 or tuple(at) != tuple(alone):
    return None
  return at[0] if e.inputs[0].shape[at[0]] == axis.size else None


def close(facts: ax.Facts):
  """Pins axes with chosen slices that later equations have split into several."""
  for axis in experts(facts):
    if not isinstance(axis, ax.Var):
      ax.pin(axis, 'parts of it are chosen')


def _is_count(facts: ax.Facts, v: jx.Value) -> bool:
  """Whether integers are 0, 1, 2, ... along their axis, and not computed from these."""
  e = facts.made[v]
  while e.name in MOVES - {'slice'} | {'convert_element_type'}:
    e = facts.made[e.inputs[0]]
  return e.name == 'iota'


def _equal(facts: ax.Facts, values: list[jx.Value], number: int) -> bool:
  """Whether all values are this constant, of whatever type."""
  made = (facts.made.get(v) for v in values)
  casts = [
    e.inputs[0] if e and e.name == 'convert_element_type' else None for e in made
  ]
  sources = [cast or v for cast, v in zip(casts, values, strict=True)]
  return all(isinstance(v, jx.Literal) and v.val == number for v in sources)


def experts(facts: ax.Facts) -> dict[ax.Axis, int]:
  """Returns the axes whose slices compete, and how many slices have to be left."""
  at = (facts.dims[e.outputs[0]][i] for e, i in facts.routers.items())
  least = dict.fromkeys(map(ax.norm, at), 1)
  for axis, count in facts.picks:
    least[ax.norm(axis)] = max(count, least.get(ax.norm(axis), 1))
  return least
