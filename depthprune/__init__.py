"""Smaller, faster networks in JAX: fewer layers, fewer channels, earlier exits.

Public names are imported when they are first used: `import depthprune` loads no jax.
"""

from etils import epy as _epy

with _epy.lazy_api_imports(globals()):
  from depthprune import models
  from depthprune.cascades.cascade import cascade
  from depthprune.cascades.generation import exit_predictions, generate_early
  from depthprune.exports.exits import load_exits, save_exits
  from depthprune.exports.networks import load, load_cascade, save, save_cascade
  from depthprune.exports.stablehlo import export
  from depthprune.gates import branch, straight_through
  from depthprune.methods.auxiliary import auxiliary
  from depthprune.methods.implosion import implosion
  from depthprune.methods.netcut import netcut
  from depthprune.methods.sidenet import sidenet
  from depthprune.methods.trainable_gates import trainable_gates
  from depthprune.models.foreign import trunk
  from depthprune.models.generation import generate, speculate
  from depthprune.program import cost
  from depthprune.program.coupling import Coupling, couple
  from depthprune.program.gating import plug
  from depthprune.program.resize import slim
  from depthprune.program.stages import split
  from depthprune.program.taps import taps
  from depthprune.runs import Run, load_run, run_method
  from depthprune.storage.checkpoint import CheckpointError
  from depthprune.surgery.activations import activations
  from depthprune.surgery.influence import block_influence
  from depthprune.surgery.oneshot import oneshot
  from depthprune.surgery.prune import InexactCut, Pruned, prune
  from depthprune.surgery.refit import refit
  from depthprune.timing.layers import milliseconds
  from depthprune.train.distill import distill
  from depthprune.train.evaluate import recalibrate
  from depthprune.train.judge import judge
  from depthprune.train.language import language_model
  from depthprune.train.loop import fit
  from depthprune.train.method import (
    CutRefused,
    Method,
    add_penalty,
    optimizer,
    spare_closed,
  )
  from depthprune.train.rounds import shrink
  from depthprune.train.search import search
  from depthprune.train.step import init_state, make_step
  from depthprune.train.task import (
    classification,
    multilabel,
    regression,
    segmentation,
  )
  from depthprune.version import __version__ as __version__

__all__ = [
  'CheckpointError',
  'Coupling',
  'CutRefused',
  'InexactCut',
  'Method',
  'Pruned',
  'Run',
  'activations',
  'add_penalty',
  'auxiliary',
  'block_influence',
  'branch',
  'cascade',
  'classification',
  'cost',
  'couple',
  'distill',
  'exit_predictions',
  'export',
  'fit',
  'generate',
  'generate_early',
  'implosion',
  'init_state',
  'judge',
  'language_model',
  'load',
  'load_cascade',
  'load_exits',
  'load_run',
  'make_step',
  'milliseconds',
  'models',
  'multilabel',
  'netcut',
  'oneshot',
  'optimizer',
  'plug',
  'prune',
  'recalibrate',
  'refit',
  'regression',
  'run_method',
  'save',
  'save_cascade',
  'save_exits',
  'search',
  'segmentation',
  'shrink',
  'sidenet',
  'slim',
  'spare_closed',
  'speculate',
  'split',
  'straight_through',
  'taps',
  'trainable_gates',
  'trunk',
]
