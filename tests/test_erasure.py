"""Depth: every erasure and every kept exit of every family is the masked network."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthprune.models.convnet import ConvNet
from depthprune.models.heads import every_tap
from depthprune.models.mlp import MLP
from depthprune.models.mobilenet import MobileNetV2
from depthprune.models.resnet import ResNet
from depthprune.models.segnet import SegNet
from depthprune.models.vgg import VGG
from depthprune.models.vit import ViT
from depthprune.program.coupling import Coupling, couple
from depthprune.program.resize import slim
from depthprune.program.trace import paths_of
from depthprune.program.units import closing, units
from depthprune.surgery.fold import fold
from depthprune.surgery.plan import cut, index_plan
from depthprune.surgery.prune import prune
from depthprune.surgery.settle import settle
from tests import masking as m
from tests import zoo

X = jnp.round(zoo.image(2))
BOTTLENECK = ResNet(depth=11, width=2, bottleneck=True, shortcut='B')
NETWORKS = {  # what has units
  'post-activation': ResNet(depth=8, width=2),
  'pre-activation': ResNet(depth=8, width=2, preact=True),
  'bottleneck': BOTTLENECK,
  'pre-activation bottleneck': BOTTLENECK.clone(preact=True),
  'inverted': MobileNetV2(blocks=(1, 3), width=0.1),
  'segmentation': SegNet(blocks=(1, 1, 1), width=2),
  'stages scanned': ResNet(depth=14, width=2, scan=True),
  'vit': ViT(width=4, depth=2, heads=2, inner=4),
  'vit scanned': ViT(width=4, depth=3, heads=2, inner=4, scan=True),
}
TRUNKS = {
  'mlp': MLP(hidden=(5, 4, 4)),
  'convnet': ConvNet(layers=3, width=4, size=3),
  'vgg': VGG(blocks=(1, 1, 1), width=2),
  'resnet': ResNet(depth=8, width=2),
  'vit': ViT(width=4, depth=3, heads=2, inner=4),
  'vit scanned': ViT(width=4, depth=6, heads=2, inner=4, scan=True, segments=3),
}
COUPLED: dict[str, tuple[Any, Any, Coupling]] = {}


def slow_but(fast: str, names) -> list:
  """The names; those that are not listed in `fast` run with the slow tests only."""
  slow = lambda name: pytest.param(name, marks=pytest.mark.slow)
  return [name if name in fast.split(', ') else slow(name) for name in names]


def coupled(name: str, model: Any) -> tuple[Any, Any, Coupling]:
  """(the model compiled, its arrays, its coupling); gates are 1, or no longer 1."""
  if name not in COUPLED:
    variables = arrays(model)
    COUPLED[name] = m.quick(model.apply), variables, couple(model, variables, X)
  return COUPLED[name]


def arrays(model):
  """Integers but for a ViT, and gates -2, 1 and 2: without rounding, every bit counts.

  Few and small ones, var + eps = 1, so that no sum is too large to be exact."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), X)
  draw = np.random.default_rng(0)

  def leaf(path, x):
    last = path[-1].key
    if last == 'branch':
      return jnp.asarray(draw.choice([-2, 1, 2], x.shape), x.dtype)
    if last == 'var':
      return jnp.full(x.shape, np.float32(1) - np.float32(1e-5))
    if last in ('scale', 'bias', 'mean'):
      return jnp.asarray(draw.integers(last == 'scale', 2, x.shape), x.dtype)
    few = draw.random(x.shape) < 3 / np.prod(x.shape[:-1])
    return jnp.asarray(few * draw.choice([-1, 1, 1], x.shape), x.dtype)

  drawn = jax.tree_util.tree_map_with_path(leaf, shapes)
  if not isinstance(model, ViT):
    return drawn
  return zoo.randomised(shapes) | {'branches': drawn['branches']}


def small(coupling: Coupling, variables: Any, keep: dict) -> Any:
  """The outputs of the network that surgery leaves, as `prune` builds it."""
  kept = settle(coupling, keep, variables).keep
  closed = paths_of(masked(variables, kept['branches']))
  gates = {b: closed[f'branches/{b}'] for b in coupling.branches}
  open_ = {b: g for b, g in gates.items() if kept['branches'][b].any()}
  folded = fold(coupling.view, variables, open_, kept['exits'])
  left = cut(folded, index_plan(coupling, kept))
  return m.quick(slim(coupling.fn, coupling, kept))(left, X)


