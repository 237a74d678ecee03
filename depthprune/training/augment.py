"""What images go through before a network sees them: normalised, cropped, mirrored."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Normalisation(NamedTuple):
  """What makes inputs of stored pixels: (x / scale - mean) / std, per channel."""

  mean: tuple[float, ...]
  std: tuple[float, ...]
  scale: float = 255.0


class Augment(NamedTuple):
  """Random crops of the image padded with `pad` black pixels, and mirror images.

  Where every pixel has a label, `ignore` is that of the padding, and labels are cropped
  and mirrored with their image; without, labels stay as they are.
  """

  pad: int = 0
  flip: bool = False
  ignore: int | None = None


def normalise(image: jax.Array, by: Normalisation) -> jax.Array:
  """float32 inputs [..., channels] of stored pixels [..., channels]."""
  mean = jnp.asarray(by.mean, jnp.float32) * by.scale
  std = jnp.asarray(by.std, jnp.float32) * by.scale
  return (image.astype(jnp.float32) - mean) / std


def augmented(
  image: jax.Array, key: jax.Array, by: Augment, fill: int = 0
) -> jax.Array:
  """Images [batch, height, width, channels], each cropped and mirrored its own way.

  The way depends on the key and their number alone: masks go the way of their images.
  fill: the value of the padding.
  """
  crop, mirror = jax.random.split(key)
  if by.pad:
    edge = (by.pad, by.pad)
    corners = jax.random.randint(crop, (len(image), 2), 0, 2 * by.pad + 1)
    padded = jnp.pad(image, ((0, 0), edge, edge, (0, 0)), constant_values=fill)
    cut = lambda padded, corner: jax.lax.dynamic_slice(
      padded, (corner[0], corner[1], 0), image.shape[1:]
    )
    image = jax.vmap(cut)(padded, corners)
  if by.flip:
    mirrored = jax.random.bernoulli(mirror, shape=(len(image), 1, 1, 1))
    image = jnp.where(mirrored, image[:, :, ::-1], image)
  return image
