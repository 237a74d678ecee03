"""A finished run, made up: ResNet-20 on digits at half of its FLOPs."""

import json
import math
from pathlib import Path

import pytest

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
    'target': 0.5,
    'of': 'flops',
    'accuracy': {
      'before': 0.9833,
      'pruned': 0.9361,
      'recalibrated': 0.9722,
      'after': 0.9806,
    },
    'held_out': {'before': 0.9861, 'pruned': 0.9444, 'after': 0.9861},
    'flops': {'before': 5_071_360, 'after': 2_532_980, 'target': 0.5},
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
    'report': {
      'requested': {'target': 0.5, 'of': 'flops'},
      'peak_bytes': {'before': 32_768, 'after': 20_480},
      'branches': {'stage1/block1/branch': True, 'stage1/block2/branch': False},
      'kept': {name: list(range(after)) for name, (_, after) in WIDTHS.items()},
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


@pytest.fixture
def result() -> dict:
  return made_up_result()


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
  """RUN as `depthprune run` leaves it, without the arrays."""
  path = tmp_path / 'run'
  path.mkdir()
  (path / 'result.json').write_text(json.dumps(made_up_result()))
  for name, records in (('history', made_up_history()), ('gates', made_up_gates())):
    lines = ''.join(json.dumps(record) + '\n' for record in records)
    (path / f'{name}.jsonl').write_text(lines)
  return path
