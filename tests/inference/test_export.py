"""What is exported runs elsewhere: the same numbers, at every batch size, from files."""

import json
import sys
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export as jax_export
from safetensors.numpy import load_file

from depthprune.inference import onnx
from depthprune.inference.cascade import cascade
from depthprune.inference.export import export
from depthprune.inference.onnx import ExportError
from depthprune.inference.saved import find, load_cascade, save_cascade
from depthprune.models import build
from depthprune.models.auxiliary import beside
from depthprune.models.heads import Head, WithHeads
from depthprune.models.mlp import MLP
from depthprune.models.mobilenet import MobileNetV2
from depthprune.models.resnet import ResNet
from depthprune.models.segnet import SegNet
from depthprune.models.vgg import VGG
from depthprune.models.vit import ViT
from depthprune.program.couple import couple
from depthprune.surgery.cut import prune
from depthprune.surgery.oneshot import oneshot
from depthprune.training import checkpoint
from depthprune.training.checkpoint import CheckpointError
from tests import zoo

IMAGES = np.random.default_rng(0).normal(size=(5, 8, 8, 3)).astype(np.float32)
DRAW = np.random.default_rng(1)
TEXT = DRAW.integers(1, 60, (5, 7)).astype(np.int32), np.arange(7) < [[7], [3], [5], [1], [6]]
TRUNK = MLP(classes=4, hidden=(7, 7, 7))
VECTORS = DRAW.normal(size=(12, 6)).astype(np.float32)
FAMILIES = {
  'mlp': (TRUNK, VECTORS),
  'resnet': (ResNet(depth=14, width=4), IMAGES),
  'imagenet': (build('resnet18', width=4), DRAW.normal(size=(5, 32, 32, 3))),
  'vgg': (VGG(blocks=(1, 2), width=4), IMAGES),
  'mobilenet': (MobileNetV2(blocks=(1, 2), width=0.5), IMAGES),
  'segnet': (SegNet(blocks=(1, 2), width=4), IMAGES),
  'vit': (ViT(width=8, depth=2, heads=2, inner=12), IMAGES),
  'bert': (build('bert_tiny'), TEXT),
  'heads': (
    WithHeads(ResNet(depth=8, width=4), {'a': Head('stage1/block0', hidden=5)}),
    IMAGES,
  ),
}


def inputs_of(x):
  return tuple(jnp.asarray(i, i.dtype if i.dtype != np.float64 else np.float32)
               for i in (x if isinstance(x, tuple) else (x,)))  # fmt: skip


def pruned(model, x, target='60%', **keep):
  """A network with some of its channels cut, if there are any to cut."""
  x = tuple(i[:1] for i in inputs_of(x))
  variables = zoo.randomised(jax.eval_shape(model.init, jax.random.key(0), *x))
  coupling = couple(model, variables, *x)
  chosen = oneshot(coupling, variables, target) if target else {}
  return prune(model, variables, {**chosen, **keep}, x)


def run(folder, name, *inputs):
  """A program as somebody without depthprune runs it."""
  arrays = load_file(folder / 'network' / 'weights.safetensors')
  if name == 'cascade':
    arrays |= load_file(folder / 'cascade.safetensors')
  program = jax_export.deserialize(bytearray((folder / f'{name}.stablehlo').read_bytes()))
  return program.call(arrays, *inputs)


def run_onnx(folder, name, *inputs):
  runtime = pytest.importorskip('onnxruntime')
  session = runtime.InferenceSession(folder / f'{name}.onnx')
  names = [x.name for x in session.get_inputs()]
  given = dict(zip(names, map(np.asarray, inputs), strict=True))
  return dict(
    zip([x.name for x in session.get_outputs()], session.run(None, given), strict=True)
  )


def close(a, b, tolerance=1e-5):
  a, b = np.asarray(a), np.asarray(b)
  assert a.shape == b.shape
  np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize('family', FAMILIES)
def test_a_pruned_network_of_every_family_is_the_same_elsewhere(tmp_path, family):
  model, x = FAMILIES[family]
  network = pruned(model, x)
  told = export(tmp_path / 'it', network, onnx=True)
  assert [*told['programs']] == [*model.exits]
  assert told['platforms'] == ['cpu', 'cuda', 'tpu']
  every = inputs_of(x)
  mine = jax.jit(network.apply)
  for size in (1, len(every[0])):
    inputs = [i[:size] for i in every]
    expected = mine(network.variables, *inputs)
    for name in model.exits:
      close(run(tmp_path / 'it', name, *inputs), expected[name])
      close(run_onnx(tmp_path / 'it', name, *inputs)['logits'], expected[name])
  back = checkpoint.load(tmp_path / 'it' / 'network')
  assert back.arch == network.arch != {}
  jax.tree.map(np.testing.assert_array_equal, back.variables, network.variables)
