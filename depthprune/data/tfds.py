"""TFDS sets that are prepared on this machine, and data sets before they are read."""

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from depthprune.data.dataset import DataError, Split

BLOCK = 1024  # records that are decoded at once

OWN = 'digits', 'multi_fashion'  # sets that TFDS does not have


class ImageSource(NamedTuple):
  """A data set of images before it is read.

  Attributes:
    train: number of training images.
    test: number of test images, 0 without a labelled test split.
    shape: (height, width, channels) of an image, or (features,) of rows of numbers.
    classes: number of classes of each label; 0 where only the masks will tell.
    scale: largest value of a pixel.
    read: (split, rows) -> the images and labels of these rows.
    validation: number of images of a validation split that is held out, else 0.
    ignore: label of unlabelled pixels where every pixel has a label, else None.
    names: names of the classes, () if they are not known.
    tasks: names of the tasks if there are several, else ().
    records: () -> `Records`, for streaming; None where images cannot be streamed.
    notes: sentences about the data that belong beside any result.
  """

  train: int
  test: int
  shape: tuple[int, ...]
  classes: int
  scale: float
  read: Callable[[str, np.ndarray], Split]
  validation: int = 0
  ignore: int | None = None
  names: tuple[str, ...] = ()
  tasks: tuple[str, ...] = ()
  records: Callable[[], 'Records'] | None = None
  notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Records:
  """Encoded images and their classes on disk, by number.

  Attributes:
    train: TFDS data source of the training images, which come first. It does not
      decode.
    test: the same of the test images, whose numbers follow.
    image: name of the feature that is the image.
    label: name of the feature that is the class.
  """

  train: Sequence[Any]
  test: Sequence[Any]
  image: str
  label: str

  def __getitem__(self, number: int) -> tuple[bytes, int]:
    beyond = number - len(self.train)
    record = self.train[number] if beyond < 0 else self.test[beyond]
    return record[self.image], int(record[self.label])


def data_dir() -> Path:
  """Returns the folder of TFDS sets: $TFDS_DATA_DIR, or TFDS's own default."""
  return Path(os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')).expanduser()


def prepared() -> list[str]:
  """Returns the names of the sets in `data_dir()`: 'cifar10', 'glue/sst2'."""
  folder = data_dir()
  versions = [*folder.glob('*/*/dataset_info.json')]
  versions += folder.glob('*/*/*/dataset_info.json')
  return sorted({v.parents[1].relative_to(folder).as_posix() for v in versions})


def find(name: str, download: bool = False) -> Any:
  """Returns the TFDS builder of a set, which is prepared if `download` allows it.

  Raises:
    DataError: no set has that name, it is not on this machine, or preparing it failed.
  """
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise DataError(
      f'data {name!r}: reading TFDS sets needs more packages ({error}): '
      "pip install 'depthprune[data]'"
    ) from error
  folder = data_dir()
  try:
    builder = tfds.builder(name, data_dir=str(folder))
  except ValueError as error:
    # The list of community data sets would be fetched from the network.
    known = {*OWN, *tfds.list_builders(with_community_datasets=False)}
    known |= {p.name for p in folder.glob('*') if p.is_dir()}
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    raise DataError(
      f'data {name!r}: {str(error).splitlines()[0]} '
      f'Nearest names: {", ".join(near) or "none"}. Expected {" or ".join(OWN)}, or a '
      f'TFDS set, in its catalogue or in {folder} (TFDS_DATA_DIR).'
    ) from error
  if not builder.is_prepared():
    how = f"tfds.builder({name!r}, file_format='array_record').download_and_prepare()"
    if not download:
      raise DataError(_absent(name, builder, folder, how))
    try:
      builder = tfds.builder(name, data_dir=str(folder), file_format='array_record')
      builder.download_and_prepare()
    except Exception as error:  # each data set has its own script, which may raise any
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


def open_split(name: str, builder: Any, split: str, raw: tuple[str, ...] = ()) -> Any:
  """Opens the records of a split; the features named in `raw` are not decoded.

  Raises:
    DataError: the records are stored in another format than array_record.
  """
  import tensorflow_datasets as tfds

  decoders: Any = {feature: tfds.decode.SkipDecoding() for feature in raw}
  try:
    return builder.as_data_source(split=split, decoders=decoders or None)
  except NotImplementedError as error:
    raise DataError(
      f'data {name!r}: {builder.data_path} is prepared as '
      f'{builder.info.file_format.value}, expected array_record: prepare it again with '
      "file_format='array_record' into another TFDS_DATA_DIR"
    ) from error


def open_splits(name: str, builder: Any) -> dict[str, Any]:
  """Opens all splits of a set, {split: records}.

  Raises:
    DataError: there is no split 'train', or records are in another format.
  """
  opened = {split: open_split(name, builder, split) for split in builder.info.splits}
  if 'train' not in opened:
    raise DataError(f"data {name!r}: expected a split 'train', got {[*opened]}")
  return opened


def decoded(split: Any, rows: np.ndarray) -> Iterator[Mapping[str, Any]]:
  """Yields the decoded records of some rows of an open split."""
  for start in range(0, len(rows), BLOCK):
    yield from split.__getitems__(rows[start : start + BLOCK].tolist())


def tested(opened: Mapping[str, Any], label_key: str) -> str:
  """Returns the name of the split to test on, '' where there is none.

  It has to be labelled: the test labels of imagenet2012 and GLUE are not public, so
  their validation split is used (for MNLI the matched one).
  """
  labelled = lambda split: len(split) > 0 and split[0][label_key] >= 0
  names = [s for kind in ('test', 'validation') for s in opened if s.startswith(kind)]
  return next((name for name in names if labelled(opened[name])), '')


def one_shape(name: str, shape: tuple, resize: int | None) -> tuple[int, int, int]:
  """Returns the shape that all images have once they are resized.

  Raises:
    DataError: images differ in shape and are not resized.
  """
  if resize is not None:
    shape = (resize, resize, shape[-1])
  if None in shape:
    raise DataError(
      f'data {name!r}: images have one shape, got {shape}: pass resize=SIDE, which '
      'scales the shorter side and crops the middle'
    )
  return shape


def sized(image: np.ndarray, side: int | None, nearest: bool = False) -> np.ndarray:
  """Scales the shorter side of an image to `side` and crops the middle of the longer.

  Args:
    image: [height, width, channels], with any number of channels where it is not
      uint8.
    side: pixels; None returns the image as it is.
    nearest: take the nearest pixel and do not interpolate, for masks of classes.
  """
  if side is None or image.shape[:2] == (side, side):
    return image
  from PIL import Image

  height, width = image.shape[:2]
  cut = min(height, width)
  top, left = (height - cut) // 2, (width - cut) // 2
  middle = image[top : top + cut, left : left + cut]
  how = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
  if image.dtype != np.uint8 or image.shape[2] not in (1, 3, 4):
    of = [
      Image.fromarray(middle[..., c].astype(np.float32)) for c in range(image.shape[2])
    ]
    small = np.stack([np.asarray(one.resize((side, side), how)) for one in of], axis=2)
    whole = np.issubdtype(image.dtype, np.integer)
    return (small.round() if whole else small).astype(image.dtype)
  middle = middle.reshape(cut, cut, *(image.shape[2:] if image.shape[2] > 1 else ()))
  small = Image.fromarray(middle).resize((side, side), how)
  return np.asarray(small).reshape(side, side, image.shape[2])
