"""Layers and widths searched together: what costs nothing goes, and nothing else."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.data.dataset import inputs_of
from depthprune.gates import branch
from depthprune.models import build
from depthprune.models.decoder import Decoder
from depthprune.models.mobilenet import MobileNetV2
from depthprune.models.resnet import ResNet
from depthprune.models.vit import ViT
from depthprune.program import cost
from depthprune.program.coupling import couple
from depthprune.surgery.activations import activations
from depthprune.surgery.influence import block_influence
from depthprune.surgery.oneshot import closing
from depthprune.surgery.prune import prune
from depthprune.train.evaluate import evaluate
from depthprune.train.language import language_model
from depthprune.train.search import search
from depthprune.train.task import classification, regression
from tests import zoo

DEPTH, WIDTH, INNER = 6, 5, 8
TASK = regression(3)
NOTHING = 1e-9  # of a loss, by rounding
UNIT = WIDTH * INNER + INNER + INNER * WIDTH + WIDTH  # parameters
ENDS = (4 * WIDTH + WIDTH) + (WIDTH * 3 + 3)


class Unit(nn.Module):
  inner: int

  @nn.compact
  def __call__(self, x):
    y = nn.Dense(self.inner, name='up')(x)
    return x + branch(self, nn.Dense(x.shape[-1], name='down')(nn.tanh(y)))


class Net(nn.Module):
  depth: int = DEPTH
  inner: int = INNER

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(WIDTH, name='stem')(x)
    for i in range(self.depth):
      x = Unit(self.inner, name=f'unit{i}')(x)
    return nn.Dense(3, name='head')(x)


@functools.cache
def made(idle=(), dead=0, **fields):
  """(coupling, variables, influence, held-out examples that it answers right).

  The branches of `idle` units return zero, and `dead` of the inner units of each.
  """
  model = Net(**fields)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 4)), jnp.float32)
  variables = zoo.randomised(jax.eval_shape(model.init, jax.random.key(0), x))
  for i in range(model.depth):
    unit = variables['params'][f'unit{i}']
    for leaf in ('kernel', 'bias'):
      unit['up'][leaf] = unit['up'][leaf].at[..., 1 : 1 + dead].set(0)
    if i in idle:
      unit['down'] = jax.tree.map(jnp.zeros_like, unit['down'])
  coupling = couple(model, variables, x[:1])
  held_out = {'image': x, 'label': model.apply(variables, x)}
  return coupling, variables, block_influence(coupling, variables, [x]), held_out


def found(network, target, **arguments):
  coupling, variables, influence, held_out = network
  influence = arguments.pop('influence', influence)
  return search(
    coupling, variables, target, influence, task=TASK, held_out=held_out, **arguments
  )


def test_layers_that_do_nothing_go_and_nothing_is_lost():
  """Half of them, when all widths matter: as the decision by depth alone."""
  network = made(idle=(1, 2, 4))
  target = ENDS + 3 * UNIT
  candidates = found(network, target)
  best = candidates[0]
  assert best.blocks and {*best.blocks} == {'unit1', 'unit2', 'unit4'}
  assert best.loss < NOTHING
  assert all(kept.all() for kept in best.keep['channels'].values())
  assert best.costs == {'params': target}
  assert candidates[1].loss > 1e-3
  (only,) = found(network, target, exclude='*')
  assert only.blocks == best.blocks and only.loss == best.loss


def test_units_that_do_nothing_go_and_nothing_is_lost():
  """Half of those of each layer, when all layers matter."""
  network = made(dead=4)
  target = ENDS + DEPTH * (UNIT - 4 * (2 * WIDTH + 1))
  for scope in 'global', 'uniform':
    best = found(network, target, scope=scope)[0]
    assert best.blocks == () and best.costs == {'params': target}
    assert best.loss < NOTHING
    assert best.kinds == {'stem': 1.0, 'unit*': 0.5}
    for i in range(DEPTH):
      kept = best.keep['channels'][f'unit{i}/up:1']
      assert kept.tolist() == [True, *[False] * 4, True, True, True]


MIXED = ENDS + 3 * (UNIT - 4 * (2 * WIDTH + 1))


@pytest.mark.parametrize('splits', [2, 5])
def test_only_both_together_lose_nothing_where_both_are_idle(splits):
  """A number of layers between the first ones that were tried is found too."""
  network = made(idle=(0, 3, 5), dead=4)
  best = found(network, MIXED, splits=splits)[0]
  assert {*best.blocks} == {'unit0', 'unit3', 'unit5'}
  assert best.kinds['unit*'] == 0.5 and best.costs == {'params': MIXED}
  assert best.loss < NOTHING
  depth = found(network, MIXED, exclude='*')[0]
  width = found(network, MIXED, influence={})[0]
  assert min(depth.loss, width.loss) > 1e-2
  assert max(depth.costs['params'], width.costs['params']) <= MIXED


def test_every_candidate_meets_every_constraint_and_costs_what_is_left():
  network = made(dead=2, depth=3)
  coupling, variables, _, held_out = network
  seen = set()
  for target in (
    {'params': '50%', 'flops': '90%'},
    {'params': '90%', 'flops': '50%'},
    {'params': '60%', 'flops': '60%', 'bytes': 800},
  ):
    candidates = found(network, target, of='flops')
    losses = [candidate.loss for candidate in candidates]
    assert losses == sorted(losses) and len(candidates) > 5
    for candidate in candidates[::4]:
      assert candidate.costs.keys() == target.keys()
      small = prune(coupling.model, variables, candidate.keep, held_out['image'][:1])
      left = jax.tree.leaves(small.variables['params'])
      params = sum(x.size for x in left)
      whole = {'params': cost.params(coupling), 'flops': cost.flops(coupling)}
      counted = {'params': params, 'flops': small.report['flops']['after']}
      for name, part in target.items():
        if name in counted:
          assert candidate.costs[name] == counted[name]
          assert counted[name] <= float(part[:-1]) / 100 * whole[name]
        else:
          assert candidate.costs[name] <= part
      seen.add(len(candidate.blocks))
  assert len(seen) > 2


@pytest.mark.parametrize(
  ('target', 'arguments', 'message'),
  [
    (
      {'flops': '90%', 'params': 10},
      {},
      'search: target params=10 is 10 params; with what .* the floor is 11 ',
    ),
    ({'flops': '1%', 'params': 0.9}, {}, 'target flops=1% is .* flops; '),
    ('1%', {'influence': {}}, r'target 1% is 2.29 params; .* floor is 19 '),
    (0.5, {'influence': {'unit9': 1.0}}, "no block 'unit9'; there are: unit0"),
    (0.5, {'blocks': {'unit0': ['unit0/x']}}, "no branch 'unit0/x'; there are: unit0"),
    (0.5, {'blocks': {'unit0': []}}, r"blocks\['unit0'\]: expected the block's"),
    (0.5, {'blocks': {'unit0': 'unit0/branch'}}, "branches, .*, got 'unit0/branch'"),
    (0.5, {'heal': lambda pruned: None}, 'heal: expected it to return .*, got None'),
    (0.5, {'influence': {'unit0': np.nan}}, r"influence\['unit0'\]: expected a finite"),
    (0.5, {'kinds': {'heads': 'attention'}}, "kinds: 'attention' matches no group"),
    ({'milliseconds': 0.5}, {}, 'milliseconds'),
    (0.5, {'splits': 1}, 'splits: expected a whole number of 2 or more'),
    (0.5, {'score': 'taylor'}, "grads: .*score='taylor' needs"),
  ],
)
def test_what_cannot_be_is_said(target, arguments, message):
  network = made(depth=2)
  if 'blocks' in arguments:
    arguments = {'influence': {'unit0': 1.0}, **arguments}
  with pytest.raises((ValueError, KeyError), match=message):
    found(network, target, **arguments)


def test_refitted_candidates_are_judged_refitted():
  """Where units are copies of others, a refit makes up for every one that goes."""
  coupling, variables, influence, held_out = made(depth=2)
  variables = jax.tree.map(jnp.asarray, variables)
  for i in range(2):
    up = variables['params'][f'unit{i}']['up']
    up['kernel'] = jnp.tile(up['kernel'][:, :4], (1, 2))
    up['bias'] = jnp.tile(up['bias'][:4], 2)
  held_out = {**held_out, 'label': coupling.model.apply(variables, held_out['image'])}
  network = coupling, variables, influence, held_out
  copies = {f'unit{i}/up:1': np.arange(8)[::-1] for i in range(2)}  # the first go last
  limits = {'exclude': 'stem', 'at_least': {'unit*/up': 4}, 'influence': {}}
  target = ENDS + 2 * (UNIT - 4 * (2 * WIDTH + 1))
  arguments = {'score': {**copies, 'stem:1': np.ones(5)}, **limits}
  (plain,) = found(network, target, **arguments)
  (made_up,) = found(network, target, refit=[held_out['image']], **arguments)
  assert made_up.loss < 1e-5 < 1e-2 < plain.loss
  jax.tree.map(np.testing.assert_array_equal, plain.keep, made_up.keep)


def test_the_best_after_healing_comes_first():
  """Of three finalists the last one heals best; a fourth is not healed."""
  network = made(depth=3)
  *_, held_out = network
  before, seen = found(network, '60%'), []

  def heal(small):
    seen.append(small)
    params = small.variables['params']
    head = (
      params['head'] if len(seen) == 3 else jax.tree.map(jnp.zeros_like, params['head'])
    )
    return {**small.variables, 'params': {**params, 'head': head}}

  after = found(network, '60%', heal=heal, finalists=3)
  assert len(seen) == 3 and len(after) == len(before) > 4
  for small, candidate in zip(seen, before[:3], strict=True):
    jax.tree.map(
      np.testing.assert_array_equal, small.keep['branches'], candidate.keep['branches']
    )
  third, first, second, *rest = after
  assert third.loss == pytest.approx(before[2].loss, rel=1e-4)
  assert third.scores == before[2].scores
  zeros = evaluate(lambda v, x, train: 0 * x[:, :3], {}, [held_out], TASK)['loss']
  assert third.loss < first.healed['loss']
  np.testing.assert_allclose([first.loss, second.loss], zeros, rtol=1e-5)
  assert [c.pruned is None for c in after] == [False] * 3 + [True] * len(rest)
  assert [c.loss for c in rest] == [c.loss for c in before[3:]]


def test_batch_statistics_are_measured_anew_before_healing():
  model = ResNet(depth=14, width=4)
  x = zoo.image(8)
  variables = zoo.randomised(jax.eval_shape(model.init, jax.random.key(0), x))
  coupling = couple(model, variables, x[:2], train=False)
  data = {'image': x, 'label': jnp.arange(8) % 10}
  influence = block_influence(coupling, variables, [x])
  task = classification(10)
  best, *_ = search(
    coupling, variables, {'flops': '60%'}, influence, task=task, held_out=data,
    calibration=[data], heal=lambda small: small.variables, finalists=1, splits=2,
    exclude='stem',
  )  # fmt: skip
  assert best.blocks and best.healed['loss'] == pytest.approx(best.scores['loss'], 1e-3)
  stale = prune(model, variables, best.keep, x, train=False, coupling=coupling)
  loss = evaluate(stale.model, stale.variables, [data], task)['loss']
  assert abs(loss - best.loss) > 1e-2


def test_layers_heads_and_widths_of_a_decoder_are_searched():
  """By the same call: whole layers as blocks, three kinds of widths by name."""
  model = Decoder(
    vocab=20, positions=9, width=8, depth=3, heads=4, groups=2, size=4, inner=12
  )
  tokens = zoo.tokens(4)
  variables = zoo.randomised(jax.eval_shape(model.init, jax.random.key(0), tokens))
  variables['branches'] = jax.tree.map(jnp.ones_like, variables['branches'])
  coupling = couple(model, variables, tokens[:1])
  blocks = {
    f'layer{i}': [f'layer{i}/attention/branch', f'layer{i}/mlp/branch']
    for i in range(3)
  }
  text = {'image': tokens, 'label': jnp.roll(tokens, -1, 1)}
  candidates = search(
    coupling, variables, {'params': '60%', 'bytes': '65%'},
    block_influence(coupling, variables, [tokens], blocks), blocks=blocks,
    score=activations(coupling, variables, [tokens]), scope='uniform',
    task=language_model(), held_out=[text],
    kinds={'heads': '*/query', 'inner': '*/mlp/gate', 'width': 'embed'},
  )  # fmt: skip
  kinds = {tuple(sorted(c.kinds.items())) for c in candidates}
  assert {len(c.blocks) for c in candidates} == {0, 1, 2} and len(kinds) > 6
  narrowed = {tuple(k for k, part in c.kinds.items() if part < 1) for c in candidates}
  assert {('heads', 'inner', 'width'), ('width',), ('heads', 'inner')} <= narrowed
  for candidate in candidates:
    for i in range(3):
      assert candidate.keep['channels'][f'layer{i}/attention/value:2'].all()
  best = candidates[0]
  small = prune(model, variables, best.keep, tokens, coupling=coupling)
  assert evaluate(small.model, small.variables, [text], language_model())[
    'loss'
  ] == pytest.approx(best.loss, rel=1e-4)
  assert 'Candidate: loss' in repr(best) and 'params' in repr(best)


def test_one_program_serves_all_candidates(compilations):
  network = made(depth=3)
  found(network, '50%', splits=2, exclude='*')  # what is compiled once for all
  compilations.clear()
  few = found(network, '50%', splits=2, exclude='*')
  compiled = len(compilations)
  compilations.clear()
  many = found(network, '50%')
  assert len(many) > 4 * len(few) and len(compilations) <= compiled


TEXT = {
  'tokens': jnp.asarray(np.random.default_rng(0).integers(5, 20, (4, 8)), jnp.int32),
  'mask': jnp.ones((4, 8), bool),
}


@pytest.mark.slow
@pytest.mark.parametrize(
  ('model', 'data'),
  [
    (ViT(width=8, depth=3, heads=2, inner=12, patch=4), {'image': zoo.image(4)}),
    (build('bert_tiny', classes=10), TEXT),
    (MobileNetV2(blocks=(1, 3), width=0.5), {'image': zoo.image(4)}),
  ],
)
def test_any_network_with_branches_can_be_searched(model, data):
  inputs = inputs_of(data)
  variables = zoo.randomised(jax.eval_shape(model.init, jax.random.key(0), *inputs))
  coupling = couple(model, variables, *inputs, train=False)
  task = classification(10)
  data = {**data, 'label': jnp.arange(4)}
  influence = block_influence(coupling, variables, [inputs])
  best, second, *_ = search(
    coupling, variables, '70%', influence, task=task, held_out=data,
    calibration=[data], heal=lambda small: small.variables, finalists=1, splits=3,
  )  # fmt: skip
  assert best.costs['params'] <= 0.7 * cost.params(coupling) and second.pruned is None
  assert best.healed['loss'] == pytest.approx(best.scores['loss'], rel=1e-3)


def test_layers_of_a_scan_are_searched_by_number():
  """Those whose weights write zeros go, and the stack is shorter."""
  model = Decoder(
    vocab=32, positions=8, width=16, depth=4, heads=2, groups=1, size=8, inner=8,
    scan=True,
  )  # fmt: skip
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 32, (8, 8)), jnp.int32)
  variables = zoo.randomised(jax.eval_shape(model.init, jax.random.key(0), tokens))
  layers = variables['params']['layers0']
  for part, name in (('attention', 'out'), ('mlp', 'down')):
    kernel = layers[part][name]['kernel']
    layers[part][name]['kernel'] = kernel.at[jnp.asarray([0, 2])].set(0)
  coupling = couple(model, variables, tokens)
  blocks = {'layers0': [*coupling.branches]}
  influence = block_influence(coupling, variables, [tokens], blocks)
  assert {*influence} == {f'layers0[{i}]' for i in range(4)}
  held_out = {'image': tokens[:, :-1], 'label': tokens[:, 1:]}
  without = {b: np.asarray([False, True, False, True]) for b in coupling.branches}
  target = cost.params(coupling, closing(coupling, without))
  (best, *_) = search(
    coupling, variables, target, influence, blocks=blocks, exclude='*',
    task=language_model(), held_out=held_out,
  )  # fmt: skip
  assert {*best.blocks} == {'layers0[0]', 'layers0[2]'}
  small = prune(model, variables, best.keep, tokens)
  assert small.variables['params']['layers0']['mlp']['up']['kernel'].shape[0] == 2
  np.testing.assert_allclose(
    small.apply(small.variables, tokens)['main'],
    model.apply(variables, tokens)['main'], rtol=1e-5, atol=1e-5,
  )  # fmt: skip
