"""TFDS sets for segmentation: an image, and a mask with a class for every pixel."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from depthprune.data.dataset import DataError, Split
from depthprune.data.tfds import ImageSource, decoded, one_shape, open_splits, sized

UNLABELLED = 'unlabelled', 'unlabeled', 'void', 'ignore'  # names of no class
IGNORE = 255  # the usual label of unlabelled pixels, for sets that name none
SKEWED = 4  # a class this many times as frequent in one split as in another is noted


def keys(builder: Any) -> tuple[str, str] | None:
  """Returns the names of the features that are the image and its mask.

  They are the set's `supervised_keys`. A set without these and without a class per
  image has a mask if a feature is named so or is a LabeledImage. None without a mask.
  """
  from tensorflow_datasets import features as kinds

  features = dict(builder.info.features)
  images = [k for k, f in features.items() if isinstance(f, kinds.Image)]
  flat = [k for k in images if features[k].shape[-1] == 1]
  labelled = any(isinstance(f, kinds.ClassLabel) for f in features.values())
  if builder.info.supervised_keys:
    image, mask, *_ = builder.info.supervised_keys
  elif labelled:
    return None
  else:
    is_mask = lambda k: (
      isinstance(features[k], kinds.LabeledImage)
      or any(word in k.lower() for word in ('mask', 'segmentation'))
    )
    mask = next(filter(is_mask, flat), '')
    image = next((k for k in images if k != mask), '')
  valid = image in images and mask in flat and image != mask
  eight = valid and all(features[k].np_dtype == np.uint8 for k in (image, mask))
  return (image, mask) if eight else None


def source(
  name: str, builder: Any, image_key: str, mask_key: str, resize: int | None
) -> ImageSource:
  """Returns the source of a set's images and masks, uint8 [n, height, width].

  The classes are those that the set names, without the name of unlabelled pixels.

  Args:
    name: name of the set.
    builder: its TFDS builder.
    image_key: name of the feature that is the image.
    mask_key: name of the feature that is the mask.
    resize: side in pixels of the square that both are scaled and cropped to.

  Raises:
    DataError: there is no training split; or, when rows are read, a mask has another
      size than its image or a label outside the classes.
  """
  shape = one_shape(name, builder.info.features[image_key].shape, resize)
  opened = open_splits(name, builder)
  test = next((s for s in ('test', 'validation') if len(opened.get(s, ()))), '')
  listed = _listed(builder, mask_key)
  names = tuple(n for n in listed if n.lower() not in UNLABELLED)
  ignore = len(names) if len(names) < len(listed) else IGNORE
  numbers = numbered(listed, ignore)

  def read(split, rows):
    of = test if split == 'test' else split
    image = np.empty((len(rows), *shape), np.uint8)
    label = np.empty((len(rows), *shape[:2]), np.uint8)
    for i, record in enumerate(decoded(opened[of], rows)):
      where = f'data {name!r}: {_where(builder, of, int(rows[i]))}'
      _check(where, record[image_key], record[mask_key], mask_key, len(listed), ignore)
      image[i] = sized(record[image_key], resize)
      label[i] = numbers[sized(record[mask_key], resize, nearest=True)[..., 0]]
    return {'image': image, 'label': label}

  count = lambda split: len(opened.get(split, ()))
  own = count('validation') if test != 'validation' else 0
  return ImageSource(
    train=count('train'),
    test=count(test),
    validation=own,
    shape=shape,
    classes=len(names),
    scale=255.0,
    read=read,
    ignore=ignore,
    names=names,
  )


def numbered(listed: Sequence[str], ignore: int) -> np.ndarray:
  """Returns the class of every label that a mask may hold, uint8 [256].

  Classes are numbered without a gap, unlabelled pixels become `ignore` wherever the
  set lists them, and a label beyond the list stays as it is.
  """
  numbers, count = np.arange(256, dtype=np.uint8), 0
  for i, name in enumerate(listed):
    is_class = name.lower() not in UNLABELLED
    numbers[i] = count if is_class else ignore
    count += is_class
  return numbers


def _listed(builder: Any, mask_key: str) -> tuple[str, ...]:
  """Returns the set's names of its labels, in order; () if it has none."""
  names = tuple(getattr(builder.info.features[mask_key], 'names', None) or ())
  listed = builder.data_path / f'{mask_key}.labels.txt'
  if not names and listed.exists():
    names = tuple(listed.read_text().split('\n'))
    names = names[:-1] if names[-1] == '' else names
  return names


def _check(where, image, mask, mask_key: str, labels: int, ignore: int) -> None:
  if image.shape[:2] != mask.shape[:2]:
    raise DataError(
      f'{where}: the image is {image.shape[:2]}, its {mask_key} {mask.shape[:2]}, '
      'expected one size: resize the mask (nearest pixel) and prepare the set again'
    )
  wrong = mask[(mask >= labels) & (mask != ignore)] if labels else mask[:0]
  if wrong.size:
    raise DataError(
      f'{where}: {mask_key} has the label {wrong.flat[0]}, expected 0 to {labels - 1}'
      f'{f", or {ignore} for no label" if ignore >= labels else ""}: name all labels, '
      f'one a line, in {mask_key}.labels.txt'
    )


def _where(builder: Any, split: str, row: int) -> str:
  """Returns the file that a record is in and its number there, for messages."""
  info = builder.info.splits[split]
  for path, count in zip(info.filepaths, info.shard_lengths):
    if row < count:
      return f'{path}, record {row}'
    row -= count
  return f'split {split!r}, record {row} behind its files'


def highest(splits: Sequence[Split], ignore: int) -> int:
  """Returns one more than the highest label of any split."""
  tops = [s['label'][s['label'] != ignore].max(initial=0) for s in splits]
  return int(max(tops)) + 1


def shares(split: Split, classes: int) -> np.ndarray:
  """Returns the share of every class in the labelled pixels, float [classes]."""
  counts = np.bincount(split['label'].ravel(), minlength=classes)[:classes]
  return counts / max(counts.sum(), 1)


def notes(
  splits: Mapping[str, Split], classes: int, source: ImageSource
) -> tuple[str, ...]:
  """Returns notes about splits that differ and classes that are absent."""
  names = source.names or tuple(map(str, range(classes)))
  share = {name: shares(split, classes) for name, split in splits.items()}
  notes = []
  if source.validation:
    notes.append('held-out images are of the validation split that the set has')
  if not source.names:
    notes.append(f'the set names no classes: {classes} are those that its labels show')
  for i, name in enumerate(names):
    each = {split: share[split][i] for split in splits}
    absent = [split for split, part in each.items() if not part]
    high, low = max(each.values()), min(each.values())
    if high > SKEWED * low > 0:
      parts = ', '.join(f'{100 * x:.2g} % in {split}' for split, x in each.items())
      notes.append(f'pixels of class {name} are {parts}')
    elif high and absent:
      notes.append(
        f'class {name} is in no label of {", ".join(absent)}: mIoU leaves it out '
        'there, unless the network answers it'
      )
  return tuple(notes)
