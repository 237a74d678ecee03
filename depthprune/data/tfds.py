"""TFDS sets that are prepared on this machine, and what a set is before it is read."""

import dataclasses
import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from depthprune.data.dataset import DataError, Split

BLOCK = 1024  # records that are decoded at once

OWN = 'digits', 'multi_fashion'  # sets that TFDS does not have


class ImageSource(NamedTuple):
  """A data set before it is read.

  `read(split, rows)` decodes the rows of 'train' or 'test'. `test` is 0 where the set
  has no labelled test split. Pixels run from 0 to `scale`.

  Where every pixel has a class, `validation` is the size of the split of that name (0
  where it has none, or is tested on), pixels labelled `ignore` have none, and `names`
  are those of the classes, where they are known; `classes` is 0 where it is not known
  before all masks are read. `tasks` are the names of several tasks, each of `classes`.
  `records()` opens the images where they lie, for those that are read when they are
  needed; None where they cannot be.
  """

  train: int
  test: int
  shape: tuple[int, int, int]
  classes: int
  scale: float
  read: Callable[[str, np.ndarray], Split]
  validation: int = 0
  ignore: int | None = None
  names: tuple[str, ...] = ()
  tasks: tuple[str, ...] = ()
  records: Callable[[], 'Records'] | None = None


@dataclasses.dataclass(frozen=True)
class Records:
  """Encoded images and their classes on disk, by number: train's, and then test's.

  train, test: TFDS data sources that do not decode. image, label: names of features.
  """

  train: Sequence[Any]
  test: Sequence[Any]
  image: str
  label: str

  def __getitem__(self, number: int) -> tuple[bytes, int]:
    beyond = number - len(self.train)
    record = self.train[number] if beyond < 0 else self.test[beyond]
    return record[self.image], int(record[self.label])


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


def open_split(name: str, builder: Any, split: str, raw: tuple[str, ...] = ()) -> Any:
  """The records of a split; raises DataError where they are in another format.

  raw: features that are not decoded.
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


def tested(opened: Mapping[str, Any], label_key: str) -> str:
  """The name of the split to test on, '' where there is none.

  The labelled one: imagenet2012 and GLUE keep their test labels to themselves, so
  theirs is the validation split (of MNLI the matched one).
  """
  labelled = lambda split: len(split) > 0 and split[0][label_key] >= 0
  names = [s for kind in ('test', 'validation') for s in opened if s.startswith(kind)]
  return next((name for name in names if labelled(opened[name])), '')


def one_shape(name: str, shape: tuple, resize: int | None) -> tuple[int, int, int]:
  """Of all images, resized; raises DataError where they differ and are not."""
  if resize is not None:
    shape = (resize, resize, shape[-1])
  if None in shape:
    raise DataError(
      f'data {name!r}: images have one shape, got {shape}: pass resize=SIDE, which '
      'scales the shorter side and crops the middle'
    )
  return shape


def sized(image: np.ndarray, side: int | None, nearest: bool = False) -> np.ndarray:
  """`image` with its shorter side scaled to `side`, and the middle of the longer.

  nearest: pixels are not mixed, for what is no picture but a class.
  """
  if side is None or image.shape[:2] == (side, side):
    return image
  from PIL import Image

  height, width = image.shape[:2]
  cut = min(height, width)
  top, left = (height - cut) // 2, (width - cut) // 2
  middle = image[top : top + cut, left : left + cut].squeeze()
  how = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
  small = Image.fromarray(middle).resize((side, side), how)
  return np.asarray(small).reshape(side, side, image.shape[2])
