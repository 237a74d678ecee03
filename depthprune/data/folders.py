"""A folder of images of a user's own: a folder for each class, with images in it.

There may be folders for splits above those for classes, named train, validation (or
val) and test. Otherwise a quarter of every class is tested on. Hidden files, and files
that are no images, are left out.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from depthprune.data import labels
from depthprune.data.dataset import DataError
from depthprune.data.tfds import ImageSource, one_shape, sized

SUFFIXES = frozenset(
  '.png .jpg .jpeg .bmp .gif .webp .tif .tiff .ppm .pgm .pbm'.split()
)
# Modes of Pillow. What is not here is colour in 8 bits.
_GREY = frozenset(('1', 'L', 'LA', 'I', 'I;16', 'I;16B', 'I;16L'))
_DEEP = frozenset(('I', 'I;16', 'I;16B', 'I;16L'))
_CLEAR = frozenset(('LA', 'PA', 'RGBA', 'RGBa', 'La'))


class Header(NamedTuple):
  """What an image file says before it is decoded."""

  height: int
  width: int
  mode: str


def source(path: str, resize: int | None = None) -> ImageSource:
  """Returns the images of a folder before they are read.

  Images are grey if all of them are, and otherwise RGB; alpha channels are left out.
  They have 16 bits if any of them has.

  Args:
    path: the folder.
    resize: side in pixels of the square that images are scaled and cropped to.

  Raises:
    DataError: there is no such folder, it has another structure, a class is empty or is
      not trained on, a file is damaged, or images differ in size and are not resized.
  """
  root = Path(path)
  classes, found = _classes(root)
  items = {
    split: np.array([str(file) for files in of.values() for file in files])
    for split, of in found.items()
  }
  numbers = {
    split: np.repeat([classes.index(c) for c in of], [*map(len, of.values())])
    for split, of in found.items()
  }
  parts = labels.Parts(
    items, {s: y.astype(np.int32) for s, y in numbers.items()}, tuple(classes), ()
  )
  keys = [Path(file).relative_to(root).as_posix() for file in items['train']]
  parts = labels.tested(path, parts, keys)
  headers = {file: _header(file) for of in parts.items.values() for file in of}
  kinds = {header.mode for header in headers.values()}
  grey, deep = kinds <= _GREY, bool(kinds & _DEEP)
  one = _one_size(path, headers) if resize is None else next(iter(headers.values()))
  shape = one_shape(path, (one.height, one.width, 1 if grey else 3), resize)

  def read(split: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    image = np.empty((len(rows), *shape), np.uint16 if deep else np.uint8)
    for i, file in enumerate(parts.items[split][rows]):
      image[i] = sized(_pixels(file, grey, deep), resize)
    return {'image': image, 'label': parts.labels[split][rows]}

  return ImageSource(
    len(parts.items['train']),
    len(parts.items['test']),
    shape,
    len(classes),
    65535.0 if deep else 255.0,
    read,
    validation=len(parts.items.get('validation', ())),
    names=parts.names,
    notes=(*parts.notes, *_notes(headers, grey)),
  )


def _classes(root: Path) -> tuple[list[str], dict[str, dict[str, list[Path]]]]:
  """Returns (classes of the training split, {split: {class: its images}})."""
  if not root.is_dir():
    raise DataError(f'data {root}: expected a folder, there is none')
  folders = _folders(root)
  splits = {labels.split_of(folder.name): folder for folder in folders}
  train = splits.get('train')
  # A class may be called 'train' (CIFAR-100 has one): then images lie directly in it.
  if train is None or not _folders(train) or _images(train.iterdir()):
    splits = {'train': root}
  elif len(splits) < len(folders) or None in splits:
    raise DataError(
      f'data {root}: beside train, expected validation and test, got '
      f'{", ".join(folder.name for folder in folders)}: move the others away'
    )
  found = {}
  for split, folder in splits.items():
    found[split] = {c.name: _images(c.rglob('*'), c) for c in _folders(folder)}
  classes = sorted(found['train'])
  empty = [c for c in classes if not found['train'][c]]
  if empty:
    raise DataError(
      f'{splits["train"] / empty[0]}: expected images of this class '
      f'({", ".join(sorted(SUFFIXES))}), got none: fill the folder or remove it'
    )
  if len(classes) < 2:
    raise DataError(
      f'data {splits["train"]}: expected two folders or more, one for each class, with '
      f'images in them, got {", ".join(classes) or "none"}'
    )
  for split, of in found.items():
    found[split] = of = {c: of[c] for c in sorted(of) if of[c]}
    for beyond in sorted({*of} - {*classes}):
      raise DataError(
        f'{splits[split] / beyond}: a class that the training split '
        f'({splits["train"]}) does not have'
      )
  return classes, {split: of for split, of in found.items() if of}


def _folders(folder: Path) -> list[Path]:
  hidden = lambda p: p.name.startswith(('.', '__MACOSX'))
  return sorted(p for p in folder.iterdir() if p.is_dir() and not hidden(p))


def _images(paths: Iterable[Path], under: Path | None = None) -> list[Path]:
  """Returns the images among some paths, in the order of their names."""
  hidden = lambda p: any(
    part.startswith('.')
    for part in (p.relative_to(under).parts if under else (p.name,))
  )
  found = (p for p in paths if p.suffix.lower() in SUFFIXES and not hidden(p))
  return sorted((p for p in found if p.is_file()), key=lambda p: p.as_posix())


def _header(file: str) -> Header:
  with _opened(file) as image:
    width, height = image.size
    if image.mode == 'F':
      raise DataError(
        f'{file}: has 32-bit pixels: expected 8 or 16 bits; for other numbers pass an '
        '.npz file'
      )
    return Header(height, width, image.mode)


def _pixels(file: str, grey: bool, deep: bool) -> np.ndarray:
  """Decodes an image, [height, width, 1 or 3]; uint16 where `deep`, else uint8."""
  with _opened(file) as image:
    try:
      if image.mode in _DEEP:
        pixels = np.asarray(image).clip(0, 65535).astype(np.uint16)
        return np.repeat(pixels[..., None], 1 if grey else 3, axis=2)
      if image.mode == 'P' and 'transparency' in image.info:
        image = image.convert('RGBA')  # Pillow warns of the direct way
      pixels = np.asarray(image.convert('L' if grey else 'RGB'))
    except (OSError, SyntaxError, ValueError) as error:
      raise _damaged(file, error) from error
  pixels = pixels[..., None] if grey else pixels
  return pixels.astype(np.uint16) * 257 if deep else pixels


def _opened(file: str):
  try:
    from PIL import Image
  except ImportError as error:
    raise DataError(
      f'{file}: reading images needs one more package ({error}): pip install '
      "'depthprune[data]'"
    ) from error
  try:
    return Image.open(file)
  except (OSError, SyntaxError, ValueError) as error:
    raise _damaged(file, error) from error


def _damaged(file: str, error: Exception) -> DataError:
  return DataError(
    f'{file}: cannot be read as an image ({error}): replace it or remove it'
  )


def _one_size(path: str, headers: dict[str, Header]) -> Header:
  """Returns the header of the first image, if all others have its size."""
  (file, first), *_ = headers.items()
  for other, header in headers.items():
    if header[:2] != first[:2]:
      raise DataError(
        f'data {path}: images differ in size: {file} has {first.height}x{first.width} '
        f'pixels, {other} {header.height}x{header.width}: pass --resize SIDE, which '
        'scales the shorter side and crops the middle'
      )
  return first


def _notes(headers: dict[str, Header], grey: bool) -> list[str]:
  count = lambda modes: sum(header.mode in modes for header in headers.values())
  n, notes = len(headers), []
  if not grey and (of := count(_GREY)):
    notes.append(f'{of} of {n} images are grey, and read as RGB')
  if of := count(_CLEAR):
    notes.append(f'the alpha channel of {of} of {n} images is left out')
  return notes
