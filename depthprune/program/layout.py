"""The rules (see rules.py) of the primitives that move, cut, join or index axes."""

from __future__ import annotations

from depthprune.program import axes as ax
from depthprune.program import jaxpr as jx
from depthprune.program import routing


def rev(facts, e, x):
  for d in e.params['dimensions']:
    ax.pin(x[d], 'reversed')
  return [x]


def fft(facts, e, x):
  k = len(e.params['fft_lengths'])
  for d in x[len(x) - k :]:
    ax.pin(d, 'fft')
  return [[*x[: len(x) - k], *ax.fresh(e.outputs[0].shape[len(x) - k :], 'fft')]]


# ---- moving axes ---------------------------------------------------------------------


def transpose(facts, e, x):
  return [[x[i] for i in e.params['permutation']]]


def squeeze(facts, e, x):
  return [[d for i, d in enumerate(x) if i not in e.params['dimensions']]]


def broadcast_in_dim(facts, e, x, *_):
  out = ax.fresh(e.outputs[0].shape)
  for i, o in enumerate(e.params['broadcast_dimensions']):
    if x[i].size == out[o].size:
      out[o] = x[i]
  if x and e.inputs[0] in facts.varying:
    new = {o for o, d in enumerate(out) if d.size > 1 and d not in x}
    facts.repeated[e.outputs[0]] = new
  return [out]


def reshape(facts, e, x, *_):
  """Matches runs of axes whose sizes have the same product: prod(ins) = prod(outs)."""
  shape = e.outputs[0].shape
  if 0 in shape:
    return ax.opaque(facts, e, x)
  out: list[ax.Axis] = ax.fresh(shape)
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
      out[big[0]] = ax.norm(ax.Prod(*ins))
    elif big:
      ax.unify(ax.Prod(*ins), ax.Prod(*(out[k] for k in big)), e)
  return [out]


def cut(a: ax.Axis, lo: int, hi: int, e: jx.Equation) -> ax.Axis:
  """Returns the part of an axis from slice lo to slice hi."""
  if (lo, hi) == (0, a.size):
    return a
  _, rest = ax.split(a, lo, e)
  return ax.norm(ax.split(rest, hi - lo, e)[0])


def split_rule(facts, e, x):
  axis, outs, at = e.params['axis'], [], 0
  for n in map(int, e.params['sizes']):
    outs.append([*x[:axis], cut(x[axis], at, at + n, e), *x[axis + 1 :]])
    at += n
  return outs


def slice_rule(facts, e, x):
  p = e.params
  steps = p['strides'] or [1] * len(x)
  out = []
  for d, lo, hi, step in zip(
    x, p['start_indices'], p['limit_indices'], steps, strict=True
  ):
    out.append(cut(d, lo, hi, e) if step == 1 else strided(d, lo, hi, step, e))
  return [out]


