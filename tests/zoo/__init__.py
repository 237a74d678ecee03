"""Networks that the tests couple, gate and cut, with arrays and inputs for each."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.zoo import functions as f
from tests.zoo import images as im
from tests.zoo import sequences as sq


def image(batch: int, size: int = 8) -> jax.Array:
  x = np.random.default_rng(0).normal(size=(batch, size, size, 3))
  return jnp.asarray(x, jnp.float32)


def tokens(batch: int, length: int = 9) -> jax.Array:
  return jnp.asarray(np.random.default_rng(0).integers(0, 20, (batch, length)))


class Case(NamedTuple):
  """A network. inputs(batch) -> x; shapes: of the arrays of a plain function."""

  model: Any
  inputs: Callable = image
  shapes: Any = None

  @property
  def apply(self) -> Callable:
    return getattr(self.model, 'apply', self.model)

  def variables(self, seed: int = 0) -> Any:
    """Random arrays, statistics and biases too, so that equality means something."""
    shapes = self.shapes
    if shapes is None:
      shapes = jax.eval_shape(self.model.init, jax.random.key(0), self.inputs(2))
    else:
      is_shape = lambda s: isinstance(s, tuple) and all(isinstance(n, int) for n in s)
      shapes = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=is_shape
      )
    return randomised(shapes, seed)


def randomised(shapes: Any, seed: int = 0) -> Any:
  draw = np.random.default_rng(seed)

  def leaf(path, s):
    name = jax.tree_util.keystr(path, simple=True, separator='/').split('/')[-1]
    if name in ('var', 'scale', 'branch') or 'gate' in name:
      return jnp.asarray(draw.uniform(0.5, 1.5, s.shape), s.dtype)
    fan_in = np.prod(s.shape[:-1]) if len(s.shape) > 1 else 4
    return jnp.asarray(draw.normal(size=s.shape) / np.sqrt(fan_in), s.dtype)

  return jax.tree_util.tree_map_with_path(leaf, shapes)


NETWORKS = {
  'resnet basic': Case(im.ResNet()),
  'resnet bottleneck': Case(im.ResNet(im.Bottleneck, features=4)),
  'resnext': Case(im.ResNet(partial(im.Bottleneck, groups=2), features=4)),
  'resnet option A': Case(im.PaddedShortcuts()),
  'mobilenet': Case(im.MobileNetV2()),
  'densenet': Case(im.DenseNet()),
  'vgg': Case(im.VGG()),
  'multi-exit': Case(im.MultiExit()),
  'u-net': Case(im.UNet()),
  'atrous': Case(im.Atrous()),
  'squeeze-excite': Case(im.SqueezeExcite()),
  'group norm': Case(im.GroupNormed()),
  'shufflenet': Case(im.ShuffleNet()),
  'vit': Case(sq.ViT(block=partial(sq.EncoderBlock, dropout=0.2))),
  'vit fused': Case(sq.ViT(block=sq.FusedBlock)),
  'vit scanned': Case(sq.ScannedViT()),
  'char cnn': Case(sq.CharCNN(), tokens),
  'tied embedding': Case(sq.TiedEmbedding(), tokens),
  'rotary': Case(sq.Rotary(), tokens),
  'gated units': Case(sq.GatedUnits(), tokens),
  'gru': Case(sq.Recurrent(), tokens),
  'mixer without norm': Case(sq.Mixer(normed=False)),
  'torch style': Case(f.torch_style, image, f.TORCH_STYLE),
  'recurrent': Case(f.recurrent, image, f.RECURRENT),
  'branching': Case(f.branching, image, f.BRANCHING),
  'strided': Case(f.strided, image, f.STRIDED),
  'gathered': Case(f.gathered, image, f.GATHERED),
  'own rules': Case(f.own_rules, image, f.OWN_RULES),
  'own contraction': Case(f.own_contraction, image, f.OWN_CONTRACTION),
  'square': Case(f.square, image, f.SQUARE),
  'channels first': Case(f.channels_first, image, f.CHANNELS_FIRST),
}
# Masked is not small here: some channels cannot be cut exactly.
INEXACT = {
  'mixer': Case(sq.Mixer()),
  'channel softmax': Case(im.ChannelSoftmax()),
}
