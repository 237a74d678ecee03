"""For every model: small equals masked, and `clone(arch)` is the very same program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune import models
from depthprune.models import build, names
from depthprune.models.bert import BERT
from depthprune.models.convnet import ConvNet
from depthprune.models.heads import Head, WithHeads, every_tap, multitask
from depthprune.models.mlp import MLP
from depthprune.models.mobilenet import MobileNetV2
from depthprune.models.resnet import ResNet
from depthprune.models.segnet import SegNet
from depthprune.models.vgg import VGG
from depthprune.models.vit import ViT
from depthprune.program import cost
from depthprune.program import jaxpr as jx
from depthprune.program.coupling import Coupling, couple
from depthprune.program.modules import runnable
from depthprune.program.trace import paths_of
from depthprune.program.units import units
from depthprune.surgery.prune import Pruned, prune
from tests import masking as m
from tests import zoo

X = zoo.image(1)
HEADS = {'early': Head('stage1/block0', hidden=5), 'late': Head('stage2/block0')}
CASES = {  # model, and what is decided beyond half of every group
  'mlp scanned': (MLP(hidden=(6, 6, 6), scan=True), {}),
  'convnet scanned': (ConvNet(layers=4, width=6, size=3, scan=True), {}),
  'vgg scanned': (VGG(blocks=(1, 3), width=4, scan=True), {}),
  'resnet A': (
    ResNet(depth=14, width=4), {'branches': ['stage1/block0', 'stage2/block0']}
  ),
  'resnet B': (ResNet(depth=8, width=4, shortcut='B'), {'branches': ['stage2/block0']}),
  'bottleneck': (
    ResNet(depth=11, width=2, bottleneck=True, shortcut='B'), {'branches': []}
  ),
  'preact A': (
    ResNet(depth=14, width=4, preact=True),
    {'branches': ['stage1/block0', 'stage2/block0']},
  ),
  'preact B': (
    ResNet(depth=11, width=2, bottleneck=True, shortcut='B', preact=True),
    {'branches': ['stage2/block0']},
  ),
  'mobilenet of several units': (
    MobileNetV2(blocks=(1, 3), width=0.5), {'branches': ['stage2/block1']}
  ),
  'mobilenet scanned': (
    MobileNetV2(blocks=(1, 4), width=0.1, scan=True), {'layers': ['stage2/blocks']}
  ),
  'segnet of several units': (
    SegNet(blocks=(1, 2, 1), width=4, classes=3),
    {'branches': ['stage1/block0', 'stage2/block1']},
  ),
  'segnet scanned': (
    SegNet(blocks=(1, 4), width=4, scan=True), {'layers': ['stage2/blocks']}
  ),
  'vit of several units': (
    ViT(width=8, depth=3, heads=4, inner=6),
    {'branches': ['block0/mlp', 'block1/attention', 'block2/attention', 'block2/mlp']},
  ),
  'vit scanned': (
    ViT(width=8, depth=6, heads=4, inner=6, scan=True, segments=3),
    {
      'branches': ['blocks1/attention', 'blocks2/attention', 'blocks2/mlp'],
      'layers': ['blocks0/attention', 'blocks0/mlp'],
    },
  ),
  'bert of several units': (
    BERT(vocab=20, positions=9, width=8, depth=3, heads=4, inner=6),
    {'branches': ['layer0/mlp', 'layer1/attention', 'layer2/attention', 'layer2/mlp']},
  ),
  'bert scanned': (
    BERT(
      vocab=20, positions=9, width=8, depth=6, heads=4, inner=6, scan=True, segments=3
    ),
    {'branches': ['layers1/attention', 'layers2/mlp']},
  ),
  'imagenet': (
    build('resnet18', width=4, classes=10),
    {'branches': [f'stage{i}/block{i % 2}' for i in (1, 2, 3, 4)]},
  ),
  'scanned': (
    ResNet(depth=20, width=4, scan=True),
    {'branches': ['stage3/block0', 'stage1/blocks'], 'layers': ['stage2/blocks']},
  ),
  'heads': (WithHeads(ResNet(depth=8, width=4), HEADS), {'exits': ['early']}),
  'without main': (
    WithHeads(ResNet(depth=8, width=4), HEADS),
    {'exits': ['main'], 'branches': ['trunk/stage2/block0']},
  ),
  'multitask': (
    multitask(ResNet(depth=8, width=4), {'left': 5, 'right': 4}),
    {'exits': ['left'], 'branches': ['trunk/stage3/block0']},
  ),
}  # fmt: skip


def of_family(name: str) -> tuple[Any, dict]:
  """The small network that a family offers, with its first unit closed, if it has one.

  A new model file is tested so without being listed anywhere.
  """
  model, x = models.small(name)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  present = units(couple(model, shapes, x))
  first = next((unit.branches for unit in present if not unit.why_not), ())
  return model, {'branches': [branch.removesuffix('/branch') for branch in first]}


def test_every_name_is_of_a_family_that_is_tested():
  assert {type(build(name)) for name in names()} == {
    type(models.small(family)[0]) for family in models.families()
  }


def example(model: Any, batch: int) -> jax.Array:
  """Images, or the tokens of a network that reads texts."""
  of = {type(small): x for small, x in map(models.small, models.families())}
  if jnp.issubdtype(of.get(type(model), X).dtype, jnp.integer):
    return zoo.tokens(batch)
  return zoo.image(batch)


def decision(coupling: Coupling, closed: dict) -> dict:
  """Half of every group; branches and exits closed by name; of a stack, one layer."""
  keep = m.random_keep(coupling, gated=True)
  keep['branches'] = {
    f'{name}/branch': np.zeros(coupling.branch_shape(f'{name}/branch'), bool)
    for name in (*closed.get('branches', ()), *closed.get('layers', ()))
  }
  for name in closed.get('layers', ()):
    keep['branches'][f'{name}/branch'][1] = True
  keep['exits'] = dict.fromkeys(closed.get('exits', ()), False)
  return keep


@pytest.fixture(scope='module', params=[*models.families(), *CASES])
def cut(request) -> tuple[Any, Pruned]:
  name = request.param
  model, closed = CASES[name] if name in CASES else of_family(name)
  x = example(model, 2)
  variables = zoo.randomised(jax.eval_shape(model.init, jax.random.key(0), x))
  coupling = couple(model, variables, x)
  keep = decision(coupling, closed)
  return model, prune(model, variables, keep, x, coupling=coupling)


def test_small_is_masked(cut):
  model, pruned = cut
  verify = pruned.report['verify']
  assert verify['difference'] <= 1e-5 and verify['moved'] > 1e-3
  assert verify['settled'] == 0 and pruned.report['notes'] == []
  built = couple(pruned.apply, pruned.variables, example(model, 2))
  for name, of in (('flops', cost.flops), ('params', cost.params)):
    assert (
      pruned.report[name]['after'] == of(built) < 0.8 * pruned.report[name]['before']
    )


def test_the_clone_has_the_arrays(cut):
  model, pruned = cut
  assert pruned.arch and pruned.model == model.clone(arch=pruned.arch)
  fresh = jax.eval_shape(pruned.model.init, jax.random.key(0), example(model, 2))
  fresh = {name: tree for name, tree in fresh.items() if name != 'branches'}
  described = lambda tree: {p: (x.shape, x.dtype) for p, x in paths_of(tree).items()}
  assert described(fresh) == described(pruned.variables)


@pytest.mark.parametrize('train', [False, True])
def test_the_clone_is_the_same_program(cut, train):
  """Equation by equation, at another batch size than the one of the coupling."""
  model, pruned = cut
  mode = {'train': True, 'mutable': ['batch_stats']} if train else {}
  ours, native = (
    canonical(fn, pruned.variables, example(model, 3), **mode)
    for fn in (pruned.apply, runnable(pruned.model))
  )
  assert ours == native and len(ours) > 5


DEPTHS = [  # trunk, its image, {exit that is kept: parameters}
  pytest.param(ResNet(depth=14, width=4), 8, {2: 774, 4: 2894, 6: 11_166}, id='small'),
  pytest.param(
    build('resnet110'), 32, {18: 84_730, 36: 414_362, 54: 1_727_962}, id='resnet110',
    marks=pytest.mark.slow,
  ),
]  # fmt: skip


@pytest.mark.parametrize(('trunk', 'size', 'depths'), DEPTHS)
def test_a_network_cut_at_a_depth_is_one_built_to_that_depth(trunk, size, depths):
  """By NetCut's surgery and from scratch: one program, the same arrays."""
  model, x = every_tap(trunk), zoo.image(2, size)
  variables = zoo.randomised(jax.eval_shape(model.init, jax.random.key(0), x))
  coupling = couple(model, variables, x)
  for depth, expected in depths.items():
    kept = model.exits[depth - 1]
    keep = {'exits': {name: name == kept for name in model.exits}}
    pruned = prune(model, variables, keep, x, coupling=coupling)
    dropped = {f'exit/{name}': 0 for name in ('main', *model.exits) if name != kept}
    built = every_tap(trunk).clone(arch=dropped)
    fresh = jax.eval_shape(built.init, jax.random.key(0), x)['params']
    left = pruned.variables['params']
    assert jax.tree.map(np.shape, fresh) == jax.tree.map(np.shape, left)
    assert sum(a.size for a in jax.tree.leaves(left)) == expected
    assert pruned.report['params']['after'] == expected
    assert pruned.report['notes'] == []
    small, native = (
      canonical(fn, pruned.variables, x) for fn in (pruned.apply, runnable(built))
    )
    assert small == native and len(small) > 10 * depth


