"""Encoded images decoded, cropped and augmented, one by one, in numpy and Pillow.

This runs where data are read, in threads or processes beside the training.
"""

import io
from typing import Any, NamedTuple

import numpy as np

from depthprune.config import STRONGEST

CENTRE = 7 / 8  # of the shorter side is seen in evaluation: 224 of 256 pixels
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random crop; ratio is width / height
TRIES = 10
OPERATIONS = 2  # of RandAugment on every image
MODES = {1: 'L', 3: 'RGB'}  # what Pillow calls images of so many channels


class Crops(NamedTuple):
  """How images of any size become uint8 arrays of `shape` (height, width, channels).

  Attributes:
    random: a random part of the image, resized (Inception's crop); else its centre.
    flip: mirror images half of the time.
    randaugment: magnitude of RandAugment, 1 to 30; 0 is none.
  """

  shape: tuple[int, int, int]
  random: bool = False
  flip: bool = False
  randaugment: int = 0

  def __call__(self, encoded: bytes, rng: np.random.Generator) -> np.ndarray:
    """The image in a JPEG or PNG; all that is drawn comes from rng."""
    from PIL import Image

    height, width, channels = self.shape
    with Image.open(io.BytesIO(encoded)) as file:
      image = file.convert(MODES[channels])
    box = _random_box(image.size, rng) if self.random else None
    if box is None and image.size != (width, height):
      box = _centre_box(image.size, width / height, 1.0 if self.random else CENTRE)
    if box is not None:
      image = image.resize((width, height), Image.Resampling.BILINEAR, box)
    if self.flip and rng.random() < 0.5:
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if self.randaugment:
      image = _randaugmented(image, self.randaugment, rng)
    return np.asarray(image).reshape(self.shape)


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _random_box(size: tuple[int, int], rng: np.random.Generator) -> Box | None:
  """A part of 8 to 100 % of the area, 3:4 to 4:3; None where none of 10 fits.

  Szegedy et al., arXiv 1409.4842; limits as in torchvision's RandomResizedCrop.
  """
  width, height = size
  for _ in range(TRIES):
    area = width * height * rng.uniform(*AREA)
    ratio = np.exp(rng.uniform(*np.log(RATIO)))
    w, h = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
    if 0 < w <= width and 0 < h <= height:
      left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
      return left, top, left + w, top + h
  return None


def _centre_box(size: tuple[int, int], ratio: float, part: float) -> Box:
  """The largest centred box of a ratio of width to height, and of that a part."""
  width, height = size
  w = min(width, height * ratio) * part
  h = w / ratio
  left, top = (width - w) / 2, (height - h) / 2
  return left, top, left + w, top + h


def _randaugmented(image: Any, magnitude: int, rng: np.random.Generator) -> Any:
  """RandAugment: two operations out of 14, all of one magnitude.

  Cubuk et al., arXiv 1909.13719; ranges as in torchvision's RandAugment.
  """
  part = magnitude / STRONGEST
  operations = _operations()
  for i in rng.integers(len(operations), size=OPERATIONS):
    image = operations[i](image, part * rng.choice((-1, 1)))
  return image


def _operations() -> list[Any]:
  """f(image, part), part in [-1, 1]; where there is one direction only, |part|."""
  from PIL import Image, ImageEnhance, ImageOps

  def affine(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix)

  def enhanced(of):
    return lambda image, part: of(image).enhance(1 + 0.9 * part)

  moved = lambda image, part: round(part * 150 / 331 * image.width)
  return [
    lambda image, part: image,
    lambda image, part: affine(image, 1, 0.3 * part, 0, 0, 1, 0),
    lambda image, part: affine(image, 1, 0, 0, 0.3 * part, 1, 0),
    lambda image, part: affine(image, 1, 0, moved(image, part), 0, 1, 0),
    lambda image, part: affine(image, 1, 0, 0, 0, 1, moved(image, part)),
    lambda image, part: image.rotate(30 * part),
    *map(enhanced, (ImageEnhance.Brightness, ImageEnhance.Contrast)),
    *map(enhanced, (ImageEnhance.Color, ImageEnhance.Sharpness)),
    lambda image, part: ImageOps.posterize(image, 8 - round(4 * abs(part))),
    lambda image, part: ImageOps.solarize(image, round(255 * (1 - abs(part)))),
    lambda image, part: ImageOps.autocontrast(image),
    lambda image, part: ImageOps.equalize(image),
  ]
