"""The data set of a run: images or texts, with their normalisation or tokenizer.

It is read by name, or from files of the user's own, see `run.own`.
"""

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from depthprune.data import (
  arrays,
  corpus,
  folders,
  images,
  tables,
  text,
  tfds,
  tokens,
)
from depthprune.data.augment import Normalisation
from depthprune.data.corpus import Corpus
from depthprune.data.dataset import DataError, Dataset, count
from depthprune.data.text import TextSource
from depthprune.data.tfds import ImageSource
from depthprune.exports import records
from depthprune.models import llamacpp, pretrained
from depthprune.models.decoder import Decoder
from depthprune.run import build, own
from depthprune.run.config import Config
from depthprune.storage import checkpoint
from depthprune.storage.checkpoint import kind


class Sizes(NamedTuple):
  """What is known of a data set before it is read.

  Attributes:
    what: what an example is, such as 'images 32x32x3'.
    classes: number of classes.
    train: number of training examples, before any are held out.
    test: number of test examples; 0 where a part of `train` becomes the test split.
  """

  what: str
  classes: int
  train: int
  test: int


def read(config: Config) -> Dataset:
  """Reads the data set of a config and splits it by the config's seed.

  Raises:
    DataError: the data set is unknown, absent or of another kind, texts have no
      tokenizer, or an option does not suit the data.
    CheckpointError: the pretrained network's folder holds no network.
  """
  ours = not own.is_object(config.model)  # any other is built later, once
  if ours and isinstance(model := build.alone(config, classes=1), Decoder):
    return _corpus(config, model)
  source = _own(config.data, config.resize)
  if source is not None and not isinstance(source, ImageSource | TextSource):
    return _ready(config, source)
  if source is None and text.kind_of(config.data) == 'text':
    source = text.source(config.data)
  if isinstance(source, TextSource):
    if source.classes < 2:
      raise DataError(
        f'data {config.data!r}: texts without classes are for a network that writes, '
        f'such as decoder_smollm2, got {own.word(config.model)}'
      )
    for_images = 'mixup', 'randaugment', 'stream', 'workers'
    if wrong := [name for name in for_images if getattr(config, name) is not None]:
      raise DataError(
        f'data {config.data!r}: {", ".join(wrong)}: for images, these are texts: leave '
        'it out'
      )
    if config.resize is not None:
      raise DataError(
        f'data {config.data!r}: resize is for images, got resize={config.resize} for '
        'texts: leave it out, and give the tokens of a text with length'
      )
    return text.encoded(
      config.data,
      source,
      tokenizer(config),
      seed=config.seed,
      subset=config.subset,
      length=config.length,
    )
  return images.divided(
    config.data,
    source or images.source(config.data, config.resize),
    seed=config.seed,
    subset=config.subset,
    stream=None if config.stream is None else config.stream == 'always',
    normalisation=normalisation(config.pretrained) if config.pretrained else None,
    mixup=config.mixup or 0.0,
    randaugment=config.randaugment or 0,
    workers=config.workers or 0,
  )


def _corpus(config: Config, model: Decoder) -> Corpus:
  """Reads texts for a network that writes."""
  if config.length > model.positions:
    raise DataError(
      f'length: expected at most {model.positions} tokens, as many as '
      f'{own.word(config.model)} has positions for, got {config.length}'
    )
  for_others = 'resize', 'mixup', 'randaugment', 'stream', 'workers'
  others = [name for name in for_others if getattr(config, name) is not None]
  if others:
    raise DataError(
      f'data {config.data!r}: {", ".join(others)}: for images, these are texts: leave '
      'it out'
    )
  source = _own(config.data, None, as_texts=True)
  if source is None and text.kind_of(config.data) == 'text':
    source = text.source(config.data)
  if not isinstance(source, TextSource):
    raise DataError(
      f'data {config.data!r}: {own.word(config.model)} writes texts: expected a file '
      f'or a folder of text ({", ".join(own.TEXTS)}), or a data set of texts'
    )
  return corpus.packed(
    config.data,
    source,
    writing(config),
    model.vocab,
    seed=config.seed,
    subset=config.subset,
    length=config.length,
  )


def listed(names: Sequence[str] = ()) -> Iterator[tuple[str, Sizes | str]]:
  """Yields (name, what is known of it) of data sets.

  Args:
    names: what `Config.data` may be. Without any, the sets that come with libraries and
      those of TFDS that are on this machine.

  Yields:
    The name and its `Sizes`, or a sentence that says why it cannot be read here.
  """
  for name in names or [*tfds.OWN, *tfds.prepared()]:
    try:
      yield name, _sizes(own.absolute(name))
    except (DataError, own.ConfigError) as error:
      yield name, str(error).removeprefix(f'data {name!r}: ')


