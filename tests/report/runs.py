"""Finished runs, made up: plain values, as files have them, and `typed` to read them.

Gates: ResNet-20 at half of its FLOPs. NetCut: 20 dense layers, cut after the third.
Implosion: ResNet-56, twelve units in three rounds. Auxiliary: ResNet-8 beside a path of
three stages.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from depthprune.train.result import Accuracies, Change, Result, RoundResult, from_json

WIDTHS = {
  'stem/conv:3': [16, 12],
  'stage1/block0/conv1:3': [16, 9],
  'stage1/block1/conv1:3': [16, 4],
  'stage1/block2/conv1:3': [16, 0],
  'stage2/block0/conv1:3': [32, 27],
  'stage2/block0/conv2:3': [32, 30],
  'stage2/block1/conv1:3': [32, 14],
  'stage2/block2/conv1:3': [32, 11],
  'stage3/block0/conv1:3': [64, 52],
  'stage3/block0/conv2:3': [64, 64],
  'stage3/block1/conv1:3': [64, 21],
  'stage3/block2/conv1:3': [64, 6],
}


FLOPS = 5_071_360, 2_532_980


def made_up_layers() -> dict:
  """The layers that have the WIDTHS, which share the FLOPs by what they are wide."""
  total = [sum(width[when] for width in WIDTHS.values()) for when in (0, 1)]
  return {
    f'params/{name.removesuffix(":3")}/kernel': {
      'outputs': [3],
      'width': width,
      'flops': [FLOPS[when] * width[when] / total[when] for when in (0, 1)],
    }
    for name, width in WIDTHS.items()
  }


def made_up_result() -> dict:
  notes = [
    'stage1/block2/conv1:3: every channel closed, so stage1/block2/branch was removed',
    'stage3/block0/conv2:3: 64 of 64 kept; nothing could be cut here',
  ]
  return {
    'config': {'model': 'resnet20', 'data': 'digits', 'target': 0.5, 'seed': 0},
    'versions': {'depthprune': '0.1.0', 'jax': '0.10.2', 'flax': '0.12.0'},
    'device': 'CPU, AMD EPYC, 2 cores',
    'seed': 0,
    'command': 'depthprune run gates --data digits --target 0.5',
    'wall_seconds': 74.2,
    'model': 'resnet20',
    'data': 'digits',
    'method': 'trainable_gates',
    'options': {'target': 0.5, 'of': 'flops'},
    'rounds': [],
    'accuracy': {
      'before': 0.9833,
      'pruned': 0.9361,
      'recalibrated': 0.9722,
      'after': 0.9806,
    },
    'held_out': {'before': 0.9861, 'pruned': 0.9444, 'after': 0.9861},
    'flops': dict(zip(('before', 'after'), FLOPS)),
    'params': {'before': 272_474, 'after': 131_204},
    'latency_ms': {
      '1': {'before': 1.21, 'after': 0.96, 'speedup': 1.26, 'notes': []},
      '128': {
        'before': 18.4,
        'after': 11.9,
        'speedup': 1.55,
        'notes': ['batch 128: a note about its timing'],
      },
    },
    'verify': {'difference': 4.1e-7, 'settled': 3.2e-3, 'moved': 0.4},
    'widths': WIDTHS,
    'layers': made_up_layers(),
    'report': {
      'requested': {'target': 0.5, 'of': 'flops'},
      'peak_bytes': {'before': 32_768, 'after': 20_480},
      'branches': {'stage1/block1/branch': True, 'stage1/block2/branch': False},
      'kept': {name: list(range(after)) for name, (_, after) in WIDTHS.items()},
      'tensors': {
        f'params/{name.removesuffix(":3")}/kernel': {
          'shape': [[3, 3, 16, before], [3, 3, 16, after]],
          'kept': {'3': [0, 1, *range(before - after + 2, before)]},
        }
        for name, (before, after) in WIDTHS.items()
        if after
      },
      'notes': notes,
    },
  }


def made_up_history() -> list[dict]:
  """Three stages of a hundred steps, every stage counting from its own start."""
  records = []
  for index, stage in enumerate(('train', 'gates', 'finetune')):
    for step in range(0, 101, 5):
      loss = 2.2 * math.exp(-step / 25) if index == 0 else 0.25 * math.exp(-step / 60)
      flops = 0.5 + 0.5 * math.exp(-step / 30) if stage == 'gates' else None
      records.append(
        {
          'stage': stage,
          'step': step,
          'loss': loss + 0.02 * math.sin(step),
          'accuracy': 1 - 0.4 * loss,
          'flops': flops,
          'images_per_second': 4_100.0,
          'time': 0.3 * step,
        }
      )
  return records


def made_up_gates() -> list[dict]:
  return [
    {
      'step': step,
      'open': {
        name: round(after + (before - after) * math.exp(-step / 25))
        for name, (before, after) in WIDTHS.items()
      },
    }
    for step in range(0, 101, 4)
  ]


def depth_result(method: str, options: dict, rounds: list[dict]) -> dict:
  """A result.json of a method that leaves the widths of what it keeps as they are."""
  before, after = rounds[0], rounds[-1]
  result = made_up_result() | {
    'command': f'depthprune run {method}',
    'method': method,
    'options': options,
    'rounds': rounds,
    'config': {'method': method, 'options': options, 'seed': 0},
    'compile_s': {'before': 4.31, 'after': 0.982},
    'widths': {'stage1/block0/conv1:3': [16, 16], 'stage1/block1/conv1:3': [16, 0]},
    'layers': {},
  }
  for cost in ('flops', 'params'):
    result[cost] = {
      'before': before[cost]['before'],
      'after': after[cost]['after'],
    }
  result['report'] = {'kept': {}, 'branches': {}, 'exits': {}, 'notes': []}
  return result


def importance(step: float, exits: int, kept: int) -> dict[str, float]:
  """w of every exit, all the same at first, then nearly all of it at exit `kept`."""
  v = [step / 20 * math.exp(-abs(k - kept) / 2) for k in range(1, exits + 1)]
  total = sum(map(math.exp, v))
  return {f'exit{k:02}': math.exp(v[k - 1]) / total for k in range(1, exits + 1)}


def made_up_netcut(exits: int = 20, kept: int = 3) -> tuple[dict, list[dict]]:
  """(result.json, gates.jsonl) of NetCut."""
  learned = lambda step: {
    'importance': importance(step, exits, kept),
    'max_importance': max(importance(step, exits, kept).values()),
    'entropy': 1 / (1 + step / 40),
  }
  part = kept / exits
  options = {'beta': 0.01, 'aggregate': 'log', 'gamma': 0.0, 'cost': 'index'}
  only = {
    'units': [0, 0],
    'erased': [],
    'exits': [f'exit{kept:02}'],
    'learned': learned(200),
    'flops': {'before': 1_913_600, 'after': round(1_913_600 * part)},
    'params': {'before': 961_000, 'after': round(961_000 * part)},
    'held_out': {
      'before': 0.8952,
      'pruned': 0.8949,
      'recalibrated': 0.8949,
      'after': 0.8949,
    },
  }
  result = depth_result('netcut', options, [only])
  result |= {
    'model': 'mlp20x200',
    'data': 'fashion_mnist',
    'held_out': only['held_out'],
  }
  after = dict.fromkeys(('pruned', 'recalibrated', 'after'), 0.8866)
  result['accuracy'] = {'before': 0.8871, **after}
  lines = [{'stage': 'gates', 'step': s, **learned(s)} for s in range(0, 201, 4)]
  return result, lines


def made_up_implosion(rounds: int = 3, per_round: int = 4) -> tuple[dict, list[dict]]:
  """(result.json, gates.jsonl) of Network Implosion, on 27 units."""
  units = [f'stage{s}/block{b}' for s in (1, 2, 3) for b in range(9)]
  left = [u for u in units if u not in ('stage2/block0', 'stage3/block0')]
  start = {unit: 1 - 0.6 * (i * 7 % 25) / 25 for i, unit in enumerate(left)}
  found, lines, present = [], [], len(units)
  for number in range(1, rounds + 1):
    priority = lambda step, n=number, left=tuple(left): {
      unit: start[unit] ** (1 + 0.5 * (n + step / 100)) for unit in sorted(left)
    }
    lines += [
      {'stage': f'gates-{number}', 'step': step, 'priority': priority(step)}
      for step in range(5, 101, 5)
    ]
    at_end = priority(100)
    erased = sorted(left, key=at_end.__getitem__)[:per_round]
    flops = 251_490_000 * present // len(units)
    left = [unit for unit in left if unit not in erased]
    found.append(
      {
        'units': [present, present - per_round],
        'erased': erased,
        'exits': ['main'],
        'learned': {'priority': at_end},
        'flops': {'before': flops, 'after': flops - per_round * 9_000_000},
        'params': {'before': 31_000 * present, 'after': 31_000 * (present - per_round)},
        'held_out': {
          'before': 0.938 - 0.002 * (number - 1),
          'pruned': 0.70 - 0.04 * number,
          'recalibrated': 0.89 - 0.04 * number,
          'after': 0.938 - 0.002 * number,
        },
      }
    )
    present -= per_round
  options = {'depth': present, 'per_round': per_round, 'importance': 'priority'}
  result = depth_result('implosion', options, found)
  return result | {'model': 'resnet56', 'data': 'cifar10'}, lines


def made_up_auxiliary() -> tuple[dict, list[dict]]:
  """(result.json, gates.jsonl) of a path whose connections were searched.

  Every tap may feed its own stage or a later one; the longest connection is closed.
  """
  pairs = [(stage, tap) for stage in (1, 2, 3) for tap in range(1, stage + 1)]
  paths = [f'head_aux/stage{stage}/layer{tap}/gate' for stage, tap in pairs]
  closed = 'head_aux/stage3/layer1/gate'
  learned = lambda step: {
    'connections': 5.0,
    'open': {path: float(path != closed) for path in paths},
    'weight': {
      path: 0.5 + (-1 if path == closed else 1) * step * (i + 1) / 2000
      for i, path in enumerate(paths)
    },
  }
  accuracies = {'before': 0.912, 'pruned': 0.91, 'recalibrated': 0.91, 'after': 0.91}
  only = {
    'units': [3, 3],
    'erased': [],
    'exits': ['main'],
    'learned': learned(200),
    'flops': {'before': 16_000_000, 'after': 12_400_000},
    'params': {'before': 98_000, 'after': 78_000},
    'held_out': accuracies,
  }
  options = {'structure': 'search', 'weight': 1.0, 'decay': 'constant', 'width': 64}
  result = depth_result('auxiliary', options, [only])
  result |= {'model': 'resnet8', 'data': 'fashion_mnist', 'accuracy': accuracies}
  lines = [{'stage': 'gates', 'step': s, **learned(s)} for s in range(0, 201, 4)]
  return result, lines


def typed(result: dict) -> Result:
  """What a report reads in the file that has these values."""
  return from_json(json.loads(json.dumps(result)))


def made_up_round(priority: Mapping[str, float], erased: Sequence[str]) -> RoundResult:
  """A round of erasure of which nothing else matters."""
  return RoundResult(
    units=(len(priority), len(priority) - len(erased)),
    erased=list(erased),
    exits=['main'],
    flops=Change(2.0, 1.0),
    params=Change(2.0, 1.0),
    held_out=Accuracies(0.9),
    learned={'priority': dict(priority)},
  )


def write_run(path: Path, result: dict, gates: list[dict]) -> Path:
  """RUN as `depthprune run` leaves it, without the arrays."""
  path.mkdir()
  (path / 'result.json').write_text(json.dumps(result))
  for name, records in (('history', made_up_history()), ('gates', gates)):
    lines = ''.join(json.dumps(record) + '\n' for record in records)
    (path / f'{name}.jsonl').write_text(lines)
  return path
