"""What became of every layer: its width, its channels, its FLOPs and its time."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from depthprune.report.names import spoken_apart
from depthprune.report.numbers import count, kept, milliseconds, percent
from depthprune.train.result import Change, LayerReport, Result


class Strip(NamedTuple):
  """The slices of an axis that are kept, to be drawn as a strip.

  Attributes:
    size: number of slices before.
    runs: (first, length) of every run of kept slices.
    text: the same as text, `0–2, 5`.
  """

  size: int
  runs: Sequence[tuple[int, int]]
  text: str


class LayerView(NamedTuple):
  """A layer as the page shows it.

  Attributes:
    name: name that a person would give it.
    path: its name in the program.
    change: `16 → 9`, `16` where it is as wide as before, or `removed`.
    before: its width before, as a part of the widest layer's.
    after: its width after, as a part of that before.
    facts: (name, value) of all that is known about it.
    strips: for each of its axes, the slices that are kept.
    is_open: whether the page shows the facts at first.
  """

  name: str
  path: str
  change: str
  before: float
  after: float
  facts: Sequence[tuple[str, str]]
  strips: Sequence[Strip] = ()
  is_open: bool = False


def layers(result: Result) -> list[LayerView]:
  """Returns the layers of a run in the order of the network.

  They are none where nothing was cut. Of a run from before layers were reported, they
  are the groups of channels, whose FLOPs are not known.
  """
  known = result.layers or {
    group: LayerReport(width, (0, 0)) for group, width in result.widths.items()
  }
  if all(each.width[0] == each.width[1] for each in known.values()):
    return []
  names = spoken_apart(known)
  widest = max(each.width[0] for each in known.values())
  lost = lambda path: [a - b for a, b in (known[path].flops, known[path].width)]
  most_changed = max(known, key=lost)
  return [
    LayerView(
      name=names[path],
      path=path,
      change=_change(each),
      before=each.width[0] / widest,
      after=Change(*each.width).kept if each.width[0] else 0.0,
      facts=[*_facts(each, result)],
      strips=[*_strips(path, each, result)],
      is_open=path == most_changed,
    )
    for path, each in known.items()
  ]


def _change(layer: LayerReport) -> str:
  before, after = layer.width
  if not after:
    return 'removed'
  if not _has_width(layer):
    return ''
  return f'{before:,}' if before == after else f'{before:,} → {after:,}'


def _has_width(layer: LayerReport) -> bool:
  """Whether it is not a product of two activations, which has no array."""
  return bool(layer.outputs) or not layer.flops[0]


def _facts(layer: LayerReport, result: Result) -> Iterator[tuple[str, str]]:
  width, flops, whole = Change(*layer.width), Change(*layer.flops), result.flops
  shares = Change(whole.before, flops.before), Change(whole.after, flops.after)
  before, after = (percent(share.kept) for share in shares)
  if not width.after:
    yield 'width', f'{width.before:,} before'
  elif _has_width(layer):
    yield 'width', f'{width.before:,} → {width.after:,} ({kept(width.kept)})'
  if not flops.before:
    return
  if width.after:
    change = f'{count(flops.before)} → {count(flops.after)}'
    yield 'FLOPs', f'{change} ({kept(flops.kept)})'
    yield 'of all FLOPs', f'{before} → {after}'
  else:
    yield 'FLOPs', f'{count(flops.before)} before, {before} of all'
  if layer.ms is not None:
    took = Change(*layer.ms)
    if width.after:
      change = f'{milliseconds(took.before).removesuffix(" ms")} → '
      yield 'time', f'{change}{milliseconds(took.after)} ({kept(took.kept)})'
    else:
      yield 'time', f'{milliseconds(took.before)} before'


def _strips(path: str, layer: LayerReport, result: Result) -> Iterator[Strip]:
  """Yields the kept slices of a group, or of every output axis of a layer's array.

  The report of surgery is about the last of several cuts, so what it says is left out
  where an earlier one made the layer narrower.
  """
  if not all(layer.width):
    return
  report = result.report
  if path in report.kept:
    yield _strip(layer.width[0], report.kept[path])
    return
  tensor = report.tensors.get(path, {})
  before = tensor.get('shape', [[]])[0]
  sizes = [before[axis] for axis in layer.outputs if axis < len(before)]
  if not sizes or math.prod(sizes) != layer.width[0]:
    return
  for axis, size in zip(layer.outputs, sizes, strict=True):
    yield _strip(size, tensor['kept'].get(str(axis), range(size)))


def _strip(size: int, indices: Iterable[int]) -> Strip:
  runs: list[tuple[int, int]] = []
  for index in sorted(indices):
    if runs and index == sum(runs[-1]):
      runs[-1] = runs[-1][0], runs[-1][1] + 1
    else:
      runs.append((index, 1))
  said = (f'{at}' if n == 1 else f'{at}–{at + n - 1}' for at, n in runs)
  return Strip(size, runs, ', '.join(said) or 'none')
