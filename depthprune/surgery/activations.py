"""Scores of channels by their activations over a calibration set.

A channel is measured where its axis is contracted, as the gates of `program.gating` are
placed: at every read, after whatever nonlinearity, normalisation or pooling lies
between the layer that produces it and the layer that reads it. A channel that is read
as zero contributes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.program import axes as ax
from depthprune.program import gating, rules
from depthprune.program import jaxpr as jx
from depthprune.program.arguments import coupling as checked
from depthprune.program.arguments import kind_of, refused, wrong
from depthprune.program.coupling import Coupling
from depthprune.program.trace import View, remembered, several, split_arrays

Measure = Literal['absolute', 'square', 'nonzero']
VALUES: Mapping[str, Callable[[jax.Array], jax.Array]] = {
  'absolute': jnp.abs,
  'square': lambda x: jnp.square(jnp.abs(x)),
  'nonzero': lambda x: x != 0,
}


def activations(
  coupling: Coupling,
  variables: Any,
  batches: Iterable[Any],
  measure: Measure = 'absolute',
) -> dict[str, np.ndarray]:
  """Scores every channel by its mean activation over a calibration set.

  The scores are what `oneshot` takes::

    coupling = dp.couple(model, variables, images[:1], train=False)
    score = dp.activations(coupling, variables, [images[:128], images[128:256]])
    keep = dp.oneshot(coupling, variables, '50%', score=score)

  Args:
    coupling: of the network, made by `couple` in the mode that is to be measured.
    variables: its arrays.
    batches: the calibration set, in batches of any sizes. A batch is what the network
      is called with: its input, or a tuple of its inputs. Of a network that was coupled
      with arrays by keyword it is a pair (inputs, {name: array}).
    measure: 'absolute' is the mean absolute activation, 'square' the mean squared one,
      and 'nonzero' the part of the activations that are not zero, which is 1 - APoZ (Hu
      et al., arXiv 1607.03250).

  Returns:
    {group: float64 [slices]}, for all groups that can be gated: the mean over examples,
    positions and all places where the channel is read.

  Raises:
    ValueError: an unknown measure, no batches, or a batch that is not like the inputs
      with which the network was coupled.
  """
  if measure not in VALUES:
    expected = ', '.join(get_args(Measure))
    raise refused('measure', f'one of {expected}', measure, kind=ValueError)
  checked(coupling).fits(variables)
  groups = [g for g in coupling.groups.values() if not g.ungated]
  starts = np.cumsum([0, *(g.size for g in groups)])
  views = remembered(lambda inputs, kw: coupling.retrace(coupling.fn, inputs, kw))

  @jax.jit
  def measured(variables, inputs, named):
    kwargs = {**coupling.kwargs, **named}
    view = views(inputs, kwargs)
    coupling.check_view(view, [g.name for g in groups])
    slots: dict[ax.Axis, Any] = {}
    for group, start in zip(groups, starts):
      gating.place(
        group.name, view.groups[group.name], start + np.arange(group.size), slots
      )
    arrays, _ = split_arrays((inputs, kwargs))
    args = [*jax.tree.leaves(variables), *arrays]
    return _sums(view, slots, int(starts[-1]), VALUES[measure], args)

  totals, counts = np.zeros((2, starts[-1]))
  for inputs, named in calls(coupling, batches):
    both = measured(variables, inputs, named)
    totals, counts = (a + np.asarray(b, float) for a, b in zip((totals, counts), both))
  means = totals / np.maximum(counts, 1)
  return {g.name: means[start : start + g.size] for g, start in zip(groups, starts)}


def calls(coupling: Coupling, batches: Iterable[Any]) -> Iterator[tuple[tuple, dict]]:
  """Yields the (inputs, {name: array}) of every batch of a calibration set.

  Args:
    coupling: of the network.
    batches: as `activations` takes them.

  Raises:
    ValueError: no batches, or one that is not like the inputs of `coupling`.
  """
  kind_of('batches', batches, Iterable, 'a list of batches of inputs')
  batch = None
  for batch in batches:
    is_pair = type(batch) is tuple and len(batch) == 2 and isinstance(batch[1], Mapping)
    inputs, named = batch if coupling.named and is_pair else (batch, {})
    inputs = several(inputs)
    _check_batch(coupling, inputs, named)
    yield inputs, dict(named)
  if batch is None:
    has = 'expected at least one batch of inputs, got none'
    raise wrong('batches', has, 'pass a list, or an iterator not yet used up')


def _check_batch(coupling: Coupling, inputs: tuple, named: Mapping) -> None:
  described = lambda tree: [
    (np.ndim(x), jnp.result_type(x)) for x in split_arrays(tree)[0]
  ]
  expected, got = (coupling.inputs, coupling.named), (inputs, dict(named))
  same = jax.tree.structure(expected) == jax.tree.structure(got)
  if not same or described(expected) != described(got):
    shown = lambda tree: ', '.join(
      f'{jnp.result_type(x)}{list(np.shape(x))}' for x in split_arrays(tree)[0]
    )
    pair = ''
    if coupling.named:
      names = ', '.join(f'{name!r}: ...' for name in coupling.named)
      pair = f'; a batch is a pair (inputs, {{{names}}})'
    like = f'expected batches like the inputs of couple ({shown(expected)})'
    is_ = shown(got) or described(inputs[0] if inputs else None)
    raise wrong(
      'batches', f'{like}, got {is_}', f'one batch goes into a list: [x]{pair}'
    )


def _sums(
  view: View, slots: Mapping, size: int, value: Callable, args: Sequence
) -> list[jax.Array]:
  """Runs a program; returns the sum of the values of every channel, and their number.

  Args:
    view: the traced network.
    slots: {axis variable: numbers of its slices among all}.
    size: number of slices of all groups.
    value: what is added up of each activation.
    args: inputs of the program.

  Returns:
    [sums, numbers], each float32 [size].
  """

  def run(program: jx.Program, args: Sequence) -> list:
    """The outputs of a program, followed by its sums and numbers."""
    seen = [jnp.zeros(size), np.zeros(size, np.float32)]

    def execute(e: jx.Equation, ins: list) -> list:
      for k, axis in _activations_read(view, e):
        _add(seen, view.facts.dims[e.inputs[k]][axis], ins[k], axis, _summed(view, e))
      if e.name == 'while':
        outputs = _while(e, ins, run, size)
      else:
        outputs = jx.bind(e, ins, e.params, run)
      own, inner = outputs[: len(e.outputs)], outputs[len(e.outputs) :]
      for i, more in enumerate(inner):
        seen[i] = seen[i] + (more.sum(0) if e.name == 'scan' else more)
      return own

    outputs = jx.interpret(program, args, execute)
    return [*outputs, *seen]

  def _add(seen, dims: ax.Axis, x, axis: int, summed: set):
    others = tuple(i for i in range(x.ndim) if i != axis)
    each = value(x).astype(jnp.float32).sum(others)
    for v in dict.fromkeys(ax.leaves(dims)):
      if v in slots and v in summed:
        at = ax.index_of(dims, v)
        slot = np.asarray(slots[v])[at[at >= 0]]
        seen[0] = seen[0].at[slot].add(each[at >= 0])
        numbers = np.zeros(size, np.float32)  # in numpy: XLA is slow to fold them
        np.add.at(numbers, slot, x.size / x.shape[axis])
        seen[1] = seen[1] + numbers

  return run(view.program, args)[-2:]


def _activations_read(view: View, e: jx.Equation) -> list[tuple[int, int]]:
  """(input, axis) of the activations that a contraction sums over.

  Of two weights, which only meet where weights are computed, both count. Norms, which
  read squares or magnitudes, do not.
  """
  if e.name == 'conv_general_dilated':
    return [(0, e.params['dimension_numbers'].lhs_spec[1])]
  if e.name in rules.NORMS:
    return []
  sides = [side for side in rules.contracted(view.facts, e) if side]
  data = [side for side in sides if e.inputs[side[0][0]] in view.facts.activations]
  return [pair for side in data or sides for pair in side]


def _summed(view: View, e: jx.Equation) -> set[ax.Var]:
  """The axes that an equation sums over."""
  pairs = (pair for side in rules.contracted(view.facts, e) for pair in side)
  axes = (view.facts.dims[e.inputs[k]][axis] for k, axis in pairs)
  return {v for axis in axes for v in ax.leaves(axis)}


def _while(e: jx.Equation, ins: list, run: Callable, size: int) -> list:
  """Runs a loop whose carry has its sums and numbers besides."""
  test, body = e.bodies
  test_consts, body_consts, carry = jx.while_parts(e, ins)

  def step(loop):
    carry, seen = loop
    outputs = run(body, [*body_consts, *carry])
    n = len(carry)
    return outputs[:n], [a + b for a, b in zip(seen, outputs[n:], strict=True)]

  ends = lambda loop: run(test, [*test_consts, *loop[0]])[0]
  start = carry, [jnp.zeros(size), jnp.zeros(size)]
  carry, seen = jax.lax.while_loop(ends, step, start)
  return [*carry, *seen]
