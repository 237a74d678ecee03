"""Encoded images become arrays: crops, mirrored, and changed as strongly as told."""

import io

import numpy as np
import pytest
from PIL import Image

from depthprune.data.streaming import Crops


def encoded(pixels: np.ndarray) -> bytes:
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'PNG')
  return file.getvalue()


def test_random_crops_are_parts_of_8_to_100_percent_and_3_to_4_sides():
  """Of a picture whose pixels say where they are."""
  y, x = np.mgrid[:200, :240]
  image = encoded(np.stack([x, y, 0 * x], -1).astype(np.uint8))
  crops, rng = Crops((40, 40, 3), random=True), np.random.default_rng(0)
  areas, ratios = [], []
  for _ in range(300):
    found = crops(image, rng).astype(float)
    across, down = (np.ptp(found[..., i]) * 40 / 39 for i in (0, 1))
    areas.append(across * down / (200 * 240))
    ratios.append(across / down)
  assert 0.07 < min(areas) < 0.15 and 0.8 < max(areas) <= 1.02
  assert 0.45 < np.mean(areas) < 0.6
  assert 0.72 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.39


def test_half_of_the_images_are_mirrored():
  image = encoded(np.tile(np.arange(16, dtype=np.uint8), (16, 1)))
  crops, rng = Crops((16, 16, 1), flip=True), np.random.default_rng(0)
  mirrored = [crops(image, rng)[0, 0, 0] == 15 for _ in range(400)]
  assert 0.4 < np.mean(mirrored) < 0.6
  plain = Crops((16, 16, 1))(image, rng)
  np.testing.assert_array_equal(plain[..., 0], np.tile(np.arange(16), (16, 1)))


@pytest.mark.parametrize('channels', [1, 3])
def test_randaugment_changes_images_as_strongly_as_it_is_told(channels):
  pixels = np.random.default_rng(1).integers(0, 256, (24, 32, 3), dtype=np.uint8)
  image = encoded(pixels if channels == 3 else pixels[..., 0])
  shape = (24, 32, channels)
  plain = Crops(shape)(image, np.random.default_rng(0)).astype(int)
  apart = []
  for magnitude in (2, 28):
    crops = Crops(shape, randaugment=magnitude)
    found = [crops(image, np.random.default_rng(i)) for i in range(150)]
    assert all(one.shape == shape and one.dtype == np.uint8 for one in found)
    np.testing.assert_array_equal(crops(image, np.random.default_rng(7)), found[7])
    apart.append(np.mean([np.abs(one - plain).mean() for one in found]))
  assert 0 < apart[0] < apart[1]