def strided(d: ax.Axis, lo: int, hi: int, step: int, e: jx.Equation) -> ax.Axis:
  """Returns every step-th slice: the outer part of outer*step where that fits."""
  count = -(-(hi - lo) // step)
  if lo < step and count * step == d.size:
    outer = ax.Var(count)
    ax.unify(d, ax.Prod(outer, ax.Var(step, 'strided slice')), e)
    return ax.norm(outer)
  ax.pin(d, 'strided slice')
  return ax.Var(count, 'strided slice')


def concatenate(facts, e, *ins):
  k = e.params['dimension']
  first, *rest = ins
  for x in rest:
    ax.equal([*first[:k], *first[k + 1 :]], [*x[:k], *x[k + 1 :]], e)
  return [[*first[:k], ax.norm(ax.Cat(*(x[k] for x in ins))), *first[k + 1 :]]]


def pad(facts, e, x, _):
  out = []
  for d, (lo, hi, inner), n in zip(
    x, e.params['padding_config'], e.outputs[0].shape, strict=True
  ):
    if inner or lo < 0 or hi < 0:
      ax.pin(d, 'padded inside or cropped')
      out.append(ax.Var(n, 'padded inside or cropped'))
    else:
      left, right = (ax.Var(n, 'padding') if n else ax.Cat() for n in (lo, hi))
      out.append(ax.norm(ax.Cat(left, d, right)))
  return [out]


def tile(facts, e, x):
  pairs = zip(x, e.params['reps'], strict=True)
  return [[ax.norm(ax.Prod(ax.Var(r, 'tiled'), d)) if r > 1 else d for d, r in pairs]]


def stack(facts, e, *ins):
  for x in ins[1:]:
    ax.equal(ins[0], x, e)
  axis = e.params['axis']
  stacked = ax.norm(ax.Cat(*(ax.Var(1) for _ in ins)))
  return [[*ins[0][:axis], stacked, *ins[0][axis:]]]


def unstack(facts, e, x):
  axis = e.params['axis']
  for i in range(x[axis].size):
    cut(x[axis], i, i + 1, e)
  return [[d for i, d in enumerate(x) if i != axis]] * len(e.outputs)


def iota(facts, e, *_):
  """Counts along an axis: a table of which slices may be taken.

  Integers may also be compared or be indices, as in a one-hot code; `rules.infer` then
  pins the axis.
  """
  (v,) = e.outputs
  out: list[ax.Axis] = ax.fresh(v.shape)
  if not jx.differentiable(v):
    facts.counted[v] = out[e.params['dimension']]
  return [out]


# ---- indexing ------------------------------------------------------------------------


def gather(facts, e, x, idx):
  dn, sizes = e.params['dimension_numbers'], e.params['slice_sizes']
  batching = dict(
    zip(dn.operand_batching_dims, dn.start_indices_batching_dims, strict=True)
  )
  for i, j in batching.items():
    ax.unify(x[i], idx[j], e)
  chosen = routing.addressed(facts, e)
  if chosen is not None:
    ax.unify(x[chosen], facts.chosen[e.inputs[1]], e)
  for i, n in enumerate(sizes):
    if i == chosen:
      continue
    # A window over all of an axis starts at its beginning, whatever the index says.
    if i in dn.collapsed_slice_dims or (i not in batching and n != x[i].size):
      ax.pin(x[i], 'indexed')
  offset = iter(
    i for i in range(len(x)) if i not in {*dn.collapsed_slice_dims, *batching}
  )
  rows, out = iter(idx[:-1]), []
  for k in range(len(e.outputs[0].shape)):
    if k not in dn.offset_dims:
      out.append(next(rows))
      continue
    i = next(offset)
    out.append(x[i] if sizes[i] == x[i].size else ax.Var(sizes[i], 'indexed'))
  return [out]


def scatter(facts, e, x, idx, updates):
  dn = e.params['dimension_numbers']
  batching = dict(
    zip(dn.operand_batching_dims, dn.scatter_indices_batching_dims, strict=True)
  )
  for i, j in batching.items():
    ax.unify(x[i], idx[j], e)
  chosen = routing.addressed(facts, e)
  if chosen is not None:
    ax.unify(x[chosen], facts.chosen[e.inputs[1]], e)
  for i in dn.inserted_window_dims:
    if i != chosen:
      ax.pin(x[i], 'indexed')
  windows = [i for i in range(len(x)) if i not in {*dn.inserted_window_dims, *batching}]
  for i, k in zip(windows, dn.update_window_dims, strict=True):
    _same_or_pin(x[i], updates[k], e)
  rows = [d for k, d in enumerate(updates) if k not in dn.update_window_dims]
  ax.equal(rows, idx[:-1], e)
  for k, d in enumerate(idx[:-1]):
    if k not in batching.values():  # slices of zeros would be written like the others
      ax.pin(d, f'spread over another axis by {e.where}')
  return [x]


def dynamic_slice(facts, e, x, *_):
  pairs = zip(x, e.params['slice_sizes'], strict=True)
  return [[_same_or_pin(d, ax.Var(n), e) for d, n in pairs]]


def dynamic_update_slice(facts, e, x, update, *_):
  for d, u in zip(x, update, strict=True):
    _same_or_pin(d, u, e)
  return [x]


def _same_or_pin(d: ax.Axis, part: ax.Axis, e: jx.Equation) -> ax.Axis:
  """Equates a window over all of an axis with that axis; a smaller window pins both."""
  if d.size == part.size:
    ax.unify(d, part, e)
  else:
    ax.pin(d, f'part of it is addressed by {e.name}')
    ax.pin(part, f'part of an axis addressed by {e.name}')
  return part
