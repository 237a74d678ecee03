"""A whole run: fit, decide, prune, recalibrate, as often as the method asks; measure.

The sequence is the same for every method. Surgery proves each cut itself. A run that
was stopped restarts every stage from its checkpoints; decisions and cuts are pure
functions of what is in them and are made again.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune import distributed, methods
from depthprune.data.dataset import epoch_steps
from depthprune.distributed import local
from depthprune.exports import networks
from depthprune.program.coupling import Coupling, couple
from depthprune.program.gating import with_branches
from depthprune.program.units import units
from depthprune.run import early_exit, result
from depthprune.run.config import Config
from depthprune.run.job import Job, prepare, record_config, remembering, stage
from depthprune.run.network import check_answer, initial_variables, network
from depthprune.storage import directory
from depthprune.surgery.oneshot import rank
from depthprune.surgery.prune import Pruned, prune
from depthprune.train.distill import Teacher, distill
from depthprune.train.evaluate import COLLECTION, recalibrate
from depthprune.train.judge import Judge, judge, kept_gates
from depthprune.train.method import Method, plain
from depthprune.train.result import Accuracies, Result, RoundResult, to_json
from depthprune.train.step import State, apply_of, branches_of, gated
from depthprune.train.task import Tree, as_dict

RECALIBRATION = 50  # batches, at most
JUDGING = 4  # batches that each candidate of a decision is recalibrated on

Build = Callable[..., Method]
"""(coupling, steps, scores, whole) -> method; scores are the channels' L1 norms, whole
is the coupling of the network before any cut."""


class Shrunk(NamedTuple):
  """A network before and after.

  Attributes:
    before: variables of the whole network. answer: (outputs) -> logits, what it says.
    pruned: of the last round. model: what runs the small variables: a module of ours,
      else pruned.apply.
    recalibrated: variables after surgery, with fresh batch statistics.
    variables: after fine-tuning.
    rounds: the cuts, in order. reports: what surgery says of each.
  """

  before: Tree
  answer: Callable[[Tree], jax.Array]
  pruned: Pruned
  model: Any
  recalibrated: Tree
  variables: Tree
  rounds: tuple[RoundResult, ...]
  reports: tuple[dict[str, Any], ...]


class _Cut(NamedTuple):
  """What one round leaves: `model` runs `fresh`, the recalibrated small variables."""

  coupling: Coupling
  method: Method
  state: State
  pruned: Pruned
  model: Any
  fresh: Tree
  held_out: Accuracies


def run(config: Config, show: bool = True) -> Result:
  """The whole job of one command: data, training, decisions, surgery, measurements.

  Writes everything into `config.path` (config.json, history.jsonl, gates.jsonl,
  checkpoints/, pruned/ or cascade/, result.json) and continues a run that was stopped
  there. The test images are looked at once, at the end.

  Args:
    config: what to run.
    show: whether to draw progress bars.

  Returns:
    What result.json contains.

  Raises:
    ValueError: an unknown model or data set, a target that cannot be reached, weights
      that do not fit.
    CutRefused: a cut that costs too much.
    CheckpointError: the directory belongs to another run.
    InUse: a run is alive in the directory.
    NonFiniteLoss, WriteError, HostLost: training diverged, the disk is full, another
      process is gone.
  """
  started = time.monotonic()
  network(config, classes=1)  # an unknown name is found before the data are read
  distributed.join()
  with distributed.watched(), directory.held(config.path):
    job = prepare(config, show)
    if config.recipe.cascade:
      reached = early_exit.run(job)
    else:
      reached = _prune(job)
    values = {**to_json(reached), 'wall_seconds': time.monotonic() - started}
    values = distributed.gathered(values)[0]
    directory.write(job.folder / 'result.json', values)
    return result.from_json(values)


def _prune(job: Job) -> Result:
  """Trains the network, shrinks it, saves what is left and measures it."""
  config = job.config
  model = network(config, job.images.classes)
  check_answer(job, model)
  build = partial(
    methods.build,
    config.options,
    seed=config.seed,
    remember=remembering(job.folder / 'costs.json'),
  )
  variables = initial_variables(job, model)
  # Before any training: a target below what can be reached is found now, not later.
  build(couple(model, variables, *job.inputs))
  record_config(job)
  if config.epochs.train:
    peak, epochs = config.learning_rate, config.epochs.train
    state = stage(job, 'train', model, plain(), variables, epochs=epochs, peak=peak)
    variables = state.variables
  small = shrink(job, model, variables, build)
  reached = result.measure(job, model, small)
  networks.save(
    job.folder / 'pruned',
    small.pruned._replace(variables=small.variables),
    job.images.normalisation,
  )
  return reached


def shrink(job: Job, model: Any, variables: Tree, build: Build) -> Shrunk:
  """Fits, decides, prunes and recalibrates, once or more, and fits what is left.

  Args:
    job: the run, with the epochs of each stage.
    model, variables: the network that is to be cut.
    build: the method for a coupling; it is asked again in every round. The branch gates
      that it trains go on from round to round and are folded in at the last cut.
  """
  config = job.config
  # What was not trained before has nothing to teach before the first cut.
  trained_before = bool(
    config.epochs.train or (config.pretrained and not config.recipe.heads)
  )
  whole, answer, teacher = variables, job.task.answer, None
  if config.distill and trained_before:
    teacher = Teacher(apply_of(model), variables)
  cuts = [_round(job, model, variables, build, teacher, ())]
  if not trained_before:
    method, first = cuts[0].method, cuts[0].state
    whole = trained(method, first)
    answer = lambda outputs: method.answer(job.task, outputs, first.theta)
    if config.distill:
      apply = gated(model)
      says = lambda v, *inputs, **mode: answer(as_dict(apply(v, {}, *inputs, **mode)))
      teacher = Teacher(says, whole)
  while cuts[-1].method.rounds > 1:
    cuts.append(_round(job, cuts[-1].model, cuts[-1].fresh, build, teacher, cuts))
  last = cuts[-1]
  state = stage(
    job,
    'finetune',
    last.model,
    distill(plain()) if teacher else plain(),
    last.fresh,
    epochs=config.epochs.finetune,
    peak=config.recipe.peaks[1] * config.learning_rate,
    teacher=teacher,
  )
  accuracy = job.scores(last.model)(state.variables, job.images.held_out)['accuracy']
  # What a round was worth once retrained is seen before the next one cuts.
  afters = [*(cut.held_out.before for cut in cuts[1:]), accuracy]
  return Shrunk(
    before=whole,
    answer=answer,
    pruned=last.pruned,
    model=last.model,
    recalibrated=last.fresh,
    variables=state.variables,
    rounds=tuple(map(_described, cuts, afters)),
    reports=tuple(cut.pruned.report for cut in cuts),
  )


def _round(job: Job, model, variables, build: Build, teacher, before) -> _Cut:
  """Fits with the method, decides on held-out data, cuts, recalibrates."""
  coupling = couple(model, variables, *job.inputs)
  epochs = job.config.epochs.finetune if before else job.config.epochs.gates
  method = build(
    coupling,
    steps=job.steps(epochs),
    scores=rank(coupling, variables, 'l1'),
    whole=before[0].coupling if before else coupling,
  )
  several = before or method.rounds > 1
  state = stage(
    job,
    f'gates-{len(before) + 1}' if several else 'gates',
    model,
    distill(method) if teacher else method,
    variables,
    epochs=epochs,
    peak=job.config.recipe.peaks[0] * job.config.learning_rate,
    coupling=coupling,
    teacher=teacher,
  )
  evaluate = _judge(job, model, method, state, coupling)
  decision = method.decide(jax.device_get(state.theta), state.stats, evaluate)
  keep = distributed.agreed(decision)
  pruned, small = _cut(job, model, method, state, keep, coupling)
  model = pruned.model if pruned.arch else pruned.apply
  fresh = _recalibrated(job, model, small) if _touched(pruned.keep) else small
  scores, held_out = job.scores(model), job.images.held_out
  accuracies = Accuracies(
    before=evaluate({})['accuracy'],
    pruned=scores(small, held_out)['accuracy'],
    recalibrated=scores(fresh, held_out)['accuracy'],
  )
  return _Cut(coupling, method, state, pruned, model, fresh, accuracies)


def _judge(job: Job, model, method: Method, state: State, coupling) -> Judge:
  batch_at = job.batch_at('judge').stepwise()
  count = min(JUDGING, epoch_steps(job.train, job.config.batch))
  calibration = [batch_at(job.train, i) for i in range(count)]
  held_out = list(job.batches(job.images.held_out))
  state = job.on_mesh(state)
  return judge(model, method, job.task, state, held_out, calibration, coupling)


def _cut(job: Job, model, method: Method, state: State, keep, coupling):
  """(what surgery returns, the small variables, with branch gates if not the last)."""
  last = method.rounds <= 1
  gates = method.forward(state.theta, None, state.step)
  channels = {'channels': gates.get('channels', {})}
  pruned = prune(
    model,
    trained(method, state) if last else opened(state.variables),
    keep,
    job.inputs,
    round_to=job.config.recipe.round_to(job.config.options),
    gates=kept_gates(channels, keep),
    coupling=coupling,
  )
  kept = keep.get('channels', {})
  moved = sum(
    int((np.asarray(gate > 0) != kept[group]).sum())
    for group, gate in channels['channels'].items()
    if group in kept
  )
  if moved:
    pruned.report['notes'].append(
      f'{moved} channels were decided against their gate, to meet the target'
    )
  if last:
    return pruned, pruned.variables
  branches = branches_of(trained(method, state))
  return pruned, carried(pruned, branches, *job.inputs)


def _described(cut: _Cut, after: float) -> RoundResult:
  """One cut for the result, with the held-out accuracy of the retraining behind it."""
  report, kept = cut.pruned.report, cut.pruned.keep['branches']
  present = units(cut.coupling)
  dead = cut.coupling.decision(cut.pruned.keep).dead
  closed = lambda u, b: not np.ravel(kept[b])[u.layer or 0] or f'branches/{b}' in dead
  erased = [u.name for u in present if all(closed(u, b) for b in u.branches)]
  held_out = cut.held_out
  return result.round_from(
    report,
    units=(len(present), len(present) - len(erased)),
    erased=erased,
    learned=directory.plain(cut.method.report(cut.state.theta)),
    held_out=Accuracies(held_out.before, after, held_out.pruned, held_out.recalibrated),
  )


def _touched(keep: Mapping) -> bool:
  """Whether anything is closed within what is left, so that statistics change."""
  return not all(
    np.all(k) for part in ('channels', 'branches') for k in keep[part].values()
  )


def _recalibrated(job: Job, model: Any, variables: Tree) -> Tree:
  """Fresh statistics from augmented images, where there are any."""
  if not jax.tree.leaves(variables.get(COLLECTION, {})):
    return variables
  batch_at = job.batch_at('recalibrate').stepwise()
  count = min(RECALIBRATION, epoch_steps(job.train, job.config.batch))
  batches = (batch_at(job.train, i) for i in range(count))
  return local(recalibrate(model, job.on_mesh(variables), batches))


# ---- branch gates --------------------------------------------------------------------


def trained(method: Method, state: State) -> Tree:
  """The state's variables with the branch gates that the method has trained."""
  branches = method.forward(state.theta, None, state.step).get('branches')
  return with_branches(state.variables, branches) if branches else state.variables


def opened(variables: Tree) -> Tree:
  """The variables with all branch gates one, so that a cut folds nothing."""
  ones = jax.tree.map(jnp.ones_like, branches_of(variables))
  return with_branches(variables, ones) if ones else variables


def carried(pruned: Pruned, gates: Mapping[str, jax.Array], *inputs: jax.Array) -> Tree:
  """The small variables of a cut that folded nothing, with the gates that are left.

  Args:
    pruned: the cut.
    gates: {path: gate} before it.
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
