"""What images go through before a network sees them, inside jit.

They are cropped, mirrored, normalised and mixed. Images that are read as they are
needed are cropped and mirrored where they are decoded, in `crops`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.data.tfds import ImageSource

# A mirrored character is another one, or none.
_CHARACTERS = frozenset(
  ('digits', 'emnist', 'kmnist', 'mnist', 'mnist_corrupted', 'omniglot', 'svhn_cropped')
)


class Normalisation(NamedTuple):
  """What makes inputs of stored pixels: (x / scale - mean) / std, per channel."""

  mean: tuple[float, ...]
  std: tuple[float, ...]
  scale: float = 255.0


class Augment(NamedTuple):
  """Random crops of the image padded with `pad` black pixels, and mirror images.

  Where every pixel has a label, `ignore` is that of the padding, and labels are cropped
  and mirrored with their image; without, labels stay as they are. `mixup` is as for
  `mixed`, `randaugment` as in `crops.Crops`.
  """

  pad: int = 0
  flip: bool = False
  ignore: int | None = None
  mixup: float = 0.0
  randaugment: int = 0


def usual(name: str, source: ImageSource) -> Augment:
  """The augmentation of images like those of a source."""
  if source.tasks:  # they are told by where things lie: shifted by less than that
    return Augment(source.shape[0] // 12)
  # An eighth of the side: 4 pixels of 32, 1 of 8.
  flip = name.split(':')[0] not in _CHARACTERS
  return Augment(-(-source.shape[0] // 8), flip, source.ignore)


def measured(image: np.ndarray, scale: float) -> Normalisation:
  """Mean and standard deviation per channel of uint8 images [n, height, width,
  channels], exact: from counts of pixel values."""
  value = np.arange(256) / scale
  mean, std = [], []
  for channel in range(image.shape[-1]):
    share = np.bincount(image[..., channel].ravel(), minlength=256) / image[..., 0].size
    mean.append(float(share @ value))
    std.append(float(share @ (value - mean[-1]) ** 2) ** 0.5 or 1.0)
  return Normalisation(tuple(mean), tuple(std), scale)


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


def mixed(
  batch: dict[str, jax.Array], key: jax.Array, alpha: float
) -> dict[str, jax.Array]:
  """The batch, every image blended with another one: mixup.

  Zhang et al., arXiv 1710.09412. One share a ~ Beta(alpha, alpha) per batch, and the
  partner of an image is the one as far from the end: x' = a x + (1 - a) x_partner.
  Adds 'partner', the partner's labels, and 'share' [batch], a; alpha 0 adds nothing.
  """
  if not alpha:
    return batch
  image, label = batch['image'], batch['label']
  share = jax.random.beta(key, alpha, alpha, dtype=image.dtype)
  blended = share * image + (1 - share) * image[::-1]
  shares = jnp.full(len(label), share)
  return {**batch, 'image': blended, 'partner': label[::-1], 'share': shares}
