"""The data set that a run is about: images or texts, whichever its name stands for."""

import zlib
from pathlib import Path

import numpy as np

from depthprune.data import images, text
from depthprune.data.augment import Normalisation
from depthprune.data.dataset import DataError, Dataset
from depthprune.exports import networks
from depthprune.models import pretrained
from depthprune.run.config import Config
from depthprune.storage import checkpoint
from depthprune.storage.checkpoint import kind


def read(config: Config) -> Dataset:
  """The data set of a config, split by its seed.

  Raises:
    DataError: it is unknown, absent or of another kind; texts have no tokenizer; an
      option is not for such data.
    CheckpointError: the pretrained network's folder holds none.
  """
  # What is no text is read as images: what it is instead is said there.
  if text.kind_of(config.data) == 'text':
    return _texts(config)
  return images.load(
    config.data,
    seed=config.seed,
    subset=config.subset,
    resize=config.resize,
    stream=None if config.stream is None else config.stream == 'always',
    normalisation=normalisation(config.pretrained) if config.pretrained else None,
    mixup=config.mixup or 0.0,
    randaugment=config.randaugment or 0,
    workers=config.workers or 0,
  )


def checksums(data: Dataset) -> dict[str, str]:
  """Shape and checksum of every array by which a data set is known."""
  crc32 = lambda x: zlib.crc32(np.ascontiguousarray(x).data)
  arrays = checkpoint.paths(data.probe())
  return {k: f'{kind(x)} {crc32(x):08x}' for k, x in arrays.items()}


def normalisation(path: str) -> Normalisation | None:
  """What weights were trained on: as their file's .json says, or their folder's record.

  Raises as `pretrained.normalisation` does, and CheckpointError for a folder that is no
  pruned network.
  """
  if not Path(path).is_dir():
    found = pretrained.normalisation(path)
    return None if found is None else Normalisation(*found)
  record = checkpoint.read_record(Path(path), networks.RECORD)
  found = record['report'].get('normalisation')
  if found is None:
    return None
  return Normalisation(tuple(found['mean']), tuple(found['std']), found['scale'])


def _texts(config: Config) -> Dataset:
  options = 'mixup', 'randaugment', 'stream', 'workers'
  if given := [name for name in options if getattr(config, name) is not None]:
    raise DataError(
      f'data {config.data!r}: {", ".join(given)}: for images, these are texts: leave '
      'it out'
    )
  if config.resize is not None:
    raise DataError(
      f'data {config.data!r}: resize is for images, got resize={config.resize} for '
      'texts: leave it out, and give the tokens of a text with length'
    )
  return text.load(
    config.data,
    tokenizer(config),
    seed=config.seed,
    subset=config.subset,
    length=config.length,
  )


def tokenizer(config: Config) -> Path:
  """The tokenizer.json of a run: as given, else the one beside the weights.

  Raises DataError where there is neither.
  """
  if config.tokenizer is not None:
    return Path(config.tokenizer)
  weights = config.pretrained
  beside = None if weights is None else Path(weights).with_name('tokenizer.json')
  if beside is None or not beside.is_file():
    looked = 'no weights were given' if beside is None else f'there is no {beside}'
    raise DataError(
      f'data {config.data!r}: texts need the tokenizer.json that belongs to the '
      f'network, got none, and {looked}: pass --tokenizer FILE'
    )
  return beside
