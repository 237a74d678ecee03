"""The equations: how each jax primitive relates the axes of its inputs and outputs.

A rule takes (facts, equation, axes of input 0, axes of input 1, …) and returns the axes
of every output. A primitive without a rule pins all that it touches and is reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from depthprune.program import jaxpr as jx
from depthprune.program.axes import (
  Axis, Cat, Dims, LayoutError, Prod, Var, factor, leaves, norm, note, pin, split, unify,
)  # fmt: skip

ELEMENTWISE = frozenset(
  """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
  bitcast_convert_type cbrt ceil clamp conj convert_element_type copy copy_p cos cosh
  custom_lin device_put digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma
  igammac imag integer_pow is_finite le lgamma log log1p logistic lt max mesh_cast min mul
  ne neg nextafter not optimization_barrier or polygamma population_count pow pvary
  pvary_invariant random_gamma real reduce_precision regularized_incomplete_beta rem
  reshard round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical
  sharding_constraint sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta name
  real_part complex""".split()
)
LAYER = 'a layer of a scan'  # close its branches instead
REDUCE = frozenset(
  """reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or
  reduce_xor""".split()
)
ARGREDUCE = frozenset(('argmax', 'argmin'))
CUMULATIVE = frozenset(
  ('cumsum', 'cumprod', 'cummax', 'cummin', 'cumlogsumexp', 'cumred')
)
WINDOW = frozenset(
  """reduce_window reduce_window_sum reduce_window_max reduce_window_min""".split()
)
SCATTER = frozenset(
  """scatter scatter_add scatter_sub scatter_mul scatter_min scatter_max scatter-add
  scatter-sub scatter-mul scatter-min scatter-max""".split()
)
ANY_SHAPE = frozenset(
  """random_bits random_wrap random_unwrap random_seed random_fold_in random_split
  random_clone rng_bit_generator rng_uniform threefry2x32 empty create_token""".split()
)


@dataclasses.dataclass
class Facts:
  """What has been inferred: the axes of every value, filled in by `infer`.

  Attributes:
    dims: the axes of every value, those inside bodies included.
    hidden: axes that lie on no array: a convolution's feature groups, a scan's loop.
    unknown: names of primitives without a rule that were met."""

  dims: dict[jx.Value, Dims] = dataclasses.field(default_factory=dict)
  hidden: dict[jx.Equation, Axis] = dataclasses.field(default_factory=dict)
  unknown: set[str] = dataclasses.field(default_factory=set)


def fresh(shape: Sequence[int], why: str | None = None) -> list[Axis]:
  return [Var(n, why) for n in shape]


def infer(facts: Facts, program: jx.Program, in_dims: Sequence[Dims]) -> list[Dims]:
  """States the equations of a program; returns the axes of its outputs."""
  env = facts.dims
  env.update((v, fresh(v.shape)) for v in program.constants)
  env.update(zip(program.inputs, in_dims, strict=True))

  def read(v):
    if isinstance(v, jx.Literal):
      return env.setdefault(v, fresh(v.shape))
    return env[v]

  for e in program.equations:
    outs = rule_of(e.name)(facts, e, *(read(v) for v in e.inputs))
    for v, dims in zip(e.outputs, outs, strict=True):
      if tuple(d.size for d in dims) != v.shape:
        raise AssertionError(
          f'rule of {e.where}: {[d.size for d in dims]} for {v.shape}'
        )
      env[v] = dims
  return [read(v) for v in program.outputs]


def rule_of(name: str):
  """The rule of a primitive, by its name."""
  if name in RULES:
    return RULES[name]
  families = (
    (ELEMENTWISE, elementwise), (REDUCE, reduce), (ARGREDUCE, argreduce),
    (CUMULATIVE, cumulative), (WINDOW, window), (SCATTER, scatter),
    (ANY_SHAPE, any_shape),
  )  # fmt: skip
  return next((rule for names, rule in families if name in names), opaque)


def equal(a: Dims, b: Dims, e: jx.Equation):
  for x, y in zip(a, b, strict=True):
    unify(x, y, e)


def opaque(facts, e, *ins):
  """The sound default: an unknown primitive forbids slicing everything it touches."""
  why = f'no rule for the primitive {e.name}'
  if any(d.size > 1 for x in ins for d in x):
    facts.unknown.add(e.name)
  for x in ins:
    for d in x:
      pin(d, why)
  return [fresh(v.shape, why) for v in e.outputs]


def any_shape(facts, e, *_):
  return [fresh(v.shape) for v in e.outputs]


# ---- shape-preserving ----------------------------------------------------------------


def elementwise(facts, e, *ins):
  outs = []
  for v in e.outputs:
    dims = []
    for i, n in enumerate(v.shape):
      same = [x[i] for x in ins if len(x) == len(v.shape) and x[i].size == n]
      for other in same[1:]:
        unify(same[0], other, e)
      dims.append(same[0] if same else Var(n))
    outs.append(dims)
  return outs


def cumulative(facts, e, x):
  note(x[e.params['axis']], f'accumulated along by {e.where}')
  return [x]


def sort(facts, e, *ins):
  for x in ins:
    pin(x[e.params['dimension']], 'sorted along')
  return elementwise(facts, e, *ins)


def top_k(facts, e, x):
  axis = e.params.get('axis', -1) % len(x)
  pin(x[axis], 'top_k')
  last = fresh([e.outputs[0].shape[axis]], 'top_k')
  return [[*x[:axis], *last, *x[axis + 1 :]]] * len(e.outputs)


def rev(facts, e, x):
  for d in e.params['dimensions']:
    pin(x[d], 'reversed')
  return [x]


def fft(facts, e, x):
  k = len(e.params['fft_lengths'])
  for d in x[len(x) - k :]:
    pin(d, 'fft')
  return [[*x[: len(x) - k], *fresh(e.outputs[0].shape[len(x) - k :], 'fft')]]


# ---- moving axes ---------------------------------------------------------------------


def transpose(facts, e, x):
  return [[x[i] for i in e.params['permutation']]]


def squeeze(facts, e, x):
  return [[d for i, d in enumerate(x) if i not in e.params['dimensions']]]


def broadcast_in_dim(facts, e, x, *_):
  out = fresh(e.outputs[0].shape)
  for i, o in enumerate(e.params['broadcast_dimensions']):
    if x[i].size == out[o].size:
      out[o] = x[i]
  return [out]


def reshape(facts, e, x, *_):
  """Matches runs of axes with equal products: prod(ins) = prod(outs)."""
  shape = e.outputs[0].shape
  if 0 in shape:
    return opaque(facts, e, x)
  out: list[Axis] = fresh(shape)
  i = j = 0
  while i < len(x) or j < len(shape):
    i0, j0, a, b = i, j, 1, 1
    if i < len(x):
      a, i = x[i].size, i + 1
    if j < len(shape):
      b, j = shape[j], j + 1
    while a != b:
      if a < b:
        a, i = a * x[i].size, i + 1
      else:
        b, j = b * shape[j], j + 1
    ins = [d for d in x[i0:i] if d.size != 1]
    big = [k for k in range(j0, j) if shape[k] != 1]
    if len(big) == 1:
      out[big[0]] = norm(Prod(*ins))
    elif big:
      unify(Prod(*ins), Prod(*(out[k] for k in big)), e)
  return [out]


def cut(a: Axis, lo: int, hi: int, e: jx.Equation) -> Axis:
  """The part of an axis from lo to hi."""
  if (lo, hi) == (0, a.size):
    return a
  try:
    _, rest = split(a, lo, e)
    return norm(split(rest, hi - lo, e)[0])
  except LayoutError as error:
    pin(a, f'sliced across its layout: {error}')
    return Var(hi - lo, 'a slice across a layout')


def split_rule(facts, e, x):
  sizes, axis = e.params['sizes'], e.params['axis']
  outs, at = [], 0
  for n in map(int, sizes):
    outs.append([*x[:axis], cut(x[axis], at, at + n, e), *x[axis + 1 :]])
    at += n
  return outs


def slice_rule(facts, e, x):
  p = e.params
  steps = p['strides'] or [1] * len(x)
  bounds = zip(x, p['start_indices'], p['limit_indices'], steps, strict=True)
  return [
    [
      cut(d, lo, hi, e) if step == 1 else strided(d, lo, hi, step, e)
      for d, lo, hi, step in bounds
    ]
  ]


def strided(d: Axis, lo: int, hi: int, step: int, e: jx.Equation) -> Axis:
  """Every step-th slice: the outer factor of outer*step, where the layout allows it."""
  count = -(-(hi - lo) // step)
  if lo < step and count * step == d.size:
    try:
      outer, inner = factor(d, count, e)
      pin(inner, 'strided slice')
      return outer
    except LayoutError:
      pass
  pin(d, 'strided slice')
  return Var(count, 'strided slice')


def concatenate(facts, e, *ins):
  k = e.params['dimension']
  first, *rest = ins
  for x in rest:
    equal([*first[:k], *first[k + 1 :]], [*x[:k], *x[k + 1 :]], e)
  return [[*first[:k], norm(Cat(*(x[k] for x in ins))), *first[k + 1 :]]]


def pad(facts, e, x, _):
  out = []
  for d, (lo, hi, inner), n in zip(
    x, e.params['padding_config'], e.outputs[0].shape, strict=True
  ):
    if inner or lo < 0 or hi < 0:
      pin(d, 'padded inside or cropped')
      out.append(Var(n, 'padded inside or cropped'))
    else:
      ends = [Var(n, 'padding') if n else Cat() for n in (lo, hi)]
      out.append(norm(Cat(ends[0], d, ends[1])))
  return [out]


def tile(facts, e, x):
  reps = e.params['reps']
  return [
    [norm(Prod(Var(r, 'tiled'), d)) if r > 1 else d for d, r in zip(x, reps, strict=True)]
  ]


def stack(facts, e, *ins):
  for x in ins[1:]:
    equal(ins[0], x, e)
  axis = e.params['axis']
  return [[*ins[0][:axis], Var(len(ins), 'stacked'), *ins[0][axis:]]]


def unstack(facts, e, x):
  axis = e.params['axis']
  pin(x[axis], 'unstacked')
  return [[d for i, d in enumerate(x) if i != axis]] * len(e.outputs)


def iota(facts, e, *_):
  d = e.params['dimension']
  return [[Var(n, 'iota' if i == d else None) for i, n in enumerate(e.params['shape'])]]


# ---- contracting, reducing -------------------------------------------------------------


def dot_general(facts, e, lhs, rhs):
  (lc, rc), (lb, rb) = e.params['dimension_numbers']
  for i, j in zip([*lc, *lb], [*rc, *rb], strict=True):
    unify(lhs[i], rhs[j], e)
  free_lhs = [d for i, d in enumerate(lhs) if i not in {*lc, *lb}]
  free_rhs = [d for i, d in enumerate(rhs) if i not in {*rc, *rb}]
  return [[lhs[i] for i in lb] + free_lhs + free_rhs]


def conv_general_dilated(facts, e, lhs, rhs):
  """lhs.C = g·rhs.I, rhs.O = g·o, out.C = g·o: dense, grouped and depthwise alike."""
  p, dn = e.params, e.params['dimension_numbers']
  if p['batch_group_count'] != 1:
    return opaque(facts, e, lhs, rhs)
  (n_l, c_l, *s_l), (o_r, i_r, *s_r) = dn.lhs_spec, dn.rhs_spec
  n_o, c_o, *_ = dn.out_spec
  for i in s_r:
    pin(rhs[i], 'kernel window')
  for i in s_l:
    pin(lhs[i], 'spatial')
  groups = Var(p['feature_group_count'])
  per_group = Var(rhs[o_r].size // groups.size)
  unify(lhs[c_l], norm(Prod(groups, rhs[i_r])), e)
  unify(rhs[o_r], norm(Prod(groups, per_group)), e)
  facts.hidden[e] = groups
  out: list[Axis] = fresh(e.outputs[0].shape, 'spatial')
  out[n_o], out[c_o] = lhs[n_l], norm(Prod(groups, per_group))
  return [out]


def reduce(facts, e, *ins):
  axes = e.params['axes']
  for x in ins:
    for i in axes:
      note(x[i], f'reduced over by {e.where}')
  return [[d for i, d in enumerate(ins[0]) if i not in axes]] * len(e.outputs)


def argreduce(facts, e, x):
  for i in e.params['axes']:
    pin(x[i], e.name)
  return reduce(facts, e, x)


def window(facts, e, *ins):
  p, x, out = e.params, ins[0], []
  for i, (d, n) in enumerate(zip(x, e.outputs[0].shape, strict=True)):
    if p['window_dimensions'][i] == p['window_strides'][i] == 1 and d.size == n:
      out.append(d)
    else:
      pin(d, 'window')
      out.append(Var(n, 'window'))
  return [out] * len(e.outputs)


# ---- indexing ------------------------------------------------------------------------


def gather(facts, e, x, idx):
  dn, sizes = e.params['dimension_numbers'], e.params['slice_sizes']
  batching = dict(
    zip(dn.operand_batching_dims, dn.start_indices_batching_dims, strict=True)
  )
  for i, j in batching.items():
    unify(x[i], idx[j], e)
  for i in dn.start_index_map:
    pin(x[i], 'indexed')
  offset = iter(
    i for i in range(len(x)) if i not in {*dn.collapsed_slice_dims, *batching}
  )
  rows, out = iter(idx[:-1]), []
  for k in range(len(e.outputs[0].shape)):
    if k not in dn.offset_dims:
      out.append(next(rows))
      continue
    i = next(offset)
    out.append(x[i] if sizes[i] == x[i].size else Var(sizes[i], 'indexed'))
  return [out]


def scatter(facts, e, x, idx, updates):
  dn = e.params['dimension_numbers']
  batching = dict(
    zip(dn.operand_batching_dims, dn.scatter_indices_batching_dims, strict=True)
  )
  for i, j in batching.items():
    unify(x[i], idx[j], e)
  for i in dn.scatter_dims_to_operand_dims:
    pin(x[i], 'indexed')
  kept = [i for i in range(len(x)) if i not in {*dn.inserted_window_dims, *batching}]
  for i, k in zip(kept, dn.update_window_dims, strict=True):
    _same_or_pin(x[i], updates[k], e)
  rows = [d for k, d in enumerate(updates) if k not in dn.update_window_dims]
  equal(rows, idx[:-1], e)
  return [x]


def dynamic_slice(facts, e, x, *_):
  return [
    [_same_or_pin(d, Var(n), e) for d, n in zip(x, e.params['slice_sizes'], strict=True)]
  ]


def dynamic_update_slice(facts, e, x, update, *_):
  for d, u in zip(x, update, strict=True):
    _same_or_pin(d, u, e)
  return [x]


def _same_or_pin(d: Axis, part: Axis, e: jx.Equation) -> Axis:
  """A window over all of d is d itself; a smaller one pins both."""
  if d.size == part.size:
    unify(d, part, e)
  else:
    pin(d, f'part of it is addressed by {e.name}')
    pin(part, f'part of an axis addressed by {e.name}')
  return part


# ---- control flow --------------------------------------------------------------------


def scan(facts, e, *ins):
  consts, carry, xs = jx.scan_parts(e, ins)
  loop = Var(e.params['length'])
  loop.notes.add(LAYER)
  for x in xs:
    unify(loop, x[0], e)
  facts.hidden[e] = loop
  outs = infer(facts, e.bodies[0], [*consts, *carry, *(x[1:] for x in xs)])
  for a, b in zip(carry, outs[: len(carry)], strict=True):
    equal(a, b, e)
  return [*carry, *([loop, *y] for y in outs[len(carry) :])]


def while_rule(facts, e, *ins):
  test, body, carry = jx.while_parts(e, ins)
  infer(facts, e.bodies[0], [*test, *carry])
  for a, b in zip(carry, infer(facts, e.bodies[1], [*body, *carry]), strict=True):
    equal(a, b, e)
  return carry


def cond(facts, e, _, *ins):
  first, *rest = (infer(facts, body, ins) for body in e.bodies)
  for outs in rest:
    for a, b in zip(first, outs, strict=True):
      equal(a, b, e)
  return first


def own_derivative(facts, e, *ins):
  """A contraction inside has a rule that knows no gate, so its axes take none."""
  outs = infer(facts, e.bodies[0], ins)
  for inner in jx.walk(e.bodies[0]):
    for k, axis in (pair for side in contracted(inner) for pair in side):
      note(facts.dims[inner.inputs[k]][axis], f'contracted inside a {e.name}')
  return outs


def contracted(e: jx.Equation) -> list[list[tuple[int, int]]]:
  """(input, axis) pairs that an equation sums over, for each side that can be gated."""
  if e.name == 'dot_general':
    (lhs, rhs), _ = e.params['dimension_numbers']
    return [[(0, i) for i in lhs], [(1, i) for i in rhs]]
  if e.name == 'conv_general_dilated':
    return [[(1, e.params['dimension_numbers'].rhs_spec[1])]]
  return []


RULES = {
  'broadcast_in_dim': broadcast_in_dim, 'concatenate': concatenate, 'cond': cond,
  'conv_general_dilated': conv_general_dilated, 'custom_jvp_call': own_derivative,
  'custom_vjp_call': own_derivative, 'dot_general': dot_general,
  'dynamic_slice': dynamic_slice, 'dynamic_update_slice': dynamic_update_slice,
  'expand_dims': reshape, 'fft': fft, 'gather': gather, 'iota': iota, 'pad': pad,
  'reshape': reshape, 'rev': rev, 'scan': scan, 'slice': slice_rule, 'sort': sort,
  'split': split_rule, 'squeeze': squeeze, 'stack': stack, 'tile': tile, 'top_k': top_k,
  'transpose': transpose, 'unstack': unstack, 'while': while_rule,
}  # fmt: skip
