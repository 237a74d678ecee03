"""For every model: small equals masked, and `clone(arch)` is the very same program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.models import build, names
from depthprune.models.heads import Head, WithHeads
from depthprune.models.mlp import MLP
from depthprune.models.resnet import ResNet
from depthprune.models.vgg import VGG
from depthprune.program import jaxpr as jx
from depthprune.program.couple import couple
from depthprune.program.view import paths_of, runnable
from depthprune.surgery.cut import Pruned, prune
from tests import masking as m
from tests import zoo

EXACT = 1e-5  # relative, in float32
CLOSED = {'branches': {'stage2/block0/branch': np.asarray(False)}}
TRUNK = ResNet(depth=14, width=4)
HEADS = {'early': Head('stage1/block0', hidden=5), 'late': Head('stage2/block1')}
CASES = {  # model, and the part of the decision that is not random
  'mlp': (MLP(hidden=(6, 5)), {}),
  'mlp scanned': (MLP(hidden=(6, 6, 6), scan=True), {}),
  'vgg': (VGG(blocks=(1, 2), width=4), {}),
  'vgg scanned': (VGG(blocks=(1, 3), width=4, scan=True), {}),
  'resnet A': (ResNet(depth=8, width=4), {}),
  'resnet B': (ResNet(depth=8, width=4, shortcut='B'), {}),
  'bottleneck': (ResNet(depth=11, width=2, bottleneck=True, shortcut='B'), {}),
  'bottleneck A': (ResNet(depth=11, width=2, bottleneck=True), {}),
  'imagenet': (build('resnet18', width=4, classes=10), {}),
  'scanned': (ResNet(depth=20, width=4, scan=True, shortcut='B'), {}),
  'closed branch': (ResNet(depth=14, width=4), CLOSED),
  'closed branch A': (ResNet(depth=8, width=4), CLOSED),
  'closed layer': (
    ResNet(depth=20, width=4, scan=True),
    {'branches': {'stage2/blocks/branch': np.asarray([False, True])}},
  ),
  'closed stack': (
    ResNet(depth=20, width=4, scan=True),
    {'branches': {'stage2/blocks/branch': np.zeros(2, bool)}},
  ),
  'heads': (WithHeads(TRUNK, HEADS), {}),
  'without main': (WithHeads(TRUNK, HEADS), {'exits': {'main': False}}),
  'without a head': (WithHeads(TRUNK, HEADS), {'exits': {'early': False}}),
}  # fmt: skip


def test_no_family_is_left_out():
  families = {type(build(name)).__name__ for name in names()}
  assert families <= {type(model).__name__ for model, _ in CASES.values()}


def cut(name: str) -> tuple[Any, Pruned]:
  model, decision = CASES[name]
  x = zoo.image(2)
  variables = zoo.randomised(jax.eval_shape(model.init, jax.random.key(0), x))
  variables['branches'] = jax.tree.map(jnp.ones_like, variables.get('branches', {}))
  coupling = couple(model, variables, x)
  keep = m.random_keep(coupling) | decision
  return model, prune(model, variables, keep, x, coupling=coupling)


@pytest.mark.parametrize('name', CASES)
def test_small_is_masked_and_the_clone_is_small(name):
  model, pruned = cut(name)
  verify = pruned.report['verify']
  assert verify['difference'] <= EXACT and verify['moved'] > 1e-3
  assert pruned.report['flops']['after'] < pruned.report['flops']['before']
  assert pruned.model == model.clone(arch=pruned.arch) != model

  x = zoo.image(3)  # another batch size than the one of the coupling
  fresh = jax.eval_shape(pruned.model.init, jax.random.key(0), x)
  shapes = {p: (v.shape, v.dtype) for p, v in paths_of(fresh).items()}
  ours = {p: (v.shape, v.dtype) for p, v in paths_of(pruned.variables).items()}
  assert {p: s for p, s in shapes.items() if p[:9] != 'branches/'} == ours
  for mode in ({}, {'train': True, 'mutable': ['batch_stats']}):
    native, ours = (
      canonical(fn, pruned.variables, x, **mode)
      for fn in (runnable(pruned.model), pruned.apply)
    )
    assert ours == native, mode


# ---- programs as text ----------------------------------------------------------------

# What says how a program came about, or where it runs, but not what it computes.
SILENT = ('name', 'sharding', 'jaxpr', 'call_jaxpr', 'ctx_mesh', 'metadata')


def canonical(fn: Callable, variables: Any, x: jax.Array, **kwargs) -> list[str]:
  """A line per equation that the outputs need, values numbered in order of use."""
  run = lambda variables, x: fn(variables, x, **kwargs)
  program, tree = jx.trace(run, (variables, x))
  names = {v: p for v, p in zip(program.inputs, [*paths_of(variables), 'x'])}
  lines = _lines(program, names)
  return [*lines, f'return {tree}']


def _lines(program: jx.Program, names: dict[jx.Value, str]) -> list[str]:
  names |= {v: f'constant {np.asarray(c)}' for v, c in program.constants.items()}
  lines = []
  for e in jx.live(program)[0]:
    for v in e.outputs:
      names[v] = f'%{len(names)}'
    ins, outs = (', '.join(_show(v, names) for v in vs) for vs in (e.inputs, e.outputs))
    params = {k: str(v) for k, v in e.params.items() if _speaks(k, v)}
    lines.append(f'{outs} = {e.name}({ins}) {params}')
    for body, outer in jx.bodies_with_inputs(e):
      inside = {v: f'argument {i}' for i, v in enumerate(body.inputs)}
      lines += [f'  {line}' for line in _lines(body, inside)]
  return [*lines, 'out ' + ', '.join(_show(v, names) for v in program.outputs)]


def _speaks(key: str, param: Any) -> bool:
  return key not in SILENT and not callable(param) and param is not None


def _show(v: jx.Value, names: dict[jx.Value, str]) -> str:
  name = repr(v.val) if isinstance(v, jx.Literal) else names[v]
  return f'{name}: {v.dtype}{list(v.shape)}'
