"""One command's whole job: data, network, training, rounds of pruning, measurements."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune import distributed as hosts
from depthprune import distributed as lost
from depthprune import methods
from depthprune.data import images as data
from depthprune.export import networks as checkpoint
from depthprune.program.coupling import Coupling, couple
from depthprune.program.gating import with_branches
from depthprune.program.units import units
from depthprune.run import early_exit as cascading
from depthprune.run import result as results
from depthprune.run.config import Config
from depthprune.run.job import Job, prepare, stage
from depthprune.run.network import check_answer
from depthprune.run.network import network as network
from depthprune.run.network import start as start
from depthprune.storage import directory as disk
from depthprune.storage import directory as record
from depthprune.surgery.oneshot import rank
from depthprune.surgery.prune import Pruned, prune
from depthprune.train.distill import Teacher, distill
from depthprune.train.evaluate import COLLECTION, recalibrate
from depthprune.train.judge import Judge, judge
from depthprune.train.mesh import local
from depthprune.train.method import Method, as_dict, plain
from depthprune.train.step import State, apply_of, branches_of, gated
from depthprune.train.task import Tree


def trained(method: Method, state: State) -> Tree:
  """The state's variables with the branch gates that the method has trained."""
  gates = method.forward(state.theta, jax.random.key(0), state.step)
  found = gates.get('branches')
  return with_branches(state.variables, found) if found else state.variables


def opened(variables: Tree) -> Tree:
  """The variables with all branch gates one, so that a cut folds nothing."""
  ones = jax.tree.map(jnp.ones_like, branches_of(variables))
  return with_branches(variables, ones) if ones else variables


