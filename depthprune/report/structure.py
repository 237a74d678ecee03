"""What an auxiliary path was while training: its connections, in words and drawn."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from depthprune.report import style
from depthprune.report.numbers import in_order, percent

STRUCTURES = {
  'all': 'a path that every tap feeds',
  'search': 'a path whose connections were searched',
  'deep-supervision': 'linear heads after its stages',
}


def sentence(result: Mapping[str, Any]) -> str:
  """`trained beside a path ... (17 of 18 connections open), dropped after ...`."""
  structure = result['options']['structure']
  if structure == 'none':
    return 'trained alone, without a path beside it'
  flops = result['flops']
  found = weights(result)
  open_ = sum(is_open for *_, is_open in found)
  kept = f' ({open_} of {len(found)} connections open)' if found else ''
  return (
    f'trained beside {STRUCTURES[structure]}{kept}, dropped after training: '
    f'{percent(flops["after"] / flops["before"])} of the FLOPs are left'
  )


def weights(result: Mapping[str, Any]) -> list[tuple[str, str, float, bool]]:
  """(tap, stage, weight, whether open) of every connection with a gate."""
  rounds = result.get('rounds') or [{}]
  learned = rounds[-1].get('learned', {})
  found = []
  for path in in_order(learned.get('weight', {})):
    *_, stage, tap, _ = path.split('/')
    found.append((tap, stage, learned['weight'][path], learned['open'][path] > 0))
  return found


def connections(result: Mapping[str, Any]) -> Figure:
  """Taps against stages of the path: a full mark for an open gate, else a ring."""
  found = weights(result)
  taps = in_order({tap for tap, *_ in found})
  stages = in_order({stage for _, stage, *_ in found})
  with style.styled():
    height = 1.2 + style.ROW * len(taps)
    figure = Figure(figsize=(7.2, height), layout='constrained')
    axes = figure.subplots()
    for tap, stage, weight, open_ in found:
      at = stages.index(stage), taps.index(tap)
      face = style.FIRST if open_ else style.PAPER
      axes.plot(*at, 'o', ms=7, mfc=face, mec=style.FIRST if open_ else style.MUTED)
      axes.annotate(
        f'{weight:.3f}', at, (9, -3), fontsize=7, color=style.MUTED, **style.OFFSET
      )
    axes.set_xticks(range(len(stages)), stages)
    axes.set_yticks(range(len(taps)), taps)
    axes.set_xlim(-0.5, len(stages) - 0.3)
    axes.set_ylim(len(taps) - 0.5, -0.5)
    axes.set_xlabel('stage of the path that the tap feeds')
  return figure
