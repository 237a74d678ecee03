"""What a training run shows while it runs: one bar per stage."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def bar(
  label: str, start: int, steps: int, show: bool = True
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
  """A context whose value is draw(step, row); row as in `train.Row`."""
  columns = (
    TextColumn('[bold]{task.description:9s}'),
    BarColumn(bar_width=20),
    TextColumn('{task.completed:.0f}/{task.total:.0f}'),
    TimeRemainingColumn(compact=True),
    TextColumn('{task.fields[text]}'),
  )
  with Progress(*columns, disable=not show) as shown:
    task = shown.add_task(label, completed=start, total=steps, text='compiling')

    def draw(step: int, row: Mapping[str, float]) -> None:
      shown.update(task, completed=step, text=describe(row))

    yield draw


def describe(row: Mapping[str, float]) -> str:
  """'loss 0.213, accuracy 98.1 %, flops 62 -> 50 %, 2510 images/s'."""
  parts = [f'loss {row["loss"]:.3f}']
  if 'accuracy' in row:
    parts.append(f'accuracy {100 * row["accuracy"]:.1f} %')
  costs = ('flops', 'params', 'milliseconds')
  for cost in costs:
    if cost in row:
      goal = f' -> {100 * row["target"]:.0f}' if 'target' in row else ''
      parts.append(f'{cost} {100 * row[cost]:.0f}{goal} %')
  shown = {'step', 'loss', 'accuracy', *costs, 'target', 'time'}
  rest = set(row) - shown - {'images_per_second'}
  parts += [f'{name} {row[name]:.3g}' for name in sorted(rest)]
  if 'images_per_second' in row:
    parts.append(f'{row["images_per_second"]:,.0f} images/s')
  return ', '.join(parts)