def masked(variables: Any, keep: dict) -> Any:
  """The arrays with zeros for the gates of closed branches."""
  leaves = [
    np.asarray(x) * np.asarray(keep.get(path.removeprefix('branches/'), 1), x.dtype)
    for path, x in paths_of(variables).items()
  ]
  return jax.tree.unflatten(jax.tree.structure(variables), leaves)


def same(model: Any, expected: Any, got: Any):
  """Bit for bit; of a ViT, whose softmax rounds, to 1e-5."""
  assert expected.keys() == got.keys()
  if 'vit' in str(type(model)).lower():
    assert m.difference(expected, got) <= 1e-5
  else:
    jax.tree.map(np.testing.assert_array_equal, expected, got)


def erase(name: str, chosen: set[int]):
  """Masked is small with these units of a network erased; and something changed."""
  model = NETWORKS[name]
  run, variables, coupling = coupled(name, model)
  keep = closing([units(coupling)[i] for i in chosen], coupling)
  full, closed = (
    run(arrays, X)['main']
    for arrays in (variables, masked(variables, keep['branches']))
  )
  same(model, {'main': closed}, small(coupling, variables, keep))
  assert bool(chosen) == (m.difference(full, closed) > 1e-3)


def count(name: str) -> int:
  *_, coupling = coupled(name, NETWORKS[name])
  return len(units(coupling))


@pytest.mark.parametrize(
  'name',
  slow_but('post-activation, pre-activation, bottleneck, vit, vit scanned', NETWORKS),
)
def test_every_single_erasure_is_the_masked_network(name):
  """Gates that are no longer 1 are folded on the way."""
  assert count(name) >= 3
  for i in range(count(name)):
    erase(name, {i})


random_erasures = given(
  st.sampled_from(sorted(NETWORKS)), st.sets(st.integers(0, 5), min_size=2)
)


def erased_together(name: str, chosen: set[int]):
  erase(name, {i % count(name) for i in chosen})


@random_erasures
@settings(deadline=None, max_examples=4, derandomize=True)
def test_random_erasures_together(name, chosen):
  erased_together(name, chosen)


@pytest.mark.slow
@random_erasures
@settings(deadline=None, max_examples=100)
def test_many_more_random_erasures_together(name, chosen):
  erased_together(name, chosen)


@pytest.mark.parametrize('name', TRUNKS)
def test_every_kept_exit_is_that_of_the_whole_network(name):
  model = every_tap(TRUNKS[name])
  run, variables, coupling = coupled(f'exits of {name}', model)
  expected = run(variables, X)
  assert coupling.exits == model.exits and len(model.exits) == 3
  for kept in model.exits:
    keep = {'exits': {name: name == kept for name in model.exits}}
    got = small(coupling, variables, keep)
    same(model.trunk, {kept: expected[kept]}, got)


SOFT = {**NETWORKS, 'exits': every_tap(ResNet(depth=8, width=2, preact=True))}


@pytest.mark.parametrize('name', slow_but('stages scanned, vit scanned, exits', SOFT))
def test_priorities_are_folded_when_the_network_is_cut(name):
  """Soft and negative ones, one unit erased: `prune` itself, through `arch` too."""
  model = SOFT[name]
  variables = zoo.randomised(jax.eval_shape(model.init, jax.random.key(0), X))
  soft = lambda x: jnp.resize(jnp.asarray([-1.3, 0.7, 2.0], x.dtype), x.shape)
  variables['branches'] = jax.tree.map(soft, variables['branches'])
  coupling = couple(model, variables, X)
  keep = closing([units(coupling)[1]], coupling)
  expected = m.quick(model.apply)(masked(variables, keep['branches']), X)
  pruned = prune(model, variables, keep, X, coupling=coupling)
  assert 'branches' not in pruned.variables and not pruned.report['notes']
  for fn in (pruned.apply, pruned.model.apply):
    got = m.quick(fn)(pruned.variables, X)
    for exit in model.exits:
      assert m.difference(expected[exit], got[exit]) <= 1e-5
