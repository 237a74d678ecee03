"""A made-up imagenet2012: JPEGs of many sizes, 1000 classes, for TFDS to read.

  python -m experiments.imagenet.generated FOLDER [--train 256] [--validation 64]

and then TFDS_DATA_DIR=FOLDER. Shapes, dtypes, names and file format are those of the
real set, prepared with file_format='array_record'; a class is a colour and a grating,
so that it can be told.
"""

import argparse
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = 1000


def prepare(
  folder: Path, train: int, validation: int, side: tuple[int, int] = (160, 520)
) -> Path:
  """Writes both splits; returns `folder`, for TFDS_DATA_DIR.

  side: least and most pixels of an image, in either direction.
  """
  import tensorflow_datasets as tfds

  builder: Any = tfds.builder(
    'imagenet2012', data_dir=str(folder), file_format='array_record'
  )
  sizes = {'train': train, 'validation': validation}
  builder._split_generators = lambda manager: {
    split: examples(split, count, side) for split, count in sizes.items()
  }
  config = tfds.download.DownloadConfig(try_download_gcs=False)
  builder.download_and_prepare(download_config=config)
  return folder


def examples(
  split: str, count: int, side: tuple[int, int]
) -> Iterator[tuple[str, dict[str, Any]]]:
  """(name, what TFDS calls an example), always the same for a split."""
  rng = np.random.RandomState(len(split))
  for i in range(count):
    # Both splits have the same classes, as many as there are images.
    label = i * 37 % CLASSES
    height, width = rng.randint(side[0], side[1] + 1, 2)
    name = f'n{label:08d}_{i}.JPEG'
    image = io.BytesIO(jpeg(label, height, width, rng))
    yield name, {'file_name': name, 'image': image, 'label': label}


def jpeg(label: int, height: int, width: int, rng: np.random.RandomState) -> bytes:
  """An image of a class: its colour, in stripes as wide and as steep as it says."""
  from PIL import Image

  colour = np.array([label % 10, label // 10 % 10, label // 100]) * 20 + 30
  y, x = np.mgrid[:height, :width] / min(height, width)
  angle, waves = label % 7 / 7 * np.pi, 4 + label % 5
  phase = rng.uniform(2 * np.pi)
  grating = np.sin(2 * np.pi * waves * (x * np.cos(angle) + y * np.sin(angle)) + phase)
  noise = rng.normal(0, 12, (height, width, 3))
  pixels = np.clip(colour + 30 * grating[..., None] + noise, 0, 255).astype(np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'JPEG', quality=90)
  return file.getvalue()


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('folder', type=Path)
  parser.add_argument('--train', type=int, default=256)
  parser.add_argument('--validation', type=int, default=64)
  given = parser.parse_args()
  print(prepare(given.folder, given.train, given.validation))
