"""From a network to a small one: fit, decide, prune, recalibrate, as often as is asked.

The sequence is the same for every method. Surgery verifies each cut itself. A run that
was stopped restarts every stage from its checkpoints; decisions and cuts are pure
functions of what is in them and are made again.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.program.couple import Coupling, couple
from depthprune.program.plug import with_branches
from depthprune.program.units import units
from depthprune.surgery.cut import Pruned, prune
from depthprune.surgery.oneshot import rank
from depthprune.training import data, record
from depthprune.training.distill import distill
from depthprune.training.evaluate import evaluator
from depthprune.training.judge import Judge, judge
from depthprune.training.method import Method, Tree, main, plain
from depthprune.training.recalibrate import COLLECTION, recalibrate
from depthprune.training.stage import Job, Teacher, stage
from depthprune.training.step import State, apply_of, branches_of

RECALIBRATION = 50  # batches, at most
JUDGING = 4  # batches that each candidate of a decision is recalibrated on

Build = Callable[[Coupling, int, Mapping[str, np.ndarray], Coupling], Method]
"""(coupling, steps, scores, whole) -> method; scores are the channels' L1 norms, whole
is the coupling of the network before any cut."""


class Round(NamedTuple):
  """One cut.

  Attributes:
    report: of surgery. learned: what the method had learnt, as it reports it.
    units: residual units before and after. erased: names of those that went.
    held_out: accuracy 'before', 'pruned', 'recalibrated', and 'after' retraining.
  """

  report: dict
  learned: Tree
  units: tuple[int, int]
  erased: tuple[str, ...]
  held_out: dict[str, float]


class Shrunk(NamedTuple):
  """A network before and after.

  Attributes:
    before: variables of the whole network. answer: (outputs) -> logits, what it says.
    pruned: of the last round. model: what runs the small variables: a module of ours,
      else pruned.apply.
    recalibrated: variables after surgery, with fresh batch statistics.
    variables: after fine-tuning. rounds: the cuts, in order.
  """

  before: Tree
  answer: Callable[[Tree], jax.Array]
  pruned: Pruned
  model: Any
  recalibrated: Tree
  variables: Tree
  rounds: tuple[Round, ...]


def shrink(job: Job, model: Any, variables: Tree, build: Build) -> Shrunk:
  """Fits, decides, prunes and recalibrates, once or more, and fits what is left.

  Args:
    job: the run, with the epochs of each stage. model: to be cut, with `variables`.
    build: the method for a coupling; it is asked again in every round. The branch gates
      that it trains go on from round to round and are folded in at the last cut.
  """
  teacher = Teacher(apply_of(model), variables) if job.config.distill else None
  rounds: list[Round] = []
  whole = method = full = None
  while method is None or method.rounds > 1:
    coupling = couple(model, variables, job.example)
    full = full or coupling
    epochs = job.config.epochs.finetune if rounds else job.config.epochs.gates
    scores = rank(coupling, variables, 'l1')
    method = build(coupling, job.steps(epochs), scores, full)
    tag = f'-{len(rounds) + 1}' if rounds or method.rounds > 1 else ''
    state = _fit(
      job, f'gates{tag}', model, method, variables, epochs, coupling, teacher
    )
    whole = whole or _whole(job, variables, method, state)
    evaluate = _judge(job, model, method, state, coupling)
    keep = method.decide(jax.device_get(state.theta), state.stats, evaluate)
    pruned, variables = _cut(job, model, method, state, keep, coupling)
    model, cut = pruned.model if pruned.arch else pruned.apply, variables
    variables = _recalibrated(job, model, cut)
    held_out = evaluator(model, job.task)
    accuracy = {
      'before': evaluate({})['accuracy'],
      'pruned': held_out(cut, job.held_out())['accuracy'],
      'recalibrated': held_out(variables, job.held_out())['accuracy'],
    }
    rounds.append(_round(method, state, coupling, pruned, accuracy))
  epochs, fresh = job.config.epochs.finetune, variables
  variables = _fit(
    job, 'finetune', model, plain(), fresh, epochs, None, teacher
  ).variables
  last = evaluator(model, job.task)(variables, job.held_out())['accuracy']
  afters = [*(r.held_out['before'] for r in rounds[1:]), last]
  for cut_, after in zip(rounds, afters, strict=True):
    cut_.held_out['after'] = after
  return Shrunk(*whole, pruned, model, fresh, variables, tuple(rounds))


def _fit(
  job: Job, name: str, model, method: Method, variables, epochs, coupling, teacher
):
  """A stage that starts from a trained network: as the method sets the rate's peak."""
  first, later = job.config.options.peaks
  peak = later if name == 'finetune' else first
  return stage(
    job,
    name,
    model,
    distill(method) if teacher else method,
    variables,
    epochs=epochs,
    peak=peak * job.config.learning_rate,
    coupling=coupling,
    teacher=teacher,
  )


