"""Training state that survives a kill: the newest few steps of a run, on disk."""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent import futures
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax

from depthprune import distributed
from depthprune.storage import checkpoint, directory
from depthprune.storage.checkpoint import CheckpointError

RECORD = 'state.json'
SHARED = 'Choose a directory (--workdir) that all hosts share'


class Restored(NamedTuple):
  """What `Keeper.save` was given, with the same structure, dtypes and bits."""

  step: int
  state: Any
  meta: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Keeper:
  """The newest `keep` states of one stage of a run, one folder per step in `folder`.

  The best is kept besides. Every write is atomic, and goes on in the background while
  training does. `config` (plain JSON data) goes with each state, and the state of
  another config is refused: put in it all that the result depends on.
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
    """Begins to write the state (a pytree of arrays) of a step, once it is copied.

    States of later steps are removed when it is written: they are of a future that was
    given up.

    meta: plain JSON data. score: the lower the better.

    Raises: WriteError where this write, or the one before, finds no room; what was
      there is then still there.
    """
    self.wait()
    if distributed.writes():
      for left in Path(self.folder).glob('.*-*'):  # of a write that was killed
        shutil.rmtree(left, ignore_errors=True)
    record = {'step': step, 'config': dict(self.config), 'meta': dict(meta or {})}
    given = self._at(step), RECORD, state, {**record, 'score': score}
    with self._whole():
      self._begun.append(checkpoint.start(*given, then=lambda: self._retain(step)))

  def wait(self) -> None:
    """Until all that was saved is on disk; raises WriteError where it is not."""
    while self._begun:
      with self._whole():
        distributed.together(self._begun.pop().result)

  def rest(self) -> None:
    """Until this process writes no more, whatever became of it.

    Of several processes, one that waited could wait for one that is gone.
    """
    if jax.process_count() == 1:
      futures.wait(self._begun)

  def restore_latest(self, like: Any) -> Restored | None:
    """The newest state that is whole, or None where none was saved yet.

    `like` is a state, or an abstract one, of the structure, shapes and dtypes expected.
    A damaged state is set aside, with a warning, and the one before it taken.

    Raises CheckpointError where all are damaged, where the config is another (naming
    the fields), and where a leaf is missing or has another shape or dtype; HostError
    where processes do not see the same folder.
    """
    return self._restore(like, self.steps()[::-1])

  def restore_best(self, like: Any) -> Restored | None:
    """As `restore_latest`, but the state of the lowest score; None without scores."""
    scores = self._scores(self.steps())
    return self._restore(like, sorted(scores, key=lambda step: scores[step]))

  def steps(self) -> list[int]:
    """The steps that were saved, oldest first."""
    self.wait()
    return self._there()

  def _restore(self, like: Any, order: list[int]) -> Restored | None:
    distributed.alike(str(self.folder), {'steps': order}, SHARED)
    broken: list[tuple[int, CheckpointError]] = []
    for step in order:
      try:
        leaves, record = checkpoint.read(self._at(step), RECORD)
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
  def _whole(self) -> Iterator[None]:
    """Names the step from which a run can go on that finds no room for another."""
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
        found[step] = checkpoint.read_record(self._at(step), RECORD).get('score')
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
  """Raises CheckpointError naming the fields in which a run differs from what is there.

  Both are compared as JSON has them, where a tuple is a list; a field that is None or
  False is as good as one that did not exist when the run was made.
  """
  stored, config = map(_given, json.loads(json.dumps([dict(stored), dict(config)])))
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


def _given(values: Any) -> Any:
  """Without what is None or off, at any depth."""
  if not isinstance(values, dict):
    return values
  given = lambda v: v is not None and v is not False
  return {k: _given(v) for k, v in values.items() if given(v)}
