"""Writes the README's tables from the committed result files; nothing is typed.

python -m experiments.tables
"""

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / 'README.md'
MARKED = re.compile(r'(<!-- results:.*?-->\n).*?(<!-- end of results -->)', re.DOTALL)
NAMES = {
  'gates': 'trainable gates',
  'l1': 'uniform L1',
  'random': 'uniform random',
  'scratch': 'same shape from scratch',
}


def spread(values: Iterable[float], digits: int = 2) -> str:
  """'97.10 ± 0.21': mean and standard deviation (of the sample)."""
  values = list(values)
  deviation = statistics.stdev(values) if len(values) > 1 else 0.0
  return f'{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}'


def percent(values: Iterable[float]) -> str:
  return spread(100 * v for v in values)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def digits() -> str:
  """The demo over seeds."""
  path = 'trainable_gates/results/digits.json'
  runs = json.loads((HERE / path).read_text())['runs']
  accuracy = lambda name: percent(r['accuracy'][name] for r in runs)
  speedup = lambda batch: spread(r['latency_ms'][batch]['speedup'] for r in runs)
  share = lambda cost: percent(r[cost]['after'] / r[cost]['before'] for r in runs)
  config, images = runs[0]['config'], runs[0]['images']
  head = ('', 'before', 'right after the cut', 'fine-tuned')
  rows = [
    ('test accuracy, %', accuracy('before'), accuracy('pruned'), accuracy('after')),
    ('FLOPs, %', '100', share('flops'), ''),
    ('parameters, %', '100', share('params'), ''),
    ('speed-up at batch 1 / 128', '', '', f'{speedup("1")} / {speedup("128")}'),
  ]
  return (
    f'`make demo`: {config["model"]} on {config["data"]}, {images["test"]} test '
    f'images, to {100 * config["target"]:g} % of its FLOPs; {len(runs)} seeds, '
    f'mean ± standard deviation; {runs[0]["device"]} '
    f'([{path}](experiments/{path})):\n\n' + table(head, rows)
  )


def compared() -> str:
  """Accuracy against FLOPs, beside the controls."""
  path = 'trainable_gates/results/fashion_mnist.json'
  found = json.loads((HERE / path).read_text())
  config, rows = found['config'], found['rows']
  targets = sorted({r['target'] for r in rows}, reverse=True)
  lines = []
  for method, name in NAMES.items():
    line = [name]
    for target in targets:
      at = [r for r in rows if (r['method'], r['target']) == (method, target)]
      line.append(percent(r['accuracy'] for r in at) if at else '–')
    lines.append(line)
  gates = [r for r in rows if r['method'] == 'gates']
  first = [r for r in gates if r['target'] == targets[0]]
  reached = ', '.join(
    f'{percent(r["flops"] / r["flops_unpruned"] for r in gates if r["target"] == t)}'
    for t in targets
  )
  return (
    f'{config["model"]} on {config["data"]}, {config["subset"]:,} training images, '
    f'{config["train_epochs"]} + {config["gate_epochs"]} + '
    f'{config["finetune_epochs"]} epochs (CPU-sized), {len(first)} seeds, test '
    f'accuracy in %; unpruned {percent(r["accuracy_unpruned"] for r in first)}; '
    f'FLOPs reached by gates: {reached} % ([{path}](experiments/{path})):\n\n'
    + table(['FLOPs kept', *(f'{100 * t:g} %' for t in targets)], lines)
  )


def bench() -> str:
  """What gates cost, and what the cut gains."""
  path = 'bench/results/gates.json'
  found = json.loads((HERE / path).read_text())
  gating = found['gating']
  gains = [
    f'{fast["flop_ratio"]:.2f}× fewer FLOPs gave {_timed(fast)} ({widths})'
    for widths, fast in zip(('any width', 'multiples of 8'), found['speedup'].values())
  ]
  shape = '×'.join(map(str, found['shape']))
  return (
    f'A training step with gates takes {gating["ratio"]:.3f} of the time of a plain '
    f'one (quartiles {gating["quartiles"][0]:.3f} to {gating["quartiles"][1]:.3f}; '
    f'{found["model"]}, {shape}, batch {found["batch"]}, {found["device"]}). '
    f'{"; ".join(gains)} ([{path}](experiments/{path})).'
  )


def _timed(fast: dict) -> str:
  rows = [(batch, row) for batch, row in fast['latency_ms'].items() if batch.isdigit()]
  return ', '.join(f'{row["speedup"]:.2f}× at batch {batch}' for batch, row in rows)


if __name__ == '__main__':
  text = '\n\n'.join(part() for part in (digits, compared, bench))
  README.write_text(
    MARKED.sub(lambda m: f'{m[1]}\n{text}\n\n{m[2]}', README.read_text())
  )
