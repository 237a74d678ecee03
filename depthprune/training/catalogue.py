"""Where data come from: scikit-learn's digits, or any TFDS image classification set.

TFDS sets are read from disk in the array_record format, which needs neither TensorFlow
nor a network. A `Source` knows its sizes at once and decodes only the rows asked for.
What sets of texts share with those of images (`sentences`) is public.
"""

import difflib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Split = dict[str, np.ndarray]
"""{'image': uint8 [n, height, width, channels], 'label': int32 [n]}"""

_BLOCK = 1024


class DataError(ValueError):
  """A data set that is not there, or is not one for classification."""


class Source(NamedTuple):
  """A data set before it is read.

  `read(split, rows)` decodes the rows of 'train' or 'test'. `test` is 0 where the set
  has no labelled test split. Pixels run from 0 to `scale`.
  """

  train: int
  test: int
  shape: tuple[int, int, int]
  classes: int
  scale: float
  read: Callable[[str, np.ndarray], Split]


def source(name: str, resize: int | None = None, download: bool = False) -> Source:
  """The data set called `name`: 'digits', or anything TFDS has in TFDS_DATA_DIR.

  Raises DataError for a name nobody knows, a set that is not prepared on this machine,
  and a set without images or without classes.
  """
  return _digits() if name == 'digits' else _tfds(name, resize, download)


def _digits() -> Source:
  from sklearn.datasets import load_digits

  digits: Any = load_digits()
  image = digits.images[..., None].astype(np.uint8)  # [1797, 8, 8, 1], 0 to 16
  label = digits.target.astype(np.int32)

  def read(split, rows):
    return {'image': image[rows], 'label': label[rows]}

  return Source(len(label), 0, image.shape[1:], 10, 16.0, read)


def _tfds(name: str, resize: int | None, download: bool) -> Source:
  builder = find(name, download)
  image_key, label_key = _keys(name, builder)
  shape = builder.info.features[image_key].shape
  if resize is not None:
    shape = (resize, resize, shape[-1])
  if None in shape:
    raise DataError(
      f'data {name!r}: images have one shape, got {shape}: pass resize=SIDE, which '
      'scales the shorter side and crops the middle'
    )
  opened = {split: open_split(name, builder, split) for split in builder.info.splits}
  if 'train' not in opened:
    raise DataError(f"data {name!r}: expected a split 'train', got {[*opened]}")
  splits = {'train': opened['train']}
  if test := tested(opened, label_key):
    splits['test'] = opened[test]

  def read(split, rows):
    image = np.empty((len(rows), *shape), np.uint8)
    label = np.empty(len(rows), np.int32)
    for start in range(0, len(rows), _BLOCK):
      records = splits[split].__getitems__(rows[start : start + _BLOCK].tolist())
      for i, record in enumerate(records, start):
        image[i] = _sized(record[image_key], resize)
        label[i] = record[label_key]
    return {'image': image, 'label': label}

  classes = builder.info.features[label_key].num_classes
  return Source(
    len(splits['train']), len(splits.get('test', ())), shape, classes, 255.0, read
  )


def find(name: str, download: bool = False) -> Any:
  """The TFDS builder of a set that is prepared on this machine, or is made so here.

  Raises DataError for a name nobody knows, and for a set that is not on this machine.
  """
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise DataError(
      f'data {name!r}: reading TFDS sets needs more packages ({error}): '
      "pip install 'depthprune[data]'"
    ) from error
  folder = Path(os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')).expanduser()
  try:
    builder = tfds.builder(name, data_dir=str(folder))
  except ValueError as error:
    # With the community's sets the list is fetched from the network: without them.
    known = {'digits', *tfds.list_builders(with_community_datasets=False)}
    known |= {p.name for p in folder.glob('*') if p.is_dir()}
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    raise DataError(
      f'data {name!r}: {str(error).splitlines()[0]} '
      f'Nearest names: {", ".join(near) or "none"}. Expected digits, or a TFDS set, '
      f'in its catalogue or in {folder} (TFDS_DATA_DIR).'
    ) from error
  if not builder.is_prepared():
    how = f"tfds.builder({name!r}, file_format='array_record').download_and_prepare()"
    if not download:
      raise DataError(_absent(name, builder, folder, how))
    try:
      builder = tfds.builder(name, data_dir=str(folder), file_format='array_record')
      builder.download_and_prepare()
    except Exception as error:  # whatever a network and a hundred scripts can raise
      raise DataError(
        f'{_absent(name, builder, folder, how)} Preparing it here failed: '
        f'{type(error).__name__}: {error}'
      ) from error
  return builder


def _absent(name: str, builder: Any, folder: Path, how: str) -> str:
  return (
    f'data {name!r}: not on this machine. Looked for {builder.data_path} '
    f'(TFDS_DATA_DIR is {os.environ.get("TFDS_DATA_DIR", f"not set, so {folder}")}). '
    'Set TFDS_DATA_DIR to the folder that has it, or prepare it where there is a '
    f'network (TFDS may ask for TensorFlow to do so): python -c "import '
    f'tensorflow_datasets as tfds; {how}", or load({name!r}, download=True).'
  )


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
      f'data {name!r}: expected an 8-bit image and a class to tell from it, got '
      f'{features}'
    )
  return image, label


def open_split(name: str, builder: Any, split: str) -> Any:
  """The records of a split; raises DataError where they are in another format."""
  try:
    return builder.as_data_source(split=split)
  except NotImplementedError as error:
    raise DataError(
      f'data {name!r}: {builder.data_path} is prepared as '
      f'{builder.info.file_format.value}, expected array_record: prepare it again with '
      "file_format='array_record' into another TFDS_DATA_DIR"
    ) from error


def tested(opened: Mapping[str, Any], label_key: str) -> str:
  """The name of the split to test on, '' where there is none.

  The labelled one: imagenet2012 and GLUE keep their test labels to themselves, so
  theirs is the validation split (of MNLI the matched one).
  """
  labelled = lambda split: len(split) > 0 and split[0][label_key] >= 0
  names = [s for kind in ('test', 'validation') for s in opened if s.startswith(kind)]
  return next((name for name in names if labelled(opened[name])), '')


def _sized(image: np.ndarray, side: int | None) -> np.ndarray:
  """`image` with its shorter side scaled to `side`, and the middle of the longer."""
  if side is None or image.shape[:2] == (side, side):
    return image
  from PIL import Image

  height, width = image.shape[:2]
  cut = min(height, width)
  top, left = (height - cut) // 2, (width - cut) // 2
  middle = image[top : top + cut, left : left + cut].squeeze()
  small = Image.fromarray(middle).resize((side, side), Image.Resampling.BILINEAR)
  return np.asarray(small).reshape(side, side, image.shape[2])
