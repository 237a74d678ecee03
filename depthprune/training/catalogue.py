"""Where data come from: scikit-learn's digits, or any TFDS set of images and classes.

TFDS sets are read from disk in the array_record format, which needs neither TensorFlow
nor a network. A `Source` knows its sizes at once and decodes only the rows asked for.
"""

from typing import Any

import numpy as np

from depthprune.training import masks, overlaid
from depthprune.training.prepared import (
  BLOCK,
  DataError,
  Records,
  Source,
  find,
  one_shape,
  open_split,
  sized,
  tested,
)


def source(name: str, resize: int | None = None, download: bool = False) -> Source:
  """The data set called `name`: 'digits', or anything TFDS has in TFDS_DATA_DIR.

  'multi_fashion' is made of fashion_mnist, and where a set has masks every pixel has
  a class.

  Raises DataError for a name nobody knows, a set that is not prepared on this machine,
  and a set without images or without classes.
  """
  if name == 'digits':
    return _digits()
  if name == overlaid.NAME:
    pieces = _tfds(overlaid.OF, find(overlaid.OF, download), None)
    return overlaid.overlaid(pieces, resize)
  builder = find(name, download)
  if found := masks.keys(builder):
    return masks.source(name, builder, *found, resize)
  return _tfds(name, builder, resize)


def _digits() -> Source:
  from sklearn.datasets import load_digits

  digits: Any = load_digits()
  image = digits.images[..., None].astype(np.uint8)  # [1797, 8, 8, 1], 0 to 16
  label = digits.target.astype(np.int32)

  def read(split, rows):
    return {'image': image[rows], 'label': label[rows]}

  return Source(len(label), 0, image.shape[1:], 10, 16.0, read)


def _tfds(name: str, builder: Any, resize: int | None) -> Source:
  image_key, label_key = _keys(name, builder)
  shape = one_shape(name, builder.info.features[image_key].shape, resize)
  opened = {split: open_split(name, builder, split) for split in builder.info.splits}
  if 'train' not in opened:
    raise DataError(f"data {name!r}: expected a split 'train', got {[*opened]}")
  splits = {'train': opened['train']}
  test = tested(opened, label_key)
  if test:
    splits['test'] = opened[test]

  def read(split, rows):
    image = np.empty((len(rows), *shape), np.uint8)
    label = np.empty(len(rows), np.int32)
    for start in range(0, len(rows), BLOCK):
      records = splits[split].__getitems__(rows[start : start + BLOCK].tolist())
      for i, record in enumerate(records, start):
        image[i] = sized(record[image_key], resize)
        label[i] = record[label_key]
    return {'image': image, 'label': label}

  def records():
    raw = lambda split: open_split(name, builder, split, (image_key,)) if split else ()
    return Records(raw('train'), raw(test), image_key, label_key)

  classes = builder.info.features[label_key].num_classes
  sizes = len(splits['train']), len(splits.get('test', ()))
  return Source(*sizes, shape, classes, 255.0, read, records=records)


def _keys(name: str, builder: Any) -> tuple[str, str]:
  """The names of the image and of the class among the features."""
  import tensorflow_datasets as tfds

  features = dict(builder.info.features)
  images = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
  labels = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
  first = (*images, '')[0], (*labels, '')[0]
  image, label, *_ = builder.info.supervised_keys or first
  if image not in images or label not in labels or features[image].np_dtype != np.uint8:
    raise DataError(
      f'data {name!r}: expected an 8-bit image and a class to tell from it, or a mask '
      f'with one for every pixel, got {features}'
    )
  return image, label
