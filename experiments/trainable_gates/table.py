"""Trainable gates: the demo over seeds, and accuracy by FLOPs beside the controls."""

from depthprune.report.numbers import spread
from experiments.found import link, load, percent, table

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
  """Accuracy against FLOPs, beside the controls."""
  path = 'trainable_gates/results/fashion_mnist.json'
  found = load(path)
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
    f'FLOPs reached by gates: {reached} % ({link(path)}):\n\n'
    + table(['FLOPs kept', *(f'{100 * t:g} %' for t in targets)], lines)
  )
