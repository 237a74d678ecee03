"""Multi-Fashion: two pieces of clothing in one image, and a class to tell of each.

Sener, Koltun: "Multi-Task Learning as Multi-Objective Optimization" (NeurIPS 2018,
arXiv 1810.04650), after MultiMNIST (Sabour et al. 2017). Here every image is once at
the top left and once at the bottom right, over another of the same split.
"""

import numpy as np

from depthprune.training.prepared import Source, sized

NAME, OF = 'multi_fashion', 'fashion_mnist'
TASKS = 'left', 'right'  # the columns of the labels
SIDE, PIECE = 36, 28  # of the canvas, and of what lies in two of its corners


def overlaid(pieces: Source, resize: int | None = None) -> Source:
  """Images [n, 36, 36, 1] and labels int32 [n, 2] of a source of images [n, 28, 28, 1].

  Pairs are made among the rows that are read together, always the same for as many:
  training images lie over training images, held-out over held-out ones.
  """

  def read(split, rows):
    found = pieces.read(split, rows)
    partner = pairs(len(rows))
    image = overlay(found['image'], found['image'][partner])
    if resize is not None:
      small = [sized(one, resize) for one in image]
      image = np.array(small, np.uint8).reshape(-1, resize, resize, 1)
    label = np.stack([found['label'], found['label'][partner]], axis=1)
    return {'image': image, 'label': label}

  side = resize or SIDE
  return pieces._replace(shape=(side, side, 1), read=read, tasks=TASKS, records=None)


def tasks(name: str) -> tuple[str, ...]:
  """The tasks of the data set of that name, () where it has but one."""
  return TASKS if name == NAME else ()


def pairs(n: int) -> np.ndarray:
  """[n]: which image lies over each; all in one circle, so that none is over itself."""
  # RandomState, because its streams are frozen for all versions of numpy.
  circle = np.random.RandomState(0).permutation(n)
  partner = np.empty(n, np.int64)
  partner[circle] = np.roll(circle, -1)
  return partner


def overlay(left: np.ndarray, right: np.ndarray) -> np.ndarray:
  """The brighter pixel of two images [n, 28, 28, 1], on a canvas [n, 36, 36, 1]."""
  canvas = np.zeros((len(left), SIDE, SIDE, 1), left.dtype)
  canvas[:, :PIECE, :PIECE] = left
  corner = canvas[:, -PIECE:, -PIECE:]
  np.maximum(corner, right, out=corner)
  return canvas
