"""Trainable gates: the demo over seeds, and accuracy by FLOPs beside the controls."""

from pathlib import Path
from typing import Any

from depthprune.report.numbers import spread
from experiments.found import files, link, load, percent, table

NAMES = {
  'gates': 'trainable gates',
  'l1': 'uniform L1',
  'random': 'uniform random',
  'scratch': 'same shape from scratch',
}


def digits() -> str:
  """The demo over seeds."""
  path = 'trainable_gates/results/digits.json'
  runs = load(path)['runs']
  accuracy = lambda name: percent(r['accuracy'][name] for r in runs)
  speedup = lambda batch: spread(r['latency_ms'][batch]['speedup'] for r in runs)
  share = lambda cost: percent(r[cost]['after'] / r[cost]['before'] for r in runs)
  config, images = runs[0]['config'], runs[0]['images']
  target = config.get('options', config)['target']  # older files: beside the rest
  head = ('', 'before', 'right after the cut', 'fine-tuned')
  rows = [
    ('test accuracy, %', accuracy('before'), accuracy('pruned'), accuracy('after')),
    ('FLOPs, %', '100', share('flops'), ''),
    ('parameters, %', '100', share('params'), ''),
    ('speed-up at batch 1 / 128', '', '', f'{speedup("1")} / {speedup("128")}'),
  ]
  return (
    f'`make demo`: {config["model"]} on {config["data"]}, {images["test"]} test '
    f'images, to {100 * target:g} % of its FLOPs; {len(runs)} seeds, '
    f'mean ± standard deviation; {runs[0]["device"]} '
    f'({link(path)}):\n\n' + table(head, rows)
  )


def compared() -> str:
  """Accuracy against FLOPs, beside the controls: one table per result file."""
  found = files('trainable_gates', 'target', 'method', 'accuracy')
  return '\n\n'.join(_compared(*file) for file in found.items()) or (
    'Trainable gates beside their controls: –'
  )


def _compared(path: Path, found: dict[str, Any]) -> str:
  config, rows = found['config'], found['rows']
  targets = sorted({r['target'] for r in rows}, reverse=True)
  at = lambda method, t: [r for r in rows if (r['method'], r['target']) == (method, t)]
  accuracy = lambda rows: percent(r['accuracy'] for r in rows) if rows else '–'
  share = lambda rows: percent(r['flops'] / r['flops_unpruned'] for r in rows)
  lines = [
    [name, *(accuracy(at(method, target)) for target in targets)]
    for method, name in NAMES.items()
    if any(r['method'] == method for r in rows)
  ]
  reached = ', '.join(share(of) for t in targets if (of := at('gates', t)))
  cut = [r for r in rows if 'accuracy_unpruned' in r]
  unpruned = {r['seed']: r['accuracy_unpruned'] for r in cut}
  return (
    f'{config["model"]} on {config["data"]}{_trained(config)}, {len(unpruned)} seeds, '
    f'test accuracy in %; unpruned {percent(unpruned.values())}; FLOPs reached by '
    f'gates: {reached or "–"} % ({link(path)}):\n\n'
    + table(['FLOPs kept', *(f'{100 * t:g} %' for t in targets)], lines)
  )


def _trained(config: dict[str, Any]) -> str:
  """On how many images, for how many epochs."""
  images = f', {config["subset"]:,} training images' if config['subset'] else ''
  before = 'pretrained' if config.get('pretrained') else config['train_epochs']
  sized = ' (CPU-sized)' if images else ''
  epochs = f'{config["gate_epochs"]} + {config["finetune_epochs"]} epochs'
  return f'{images}, {before} + {epochs}{sized}'