# ---- programs as text ----------------------------------------------------------------

# What says how a program came about, or how its inputs are counted and placed.
SILENT = """name sharding jaxpr call_jaxpr jvp_jaxpr_fun ctx_mesh metadata linear
  num_consts ft_in ft_out""".split()


def canonical(fn: Callable, variables: Any, x: jax.Array, **kwargs) -> list[str]:
  """A line per equation that the outputs need, values numbered in order of use."""
  program, tree = jx.trace(lambda v, x: fn(v, x, **kwargs), (variables, x))
  names = dict(zip(program.inputs, [*paths_of(variables), 'x'], strict=True))
  return [*lines(program, names), f'return {tree}']


def lines(program: jx.Program, names: dict[jx.Value, str]) -> list[str]:
  names |= {v: f'constant {np.asarray(c)}' for v, c in program.constants.items()}
  show = lambda values: ', '.join(shown(v, names) for v in values)
  text = []
  for e in alive(program):
    names |= {v: f'%{len(names) + i}' for i, v in enumerate(e.outputs)}
    params = {
      k: str(p) for k, p in e.params.items() if k not in SILENT and p is not None
    }
    read = read_inputs(e)
    text.append(f'{show(e.outputs)} = {e.name}({show(read.values())}) {params}')
    for body in e.bodies:
      inside = {v: f'in{i}' for i, v in enumerate(v for v in body.inputs if v in read)}
      text += [f'  {line}' for line in lines(body, inside)]
  return [*text, f'out {show(program.outputs)}']


def alive(program: jx.Program) -> list[jx.Equation]:
  needed, kept = set(program.outputs), []
  for e in reversed(program.equations):
    if needed & set(e.outputs):
      kept.append(e)
      needed |= set(read_inputs(e).values())
  return kept[::-1]


def read_inputs(e: jx.Equation) -> dict[jx.Value, jx.Value]:
  """{input of the body, where there is one: what stands there}, without the unread."""
  if e.name != 'scan':
    bodies = e.bodies[0].inputs if len(e.bodies) == 1 else e.inputs
    return dict(zip(bodies, e.inputs, strict=True))
  (body,) = e.bodies
  used = {v for inner in alive(body) for v in read_inputs(inner).values()}
  pairs = dict(zip(body.inputs, e.inputs, strict=True))
  carry = jx.scan_parts(e, body.inputs)[1]
  return {v: o for v, o in pairs.items() if v in used or v in carry}


def shown(v: jx.Value, names: dict[jx.Value, str]) -> str:
  name = repr(v.val) if isinstance(v, jx.Literal) else names[v]
  return f'{name}: {v.dtype}{list(v.shape)}'
