"""Draws the pictures of README and guides from real cuts, for light and dark pages.

  python -m experiments.picture

At the top of the README is the first run of `make demo`, which is in
trainable_gates/results/digits.json: the width of every layer that was cut, before,
while gates close channels, and after. docs/concepts.md has the kernels of its example.
"""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

import depthprune as dp
from depthprune.report import style
from experiments.result_files import Row, read

DOCS = Path(__file__).parent.parent / 'docs'
PAGES = {  # colours of text, of open and of closed channels
  'light': (style.INK, style.FIRST, style.LINE),
  'dark': ('#e8eaf0', '#3bc9db', '#3a4150'),
}


def cut(run: Row, ink: str, open_: str, closed: str) -> Figure:
  """Three rows of bars, one bar for each layer, as high as the layer is wide."""
  widths = list(run['widths'].values())
  full, kept = zip(*widths)
  places = range(len(widths))
  figure = Figure((8.4, 2.1), layout='constrained', facecolor='none')
  change = lambda key: (run[key]['before'], run[key]['after'])
  (params, fewer), (right, still) = change('params'), change('accuracy')
  faster = run['latency_ms']['128']['speedup']
  shown = (
    (f'trained\n{params / 1e3:.0f} k parameters, {100 * right:.1f} %', full, full),
    ('gates\nclose what may go', full, kept),
    (
      f'cut, and proven equal\n{fewer / 1e3:.0f} k, {100 * still:.1f} %, '
      f'{faster:.2f}× as fast',
      kept,
      kept,
    ),
  )
  for axes, (title, whole, left) in zip(figure.subplots(1, 3, sharey=True), shown):
    axes.bar(places, whole, 0.8, color=closed)
    axes.bar(places, left, 0.8, color=open_)
    axes.set_title(title, color=ink, fontsize=10)
    axes.set_axis_off()
  return figure


class Example(nn.Module):
  """The network of docs/concepts.md."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Dense(8, name='first')(x))
    x = nn.relu(nn.Dense(6, name='second')(x))
    return nn.Dense(4, name='third')(x)


def groups(ink: str, open_: str, closed: str) -> Figure:
  """The kernels of the example: their groups, a decision, and what is left.

  A stripe along an axis has the colour of its group, and so has a slice that goes.
  """
  model, x = Example(), jnp.ones((1, 5))
  variables: Any = model.init(jax.random.key(0), x)
  coupling = dp.couple(model, variables, x)
  keep = dp.oneshot(coupling, variables, '50%')['channels']
  colours = dict(zip(coupling.groups, (style.SECOND, open_), strict=True))
  group_of = {m: g.name for g in coupling.groups.values() for m in g.members}
  shown = {
    'groups: what goes together': {g: np.ones(len(k), bool) for g, k in keep.items()},
    'a decision: what goes': keep,
    'cut: what is left': {g: np.ones(k.sum(), bool) for g, k in keep.items()},
  }
  figure = Figure((8.4, 2.3), layout='constrained', facecolor='none')
  for axes, (title, kept) in zip(figure.subplots(1, 3, sharey=True), shown.items()):
    axes.set_title(title, color=ink, fontsize=10)
    left = 0
    for layer, arrays in variables['params'].items():
      path, shape = f'params/{layer}/kernel', arrays['kernel'].shape
      names = [group_of.get((path, axis), '') for axis in (0, 1)]
      stays = [kept.get(g, np.ones(n, bool)) for g, n in zip(names, shape)]
      height, width = map(len, stays)
      cells = np.full((height, width, 3), to_rgb(closed))
      for group, lines, axis in zip(names, stays, (1, 0)):
        gone = np.broadcast_to(~np.expand_dims(lines, axis), (height, width))
        cells[gone] = to_rgb(colours.get(group, closed))
      x0, y0 = left + np.arange(width + 1), -np.arange(height + 1)
      axes.pcolormesh(x0, y0, cells, edgecolors=ink, linewidth=0.4)
      beside = ([left - 0.5] * 2, [0, -height]), ([left, left + width], [0.5] * 2)
      for group, line in zip(names, beside):
        axes.plot(*line, color=colours.get(group, closed), linewidth=3)
      size = f'{layer}\n{height} × {width}'
      axes.text(left, -9, size, color=ink, fontsize=8, va='top')
      left += width + 2
    axes.set(aspect='equal', xlim=(-1, 23), ylim=(-12, 1.5))
    axes.set_axis_off()
  return figure


def main() -> None:
  """Writes docs/cut_light.svg, docs/groups_light.svg and the same for dark pages."""
  run = read('trainable_gates/results/digits.json')['runs'][0]
  for page, colours in PAGES.items():
    style.save(cut(run, *colours), DOCS / f'cut_{page}.svg')
    style.save(groups(*colours), DOCS / f'groups_{page}.svg')


if __name__ == '__main__':
  main()
