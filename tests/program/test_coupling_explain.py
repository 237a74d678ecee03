"""What a coupling tells a person."""

import re

import jax.numpy as jnp
import pytest

from depthprune.program.coupling import couple
from tests.zoo import NETWORKS


def coupled(name):
  case = NETWORKS[name]
  return couple(case.model, case.variables(), case.inputs(2))


@pytest.mark.parametrize('name', ['resnet basic', 'vit', 'vit scanned', 'u-net', 'gru'])
def test_every_member_has_the_equation_that_tied_it(name):
  """One member per group is what the others were tied to, so it may have none."""
  coupling = coupled(name)
  for group in coupling.groups.values():
    head, *lines = coupling.explain(group.name).splitlines()
    gate = f'cannot be gated: {group.ungated}' if group.ungated else 'can be gated'
    assert head == f'{group.name}: {group.size} slices, {gate}'
    assert len(lines) == len(group.members)
    for line, (path, axis) in zip(lines, group.members, strict=True):
      assert line.startswith(f'  {path} axis {axis}')
    told = [line for line in lines if re.search(r'  <- \w+ .*\(\w+\.py:\d+', line)]
    assert len(told) >= len(lines) - 1


def test_the_equation_is_named_with_its_module_and_line():
  text = coupled('resnet basic').explain('Basic_0/Conv_0:3')
  assert re.search(
    r'<- conv_general_dilated in ResNet/Basic_0/Conv_1 \(linear.py:', text
  )
  assert 'params/Basic_0/BatchNorm_0/scale axis 0  <- ' in text


def test_everything_is_explained_by_default():
  coupling = coupled('char cnn')
  text = coupling.explain()
  for group in coupling.groups:
    assert coupling.explain(group) in text
  assert 'pinned: params/Embed_0/embedding axis 0 (20): indexed' in text


def test_axes_that_end_in_an_output_are_named_with_what_to_do():
  """Hidden states are returned too, so that nothing can be cut unless told which."""

  def f(v, x):
    h = jnp.tanh(x @ v['in'])
    return {'logits': h @ v['out'], 'hidden': h}

  v = {'in': jnp.ones((3, 6)), 'out': jnp.ones((6, 2))}
  coupling = couple(f, v, jnp.ones((4, 3)))
  assert not coupling.groups and not coupling.pinned
  *lines, advice = coupling.explain().splitlines()
  assert lines == [
    'ends in an output: in axis 1 (6)',
    'ends in an output: out axis 0 (6)',
    'ends in an output: out axis 1 (2)',
  ]
  assert 'fixed=lambda outputs:' in advice
  with pytest.raises(KeyError, match='in:1: this axis ends in an output.*fixed=lambda'):
    coupling.explain('in:1')
  free = couple(f, v, jnp.ones((4, 3)), fixed=lambda outputs: outputs['logits'])
  assert [*free.groups] == ['in:1']
  assert free.explain().splitlines()[-2:] == [lines[-1], advice]
  assert 'an output' not in free.explain('in:1')


def test_where_no_output_has_axes_of_variables_none_is_named():
  coupling = couple(lambda v, x: jnp.tanh(x @ v).sum(), jnp.ones((3, 6)), jnp.ones(3))
  assert 'output' not in coupling.explain()


def test_unknown_and_pinned_groups():
  coupling = coupled('char cnn')
  with pytest.raises(KeyError, match='Conv_0:3: no such group; nearest: .*Conv_0:2'):
    coupling.explain('Conv_0:3')
  with pytest.raises(KeyError, match=r'Embed_0/embedding:0: this axis is pinned \(ind'):
    coupling.explain('Embed_0/embedding:0')


def test_its_repr_counts_what_was_found():
  title, found, cost = repr(coupled('char cnn')).splitlines()
  assert title == 'Coupling: 4 groups of 46 channels, 4 groups can be gated'
  assert found == '  branches: 0, pinned axes: 1, exits: none'
  assert re.fullmatch(r'  1,458 parameters, 29,408 FLOPs .* for int32\[2, 9\]', cost)
