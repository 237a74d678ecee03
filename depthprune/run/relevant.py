"""What of a run's config its training depends on, whole and stage by stage."""

from collections.abc import Mapping
from typing import Any

from depthprune.options.sidenet import REQUESTS

# Of a run's config and of any method's options.
UNRELATED = (
  *('workdir', 'resume', 'checkpoint_every_s', 'mesh', 'remat', 'workers'),
  *('tolerance', 'force', 'drop', *REQUESTS, 'delta', 'confidence'),
)
TRAIN = 'train'  # the stage before anything of a method
LATER = 'options', 'gate_epochs', 'finetune_epochs', 'distill'


def relevant(values: Mapping[str, Any], stage: str = '') -> dict[str, Any]:
  """`Config.to_json()` without what training, or that stage, does not depend on."""
  unrelated = (*UNRELATED, *LATER) if stage == TRAIN else UNRELATED
  rest = {k: v for k, v in values.items() if k not in unrelated}
  return {k: relevant(v) if isinstance(v, Mapping) else v for k, v in rest.items()}