def _sizes(name: str) -> Sizes:
  source: Any = _own(name, None)
  if source is None:
    of_texts = text.kind_of(name) == 'text'
    source = text.source(name) if of_texts else images.source(name)
  if isinstance(source, TextSource):
    what = 'pairs of texts' if source.pair else 'texts'
  elif isinstance(source, ImageSource):
    kind = 'images' if len(source.shape) > 1 else 'rows'
    kind = 'images with masks' if source.ignore is not None else kind
    what = f'{kind} {"x".join(map(str, source.shape))}'
  else:  # a Dataset of the user's own
    return Sizes('examples', source.classes, count(source.train), count(source.test))
  if not source.train:
    raise DataError(f'data {name!r}: {what} without a training split')
  return Sizes(what, source.classes, source.train, source.test)


def _own(name: str, resize: int | None, as_texts: bool = False) -> Any:
  """Returns the source of a user's own data, or its `Dataset`; None for a name.

  Args:
    name: what `Config.data` is.
    resize: side in pixels of images.
    as_texts: whether a folder holds texts instead of images.
  """
  if own.is_object(name):
    try:
      given = own.load(name)()
    except own.ConfigError:
      raise
    except Exception as error:
      raise DataError(f'data {name}: the function failed: {own.told(error)}') from error
    return given if hasattr(given, 'sampler') else arrays.source(name, given, resize)
  if Path(name).suffix in own.TEXTS or (as_texts and own.is_folder(name)):
    return corpus.source(name, own.TEXTS)
  if own.is_folder(name):
    return folders.source(name, resize)
  if own.is_file(name):
    read = arrays.read_npz if name.endswith(own.ARRAYS) else tables.read
    return arrays.source(name, read(name), resize)
  return None


def _ready(config: Config, data: Any) -> Dataset:
  """Returns the `Dataset` of a user's own, which divides and augments by itself."""
  members = {*Dataset.__annotations__, *vars(Dataset)}
  missing = sorted(m for m in members if m[0] != '_' and not hasattr(data, m))
  if missing:
    raise DataError(
      f'data {config.data}: expected a Dataset, with {", ".join(missing)} besides'
    )
  options = 'subset', 'resize', 'stream', 'mixup', 'randaugment'
  if wrong := [k for k in options if getattr(config, k) is not None]:
    raise DataError(
      f'data {config.data}: {", ".join(wrong)}: the Dataset is taken as the function '
      'returns it: leave it out'
    )
  return data


def checksums(data: Dataset) -> dict[str, str]:
  """Returns the shape and checksum of every array of a data set's `probe`."""
  crc32 = lambda x: zlib.crc32(np.ascontiguousarray(x).data)
  arrays = checkpoint.paths(data.probe())
  return {k: f'{kind(x)} {crc32(x):08x}' for k, x in arrays.items()}


def normalisation(path: str) -> Normalisation | None:
  """Returns the normalisation that weights were trained with, None if it is unknown.

  Args:
    path: a file of weights, beside which a .json may say it, or the folder of a pruned
      network.

  Raises:
    CheckpointError: the folder holds no network.
    ValueError: the .json does not describe a normalisation.
  """
  if not Path(path).is_dir():
    stored = pretrained.normalisation(path)
    return None if stored is None else Normalisation(*stored)
  record = records.read_record(Path(path))
  stored = record['report'].get('normalisation')
  if stored is None:
    return None
  return Normalisation(tuple(stored['mean']), tuple(stored['std']), stored['scale'])


def writing(config: Config) -> Any:
  """Returns the `tokenizers.Tokenizer` of a network that writes.

  It is that of a GGUF file, if the pretrained weights are one and no other is given.

  Raises:
    DataError: there is none, or it cannot be read.
  """
  weights = config.pretrained
  if config.tokenizer is None and weights and Path(weights).suffix == '.gguf':
    return llamacpp.tokenizer(weights)
  return tokens.read(tokenizer(config))


def tokenizer(config: Config) -> Path:
  """Returns the config's tokenizer.json, or that in or beside the pretrained weights.

  Raises:
    DataError: there is neither.
  """
  if config.tokenizer is not None:
    return Path(config.tokenizer)
  weights = config.pretrained
  beside = None
  if weights is not None:
    inside = Path(weights, 'tokenizer.json')
    beside = inside if inside.is_file() else Path(weights).with_name('tokenizer.json')
  if beside is None or not beside.is_file():
    looked = 'no weights were given' if beside is None else f'there is no {beside}'
    raise DataError(
      f'data {config.data!r}: texts need the tokenizer.json that belongs to the '
      f'network, got none, and {looked}: pass --tokenizer FILE'
    )
  return beside
