"""Draws the picture at the top of the README from a real cut, for light and dark pages.

  python -m experiments.picture

It is the first run of `make demo` in trainable_gates/results/digits.json: the width of
every layer that was cut, before, while gates close channels, and after.
"""

from pathlib import Path

from matplotlib.figure import Figure

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


def main() -> None:
  """Writes docs/cut_light.svg and docs/cut_dark.svg."""
  run = read('trainable_gates/results/digits.json')['runs'][0]
  for page, colours in PAGES.items():
    style.save(cut(run, *colours), DOCS / f'cut_{page}.svg')


if __name__ == '__main__':
  main()
