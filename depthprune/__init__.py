"""Smaller, faster networks in JAX: fewer layers, fewer channels, earlier exits."""

from depthprune import models as models
from depthprune.gates import branch as branch
from depthprune.gates import straight_through as straight_through
from depthprune.methods.trainable_gates import trainable_gates as trainable_gates
from depthprune.program import cost as cost
from depthprune.program.couple import Coupling as Coupling
from depthprune.program.couple import couple as couple
from depthprune.program.plug import plug as plug
from depthprune.program.rebind import slim as slim
from depthprune.surgery.cut import InexactCut as InexactCut
from depthprune.surgery.cut import Pruned as Pruned
from depthprune.surgery.cut import prune as prune
from depthprune.surgery.oneshot import oneshot as oneshot
from depthprune.training.checkpoint import CheckpointError as CheckpointError
from depthprune.training.checkpoint import load as load
from depthprune.training.checkpoint import save as save
from depthprune.training.distill import distill as distill
from depthprune.training.method import Method as Method
from depthprune.training.method import optimizer as optimizer
from depthprune.training.penalties import add_penalty as add_penalty
from depthprune.training.penalties import spare_closed as spare_closed
from depthprune.training.recalibrate import recalibrate as recalibrate
from depthprune.training.train import fit as fit
from depthprune.training.train import make_step as make_step
