"""The equations of every jax primitive between the axes of its inputs and outputs.

A rule takes (facts, equation, axes of input 0, axes of input 1, …) and returns the axes
of every output. A primitive without a rule pins every axis it touches, and its name is
reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from depthprune.program import axes as ax
from depthprune.program import jaxpr as jx
from depthprune.program import layout, routing

ELEMENTWISE = frozenset(
  """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
  cbrt ceil clamp conj convert_element_type copy copy_p cos cosh
  custom_lin device_put digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt
  igamma igammac imag integer_pow is_finite le lgamma log log1p logistic lt max
  mesh_cast min mul ne neg nextafter not or polygamma
  population_count pow pvary pvary_invariant real reduce_precision
  regularized_incomplete_beta rem reshard round rsqrt select_n shift_left
  shift_right_arithmetic shift_right_logical sharding_constraint sign sin sinh sqrt
  square stop_gradient sub tan tanh xor zeta name complex""".split()
)
COMPARISONS = frozenset('eq eq_to ge gt le lt max min ne select_n sign'.split())
COUNTING = (ELEMENTWISE - COMPARISONS) | frozenset(  # what keeps counts what they are
  'broadcast_in_dim reshape squeeze transpose'.split()
)
COLLECTIVE = frozenset(
  'psum psum_invariant pmax pmin ppermute pbroadcast'.split()
)  # over an axis that vmap, shard_map or pmap names
LAYER = 'a layer of a scan'  # close its branches instead
REDUCE = frozenset(
  f'reduce_{op}' for op in ('sum', 'max', 'min', 'prod', 'and', 'or', 'xor')
)
PRODUCTS = frozenset(('dot_general', 'ragged_dot_general'))
NORMS = frozenset(('reduce_sum', 'reduce_max'))  # where they reduce magnitudes
ARGREDUCE = frozenset(('argmax', 'argmin'))
CUMULATIVE = frozenset('cumsum cumprod cummax cummin cumlogsumexp'.split())
WINDOW = frozenset(f'reduce_window{op}' for op in ('', '_sum', '_max', '_min'))
SCATTER = frozenset(
  """scatter scatter_add scatter_sub scatter_mul scatter_min scatter_max scatter-add
  scatter-sub scatter-mul scatter-min scatter-max""".split()
)
ANY_SHAPE = frozenset(
  """random_bits random_wrap random_unwrap random_seed random_fold_in random_split
  random_clone rng_bit_generator rng_uniform threefry2x32 empty create_token""".split()
)


def infer(
  facts: ax.Facts, program: jx.Program, in_dims: Sequence[ax.Dims]
) -> list[ax.Dims]:
  """States the equations of a program and returns the axes of its outputs.

  Args:
    facts: receives the axes of every value.
    program: the program.
    in_dims: the axes of each input.
  """
  env = facts.dims
  env.update((v, ax.fresh(v.shape)) for v in program.constants)
  env.update(zip(program.inputs, in_dims, strict=True))

  def read(v):
    if isinstance(v, jx.Literal):
      return env.setdefault(v, ax.fresh(v.shape))
    return env[v]

  for e in program.equations:
    outs = rule_of(e.name)(facts, e, *(read(v) for v in e.inputs))
    facts.made.update(dict.fromkeys(e.outputs, e))
    _follow_counts(facts, e)
    routing.follow(facts, e)
    for v, dims in zip(e.outputs, outs, strict=True):
      if tuple(d.size for d in dims) != v.shape:
        raise AssertionError(
          f'the rule of {e.where} gave axes of the sizes {[d.size for d in dims]}, '
          f'expected {v.shape}'
        )
      env[v] = dims
  for v in program.outputs:
    if v in facts.chosen:
      ax.pin(facts.chosen[v], 'numbers of its slices are returned')
  return [read(v) for v in program.outputs]


def rule_of(name: str) -> Callable:
  """Returns the rule of the primitive of this name."""
  if name in RULES:
    return RULES[name]
  families = (
    (ELEMENTWISE, elementwise), (REDUCE, reduce), (ARGREDUCE, argreduce),
    (CUMULATIVE, cumulative), (WINDOW, window), (SCATTER, layout.scatter),
    (COLLECTIVE, collective),
    (ANY_SHAPE, lambda facts, e, *_: [ax.fresh(v.shape) for v in e.outputs]),
  )  # fmt: skip
  return next((rule for names, rule in families if name in names), ax.opaque)


def _follow_counts(facts: ax.Facts, e: jx.Equation) -> None:
  """Pins an axis whose slices are told apart by their numbers.

  Arithmetic and changes of shape are followed, until the numbers become floats.
  """
  for axis in [facts.counted[v] for v in e.inputs if v in facts.counted]:
    if e.name not in COUNTING:
      if e.name != 'eq' or not any(v in facts.chosen for v in e.inputs):
        ax.pin(axis, 'iota')
      continue
    for v in e.outputs:
      if not jx.differentiable(v):
        facts.counted[v] = axis


# ---- shape-preserving ----------------------------------------------------------------


def elementwise(facts, e, *ins):
  _follow_repeats(facts, e, ins)
  outs = []
  for v in e.outputs:
    dims = []
    for i, n in enumerate(v.shape):
      same = [x[i] for x in ins if len(x) == len(v.shape) and x[i].size == n]
      for other in same[1:]:
        ax.unify(same[0], other, e)
      dims.append(same[0] if same else ax.Var(n))
    outs.append(dims)
  return outs


def _follow_repeats(facts: ax.Facts, e: jx.Equation, ins: Sequence[ax.Dims]):
  """Follows what repeats along an axis, up to where it is added to what does not."""
  shape = e.outputs[0].shape
  pairs = zip(e.inputs, ins, strict=True)
  varying = [(v, x) for v, x in pairs if v in facts.varying and len(x) == len(shape)]
  for i, n in enumerate(shape):
    repeats = [x[i].size < n or i in facts.repeated.get(v, ()) for v, x in varying]
    if any(repeats) and all(repeats):
      facts.repeated.setdefault(e.outputs[0], set()).add(i)
    elif any(repeats) and e.name in ('add', 'sub'):
      _, carrier = varying[repeats.index(False)]
      facts.written.append((carrier[i], f'{e.where} adds one value to all its slices'))


def unchanged(facts, e, *ins):
  """Gives every output the axes of the input at the same position."""
  return list(ins)


def collective(facts, e, *ins):
  """Combines the same slices of all members of a named axis.

  An axis that a vmap inside of the function names is a position, and disappears.
  """
  over = [i for i in e.params.get('axes', ()) if isinstance(i, int)]
  if over and e.params.get('axis_index_groups'):
    return ax.opaque(facts, e, *ins)
  for x in ins:
    for i in over:
      ax.note(x[i], f'reduced over by {e.where}')
  return [[d for i, d in enumerate(x) if i not in over] for x in ins]


def all_gather(facts, e, *ins):
  """Adds an axis with a slice for each member, or makes an axis so much longer."""
  p, outs = e.params, []
  k, members = p['all_gather_dimension'], ax.Var(p['axis_size'], 'gathered')
  for x in ins:
    at = ax.norm(ax.Prod(members, x[k])) if p['tiled'] else members
    outs.append([*x[:k], at, *x[k + p['tiled'] :]])
  return outs


def bitcast(facts, e, x):
  """Adds or removes the last axis, over which one element of a wider type is spread."""
  rank = len(e.outputs[0].shape)
  if rank > len(x):
    return [[*x, ax.Var(e.outputs[0].shape[-1], 'bitcast')]]
  if rank < len(x):
    ax.pin(x[-1], 'bitcast')
  return [x[:rank]]


def cumulative(facts, e, x):
  ax.note(x[e.params['axis']], f'accumulated along by {e.where}')
  return [x]


def sort(facts, e, *ins):
  for x in ins:
    ax.pin(x[e.params['dimension']], 'sorted along')
  return elementwise(facts, e, *ins)


def top_k(facts, e, x):
  axis = e.params.get('axis', -1) % len(x)
  if routing.compete(facts, e.inputs[0], axis):
    facts.chosen[e.outputs[1]] = x[axis]
    facts.picks.append((x[axis], e.outputs[0].shape[axis]))
  else:
    ax.pin(x[axis], 'top_k')
  last = ax.fresh([e.outputs[0].shape[axis]], 'top_k')
  return [[*x[:axis], *last, *x[axis + 1 :]]] * len(e.outputs)


# ---- contracting, reducing -----------------------------------------------------------


def dot_general(facts, e, lhs, rhs):
  (lc, rc), (lb, rb) = e.params['dimension_numbers']
  for i, j in zip([*lc, *lb], [*rc, *rb], strict=True):
    ax.unify(lhs[i], rhs[j], e)
  free_lhs = [d for i, d in enumerate(lhs) if i not in {*lc, *lb}]
  free_rhs = [d for i, d in enumerate(rhs) if i not in {*rc, *rb}]
  return [[lhs[i] for i in lb] + free_lhs + free_rhs]


def ragged_dot_general(facts, e, lhs, rhs, *sizes):
  """States the same for runs of rows, each of which meets a group's slice of rhs."""
  dn = e.params['ragged_dot_dimension_numbers']
  (lc, rc), (batch, _) = dn.dot_dimension_numbers
  rows, groups = {*dn.lhs_ragged_dimensions}, {*dn.rhs_group_dimensions}
  if batch or rows & {*lc} or len(groups) != 1 or [len(d) for d in sizes] != [1]:
    return ax.opaque(facts, e, lhs, rhs, *sizes)
  for i, j in zip(lc, rc, strict=True):
    ax.unify(lhs[i], rhs[j], e)
  for i in rows:
    ax.pin(lhs[i], 'cut into runs')
  for i in groups:
    ax.unify(rhs[i], sizes[0][0], e)
  free_lhs = [d for i, d in enumerate(lhs) if i not in {*lc}]
  return [free_lhs + [d for i, d in enumerate(rhs) if i not in {*rc} | groups]]


