"""The map of layers: shares and numbers are those of the result."""

import dataclasses

import numpy as np
import pytest

from depthprune.report import layer_map, style
from depthprune.train.result import LayerReport
from tests.report.runs import made_up_result, typed


def result(widths, layers=None):
  made = typed(made_up_result())
  return dataclasses.replace(made, widths=widths, layers=layers or {})


@pytest.fixture
def decoder():
  """Three layers of two groups of three heads: one whole, one narrower, one gone."""
  widths, layers = {'embed:1': (64, 64)}, {}
  sizes = ((2, 3, 16, 100), (1, 2, 12, 25), (0, 0, 0, 0))
  for i, (groups, heads, value, inner) in enumerate(sizes):
    widths |= {
      f'layer{i}/attention/query:1': (2, groups),
      f'layer{i}/attention/query:2': (3, heads),
      f'layer{i}/attention/value:2': (16, value),
      f'layer{i}/mlp/gate:1': (100, inner),
    }
    made = lambda *flops: LayerReport((6, 6), flops, [1, 2, 3])
    left = (100, 30, 0)[i]
    layers |= {
      f'params/layer{i}/attention/query/kernel': made(100, left),
      f'layer{i}/attention': made(100, left),
      f'params/layer{i}/mlp/down/kernel': made(300, left),
    }
  layers['params/head/kernel'] = LayerReport((9, 9), (500, 500), [1])
  return result(widths, layers)


def test_a_decoder_is_shown_by_heads_groups_widths_and_flops(decoder):
  drawn = layer_map.layer_map(decoder)
  assert drawn.layers == ['layer0', 'layer1', 'layer2']
  assert drawn.parts == [
    *('attention heads', 'key/value groups', 'size of a value', 'FFN width'),
    'FLOPs of the layer',
  ]
  expected = [[1, 1, 1, 1, 0.6], [2 / 6, 0.5, 0.75, 0.25, 0.18], [0] * 5]
  np.testing.assert_allclose(drawn.left, expected)
  assert drawn.texts == [
    ['6', '2', '16', '100', '60 %'],
    ['2', '1', '12', '25', '18 %'],
    ['0', '0', '0', '0', '0 %'],
  ]


def test_heads_without_groups_are_heads():
  """In a BERT the second axis of queries is their size; of an older run there are no
  FLOPs."""
  widths = {}
  for i in range(3):
    widths |= {
      f'trunk/layer{i}/attention/query:1': (4, 4 - i),
      f'trunk/layer{i}/attention/query:2': (8, 8),
      f'trunk/layer{i}/mlp/up:1': (10, 5),
    }
  drawn = layer_map.layer_map(result(widths))
  assert drawn.parts == ['attention heads', 'size of a query', 'FFN width']
  assert drawn.left[:, 0].tolist() == [1, 0.75, 0.5]


def test_a_part_that_a_layer_does_not_have_is_empty():
  widths = {f'stage{i}/block0/conv1:3': (8, 4) for i in range(1, 4)}
  widths |= {f'stage{i}/block0/conv2:3': (8, 8) for i in (1, 3)}
  widths |= {'stage2/block0/shortcut:3': (8, 8), 'stem/conv:3': (3, 1)}
  drawn = layer_map.layer_map(result(widths))
  assert drawn.layers == [f'stage{i}/block0' for i in (1, 2, 3)]
  assert drawn.parts == ['first convolution', 'second convolution']
  assert np.isnan(drawn.left[1, 1]) and drawn.texts[1] == ['4', '']


@pytest.mark.parametrize(
  'widths',
  [
    {},
    {f'layer{i}/mlp/up:1': (9, 9) for i in range(5)},
    {f'layer{i}/mlp/up:1': (9, 1) for i in range(2)},
    {f'part/dense{i}:1': (9, 1) for i in range(5)},  # of one layer
  ],
)
def test_what_is_no_map_is_not_shown(widths):
  assert layer_map.layer_map(result(widths)) is None


@pytest.mark.parametrize('width', [style.WIDE, style.NARROW])
def test_the_chart_draws_every_cell(width, decoder):
  drawn = layer_map.layer_map(decoder)
  figure = layer_map.chart(drawn, width)
  axes = figure.axes[0]
  (mesh,) = (c for c in axes.collections if hasattr(c, 'get_coordinates'))
  np.testing.assert_allclose(mesh.get_array(), drawn.left)
  assert [t.get_text() for t in axes.texts] == [t for row in drawn.texts for t in row]
  words = [label.get_text().split() for label in axes.get_xticklabels()]
  assert words == [part.split() for part in drawn.parts]  # no word is broken
  assert [label.get_text() for label in axes.get_yticklabels()] == [*drawn.layers]


def test_many_layers_are_as_tall_as_any_chart():
  """Then numbers have no room, and every few layers have a name."""
  widths = {f'layer{i}/mlp/up:1': (9, 1 + i % 9) for i in range(80)}
  axes = layer_map.chart(layer_map.layer_map(result(widths))).axes[0]
  assert axes.figure.get_figheight() <= 80 * style.THINNEST + 1.5
  assert not axes.texts and 10 < len(axes.get_yticklabels()) < 80


def test_layers_are_in_the_order_of_the_network_where_only_some_have_a_width():
  widths = {'sep0/conv1:3': (8, 4), 'sep2/conv1:3': (8, 8)}
  layers = {
    f'params/sep{i}/conv{j}/kernel': LayerReport((8, 4), (10, 5), [3])
    for i in range(4)
    for j in range(2)
  }
  drawn = layer_map.layer_map(result(widths, layers))
  assert drawn.layers == ['sep0', 'sep1', 'sep2', 'sep3']
  assert np.isnan(drawn.left[[1, 3], 0]).all()
