"""Finished runs of SideNet, made up: ResNet-56, as many exits as wanted.

Scores are drawn, not typed, so that curves and diagrams look like those of a run.
"""

from typing import Any

import numpy as np

from depthprune.train.result import CascadeResult
from tests.report.runs import typed

WHOLE = 251_490_304
OWN = 0.9387
NO_BUDGET = (
  'budget 1.0e+07 is below the floor: exit exit1, the cheapest, costs 3.1e+07 a sample'
)


def made_up_sidenet(exits: int = 5, tap: str = 'stage{}/block{}') -> dict[str, Any]:
  """result.json: asked for half a point; what it loses and saves is fixed."""
  early = [f'exit{k}' for k in range(1, exits + 1)]
  names = [*early, 'main']
  depth = np.linspace(0.2, 0.9, exits)
  cost = {name: round(WHOLE * d) for name, d in zip(early, depth)}
  cost['main'] = round(1.012 * WHOLE)
  reached = {
    name: round(0.93 - 0.25 * (1 - d) ** 2, 4) for name, d in zip(early, depth)
  }
  reached['main'] = OWN
  shares = {name: round(0.6 / exits, 4) for name in early}
  shares['main'] = 1 - sum(shares.values())
  flops = np.diff([0, *cost.values()]).tolist()
  taps = {
    name: tap.format(1 + 3 * k // exits, 2 * k + 1) for k, name in enumerate(early)
  }
  cascade = {
    'exits': names,
    'taps': taps,
    'stages': [
      {'exit': name, 'flops': f, 'params': 1000, 'crossing': ['float32[1,32,32,16]']}
      for name, f in zip(names, flops)
    ],
    'cost': cost,
    'whole': WHOLE,
    'exit_accuracy': reached,
    'thresholds': dict(zip(early, [0.912, 0.99996, *[0.8] * exits])),
    'temperatures': dict.fromkeys(early, 1.4),
    'confidence': 'probability',
    'shares': shares,
    'curve': curve(),
    'requests': requests(),
    'calibration': calibration(names, reached),
    'executed': executed(),
  }
  return {
    'config': {'method': 'sidenet', 'options': {'drop': 0.5}, 'seed': 0},
    'versions': {'depthprune': '0.1.0', 'jax': '0.10.2'},
    'device': 'CPU, AMD EPYC, 2 cores',
    'command': 'depthprune run sidenet --data cifar10 --drop 0.5',
    'seed': 0,
    'model': 'resnet56',
    'data': 'cifar10',
    'method': 'sidenet',
    'options': {'drop': 0.5, 'budget': None, 'risk': None, 'regime': 'frozen'},
    'images': {'train': 45_000, 'held_out': 5_000, 'test': 5_000},
    'wall_seconds': 312.0,
    'accuracy': {'before': OWN, 'after': 0.9356},
    'held_out': {'before': 0.9412, 'after': 0.9364},
    'flops': {'before': WHOLE, 'after': round(0.648 * WHOLE)},
    'params': {'before': 855_770, 'after': 1_402_610},
    'widths': {},
    'rounds': [],
    'report': {},
    'cascade': cascade,
  }


def cascade_of(result: dict) -> CascadeResult:
  """Typed: what a report reads in the file that has these values."""
  cascade = typed(result).cascade
  assert cascade is not None
  return cascade


def choose(result: dict, kind: str) -> dict:
  """The same run, but asked for the first request of another kind."""
  for request in result['cascade']['requests']:
    request['chosen'] = False
  chosen = next(r for r in result['cascade']['requests'] if r['kind'] == kind)
  chosen['chosen'] = True
  return result


def curve() -> list[dict[str, float]]:
  shares = np.linspace(1.012, 0.2, 30)
  lost = 0.26 * ((1.012 - shares) / 0.812) ** 5
  return [
    {
      'cost_held_out': float(WHOLE * share),
      'accuracy_held_out': float(0.9412 - fall),
      'cost': float(WHOLE * share * 0.998),
      'accuracy': float(OWN - fall),
    }
    for share, fall in zip(shares, lost)
  ]


def requests() -> list[dict[str, Any]]:
  rows = []
  for kind, much, drop, saved in (
    ('drop', 0.0, -0.06, 0.212),
    ('drop', 0.5, 0.31, 0.352),
    ('drop', 1.0, 1.12, 0.431),
    ('budget', 0.67, 0.26, 0.341),
    ('risk', 0.02, 0.74, 0.402),
  ):
    test = {
      'accuracy': OWN - drop / 100,
      'cost': (1 - saved) * WHOLE,
      'drop': drop,
      'saved': saved,
    }
    rows.append(
      {
        'kind': kind,
        'requested': much,
        'chosen': (kind, much) == ('drop', 0.5),
        'held_out': {'accuracy': 0.9364, 'cost': test['cost']},
        'test': test | ({'risk': 0.0142} if kind == 'risk' else {}),
        'interval': {
          'drop': [drop - 0.21, drop + 0.21],
          'saved': [saved - 0.006, saved + 0.006],
        },
        'refused': None,
      }
    )
  none = dict.fromkeys(('held_out', 'test', 'interval'))
  refused = {'kind': 'budget', 'requested': 0.04, 'chosen': False, 'refused': NO_BUDGET}
  return [*rows, refused | none]


def calibration(names: list[str], reached: dict[str, float]) -> dict[str, Any]:
  """Confident by too much before temperature; the first bins are empty."""
  edges = np.linspace(0, 1, 16)
  middle = (edges[1:] + edges[:-1]) / 2
  found = {}
  for name in names:
    count = np.round(5000 * middle**4 / np.sum(middle**4)).astype(int)
    count[:2] = 0
    part = lambda excess, count=count: {
      'ece': excess / 2,
      'nll': 0.4,
      'bins': {
        'edges': edges.tolist(),
        'confidence': [float(m) if c else None for m, c in zip(middle, count)],
        'accuracy': [
          float(m - excess * 4 * m * (1 - m)) if c else None
          for m, c in zip(middle, count)
        ],
        'count': count.tolist(),
      },
    }
    every = {
      'before': part(0.124 if name != 'main' else 0.03),
      'after': part(0.022 if name != 'main' else 0.03),
      'auroc': 0.871,
      'accuracy': reached[name],
      'n': 5000,
    }
    temperature = 1.4 if name != 'main' else 1.0
    exited = every | {'accuracy': 0.984} if name != 'exit2' else None
    found[name] = {'temperature': temperature, 'all': every, 'exited': exited}
  return found


def executed() -> dict[str, Any]:
  return {
    'batch': 128,
    'ideal': round(0.648 * WHOLE),
    'padded': round(0.671 * WHOLE),
    'ms': 61.2,
    'whole_ms': 84.9,
    'speedup': 1.387,
    'compile_s': 7.31,
    'differ': 3,
    'near': 2,
    'n': 5000,
  }