def conv_general_dilated(facts, e, lhs, rhs):
  """States lhs.C = g·rhs.I, rhs.O = g·o and out.C = g·o.

  With g groups, this holds for dense, grouped and depthwise convolutions alike.
  """
  p, dn = e.params, e.params['dimension_numbers']
  if p['batch_group_count'] != 1:
    return ax.opaque(facts, e, lhs, rhs)
  (n_l, c_l, *s_l), (o_r, i_r, *s_r) = dn.lhs_spec, dn.rhs_spec
  n_o, c_o, *_ = dn.out_spec
  for i in s_r:
    ax.pin(rhs[i], 'kernel window')
  for i in s_l:
    ax.pin(lhs[i], 'spatial')
  groups = ax.Var(p['feature_group_count'])
  per_group = ax.Var(rhs[o_r].size // groups.size)
  ax.unify(lhs[c_l], ax.norm(ax.Prod(groups, rhs[i_r])), e)
  ax.unify(rhs[o_r], ax.norm(ax.Prod(groups, per_group)), e)
  facts.hidden[e] = groups
  out: list[ax.Axis] = ax.fresh(e.outputs[0].shape, 'spatial')
  out[n_o], out[c_o] = lhs[n_l], ax.norm(ax.Prod(groups, per_group))
  return [out]


def reduce(facts, e, *ins):
  axes = e.params['axes']
  if (logits := routing.softmax_input(facts, e)) is not None:
    routing.compete(facts, logits, axes[0])
  for x in ins:
    for i in axes:
      if contracted(facts, e):
        facts.normalised.append(x[i])
      else:
        ax.note(x[i], f'reduced over by {e.where}')
  return [[d for i, d in enumerate(ins[0]) if i not in axes]] * len(e.outputs)


def argreduce(facts, e, x):
  for i in e.params['axes']:
    if e.name == 'argmax' and routing.compete(facts, e.inputs[0], i):
      facts.chosen[e.outputs[0]] = x[i]
    else:
      ax.pin(x[i], e.name)
  return reduce(facts, e, x)


def window(facts, e, *ins):
  p, x, out = e.params, ins[0], []
  for i, (d, n) in enumerate(zip(x, e.outputs[0].shape, strict=True)):
    if p['window_dimensions'][i] == p['window_strides'][i] == 1 and d.size == n:
      out.append(d)
    else:
      ax.pin(d, 'window')
      out.append(ax.Var(n, 'window'))
  return [out] * len(e.outputs)


# ---- control flow --------------------------------------------------------------------


def scan(facts, e, *ins):
  consts, carry, xs = jx.scan_parts(e, ins)
  loop = ax.Var(e.params['length'])
  loop.notes.add(LAYER)
  for x in xs:
    ax.unify(loop, x[0], e)
  facts.hidden[e] = loop
  outs = infer(facts, e.bodies[0], [*consts, *carry, *(x[1:] for x in xs)])
  for a, b in zip(carry, outs[: len(carry)], strict=True):
    ax.equal(a, b, e)
  return [*carry, *([loop, *y] for y in outs[len(carry) :])]


def while_rule(facts, e, *ins):
  test, body, carry = jx.while_parts(e, ins)
  infer(facts, e.bodies[0], [*test, *carry])
  for a, b in zip(carry, infer(facts, e.bodies[1], [*body, *carry]), strict=True):
    ax.equal(a, b, e)
  return carry


def cond(facts, e, _, *ins):
  first, *rest = (infer(facts, body, ins) for body in e.bodies)
  for outs in rest:
    for a, b in zip(first, outs, strict=True):
      ax.equal(a, b, e)
  return first


def own_derivative(facts, e, *ins):
  """Infers the body; the axes contracted in it take no gate.

  The derivative rule of the function would ignore the gate.
  """
  outs = infer(facts, e.bodies[0], ins)
  for inner in jx.walk(e.bodies[0]):
    for k, axis in (pair for side in contracted(facts, inner) for pair in side):
      ax.note(facts.dims[inner.inputs[k]][axis], f'contracted inside a {e.name}')
  return outs


def product_axes(e: jx.Equation) -> tuple[Sequence, Sequence]:
  """Returns the axes that a product contracts and those of its batch, by input."""
  ragged = e.params.get('ragged_dot_dimension_numbers')
  return ragged.dot_dimension_numbers if ragged else e.params['dimension_numbers']


def contracted(facts: ax.Facts, e: jx.Equation) -> list[list[tuple[int, int]]]:
  """Returns the (input, axis) pairs that are summed over, for each side to gate.

  A norm is among these: the sum or the maximum of magnitudes does not see zeros.
  """
  if e.name in PRODUCTS:
    axes, _ = product_axes(e)
    return [[(k, i) for i in own] for k, own in enumerate(axes)]
  if e.name == 'conv_general_dilated':
    return [[(1, e.params['dimension_numbers'].rhs_spec[1])]]
  if e.name in NORMS and e.inputs[0] in facts.magnitudes:
    return [[(0, i) for i in e.params['axes']]]
  return []


RULES = {
  'all_gather': all_gather, 'all_gather_invariant': all_gather,
  'bitcast_convert_type': bitcast,
  'broadcast_in_dim': layout.broadcast_in_dim, 'concatenate': layout.concatenate,
  'cond': cond, 'conv_general_dilated': conv_general_dilated,
  'custom_jvp_call': own_derivative,
  'custom_vjp_call': own_derivative, 'dot_general': dot_general,
  'dynamic_slice': layout.dynamic_slice,
  'dynamic_update_slice': layout.dynamic_update_slice,
  'fft': layout.fft, 'gather': layout.gather, 'iota': layout.iota,
  'optimization_barrier': unchanged,
  'pad': layout.pad, 'ragged_dot_general': ragged_dot_general,
  'reshape': layout.reshape, 'rev': layout.rev, 'scan': scan,
  'slice': layout.slice_rule, 'sort': sort, 'split': layout.split_rule,
  'squeeze': layout.squeeze, 'stack': layout.stack, 'tile': layout.tile, 'top_k': top_k,
  'transpose': layout.transpose, 'unstack': layout.unstack, 'while': while_rule,
}  # fmt: skip
