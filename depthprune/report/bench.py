"""The measurements of `depthprune bench`, as tables on the screen."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from depthprune.report.numbers import count, milliseconds, percent, speed
from depthprune.report.screen import indented, titled_table
from depthprune.timing.difference import compare

HEAD = ('batch', 'before', 'after', 'speed', 'a second', 'of the roof')
LEGEND = {
  'network': 'before: what the run began with, in turns with it',
  'cascade': 'before: the network alone, in turns with it; after: with early exits',
}
ROOF = (
  'Medians. Roof: the time that its FLOPs (1 MAC = 2) take at the peak, or that moving '
  'arrays, inputs and outputs once takes, whichever is more.'
)


def screen(result: Mapping[str, Any]) -> Group:
  """Returns a table for each network, notes and the device's peaks for `rich.print`.

  Args:
    result: the value of `run.bench.bench`.
  """
  parts: list[Any] = []
  for network in result['networks']:
    parts.append(_table(network) if network['batches'] else _exits(network))
    parts += indented((f'· {note}' for note in network['notes']), style='yellow')
    parts.append(Text())
  lines = [ROOF, f'{result["device"]}, measured in this process:', *peaks(result)]
  return Group(*parts, *indented(lines))


def peaks(result: Mapping[str, Any]) -> list[str]:
  """Returns the device's peaks for every type of number, one line for each."""

  def copies(speeds: Mapping[Any, float]) -> str:
    of = ((int(size) / 2**20, count(speed)) for size, speed in speeds.items())
    return ', '.join(f'{speed}B/s of {size:g} MiB' for size, speed in of)

  return [
    f'{dtype}: {count(peak["flops"])}FLOP/s (product of {peak["side"]} x '
    f'{peak["side"]}); copies: {copies(peak["bytes"])}'
    for dtype, peak in result['peaks'].items()
  ]


def rows(network: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
  """Yields the rows of a network's table, with empty cells where nothing is known."""
  for batch, line in network['batches'].items():
    before = line.get('before_ms')
    yield (
      batch,
      '' if before is None else milliseconds(before),
      milliseconds(line['ms']),
      '' if before is None else _speed(line),
      count(float(f'{line["per_second"]:.3g}')),
      percent(line['roof_ms'] / line['ms']),
    )


def _speed(line: Mapping[str, Any]) -> str:
  """Returns how the network's time differs from the one before."""
  quartiles = line.get('before_ms_quartiles'), line.get('ms_quartiles')
  turns = line.get('faster'), line.get('runs')
  return speed(compare(line['before_ms'], line['ms'], *quartiles, *turns))


def title(network: Mapping[str, Any]) -> str:
  """Returns `runs/demo: 8.1 M of 16.3 M FLOPs, float32`."""
  flops = network['flops']
  sizes = [count(flops[k]) for k in ('after', 'before') if flops.get(k)]
  return f'{network["path"]}: {" of ".join(sizes)} FLOPs, {network["dtype"]}'


def _table(network: Mapping[str, Any]) -> Table:
  table = titled_table(title(network), box=box.SIMPLE_HEAD)
  compared = any('before_ms' in line for line in network['batches'].values())
  table.caption = LEGEND[network['kind']] if compared else None
  shown = [i for i, name in enumerate(HEAD) if compared or name not in HEAD[1:4:2]]
  for i in shown:
    table.add_column(HEAD[i], justify='right')
  for row in rows(network):
    table.add_row(*(row[i] for i in shown))
  return table


def _exits(network: Mapping[str, Any]) -> Table:
  table = titled_table(title(network), box=box.SIMPLE_HEAD)
  table.add_column('an example, leaving at')
  table.add_column('', justify='right')
  for name, ms in network['exits_ms'].items():
    table.add_row(name, milliseconds(ms))
  return table