def carried(pruned: Pruned, gates: Mapping[str, jax.Array], *inputs: jax.Array) -> Tree:
  """The small variables of a cut that folded nothing, with the gates that are left.

  gates: {path: gate} before the cut. inputs: an example of what the network reads.
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


class _Done(NamedTuple):
  """What one round leaves: `model` runs `fresh`, the recalibrated small variables."""

  coupling: Coupling
  method: Method
  state: State
  pruned: Pruned
  model: Any
  fresh: Tree
  found: Round


def shrink(job: Job, model: Any, variables: Tree, build: Build) -> Shrunk:
  """Fits, decides, prunes and recalibrates, once or more, and fits what is left.

  Args:
    job: the run, with the epochs of each stage. model: to be cut, with `variables`.
    build: the method for a coupling; it is asked again in every round. The branch gates
      that it trains go on from round to round and are folded in at the last cut.
  """
  # What was not trained before has nothing to teach before the first cut.
  distills, given = job.config.distill, _is_trained(job.config)
  teacher = Teacher(apply_of(model), variables) if distills and given else None
  last = _round(job, model, variables, build, teacher, ())
  whole, answer = (variables, job.task.answer) if given else _answering(job, last)
  if distills and not given:
    apply = gated(model)
    says = lambda v, *inputs, **mode: answer(as_dict(apply(v, {}, *inputs, **mode)))
    teacher = Teacher(says, whole)
  done = [last]
  while last.method.rounds > 1:
    last = _round(job, last.model, last.fresh, build, teacher, done)
    done.append(last)
  epochs = job.config.epochs.finetune
  state = _fit(job, 'finetune', last.model, plain(), last.fresh, epochs, teacher)
  accuracy = job.scores(last.model)(state.variables, job.images.held_out)
  found = [each.found for each in done]
  # What a round was worth once retrained is seen before the next one cuts.
  afters = [*(each.held_out['before'] for each in found[1:]), accuracy['accuracy']]
  for each, after in zip(found, afters, strict=True):
    each.held_out['after'] = after
  return Shrunk(
    whole, answer, last.pruned, last.model, last.fresh, state.variables, tuple(found)
  )


def _round(job: Job, model, variables, build: Build, teacher, before) -> _Done:
  """Fits with the method, decides on held-out data, cuts, recalibrates."""
  coupling = couple(model, variables, *job.inputs)
  epochs = job.config.epochs.finetune if before else job.config.epochs.gates
  full = before[0].coupling if before else coupling
  scores = rank(coupling, variables, 'l1')
  method = build(coupling, job.steps(epochs), scores, full)
  name = f'gates-{len(before) + 1}' if before or method.rounds > 1 else 'gates'
  state = _fit(job, name, model, method, variables, epochs, teacher, coupling)
  evaluate = _judge(job, model, method, state, coupling)
  keep = hosts.agreed(method.decide(jax.device_get(state.theta), state.stats, evaluate))
  pruned, cut = _cut(job, model, method, state, keep, coupling)
  model = pruned.model if pruned.arch else pruned.apply
  fresh = _recalibrated(job, model, cut) if _touched(pruned.keep) else cut
  scores, held_out = job.scores(model), job.images.held_out
  accuracy = {
    'before': evaluate({})['accuracy'],
    'pruned': scores(cut, held_out)['accuracy'],
    'recalibrated': scores(fresh, held_out)['accuracy'],
  }
  found = _told(method, state, coupling, pruned, accuracy)
  return _Done(coupling, method, state, pruned, model, fresh, found)


def _fit(
  job: Job, name, model, method: Method, variables, epochs, teacher, coupling=None
) -> State:
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


def _is_trained(config: Config) -> bool:
  """Whether the network is trained when the rounds begin."""
  return bool(config.epochs.train or (config.pretrained and not config.options.heads))


def _answering(job: Job, first: _Done) -> tuple[Tree, Callable]:
  """The uncut network as the method trained it: its variables, and what it says."""
  method, state = first.method, first.state
  return trained(method, state), lambda outputs: method.answer(
    job.task, outputs, state.theta
  )


def _judge(job: Job, model, method: Method, state: State, coupling) -> Judge:
  batch_at = job.batch_at('judge').stepwise()
  count = min(JUDGING, data.epoch_steps(job.train, job.config.batch))
  calibration = [batch_at(job.train, i) for i in range(count)]
  held_out = list(job.batches(job.images.held_out))
  state = job.on_mesh(state)
  return judge(model, method, job.task, state, held_out, calibration, coupling)


def _cut(job: Job, model, method: Method, state: State, keep, coupling):
  """(what surgery returns, the small variables, with branch gates if not the last)."""
  last = method.rounds <= 1
  pruned = prune(
    model,
    trained(method, state) if last else opened(state.variables),
    keep,
    job.inputs,
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
  gates = branches_of(trained(method, state))
  return pruned, carried(pruned, gates, *job.inputs)


def _told(
  method: Method, state: State, coupling: Coupling, pruned: Pruned, accuracy
) -> Round:
  present, kept = units(coupling), pruned.keep['branches']
  dead = coupling.decision(pruned.keep).dead
  closed = lambda u, b: not np.ravel(kept[b])[u.layer or 0] or f'branches/{b}' in dead
  erased = tuple(u.name for u in present if all(closed(u, b) for b in u.branches))
  sizes = (len(present), len(present) - len(erased))
  learned = record.plain(method.report(state.theta))
  return Round(pruned.report, learned, sizes, erased, accuracy)


def _touched(keep: Mapping) -> bool:
  """Whether anything is closed within what is left, so that statistics change."""
  return not all(
    np.all(k) for part in ('channels', 'branches') for k in keep[part].values()
  )


def _moved(gates: Mapping, keep: Mapping) -> int:
  """How many channels a decision treats otherwise than their gates were."""
  return sum(
    int((np.asarray(gates[g] > 0) != keep[g]).sum()) for g in keep if g in gates
  )


def _recalibrated(job: Job, model: Any, variables: Tree) -> Tree:
  """Fresh statistics from augmented images, where there are any."""
  if not jax.tree.leaves(variables.get(COLLECTION, {})):
    return variables
  batch_at = job.batch_at('recalibrate').stepwise()
  count = min(RECALIBRATION, data.epoch_steps(job.train, job.config.batch))
  batches = (batch_at(job.train, i) for i in range(count))
  return local(recalibrate(model, job.on_mesh(variables), batches))


def run(config: Config, show: bool = True) -> dict[str, Any]:
  """The whole job: data, model, training, decisions, surgery, measurements.

  Writes everything into `config.path` (config.json, history.jsonl, gates.jsonl,
  checkpoints/, pruned/, result.json) and continues a run that was stopped there.
  The test images are looked at once, at the end.

  Returns: what result.json contains.

  Raises: ValueError for an unknown model or data set, for a target that cannot be
    reached and for weights that do not fit, CutRefused for a cut that costs too much,
    CheckpointError for a directory of another run, InUse for one in which a run is
    alive, NonFiniteLoss, WriteError where there is no room, HostLost where another
    process is gone.
  """
  network(config, classes=1)  # an unknown name is found before the data
  hosts.join()
  with lost.watched(), disk.held(config.path):
    return (cascading.run if config.options.cascades else _run)(config, show)


def _run(config: Config, show: bool) -> dict[str, Any]:
  started = time.monotonic()
  job = prepare(config, show)
  model = network(config, job.images.classes)
  check_answer(job, model)
  build = partial(methods.build, config)
  variables = start(job, model)
  # Before any training: a target below what can be reached is found now, not later.
  coupling = couple(model, variables, *job.inputs)
  build(coupling, 1, {}, coupling)
  record.write(
    job.folder / 'config.json',
    {'config': config.to_json(), **results.surroundings(), 'command': record.command()},
  )
  if config.epochs.train:
    peak, epochs = config.learning_rate, config.epochs.train
    state = stage(job, 'train', model, plain(), variables, epochs=epochs, peak=peak)
    variables = state.variables
  small = shrink(job, model, variables, build)
  result = results.measure(job, model, small)
  result['wall_seconds'] = time.monotonic() - started
  result = hosts.gathered(result)[0]
  checkpoint.save(
    job.folder / 'pruned',
    small.pruned._replace(variables=small.variables),
    job.images.normalisation,
  )
  record.write(job.folder / 'result.json', result)
  return result