def _whole(job: Job, variables: Tree, method: Method, state: State):
  """The uncut network: as it was given if it had been trained, else as it is now."""
  config = job.config
  if config.epochs.train or (config.pretrained and not config.options.heads):
    return variables, main
  theta = state.theta
  trained = _with_trained(method, state)
  return trained, lambda outputs: method.answer(job.task, outputs, theta)


def _judge(job: Job, model, method: Method, state: State, coupling) -> Judge:
  batch_at = job.batch_at('judge').stepwise()
  count = min(JUDGING, data.epoch_steps(job.train, job.config.batch))
  calibration = [batch_at(job.train, i) for i in range(count)]
  return judge(
    model, method, job.task, state, list(job.held_out()), calibration, coupling
  )


def _with_trained(method: Method, state: State, ones: bool = False) -> Tree:
  """The state's variables with the branch gates that were trained, or with ones."""
  gates = method.forward(state.theta, jax.random.key(0), state.step)
  branches = {**branches_of(state.variables), **gates.get('branches', {})}
  if ones:
    branches = jax.tree.map(jnp.ones_like, branches)
  return with_branches(state.variables, branches) if branches else state.variables


def _cut(job: Job, model, method: Method, state: State, keep, coupling):
  """(what surgery returns, the small variables, with branch gates if not the last)."""
  last = method.rounds <= 1
  pruned = prune(
    model,
    _with_trained(method, state, ones=not last),
    keep,
    job.example,
    round_to=job.config.options.round_to,
    coupling=coupling,
  )
  gates = method.forward(state.theta, job.key('cut'), state.step)
  moved = _moved(gates.get('channels', {}), keep.get('channels', {}))
  if moved:
    pruned.report['notes'].append(
      f'{moved} channels were decided against their gate, to meet the target'
    )
  if last:
    return pruned, pruned.variables
  return pruned, _carried(
    pruned, branches_of(_with_trained(method, state)), job.example
  )


def _carried(pruned: Pruned, gates: Mapping, example: jax.Array) -> Tree:
  """The small variables with the branch gates that are left, as they were trained."""
  if not pruned.arch:
    return pruned.variables
  shapes = jax.eval_shape(pruned.model.init, jax.random.key(0), example)
  ones = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes.get('branches', {}))
  if not ones:
    return pruned.variables
  variables = {**pruned.variables, 'branches': ones}
  left = {
    path: gates[path][pruned.keep['branches'][path]] if one.ndim else gates[path]
    for path, one in branches_of(variables).items()
  }
  return with_branches(variables, left)


def _round(method: Method, state: State, coupling: Coupling, pruned: Pruned, accuracy):
  present, kept = units(coupling), pruned.keep['branches']
  dead = coupling.decision(pruned.keep).dead
  closed = lambda u, b: not np.ravel(kept[b])[u.layer or 0] or f'branches/{b}' in dead
  erased = tuple(u.name for u in present if all(closed(u, b) for b in u.branches))
  sizes = (len(present), len(present) - len(erased))
  learned = record.plain(method.report(state.theta))
  return Round(pruned.report, learned, sizes, erased, accuracy)


def _moved(gates: Mapping, keep: Mapping) -> int:
  """How many channels a decision treats otherwise than their gates were."""
  return sum(
    int((np.asarray(gates[g] > 0) != keep[g]).sum()) for g in keep if g in gates
  )


def _recalibrated(job: Job, model: Any, variables: Tree) -> Tree:
  """Fresh statistics from one epoch of augmented images, where there are any."""
  if not jax.tree.leaves(variables.get(COLLECTION, {})):
    return variables
  batch_at = job.batch_at('recalibrate').stepwise()
  count = min(RECALIBRATION, data.epoch_steps(job.train, job.config.batch))
  return recalibrate(model, variables, (batch_at(job.train, i) for i in range(count)))
