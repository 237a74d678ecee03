"""Result files of the depth methods, made up, in a folder of their own."""

import json
from pathlib import Path

import pytest

from experiments import result_files

CONFIG = {'model': 'mlp20x200', 'data': 'fashion_mnist', 'gate_epochs': 20}


def netcut_row(seed: int, beta: float, kept: int, **changed) -> dict:
  return {
    'method': 'netcut',
    'seed': seed,
    'beta': beta,
    'aggregate': 'log',
    'gamma': 0.0,
    'kept': kept,
    'exits': 20,
    'max_importance': 0.9,
    'entropy': 0.1,
    'accuracy_before': 0.88,
    'accuracy_cut': 0.8795 + 0.001 * seed,
    'flops': kept,
    'flops_full': 20,
    'params': kept,
    'params_full': 20,
    'wall_seconds': 90.0,
    'importance_history': [[step, [0.05] * 20] for step in (0, 10)],
  } | changed


def single_row(seed: int, depth: int) -> dict:
  accuracy = 0.87 + 0.001 * depth + 0.0001 * seed
  return {'method': 'single', 'seed': seed, 'depth': depth, 'accuracy': accuracy}


def rounds(seed: int) -> list[dict]:
  of = {
    'before': 0.93,
    'pruned': 0.7,
    'recalibrated': 0.85,
    'after': 0.92 + 0.01 * seed,
  }
  return [{'units': [9, 8], 'held_out': of}]


@pytest.fixture
def results(tmp_path: Path, monkeypatch) -> Path:
  """Stands for experiments/, without a result file."""
  monkeypatch.setattr(result_files, 'HERE', tmp_path)
  return tmp_path


@pytest.fixture
def netcut_file(results: Path) -> Path:
  rows = [
    netcut_row(s, beta, kept) for s in (0, 1) for beta, kept in ((0.0, 4), (0.1, 1))
  ]
  rows.append(netcut_row(0, 0.1, 2, aggregate='linear'))
  rows += [single_row(seed, depth) for seed in (0, 1) for depth in (1, 4)]
  return write(results / 'netcut/results/mlp.json', rows)


@pytest.fixture
def implosion_files(results: Path) -> tuple[Path, Path]:
  """(one-shot, full runs)"""
  shots: list[dict] = [{'importance': 'none', 'seed': 0, 'erased': 0, 'accuracy': 0.93}]
  shots += [
    {'importance': name, 'seed': seed, 'erased': n, 'accuracy': 0.93 - n * slope}
    for name, slope, seeds in (('priority', 0.02, 1), ('random', 0.05, 2))
    for seed in range(seeds)
    for n in range(1, 13)
  ]
  shots.append({**shots[12], 'accuracy': 0.68, 'cut': True})
  runs: list[dict] = [
    {
      'method': method,
      'seed': seed,
      'accuracy_before': 0.94,
      'accuracy': 0.93,
      'units': [9, 8],
      'epochs': 30,
      'rounds': rounds(seed),
    }
    for method in ('priority', 'random')
    for seed in (0, 1)
  ]
  runs.append({'method': 'scratch', 'seed': 0, 'accuracy': 0.9, 'epochs': 30})
  folder = results / 'implosion/results'
  return write(folder / 'oneshot.json', shots), write(folder / 'resnet20.json', runs)


def write(path: Path, rows: list[dict]) -> Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps({'config': CONFIG, 'device': 'CPU', 'rows': rows}))
  return path


def sidenet_row(seed: int) -> dict:
  """Half a point asked for; a risk that the first seed could not promise."""
  bins = {k: [0.5] * n for k, n in (('edges', 3), ('confidence', 2), ('accuracy', 2))}
  measured = {'ece': 0.04, 'nll': 0.3, 'bins': {**bins, 'count': [5, 5]}}
  entry = {'before': measured, 'after': {**measured, 'ece': 0.01}, 'auroc': 0.8}
  entry |= {'accuracy': 0.8, 'n': 10}
  drop = {
    'kind': 'drop', 'requested': 0.5, 'chosen': True, 'refused': None,
    'held_out': {'accuracy': 0.93, 'cost': 60},
    'test': {
      'accuracy': 0.926 - seed / 1000, 'cost': 60, 'drop': 0.4 + seed / 10, 'saved': 0.4
    },
    'interval': {'drop': [0.1, 0.7], 'saved': [0.38 - seed / 100, 0.42]},
  }  # fmt: skip
  risk = {**drop, 'kind': 'risk', 'requested': 0.01, 'chosen': False}
  risk['test'] = {**drop['test'], 'risk': 0.008}
  if not seed:
    risk |= {'refused': 'too few', 'test': None, 'held_out': None, 'interval': None}
  return {
    'regime': 'frozen', 'seed': seed, 'exits': ['exit1', 'main'],
    'accuracy': {'before': 0.93, 'after': 0.926}, 'flops': {'before': 100, 'after': 60},
    'exit_accuracy': {'exit1': 0.8, 'main': 0.93}, 'whole': 100,
    'cost': {'exit1': 40, 'main': 102}, 'requests': [drop, risk],
    'curve': [{'cost': 102, 'accuracy': 0.93}, {'cost': 60, 'accuracy': 0.926}],
    'calibration': {'exit1': {'temperature': 0.8, 'all': entry, 'exited': None}},
    'executed': {'speedup': 1.5, 'batch': 128, 'device': 'a CPU'},
  }  # fmt: skip


@pytest.fixture
def sidenet_file(results: Path) -> Path:
  config = {'model': 'resnet56', 'data': 'cifar10', 'options': {'drop': 0.5}}
  path = results / 'sidenet' / 'results' / 'resnet56.json'
  path.parent.mkdir(parents=True)
  rows = [sidenet_row(seed) for seed in (0, 1)]
  path.write_text(json.dumps({'config': config, 'rows': rows}))
  return path
