"""Smaller, faster networks in JAX: fewer layers, fewer channels, earlier exits."""

from depthprune.program import cost as cost
from depthprune.program.couple import Coupling as Coupling
from depthprune.program.couple import couple as couple
from depthprune.program.plug import plug as plug
from depthprune.program.rebind import slim as slim
from depthprune.surgery.cut import InexactCut as InexactCut
from depthprune.surgery.cut import Pruned as Pruned
from depthprune.surgery.cut import prune as prune
from depthprune.surgery.oneshot import oneshot as oneshot
