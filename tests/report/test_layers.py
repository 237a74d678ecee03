"""What the page shows of every layer."""

from depthprune.report import sentences
from depthprune.report.layers import Strip, layers
from tests.report.runs import made_up_implosion, typed


def by_path(result: dict) -> dict:
  return {layer.path: layer for layer in layers(typed(result))}


def test_a_layer_has_its_width_its_share_of_the_flops_and_its_channels(result):
  layer = by_path(result)['params/stage3/block1/conv1/kernel']
  assert layer.name == 'stage 3, block 1, first convolution'
  assert (layer.change, layer.before, layer.after) == ('64 → 21', 1.0, 21 / 64)
  facts = dict(layer.facts)
  assert facts['width'] == '64 → 21 (32.8 % kept)'
  assert facts['FLOPs'] == '724 k → 213 k (29.4 % kept)'
  assert facts['of all FLOPs'] == '14.3 % → 8.4 %'
  assert layer.strips == [Strip(64, [(0, 2), (45, 19)], '0–1, 45–63')]


def test_a_layer_that_is_gone_says_so_and_has_no_channels(result):
  layer = by_path(result)['params/stage1/block2/conv1/kernel']
  assert (layer.change, layer.after, layer.strips) == ('removed', 0, [])
  assert layer.facts == [
    *(('width', '16 before'), ('FLOPs', '181 k before, 3.6 % of all')),
  ]


def test_the_time_of_a_layer_is_shown_where_it_was_measured(result):
  assert 'time' not in dict(by_path(result)['params/stem/conv/kernel'].facts)
  for path, ms in (('stem/conv', [2.0, 0.514]), ('stage1/block2/conv1', [0.75, 0.0])):
    result['layers'][f'params/{path}/kernel']['ms'] = ms
  result['layers_batch'] = 128
  found = by_path(result)
  facts = dict(found['params/stem/conv/kernel'].facts)
  assert facts['time'] == '2.00 → 0.514 ms (25.7 % kept)'
  assert dict(found['params/stage1/block2/conv1/kernel'].facts)['time'] == (
    '0.750 ms before'
  )
  assert 'a median, in a batch of 128. ' in sentences.layers_timed(typed(result))
  del result['layers_batch']
  assert sentences.layers_timed(typed(result)) == ''


def test_a_whole_layer_keeps_all_and_the_one_that_saved_most_is_open(result):
  found = by_path(result)
  whole = found['params/stage3/block0/conv2/kernel']
  assert (whole.change, whole.after) == ('64', 1)
  assert [path for path, each in found.items() if each.is_open] == [
    'params/stage3/block2/conv1/kernel'
  ]


def test_the_slices_of_heads_are_those_of_each_axis(result):
  query = 'params/layer0/attention/query/kernel'
  result['layers'] = {query: {'width': [8, 2], 'flops': [8, 2], 'outputs': [1, 2]}}
  result['report']['tensors'] = {
    query: {'shape': [[6, 4, 2], [6, 1, 2]], 'kept': {'1': [3]}}
  }
  (layer,) = layers(typed(result))
  assert layer.strips == [Strip(4, [(3, 1)], '3'), Strip(2, [(0, 2)], '0–1')]


def test_a_product_of_two_activations_has_flops_and_no_width(result):
  result['layers']['layer0/attention'] = {'width': [1, 1], 'flops': [9e3, 9e3]}
  layer = by_path(result)['layer0/attention']
  assert [name for name, _ in layer.facts] == ['FLOPs', 'of all FLOPs']
  assert (layer.change, layer.strips) == ('', [])


def test_channels_of_an_earlier_cut_are_not_shown_as_if_of_the_last(result):
  conv = 'params/stage3/block1/conv1/kernel'
  result['report']['tensors'][conv]['shape'][0][3] = 32
  assert by_path(result)[conv].strips == []


def test_without_layers_the_groups_are_shown_whose_flops_are_not_known(result):
  result['layers'] = {}
  layer = by_path(result)['stage3/block1/conv1:3']
  assert layer.facts == [('width', '64 → 21 (32.8 % kept)')]
  assert layer.strips == [Strip(64, [(0, 21)], '0–20')]


def test_nothing_is_shown_where_nothing_was_cut():
  result, _ = made_up_implosion()
  result['widths'] = {'stage1/block0/conv1:3': [16, 16]}
  assert layers(typed(result)) == []
