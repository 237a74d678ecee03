"""Layers are named as a person would, and no two of them the same."""

import pytest

from depthprune.report.names import spoken, spoken_apart


@pytest.mark.parametrize(
  ('name', 'said'),
  [
    ('stage3/block2/conv1:3', 'stage 3, block 2, first convolution'),
    ('params/stage3/block2/conv2/kernel', 'stage 3, block 2, second convolution'),
    ('stem/conv:3', 'stem convolution'),
    ('params/stage2/block0/depthwise/conv/kernel',
     'stage 2, block 0, depthwise convolution'),
    ('stage1/block2/branch', 'stage 1, block 2, branch'),
    ('layer0/dense:1', 'layer 0'),
    ('params/trunk/layer12/dense/kernel', 'layer 12'),
    ('params/block1/dense/kernel', 'block 1, dense layer'),
    ('params/head/kernel', 'head'),
    ('params/Conv_0/kernel/value', 'Conv 0'),
    ('block0/attention/query:1', 'block 0, attention heads'),
    ('block0/attention/value:2', 'block 0, attention values, size of a head'),
    ('params/block0/attention/value/kernel', 'block 0, attention values'),
    ('block0/conv0:3', 'block 0, conv 0'),
    ('params/layer3/mlp/up/kernel', 'layer 3, MLP up projection'),
    ('exit03', 'exit03'),
    ('main', 'main'),
    ('', ''),
  ],
)  # fmt: skip
def test_a_name_as_a_person_says_it(name, said):
  assert spoken(name) == said


def test_names_that_would_be_the_same_stay_as_they_are():
  said = spoken_apart(['a/qkv:1.0', 'a/qkv:1.1', 'a/conv:3'])
  assert said == {
    'a/qkv:1.0': 'a/qkv:1.0',
    'a/qkv:1.1': 'a/qkv:1.1',
    'a/conv:3': 'a convolution',
  }
