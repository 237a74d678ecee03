"""Keeps training states on disk, so that a killed run can be continued."""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent import futures
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax

from depthprune import distributed
from depthprune.storage import checkpoint, directory
from depthprune.storage.files import CheckpointError, Rule, at_least

RECORD = 'state.json'
NUMBER = int, float, type(None)
SHARED = 'Choose a directory (--workdir) that all hosts share'


class StateRecord(checkpoint.Record):
  """The entries of `state.json`; the score of a run that diverged may be NaN."""

  step: Annotated[int, at_least(0)]
  config: dict[str, Any]
  meta: dict[str, Any]
  score: Annotated[Any, Rule('a number or null', lambda x: type(x) in NUMBER)]


class Restored(NamedTuple):
  """A state that was read back, with the structure, dtypes and bits it was saved with.

  Attributes:
    step: its step.
    state: the pytree of arrays.
    meta: the JSON data that was saved with it.
  """

  step: int
  state: Any
  meta: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Keeper:
  """Keeps the newest states of one stage of a run, and the best, on disk.

  Every write is atomic, and goes on in the background while training continues.

  Attributes:
    folder: the folder, with a folder for each step.
    keep: number of the newest states that are kept.
    config: plain JSON data that goes with each state. The state of another config is
      refused, so it should have all that the result depends on.
  """

  folder: Path
  keep: int = 3
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  _begun: list[Future] = dataclasses.field(default_factory=list, repr=False)

  def save(
    self,
    step: int,
    state: Any,
    meta: Mapping[str, Any] | None = None,
    score: float | None = None,
  ) -> None:
    """Begins to write a state, which may change once this returns.

    States of later steps are removed when it is written: the run went back before them.

    Args:
      step: its step.
      state: a pytree of arrays.
      meta: plain JSON data to keep with it.
      score: how good it is; lower is better.

    Raises:
      WriteError: the disk is full for this state or the one before; older states are
        unchanged.
    """
    self.wait()
    if distributed.writes():
      for left in Path(self.folder).glob('.*-*'):  # left by a killed write
        shutil.rmtree(left, ignore_errors=True)
    record = {
      'step': step,
      'config': dict(self.config),
      'meta': dict(meta or {}),
      'score': score,
    }
    retain = lambda: self._retain(step)
    with self._naming_last_step():
      self._begun.append(
        checkpoint.start(self._at(step), RECORD, state, record, then=retain)
      )

  def wait(self) -> None:
    """Waits until every state is on disk; raises WriteError if it cannot be."""
    while self._begun:
      with self._naming_last_step():
        distributed.together(self._begun.pop().result)

  def rest(self) -> None:
    """Waits until this process has stopped writing, successfully or not.

    Among several processes it does not wait, because another may be gone.
    """
    if jax.process_count() == 1:
      futures.wait(self._begun)

  def restore_latest(self, like: Any) -> Restored | None:
    """Reads the newest state that is intact; returns None if none was saved.

    A damaged state is moved aside, with a warning, and the one before it is read.

    Args:
      like: a state of the expected structure, shapes and dtypes, possibly abstract.

    Raises:
      CheckpointError: all states are damaged, their config is another one, or a leaf is
        missing or has another shape or dtype.
      HostError: processes do not see the same folder.
    """
    return self._restore(like, self.steps()[::-1])

  def restore_best(self, like: Any) -> Restored | None:
    """Reads the state of the lowest score; otherwise like `restore_latest`."""
    scores = self._scores(self.steps())
    return self._restore(like, sorted(scores, key=lambda step: scores[step]))

  def steps(self) -> list[int]:
    """Returns the steps that were saved, oldest first."""
    self.wait()
    return self._there()

  def _restore(self, like: Any, order: list[int]) -> Restored | None:
    distributed.alike(str(self.folder), {'steps': order}, SHARED)
    broken: list[tuple[int, CheckpointError]] = []
    for step in order:
      try:
        leaves, record = checkpoint.read(self._at(step), RECORD, StateRecord)
      except CheckpointError as error:
        broken.append((step, error))
        continue
      same_config(record['config'], self.config, str(self.folder))
      state = checkpoint.matched(like, leaves, str(self._at(step)))
      for bad, error in broken:
        aside = self._at(bad).with_suffix('.damaged')
        if distributed.writes():
          shutil.rmtree(aside, ignore_errors=True)
          self._at(bad).rename(aside)
        warnings.warn(f'{error}; going on from step {step}', stacklevel=2)
      return Restored(step, state, record['meta'])
    if broken:
      raise CheckpointError(
        f'{self.folder}: no state is whole, the newest says: {broken[0][1]}. To start '
        'from step 0, delete the folder'
      )
    return None

  @contextmanager
  def _naming_last_step(self) -> Iterator[None]:
    """Adds to a WriteError the step from which the run can continue."""
    try:
      yield
    except directory.WriteError as error:
      last = ''.join(f' (step {step})' for step in self._there()[-1:])
      raise directory.WriteError(f'{error}{last}') from error

  def _there(self) -> list[int]:
    found = Path(self.folder).glob('*')
    return sorted(int(path.name) for path in found if path.name.isdecimal())

  def _scores(self, steps: list[int]) -> dict[int, float]:
    found = {}
    for step in steps:
      with suppress(CheckpointError):
        record = checkpoint.read_record(self._at(step), RECORD, StateRecord)
        found[step] = record['score']
    return {step: score for step, score in found.items() if score is not None}

  def _retain(self, step: int) -> None:
    steps = self._there()
    kept = [s for s in steps if s <= step]
    scores = self._scores(kept)
    best = min(scores, key=lambda s: scores[s], default=None)
    for s in steps:
      if s not in (*kept[-self.keep :], best):
        directory.discard(self._at(s))

  def _at(self, step: int) -> Path:
    return Path(self.folder) / f'{step:08d}'


def same_config(stored: Mapping, config: Mapping, where: str) -> None:
  """Checks that a run has the config of what is stored.

  They are compared as JSON, where tuples are lists. A field that is None, False or
  empty equals a field that did not exist when the stored run was made. `where` is the
  directory, for errors.

  Raises:
    CheckpointError: they differ; the message names the fields.
  """
  stored, config = map(
    _without_defaults, json.loads(json.dumps([dict(stored), dict(config)]))
  )
  differing = [
    f'{field} (asked for {config.get(field)!r}, there {stored.get(field)!r})'
    for field in sorted({*stored, *config})
    if stored.get(field, ...) != config.get(field, ...)
  ]
  if differing:
    raise CheckpointError(
      f'{where}: belongs to a run of another config: {", ".join(differing)}. Choose '
      'another directory (--workdir), the config it was made with, or start anew '
      '(--no-resume)'
    )


def _without_defaults(values: Any) -> Any:
  """Removes fields that are None, False or an empty list, at any depth."""
  if not isinstance(values, dict):
    return values
  return {
    key: _without_defaults(value)
    for key, value in values.items()
    if value is not None and value is not False and value != []
  }
