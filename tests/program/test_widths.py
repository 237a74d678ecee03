"""Which groups a pattern selects, in every library's names, and what floors allow."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from depthprune.program.coupling import couple
from depthprune.program.widths import Range, in_multiples, nearest, ranges


class Block(nn.Module):
  features: int = 6

  @nn.compact
  def __call__(self, x):
    h = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(8, name='up')(x)))
    return x + nn.Dense(self.features, name='down')(h)


class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Dense(6, name='stem')(x)
    for i in (1, 2):
      x = Block(name=f'stage{i}')(x)
    x = nn.relu(nn.Dense(20, name='neck')(x))
    return nn.Dense(3, name='head')(x)


X = jnp.ones((1, 5))
NET = couple(Net(), jax.eval_shape(Net().init, jax.random.key(0), X), X)
STREAM, FIRST, SECOND, NECK = NET.groups  # in order of execution
SIZES = {name: group.size for name, group in NET.groups.items()}


def whole(*patterns, coupling=NET):
  """The groups that these patterns leave whole."""
  return {*coupling.groups} - {*ranges(coupling, exclude=patterns)}


def test_the_network_has_four_groups():
  assert SIZES == {'stem:1': 6, 'stage1/up:1': 8, 'stage2/up:1': 8, 'neck:1': 20}
  assert ranges(NET) == {name: Range(1, size) for name, size in SIZES.items()}


@pytest.mark.parametrize(
  ('pattern', 'groups'),
  [
    ('stage1/up:1', {FIRST}),  # a group
    ('stem', {STREAM}),  # a module
    ('params/neck', {STREAM, NECK}),  # which reads the stream
    ('neck/bias', {NECK}),
    ('head', {NECK}),
    ('stage1', {STREAM, FIRST}),
    ('stage1/*', {STREAM, FIRST}),
    ('params/stage2/up/kernel', {STREAM, SECOND}),
    ('batch_stats/stage2/*', {SECOND}),
    ('*/up:?', {FIRST, SECOND}),
    ('stage[12]/up/bias', {FIRST, SECOND}),
    ('*', {*SIZES}),
    ('head/bias', set()),  # is whole in any case
  ],
)
def test_an_array_that_matches_keeps_its_shape(pattern, groups):
  assert whole(pattern) == groups


def test_several_patterns_and_a_single_text():
  assert whole('stem', 'head') == {STREAM, NECK}
  assert {*SIZES} - {*ranges(NET, exclude='head')} == {NECK}


def test_names_of_nnx_and_of_plain_trees():
  class Layers(nnx.Module):
    def __init__(self, rngs):
      self.a = nnx.Linear(5, 7, rngs=rngs)
      self.b = nnx.List([nnx.Linear(7, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])

    def __call__(self, x):
      return self.b[1](nnx.relu(self.b[0](nnx.relu(self.a(x)))))

  net = Layers(nnx.Rngs(0))
  coupling = couple(net, nnx.state(net), X)
  for pattern in ('a', 'a:1', 'a/*', 'a/kernel', 'a/bias', '*/0/kernel'):
    assert 'a:1' in whole(pattern, coupling=coupling), pattern
  assert whole('b/1', coupling=coupling) == {'b/0:1'}

  weights = {'mlp/~/linear_0': {'w': (5, 4)}, 'mlp/~/linear_1': {'w': (4, 2)}}
  shapes = jax.tree.map(jnp.ones, weights, is_leaf=lambda x: isinstance(x, tuple))
  plain = lambda p, x: (
    jax.nn.relu(x @ p['mlp/~/linear_0']['w']) @ p['mlp/~/linear_1']['w']
  )
  coupling = couple(plain, shapes, X)
  (group,) = coupling.groups
  for pattern in ('mlp', 'mlp/~/linear_0', 'mlp/*linear_1', '*_0/w', group):
    assert whole(pattern, coupling=coupling) == {group}, pattern


def test_a_name_with_brackets_is_itself():
  tree = {'blocks[0]': np.ones((5, 4)), 'out': np.ones((4, 2))}
  net = lambda p, x: x @ p['blocks[0]'] @ p['out']
  coupling = couple(net, tree, np.ones((1, 5)))
  assert whole('blocks[0]', coupling=coupling) == {'blocks[0]:1'}


@pytest.mark.parametrize(
  ('pattern', 'near'),
  [('stage3/*', 'stage'), ('nek', 'neck'), ('stage1/up:3', 'stage1/up:1')],
)
@pytest.mark.parametrize('argument', ['exclude', 'at_least', 'at_most', 'ratios'])
def test_a_pattern_that_matches_nothing_names_the_nearest(argument, pattern, near):
  asked = [pattern] if argument == 'exclude' else {pattern: 2}
  with pytest.raises(ValueError, match=rf"'{pattern[:4]}.*nearest: .*{near}"):
    ranges(NET, **{argument: asked})


@pytest.mark.parametrize(
  ('count', 'least'),
  [
    (3, 3),
    ('3', 3),
    (np.int64(3), 3),
    (0.4, 4),
    ('40%', 4),
    (0.3, 3),
    (1.0, 8),
    (9, 8),
  ],
)
def test_a_floor_is_a_number_or_a_part(count, least):
  """Of 8 channels, 0.4 are 3.2, so 4; 0.3 are 2.4. A floor of all leaves it whole."""
  found = ranges(NET, at_least={'stage1': count})
  assert found.get(FIRST, Range(8, 8)) == Range(least, 8)
  assert found[NECK] == Range(1, 20)  # the other groups have no floor


@pytest.mark.parametrize(('count', 'most'), [(3, 3), (0.4, 3), ('1%', 1), (9, 8)])
def test_a_ceiling_rounds_down_and_leaves_a_channel(count, most):
  assert ranges(NET, at_most={'stage1': count})[FIRST] == Range(1, most)


@pytest.mark.parametrize('count', [0, -1, 1.5, '0%', '120%', 'half', True, None, 0.0])
def test_what_is_no_count_is_refused(count):
  with pytest.raises(ValueError, match='at_most: expected a number of channels'):
    ranges(NET, at_most={'neck': count})


def test_numbers_are_of_the_channels_that_an_array_produces():
  """The first layer of a stage reads the stream of the one before, and leaves it be."""
  found = ranges(NET, at_most={'neck': 5, 'stage1/up': 2})
  assert found[NECK].most == 5 and found[FIRST].most == 2
  assert found[STREAM] == Range(1, 6)
  with pytest.raises(ValueError, match=r"'head' matches arrays that only .*: neck:1"):
    ranges(NET, at_least={'head': 2})
  with pytest.raises(ValueError, match="'head/bias' matches no channels that can be"):
    ranges(NET, at_least={'head/bias': 2})


def test_the_pattern_that_matches_fewest_groups_counts():
  found = ranges(NET, at_least={'stage1/up': 5, '*': 2, '*/up': 3})
  assert [found[name].least for name in SIZES] == [2, 5, 3, 2]


def test_the_name_of_a_group_goes_before_all_patterns():
  """All three match the stream alone."""
  asked = {'stem': 2, 'stem:1': 3, 'params/stage?/down/kernel': 4}
  assert ranges(NET, at_least=asked)[STREAM].least == 3


def test_equally_specific_patterns_must_agree():
  assert ranges(NET, at_least={'stage1/up': 4, '*1/up': 0.5})[FIRST].least == 4
  with pytest.raises(ValueError, match=r"stage1/up:1: at_least '.*asks for 4 and .* 5"):
    ranges(NET, at_least={'stage1/up': 4, '*1/up': 5})


def test_a_pattern_goes_before_a_number_for_all():
  found = ranges(NET, at_least=5, at_most={'stage1/up': 2})
  assert found[FIRST] == Range(1, 2) and found[NECK] == Range(5, 20)
  found = ranges(NET, at_least={'stage1/up': 6}, at_most=0.5)
  assert found[FIRST] == Range(6, 8) and found[NECK] == Range(1, 10)
  assert FIRST not in ranges(NET, exclude=['stage1/up/bias'], at_most=2)


@pytest.mark.parametrize(
  'arguments',
  [
    {'at_least': {'neck': 8}, 'at_most': {'neck': 7}},
    {'at_least': 0.5, 'at_most': 9},
    {'exclude': 'head', 'at_most': {'neck': 19}},
    {'at_least': {'neck': 9}, 'at_most': {'neck': 15}, 'round_to': 8},
  ],
)
def test_a_floor_above_the_ceiling_is_refused(arguments):
  with pytest.raises(
    ValueError, match=r'neck:1: no width is possible.* ask.* asks for'
  ):
    ranges(NET, **arguments)


def test_both_ends_can_be_built():
  assert ranges(NET, round_to=8)[NECK] == Range(8, 20)
  assert ranges(NET, round_to=8, at_least=9, at_most={'neck': 19})[NECK] == (16, 16)
  assert ranges(NET, round_to=8, at_most=0.2)[NECK] == Range(8, 8)  # never below one


@pytest.mark.parametrize(
  ('start', 'target', 'found'),
  [
    ((16, 16, 16, 16), 650, 640),  # one narrower
    ((8, 16, 16, 16), 650, 640),  # the first wider, which helps, then one narrower
    ((8, 16, 16, 16), 420, 416),  # the first beyond the target, and several back
    ((8, 16, 16, 16), 388, 384),  # near enough
  ],
)
def test_the_nearest_widths_are_found_step_by_step(start, target, found):
  """Of a stream that three branches read: the cost is s (a + b + c)."""
  choices = {'s': [8, 16], **{name: [2, 4, 8, 16] for name in 'abc'}}
  cost = lambda n: n['s'] * (n['a'] + n['b'] + n['c'])
  off = lambda n: cost(n) - target
  got = nearest(dict(zip('sabc', start)), choices, off, tolerance=10)
  assert cost(got) == found


def test_narrow_widths_of_auto_are_left_out():
  limits = ranges(NET, round_to='auto', at_most={'stage1/up': 1})
  allowed = lambda keep: True
  wide = in_multiples(NET, 'auto', limits, allowed)
  assert limits[NECK] == Range(1, 20) and wide[NECK] == Range(8, 20)
  assert wide[FIRST] == (1, 1)  # what a ceiling is below a multiple
  fours = ranges(NET, round_to=4)
  assert in_multiples(NET, 4, fours, allowed) == ranges(NET, round_to=4)
  refused = lambda keep: keep['channels'][NECK].sum() < 8
  assert in_multiples(NET, 'auto', limits, refused) == limits


def test_ratios_are_met_as_nearly_as_the_rest_allows():
  """Other groups stay whole: they are in the answer only where a ceiling cuts them."""
  assert ranges(NET, ratios={'neck': 0.5}) == {NECK: Range(10, 10)}
  assert ranges(NET, ratios={'*/up': '40%'}) == {FIRST: (3, 3), SECOND: (3, 3)}
  found = ranges(NET, ratios={'*': 0.25, 'neck': 4}, at_least=3, exclude=FIRST)
  assert found == {STREAM: (3, 3), SECOND: (3, 3), NECK: (4, 4)}
  assert ranges(NET, ratios={'neck': 11}, round_to=8) == {NECK: (8, 8)}
  assert ranges(NET, ratios={'neck': 5}, at_most={'stage1/up': 2}) == {
    FIRST: (2, 2),
    NECK: (5, 5),
  }
