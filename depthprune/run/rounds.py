"""A complete run: train, decide, cut and recalibrate in rounds, then measure.

The sequence is the same for every method, and surgery proves each cut. A run that was
stopped continues every stage from its checkpoints; decisions and cuts are pure
functions of these and are made again.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from depthprune import distributed, methods
from depthprune.data.corpus import Corpus
from depthprune.data.dataset import epoch_steps, inputs_of
from depthprune.distributed import local
from depthprune.exports import networks
from depthprune.program.coupling import Coupling, couple
from depthprune.program.modules import runnable
from depthprune.program.units import units
from depthprune.run import curves, early_exit, early_text, result
from depthprune.run.config import Config
from depthprune.run.job import (
  Job,
  prepare,
  record_config,
  remembering,
  rounding,
  stage,
)
from depthprune.run.network import check_answer, initial_variables, network
from depthprune.storage import directory
from depthprune.surgery.oneshot import rank
from depthprune.surgery.prune import Pruned
from depthprune.surgery.refit import refit
from depthprune.train.distill import Teacher, distill
from depthprune.train.evaluate import COLLECTION, recalibrate
from depthprune.train.importance import taylor
from depthprune.train.judge import judge
from depthprune.train.method import Method, plain
from depthprune.train.result import (
  Accuracies,
  Change,
  Proof,
  Result,
  RoundResult,
  from_json,
  to_json,
)
from depthprune.train.rounds import are_outdated, cut_round, trained
from depthprune.train.step import State, gated
from depthprune.train.task import Tree, as_dict

RECALIBRATION = 50  # batches for fresh statistics, at most
SCORING = 20  # batches that score channels, at most
REFITTING = 20  # batches that weights are refitted to, at most
JUDGING = 4  # batches for fresh statistics of each candidate of a decision
NOT_REFITTED = (
  'the weights that stay were not refitted: held-out data is better answered without'
)

Build = Callable[..., Method]
"""(coupling, steps, scores, whole) -> method; `scores` are those of a `Setting`, and
`whole` is the coupling of the network before any cut."""


class Shrunk(NamedTuple):
  """A network before and after its cuts.

  Attributes:
    before: variables of the network before any cut; where units are erased, after the
      first training with the method.
    answer: (outputs) -> logits, the answer of that network.
    pruned: the result of the last cut.
    model: what runs the small variables: a module of ours, else `pruned.apply`.
    recalibrated: variables after the last cut, with fresh batch statistics.
    variables: variables after fine-tuning, with fresh batch statistics where these
      answer held-out data as well or better.
    rounds: results of the rounds, in order.
    reports: reports of surgery about each cut.
    epochs: passes over the training data, of the network before and after.
    original: variables that the run began with, where those before were trained
      further.
  """

  before: Tree
  answer: Callable[[Tree], jax.Array]
  pruned: Pruned
  model: Any
  recalibrated: Tree
  variables: Tree
  rounds: tuple[RoundResult, ...]
  reports: tuple[dict[str, Any], ...]
  epochs: Change
  original: Tree | None


class _Round(NamedTuple):
  """One round.

  Attributes:
    model: what runs the small variables.
    fresh: small variables with fresh batch statistics.
    best: those, or the ones of before, whichever answers held-out data better.
  """

  coupling: Coupling
  method: Method
  state: State
  pruned: Pruned
  model: Any
  fresh: Tree
  best: Tree
  held_out: Accuracies


def run(config: Config, show: bool = True) -> Result:
  """Does what `depthprune run` does: trains a network, cuts it and measures the result.

  Everything is written into `config.path` (config.json, history.jsonl, gates.jsonl,
  checkpoints/, pruned/, cascade/ or exits/, result.json), and a run that was stopped
  there is continued. Test data is used only once, at the end.

  Args:
    config: the configuration of the run.
    show: whether to draw progress bars.

  Returns:
    The content of result.json.

  Raises:
    ValueError: the model or the data set is unknown, the target cannot be reached, or
      pretrained weights do not fit.
    CutRefused: the cut costs too much accuracy.
    CheckpointError: the directory belongs to another run.
    InUse: another process runs in the directory.
    NonFiniteLoss: training diverged.
    WriteError: the disk is full.
    HostLost: another process of the run is gone.
  """
  started = time.monotonic()
  network(config, classes=1)  # refuses an unknown name before the data is read
  curves.check(config)
  distributed.join()
  with distributed.watched(), directory.held(config.path):
    job = prepare(config, show)
    with curves.opened(config) as logs:
      job = job._replace(logs=logs)
      if not config.recipe.cascade:
        reached = _prune(job)
      elif isinstance(job.images, Corpus):
        reached = early_text.run(job)
      else:
        reached = early_exit.run(job)
    values = {**to_json(reached), 'wall_seconds': time.monotonic() - started}
    values = distributed.gathered(values)[0]
    directory.write(job.folder / 'result.json', values)
    return from_json(values)


def _prune(job: Job) -> Result:
  """Trains the network, cuts it, measures what is left and saves it."""
  config = job.config
  model = network(config, job.images.classes, *job.inputs)
  check_answer(job, model)
  build = partial(
    methods.build,
    config.options,
    seed=config.seed,
    round_to=rounding(job),
    remember=remembering(job.folder / 'costs.json'),
  )
  variables = initial_variables(job, model)
  # Before any training, this refuses a target that cannot be reached.
  build(couple(model, variables, *job.inputs))
  record_config(job)
  if config.epochs.train:
    peak, epochs = config.learning_rate, config.epochs.train
    state = stage(job, 'train', model, plain(), variables, epochs=epochs, peak=peak)
    variables = state.variables
  small = shrink(job, model, variables, build)
  reached = result.measure(job, model, small, _control(job))
  networks.save(
    job.folder / 'pruned',
    small.pruned._replace(variables=small.variables),
    job.images.normalisation,
  )
  return reached


def _control(job: Job) -> dict[str, float]:
  """Trains what the method compares its network with, if that is asked for.

  Returns:
    Its accuracy on 'test' and 'held_out'; {} without it.
  """
  options = job.config.recipe.control(job.config.options)
  if options is None:
    return {}
  config = dataclasses.replace(job.config, options=options)
  model = network(config, job.images.classes, *job.inputs)
  variables = initial_variables(job._replace(config=config), model)
  epochs, peaks = config.epochs, config.recipe.peaks
  stages = (('control', epochs.gates), ('control-finetune', epochs.finetune))
  for (name, count), part in zip(stages, peaks, strict=True):
    peak = part * config.learning_rate
    state = stage(job, name, model, plain(), variables, epochs=count, peak=peak)
    variables = state.variables
  return job.accuracies(model, variables)


def shrink(job: Job, model: Any, variables: Tree, build: Build) -> Shrunk:
  """Trains, decides and cuts in one or more rounds, and fine-tunes what is left.

  Args:
    job: the run, with the epochs of each stage.
    model: the network that is to be cut.
    variables: its variables.
    build: makes the method for a coupling, in every round. Branch gates that the method
      trains are carried from round to round and folded in at the last cut.
  """
  config = job.config
  # A network that was not trained cannot teach before the first round has trained it.
  trained_before = bool(
    config.epochs.train or (config.pretrained and not config.recipe.heads)
  )
  before, answer, teacher, original = variables, job.task.answer, None, None
  if config.distill and trained_before:
    teacher = Teacher(runnable(model), variables)
  rounds = [_round(job, model, variables, build, teacher, ())]
  trained_in_round = not trained_before or config.recipe.erases_units
  if trained_in_round:
    original = variables if trained_before else None
    method, first = rounds[0].method, rounds[0].state
    before = trained(method, first)
    answer = lambda outputs: method.answer(job.task, outputs, first.theta)
    if config.distill and not teacher:
      run = gated(model)
      says = lambda v, *inputs, **mode: answer(as_dict(run(v, {}, *inputs, **mode)))
      teacher = Teacher(says, before)
  while rounds[-1].method.rounds > 1:
    last = rounds[-1]
    rounds.append(_round(job, last.model, last.fresh, build, teacher, rounds))
  last = rounds[-1]
  state = stage(
    job,
    'finetune',
    last.model,
    distill(plain()) if teacher else plain(),
    last.best,
    epochs=config.epochs.finetune,
    peak=config.recipe.peaks[1] * config.learning_rate,
    teacher=teacher,
  )
  # Training has left the statistics of its last batches, if there are any.
  has_some = bool(jax.tree.leaves(state.variables.get(COLLECTION, {})))
  anew = config.epochs.finetune > 0 and has_some
  found = _statistics(job, last.model, state.variables, 'after-finetune', anew)
  accuracy = max(found.stored, found.measured)
  # The accuracy of a round after retraining is the next one's before its cut.
  afters = [*(each.held_out.before for each in rounds[1:]), accuracy]
  epochs = config.epochs
  in_round = epochs.train + epochs.gates
  return Shrunk(
    before=before,
    answer=answer,
    pruned=last.pruned,
    model=last.model,
    recalibrated=last.fresh,
    variables=found.best,
    rounds=tuple(map(_round_result, rounds, afters)),
    reports=tuple(each.pruned.report for each in rounds),
    epochs=Change(
      before=in_round if trained_in_round else epochs.train,
      after=in_round + len(rounds) * epochs.finetune,
    ),
    original=original,
  )


def _round(job: Job, model, variables, build: Build, teacher, before) -> _Round:
  """Trains with the method, decides on held-out data, cuts and recalibrates.

  `before` are the rounds so far.
  """
  coupling = couple(model, variables, *job.inputs)
  epochs = job.config.epochs.finetune if before else job.config.epochs.gates
  frozen = job.config.recipe.frozen(job.config.options)
  method = build(
    coupling,
    steps=job.steps(epochs),
    scores=_scores(job, coupling, model, variables),
    whole=before[0].coupling if before else coupling,
  )
  state = stage(
    job,
    f'gates-{len(before) + 1}' if before or method.rounds > 1 else 'gates',
    model,
    distill(method) if teacher else method,
    variables,
    epochs=epochs,
    peak=0 if frozen else job.config.recipe.peaks[0] * job.config.learning_rate,
    coupling=coupling,
    teacher=teacher,
  )
  judged = partial(
    judge,
    model,
    method,
    job.task,
    held_out=list(job.batches(job.images.held_out)),
    calibration=list(_augmented_batches(job, 'judge', JUDGING)),
    coupling=coupling,
  )
  evaluate = judged(job.on_mesh(state))
  decision = method.decide(jax.device_get(state.theta), state.stats, evaluate)
  keep, notes = distributed.agreed(decision), []
  if job.config.recipe.refits(job.config.options):
    batches = map(inputs_of, _augmented_batches(job, 'refit', REFITTING))
    # Weights that rest do not know the batch statistics that moved meanwhile.
    source = variables if frozen else trained(method, state)
    rest = dict(refit(coupling, source, keep, batches))
    fitted = dataclasses.replace(state, params=rest.pop('params'), model_state=rest)
    score = lambda evaluate: evaluate(keep)[job.task.decides_by]
    helps = score(judged(job.on_mesh(fitted))) > score(evaluate)
    if distributed.agreed(np.asarray(helps)):
      state = fitted
    else:
      notes.append(NOT_REFITTED)
  pruned, model, small = cut_round(
    model, method, state, keep, coupling, job.inputs, rounding(job)
  )
  pruned.report['notes'] += notes
  found = _statistics(job, model, small, 'recalibrate', are_outdated(pruned))
  accuracies = Accuracies(
    evaluate({})['accuracy'], pruned=found.stored, recalibrated=found.measured
  )
  return _Round(
    coupling, method, state, pruned, model, found.fresh, found.best, accuracies
  )


class _Statistics(NamedTuple):
  """Variables with fresh batch statistics, beside those with the stored ones.

  Attributes:
    fresh: variables with fresh statistics.
    best: those, or the ones of before, whichever answers held-out data better.
    stored: accuracy on held-out data with the statistics of before.
    measured: that with fresh ones.
  """

  fresh: Tree
  best: Tree
  stored: float
  measured: float


def _statistics(job: Job, model, variables: Tree, name: str, anew: bool) -> _Statistics:
  """Measures batch statistics anew, if asked; `name` selects the random numbers."""
  score = job.scores(model)
  accuracy = lambda v: score(v, job.images.held_out)['accuracy']
  stored = accuracy(variables)
  if not anew:
    return _Statistics(variables, variables, stored, stored)
  batches = _augmented_batches(job, name, RECALIBRATION)
  fresh = local(recalibrate(model, job.on_mesh(variables), batches))
  measured = accuracy(fresh)
  best = fresh if measured >= stored else variables
  return _Statistics(fresh, best, stored, measured)


def _scores(job: Job, coupling: Coupling, model, variables) -> dict[str, np.ndarray]:
  """Scores of what the method gates, of the kind that it starts from."""
  recipe, options = job.config.recipe, job.config.options
  if recipe.score(options) == 'l1':
    return rank(coupling, variables, 'l1')
  batches = _augmented_batches(job, 'scores', SCORING)
  arrays, branches = job.on_mesh(variables), recipe.scores_layers(options)
  return taylor(model, coupling, arrays, job.task, batches, branches)


def _augmented_batches(job: Job, name: str, most: int) -> Iterator[Tree]:
  """Yields at most `most` training batches; `name` selects their random numbers."""
  batch_at = job.batch_at(name).stepwise()
  for i in range(min(most, epoch_steps(job.train, job.config.batch))):
    yield batch_at(job.train, i)


def _round_result(one: _Round, after: float) -> RoundResult:
  """Returns the result of a round; `after` is its accuracy after retraining."""
  report, keep = one.pruned.report, one.pruned.keep
  present, kept = units(one.coupling), keep['branches']
  dead = one.coupling.decision(keep).dead
  closed = lambda u, b: not np.ravel(kept[b])[u.layer or 0] or f'branches/{b}' in dead
  erased = [u.name for u in present if all(closed(u, b) for b in u.branches)]
  return RoundResult(
    units=(len(present), len(present) - len(erased)),
    erased=erased,
    exits=[name for name, is_kept in report['exits'].items() if is_kept],
    flops=Change(**report['flops']),
    params=Change(**report['params']),
    held_out=dataclasses.replace(one.held_out, after=after),
    learned=directory.plain(one.method.report(one.state.theta)),
    verify=Proof(**report['verify']),
    notes=report['notes'],
  )
