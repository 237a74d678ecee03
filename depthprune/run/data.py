"""The data set that a run is about: images or texts, whichever its name stands for."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from depthprune.data import images as data
from depthprune.data import text
from depthprune.data.dataset import DataError
from depthprune.data.images import Dataset
from depthprune.data.streaming import Streamed
from depthprune.data.text import Texts
from depthprune.exports import networks
from depthprune.models import pretrained
from depthprune.run.config import Config
from depthprune.storage import checkpoint
from depthprune.storage.checkpoint import kind


def read(config: Config) -> Dataset | Streamed | Texts:
  """The data set of a config, split by its seed.

  Raises DataError as `data.load` and `text.load` do, for texts without a tokenizer, for
  texts that are to be resized, and for augmentation that is not for such images; and as
  `normalisation` does.
  """
  # Not all that is not text is images: what it is instead is said where it is read.
  if text.kind_of(config.data) == 'text':
    return _texts(config)
  images = data.load(
    config.data,
    seed=config.seed,
    subset=config.subset,
    resize=config.resize,
    stream=None if config.stream is None else config.stream == 'always',
    normalisation=normalisation(config.pretrained) if config.pretrained else None,
  )
  by = {'mixup': config.mixup or 0.0, 'randaugment': config.randaugment or 0}
  images = images._replace(augment=images.augment._replace(**by))
  if isinstance(images, Streamed):
    return images._replace(workers=config.workers or 0)
  if config.randaugment:
    raise DataError(
      f'data {config.data!r}: randaugment is for images that are streamed, these are '
      'in memory: leave it out, or pass --stream always'
    )
  if config.mixup and (images.tasks or images.ignore is not None):
    raise DataError(
      f'data {config.data!r}: mixup is for images with one class each: leave it out'
    )
  return images


def digests(images: Any) -> dict[str, str]:
  """Shape and checksum of every array of a data set, and of some records on disk."""
  splits = {name: getattr(images, name) for name in ('train', 'held_out', 'test')}
  if isinstance(images, Streamed):
    splits |= {'records': images.probe()}
  crc32 = lambda x: zlib.crc32(np.ascontiguousarray(x).data)
  return {k: f'{kind(x)} {crc32(x):08x}' for k, x in checkpoint.paths(splits).items()}


def normalisation(path: str) -> data.Normalisation | None:
  """What weights were trained on: as their file's .json says, or their folder's record.

  Raises as `pretrained.normalisation` does, and CheckpointError for a folder that is no
  pruned network.
  """
  if not Path(path).is_dir():
    found = pretrained.normalisation(path)
    return None if found is None else data.Normalisation(*found)
  record = checkpoint.read_record(Path(path), networks.RECORD)
  found = record['report'].get('normalisation')
  if found is None:
    return None
  return data.Normalisation(tuple(found['mean']), tuple(found['std']), found['scale'])


def _texts(config: Config) -> Texts:
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
