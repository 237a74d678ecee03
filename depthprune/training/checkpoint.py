"""What is written to disk: training state, and pruned networks."""

from depthprune.training.keeper import Keeper as Keeper
from depthprune.training.keeper import Restored as Restored
from depthprune.training.keeper import same_config as same_config
from depthprune.training.store import CheckpointError as CheckpointError
