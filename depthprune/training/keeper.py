"""Training state that survives a kill: the newest few steps of a run, on disk."""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from depthprune.options.sidenet import REQUESTS
from depthprune.training import hosts, store
from depthprune.training.store import CheckpointError

RECORD = 'state.json'
# What training does not depend on, of a run's config and of any method's options.
UNRELATED = (
  *('workdir', 'resume', 'checkpoint_every_s', 'mesh', 'remat', 'workers'),
  *('tolerance', 'force', 'drop', *REQUESTS, 'delta', 'confidence'),
)
SHARED = 'Choose a directory (--workdir) that all hosts share'


class Restored(NamedTuple):
  """What `Keeper.save` was given, with the same structure, dtypes and bits."""

  step: int
  state: Any
  meta: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Keeper:
  """The newest `keep` states of one stage of a run, one folder per step in `folder`.

  Every write is atomic. `config` (plain JSON data) goes with each state, and the state
  of another config is refused: put in it all that the result depends on.
  """

  folder: Path
  keep: int = 3
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def save(self, step: int, state: Any, meta: Mapping[str, Any] | None = None) -> None:
    """Writes the state (a pytree of arrays) of a step; `meta` is plain JSON data.

    States of later steps are removed: they are of a future that was given up.
    """
    if hosts.writes():
      for left in Path(self.folder).glob('.*-*'):  # of a write that was killed
        shutil.rmtree(left, ignore_errors=True)
    record = {'step': step, 'config': dict(self.config), 'meta': dict(meta or {})}
    store.write(self._at(step), RECORD, state, record)
    steps = self.steps()
    later, kept = [s for s in steps if s > step], [s for s in steps if s <= step]
    if hosts.writes():
      for old in later + kept[: -self.keep]:
        store.discard(self._at(old))
    hosts.wait()

  def restore_latest(self, like: Any) -> Restored | None:
    """The newest state that is whole, or None where none was saved yet.

    `like` is a state, or an abstract one, of the structure, shapes and dtypes expected.
    A damaged state is set aside, with a warning, and the one before it taken.

    Raises CheckpointError where all are damaged, where the config is another (naming
    the fields), and where a leaf is missing or has another shape or dtype; HostError
    where processes do not see the same folder.
    """
    hosts.alike(str(self.folder), {'steps': self.steps()}, SHARED)
    broken: list[tuple[int, CheckpointError]] = []
    for step in reversed(self.steps()):
      try:
        leaves, record = store.read(self._at(step), RECORD)
      except CheckpointError as error:
        broken.append((step, error))
        continue
      same_config(record['config'], self.config, str(self.folder))
      state = store.matched(like, leaves, str(self._at(step)))
      for bad, error in broken:
        aside = self._at(bad).with_suffix('.damaged')
        if hosts.writes():
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

  def steps(self) -> list[int]:
    """The steps that were saved, oldest first."""
    found = Path(self.folder).glob('*')
    return sorted(int(path.name) for path in found if path.name.isdecimal())

  def _at(self, step: int) -> Path:
    return Path(self.folder) / f'{step:08d}'


def relevant(values: Mapping[str, Any]) -> dict[str, Any]:
  """`Config.to_json()` without what training does not depend on."""
  rest = {k: v for k, v in values.items() if k not in UNRELATED}
  return {k: relevant(v) if isinstance(v, Mapping) else v for k, v in rest.items()}


def same_config(stored: Mapping, config: Mapping, where: str) -> None:
  """Raises CheckpointError naming the fields in which a run differs from what is there.

  Both are compared as JSON has them, where a tuple is a list; a field that is None is
  as good as one that did not exist when the run was made.
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
  """Without what is None, at any depth."""
  if not isinstance(values, dict):
    return values
  return {k: _given(v) for k, v in values.items() if v is not None}
