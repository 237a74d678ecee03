"""Preprocessing of image batches inside jit: crops, mirror images, scaling, mixup.

Streamed images are cropped and mirrored where they are decoded instead, by
`data.streaming.Crops`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.data.tfds import ImageSource

# Data sets of characters: mirrored, a character is another one, or none.
_CHARACTERS = frozenset(
  ('digits', 'emnist', 'kmnist', 'mnist', 'mnist_corrupted', 'omniglot', 'svhn_cropped')
)


class Normalisation(NamedTuple):
  """How stored pixels x become inputs: (x / scale - mean) / std, for each channel."""

  mean: tuple[float, ...]
  std: tuple[float, ...]
  scale: float = 255.0


class Augment(NamedTuple):
  """Which random changes training images go through.

  Attributes:
    pad: black pixels added on every side before a crop of the original size.
    flip: whether half of the images are mirrored.
    ignore: label of the padding, where every pixel has a label; labels are then
      cropped and mirrored with their images. None leaves labels as they are.
    mixup: alpha of `mixup`; 0 turns it off.
    randaugment: magnitude of RandAugment, see `streaming.Crops`; 0 turns it off.
  """

  pad: int = 0
  flip: bool = False
  ignore: int | None = None
  mixup: float = 0.0
  randaugment: int = 0


def default_augment(name: str, source: ImageSource) -> Augment:
  """Returns the usual augmentation for the images of a data set."""
  if source.tasks:  # position tells the tasks apart, so images move by less than that
    return Augment(source.shape[0] // 12)
  if len(source.shape) < 3:
    return Augment()
  # An eighth of the side: 4 pixels of 32, 1 of 8.
  flip = name.split(':')[0] not in _CHARACTERS
  return Augment(-(-source.shape[0] // 8), flip, source.ignore)


def measure_normalisation(image: np.ndarray, scale: float) -> Normalisation:
  """Computes the exact mean and standard deviation of every channel.

  Args:
    image: [n, ..., channels].
    scale: the pixel value that becomes 1.
  """
  if image.dtype != np.uint8:
    over = tuple(range(image.ndim - 1))
    means = image.mean(over, dtype=np.float64) / scale
    stds = image.std(over, dtype=np.float64) / scale
    constant = stds <= 1e-7 * np.maximum(1, np.abs(means))
    stds = np.where(constant, 1.0, stds)
    return Normalisation(tuple(means.tolist()), tuple(stds.tolist()), scale)
  value = np.arange(256) / scale
  mean, std = [], []
  for channel in range(image.shape[-1]):
    share = np.bincount(image[..., channel].ravel(), minlength=256) / image[..., 0].size
    mean.append(float(share @ value))
    std.append(float(share @ (value - mean[-1]) ** 2) ** 0.5 or 1.0)
  return Normalisation(tuple(mean), tuple(std), scale)


def normalise(image: jax.Array, by: Normalisation) -> jax.Array:
  """Turns stored pixels [..., channels] into float32 inputs of the same shape."""
  mean = jnp.asarray(by.mean, jnp.float32) * by.scale
  std = jnp.asarray(by.std, jnp.float32) * by.scale
  return (image.astype(jnp.float32) - mean) / std


def crop_and_flip(
  image: jax.Array, key: jax.Array, by: Augment, fill: int = 0
) -> jax.Array:
  """Crops and mirrors every image of a batch at random.

  What is drawn depends only on the key and on the size of the batch, so a second call
  with the same key treats masks exactly like their images.

  Args:
    image: [batch, height, width, channels].
    key: random key.
    by: its `pad` and `flip` are used.
    fill: value of the padding.
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


def mixup(
  batch: dict[str, jax.Array], key: jax.Array, alpha: float
) -> dict[str, jax.Array]:
  """Blends every image of a batch with another one.

  One share a ~ Beta(alpha, alpha) is drawn for the batch, and image i is paired with
  image batch - 1 - i: x' = a x + (1 - a) x_partner.

  Args:
    batch: with 'image' and 'label'.
    key: random key.
    alpha: parameter of the Beta distribution; 0 returns the batch unchanged.

  Returns:
    The batch with blended images, the partners' labels as 'partner' and a as 'share'
    [batch].

  Source: Zhang et al., arXiv 1710.09412.
  """
  if not alpha:
    return batch
  image, label = batch['image'], batch['label']
  share = jax.random.beta(key, alpha, alpha, dtype=image.dtype)
  blended = share * image + (1 - share) * image[::-1]
  shares = jnp.full(len(label), share)
  return {**batch, 'image': blended, 'partner': label[::-1], 'share': shares}
