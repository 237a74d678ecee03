"""What `depthprune bench` measured, as a table on the screen.

Takes the result of `inference.bench`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from depthprune.report.numbers import count, milliseconds, percent

HEAD = ('batch', 'before', 'after', 'speed-up', 'a second', 'of the roof')
LEGEND = {
  'network': 'before: what the run began with, in turns with it',
  'cascade': 'before: the network alone, in turns with it; after: with early exits',
}
ROOF = (
  'Medians. Roof: the time that its FLOPs (1 MAC = 2) take at the peak, or that moving '
  'arrays, inputs and outputs once takes, whichever is more.'
)


def screen(result: Mapping[str, Any]) -> Group:
  """All networks for `rich.print`: a table each, notes, and the device's peaks."""
  parts: list[Any] = []
  for network in result['networks']:
    parts.append(_table(network) if network['batches'] else _exits(network))
    parts += [
      Padding(Text(f'· {note}', style='yellow'), (0, 2)) for note in network['notes']
    ]
    parts.append(Text())
  lines = [ROOF, f'{result["device"]}, measured in this process:', *peaks(result)]
  return Group(*parts, *(Padding(Text(line), (0, 2)) for line in lines))


def peaks(result: Mapping[str, Any]) -> list[str]:
  """`float32: 98.1 GFLOP/s (product of 2048 x 2048); copies: 64 GB/s of 1 MiB`."""

  def copies(speeds: Mapping[Any, float]) -> str:
    of = ((int(size) / 2**20, count(speed)) for size, speed in speeds.items())
    return ', '.join(f'{speed}B/s of {size:g} MiB' for size, speed in of)

  return [
    f'{dtype}: {count(peak["flops"])}FLOP/s (product of {peak["side"]} x '
    f'{peak["side"]}); copies: {copies(peak["bytes"])}'
    for dtype, peak in result['peaks'].items()
  ]


def rows(network: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
  """The cells of a network's table, under HEAD; empty where there is nothing."""
  for batch, line in network['batches'].items():
    before = line.get('before_ms')
    yield (
      batch,
      '' if before is None else milliseconds(before),
      milliseconds(line['ms']),
      '' if before is None else f'{line["speedup"]:.2f} x',
      count(float(f'{line["per_second"]:.3g}')),
      percent(line['roof_ms'] / line['ms']),
    )


def title(network: Mapping[str, Any]) -> str:
  """`runs/demo: 8.1 M of 16.3 M FLOPs, float32`."""
  flops = network['flops']
  sizes = [count(flops[k]) for k in ('after', 'before') if flops.get(k)]
  return f'{network["path"]}: {" of ".join(sizes)} FLOPs, {network["dtype"]}'


def _table(network: Mapping[str, Any]) -> Table:
  table = _empty(network)
  compared = any('before_ms' in line for line in network['batches'].values())
  table.caption = LEGEND[network['kind']] if compared else None
  shown = [i for i, name in enumerate(HEAD) if compared or name not in HEAD[1:4:2]]
  for i in shown:
    table.add_column(HEAD[i], justify='right')
  for row in rows(network):
    table.add_row(*(row[i] for i in shown))
  return table


def _exits(network: Mapping[str, Any]) -> Table:
  table = _empty(network)
  table.add_column('an example, leaving at')
  table.add_column('', justify='right')
  for name, ms in network['exits_ms'].items():
    table.add_row(name, milliseconds(ms))
  return table


def _empty(network: Mapping[str, Any]) -> Table:
  return Table(
    title=title(network),
    title_justify='left',
    title_style='bold',
    caption_justify='left',
    box=box.SIMPLE_HEAD,
  )
