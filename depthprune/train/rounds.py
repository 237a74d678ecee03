"""Training and cutting in turns: the loop over the rounds of any method."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthprune.data import batches
from depthprune.program import arguments
from depthprune.program.coupling import Coupling, couple
from depthprune.program.gating import with_branches
from depthprune.program.rounding import RoundTo
from depthprune.program.trace import several
from depthprune.surgery.prune import Pruned, prune
from depthprune.train.evaluate import COLLECTION, recalibrate
from depthprune.train.judge import held_out_of, judge, kept_gates
from depthprune.train.method import Method, plain
from depthprune.train.step import USED, State, branches_of, init_state, make_step
from depthprune.train.task import Task, Tree, is_task

COSTS = 'flops', 'params', 'peak_bytes'  # what a report compares before and after

FIT = (
  'write train=lambda step, state, stage: dp.fit(step, state, key, data, steps=100, '
  'label=stage)'
)


def shrink(
  model: Any,
  variables: Tree,
  example: Any,
  build: Callable[[Coupling], Method],
  train: Callable[[Callable, State, str], State],
  *,
  task: Task,
  tx: optax.GradientTransformation,
  held_out: Any,
  calibration: Any = (),
  batch: int = 128,
  round_to: RoundTo = 1,
) -> Pruned:
  """Trains, decides and cuts as often as the method asks for, and trains what is left.

      net = dp.trunk(model, variables, images[:1])  # gates at its residual units
      small = dp.shrink(
        net, net.init(key, images[:1]), images[:1],
        build=lambda coupling: dp.implosion(coupling, depth=3),
        train=lambda step, state, stage: dp.fit(
          step, state, key, (images, labels), steps=200, label=stage),
        task=dp.classification(10), tx=optax.adam(1e-3),
        held_out=(held_out_images, held_out_labels), calibration=(images, labels))

  Args:
    model: the network, a linen module: one of `depthprune.models`, one with `dp.branch`
      at its residual units, or what `trunk` makes of any network.
    variables: its variables, from `model.init`.
    example: the input, or a plain tuple or list of several.
    build: (coupling) -> the method, called in every round for what is left.
    train: (step, state, stage) -> the trained state, where step(state, batch, key) is
      from `make_step`. It is called once per round, with the stages 'round1', 'round2',
      ..., and at last with 'finetune', where nothing but the weights is trained; to
      train no further, return the state as it is.
    task: what is trained and measured.
    tx: optax optimizer of the weights. Every stage begins with a fresh state of it.
    held_out: arrays or batches on which the method decides, as for `judge`.
    calibration: training data in the same form, for fresh batch statistics, needed by a
      network that has such statistics.
    batch: examples in a batch of arrays.
    round_to: widths become multiples of this, or with 'auto' of what this device is
      fast at. A method that counts a target is to be made with the same.

  Returns:
    The result of the last cut, with the variables after fine-tuning. Its report
    compares with the network before the first cut; `report['rounds']` holds the report
    of each.

  Raises:
    CutRefused: the method refuses a cut, because it would cost too much.
    InexactCut: masked and small network differ.
  """
  inputs, reports = several(example), []
  write = 'write build=lambda coupling: dp.trainable_gates(coupling, 0.5)'
  arguments.function('build', build, 'a function of the coupling', write)
  arguments.function('train', train, 'a function of (step, state, stage)', FIT)
  is_task(task)
  arguments.optimizer(tx)
  held_out = held_out_of(held_out, batch, task)
  calibration = batches.full(calibration, batch)
  while True:
    coupling = couple(model, variables, *inputs)
    method = build(coupling)
    step = make_step(model, method, task, tx, coupling)
    state = init_state(model, method, tx, variables, coupling, held_out[0])
    state = _trained(train, step, state, f'round{len(reports) + 1}')
    evaluate = judge(model, method, task, state, held_out, calibration, coupling)
    keep = method.decide(jax.device_get(state.theta), state.stats, evaluate)
    pruned, model, variables = cut_round(
      model, method, state, keep, coupling, inputs, round_to
    )
    reports.append(pruned.report)
    if are_outdated(pruned):
      variables = recalibrate(model, variables, calibration)
    if method.rounds <= 1:
      break
  step = make_step(model, plain(), task, tx)
  state = _trained(train, step, init_state(model, plain(), tx, variables), 'finetune')
  report = {**pruned.report, 'rounds': reports}
  for name in COSTS:
    report[name] = {**pruned.report[name], 'before': reports[0][name]['before']}
  return pruned._replace(variables=state.variables, report=report)


def _trained(train: Callable, step: Callable, state: State, stage: str) -> State:
  state = train(step, state, stage)
  expected = f'to return the state after the stage {stage!r}'
  arguments.kind_of('train', state, State, expected, FIT)
  return arguments.alive('train', state, USED)


def cut_round(
  model: Any,
  method: Method,
  state: State,
  keep: Tree,
  coupling: Coupling,
  inputs: tuple,
  round_to: RoundTo = 1,
) -> tuple[Pruned, Any, Tree]:
  """Cuts a network at the end of a round.

  Args:
    model: the network.
    method: how it was trained.
    state: the state after training.
    keep: what the method decided.
    coupling: of the network.
    inputs: an example of what it reads.
    round_to: widths become multiples of this, or 'auto'.

  Returns:
    The result of surgery, what runs the small network (a module of ours, else
    `Pruned.apply`), and its variables. Before the last round, these have the branch
    gates that the method trains on.
  """
  last = method.rounds <= 1
  channels = method.forward(state.theta, None, state.step).get('channels', {})
  pruned = prune(
    model,
    trained(method, state) if last else opened(state.variables),
    keep,
    inputs,
    round_to=round_to,
    gates=kept_gates({'channels': channels}, keep),
    coupling=coupling,
  )
  kept = keep.get('channels', {})
  moved = sum(
    int((np.asarray(gate > 0) != kept[group]).sum())
    for group, gate in channels.items()
    if group in kept
  )
  if moved:
    pruned.report['notes'].append(
      f'{moved} channel{" was" if moved == 1 else "s were"} decided against their '
      'gate, to meet the target'
    )
  small = pruned.model if pruned.arch else pruned.apply
  if last:
    return pruned, small, pruned.variables
  return pruned, small, carried(pruned, branches_of(trained(method, state)), *inputs)


def are_outdated(pruned: Pruned) -> bool:
  """Whether the batch statistics of a network are wrong after its cut.

  Cutting dead code alone leaves them as they were.
  """
  closed = any(
    not np.all(kept)
    for part in ('channels', 'branches')
    for kept in pruned.keep[part].values()
  )
  return closed and bool(jax.tree.leaves(pruned.variables.get(COLLECTION, {})))


# ---- branch gates --------------------------------------------------------------------


def trained(method: Method, state: State) -> Tree:
  """Returns the state's variables with the branch gates that the method has trained."""
  branches = method.forward(state.theta, None, state.step).get('branches')
  return with_branches(state.variables, branches) if branches else state.variables


def opened(variables: Tree) -> Tree:
  """Returns the variables with all branch gates one, so that a cut folds nothing."""
  ones = jax.tree.map(jnp.ones_like, branches_of(variables))
  return with_branches(variables, ones) if ones else variables


def carried(pruned: Pruned, gates: Mapping[str, jax.Array], *inputs: jax.Array) -> Tree:
  """Returns the small variables of a cut that folded nothing, with their branch gates.

  Args:
    pruned: the result of the cut.
    gates: {path: gate} before the cut.
    *inputs: an example of what the network reads.
  """
  if not pruned.arch:
    return pruned.variables
  shapes = jax.eval_shape(pruned.model.init, jax.random.key(0), *inputs)
  ones = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes.get('branches', {}))
  if not ones:
    return pruned.variables
  variables, keep = {**pruned.variables, 'branches': ones}, pruned.keep['branches']
  left = {
    path: gates[path][keep[path]] if one.ndim else gates[path]
    for path, one in branches_of(variables).items()
  }
  return with_branches(variables, left)
