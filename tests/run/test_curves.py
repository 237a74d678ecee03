"""Curves for TensorBoard and Weights & Biases: the history, and no other numbers."""

import dataclasses
import importlib.machinery
import importlib.util
import json
import struct
import sys
import types
from pathlib import Path

import pytest

from depthprune.run import curves, rounds
from depthprune.run.config import default, from_json
from depthprune.run.curves import EVENTS, ID
from depthprune.train.options import ConfigError

BRIEF = default(
  'gates',
  model='mlp',
  subset=160,
  batch=16,
  train_epochs=0,
  gate_epochs=1,
  finetune_epochs=1,
)


class Client(types.ModuleType):
  """Stands in for the package wandb, and keeps what it is told."""

  def __init__(self):
    super().__init__('wandb')
    self.__spec__ = importlib.machinery.ModuleSpec('wandb', None)
    self.runs, self.lines, self.axes, self.ended = [], [], {}, 0

  def init(self, **given):
    self.runs.append(given)
    return self

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.ended += 1

  def define_metric(self, name, step_metric):
    self.axes[name] = step_metric

  def log(self, values):
    self.lines.append(values)


@pytest.fixture
def client(monkeypatch) -> Client:
  made = Client()
  monkeypatch.setitem(sys.modules, 'wandb', made)
  return made


def history(folder: Path) -> list[dict]:
  lines = (folder / 'history.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def curves_of(folder: Path) -> dict[str, dict[int, float]]:
  """{'gates/loss': {step: value}}, the numbers of a run's history."""
  found: dict[str, dict[int, float]] = {}
  for line in history(folder):
    stage, step = line.pop('stage'), line.pop('step')
    for name, value in line.items():
      if name != 'time' and value is not None:
        found.setdefault(f'{stage}/{name}', {})[step] = value
  return found


def events(folder: Path) -> dict[str, dict[int, float]]:
  """What TensorBoard reads: records with their length in front, each an Event."""
  proto = pytest.importorskip('tensorboardX.proto.event_pb2')
  found: dict[str, dict[int, float]] = {}
  for path in sorted(folder.glob('events.*')):
    data = path.read_bytes()
    while data:
      (size,) = struct.unpack('<Q', data[:8])
      event = proto.Event.FromString(data[12 : 12 + size])
      for value in event.summary.value:
        found.setdefault(value.tag, {})[event.step] = value.simple_value
      data = data[16 + size :]
  return found


def test_both_get_the_history_and_the_numbers_of_the_run_stay(tmp_path, client):
  pytest.importorskip('tensorboardX')
  plain = dataclasses.replace(BRIEF, workdir=str(tmp_path / 'plain'))
  logged = dataclasses.replace(BRIEF, workdir=str(tmp_path / 'logged'))
  logged = dataclasses.replace(logged, tensorboard=True, wandb=True)
  without, result = rounds.run(plain, False), rounds.run(logged, False)
  assert (result.accuracy, result.widths) == (without.accuracy, without.widths)
  losses = lambda config: [line['loss'] for line in history(config.path)]
  assert losses(logged) == losses(plain)

  expected = curves_of(logged.path)
  assert {'gates/loss', 'gates/accuracy', 'gates/flops', 'finetune/loss'} <= {*expected}
  read = events(logged.path / EVENTS)
  assert read.keys() == expected.keys()
  for name, curve in expected.items():
    assert read[name] == pytest.approx(curve, rel=1e-6)

  (run,) = client.runs
  assert run['id'] == json.loads((logged.path / ID).read_text())['id']
  assert run['config'] == logged.to_json() and client.ended == 1
  stages = dict.fromkeys(line['stage'] for line in history(logged.path))
  assert client.axes == {f'{stage}/*': f'{stage}/step' for stage in stages}
  first = history(logged.path)[0]
  assert client.lines[0]['gates/step'] == first['step']
  assert client.lines[0]['gates/loss'] == first['loss']
  assert len(client.lines) == len(history(logged.path))


def test_a_run_continues_with_or_without_them(tmp_path, client):
  pytest.importorskip('tensorboardX')
  config = dataclasses.replace(BRIEF, workdir=str(tmp_path), gate_epochs=0)
  rounds.run(config, False)
  lines = history(tmp_path)
  rounds.run(dataclasses.replace(config, tensorboard=True, wandb=True), False)
  assert history(tmp_path) == lines  # nothing was trained again
  with curves.opened(dataclasses.replace(config, wandb=True)):
    assert client.runs[0]['id'] == client.runs[1]['id']
  rounds.run(dataclasses.replace(config, wandb=True, resume=False), False)
  assert client.runs[2]['id'] != client.runs[0]['id']
  assert not (tmp_path / EVENTS).exists()


def test_stored_configs_know_of_them_only_where_they_were_asked_for():
  assert {'tensorboard', 'wandb'}.isdisjoint(BRIEF.to_json())
  logged = dataclasses.replace(BRIEF, tensorboard=True)
  assert logged.to_json()['tensorboard'] is True
  assert from_json(logged.to_json()) == logged and from_json(BRIEF.to_json()) == BRIEF


@pytest.mark.parametrize('option', curves.PACKAGES)
def test_without_the_package_the_run_is_refused_before_anything_is_read(
  option, tmp_path, monkeypatch
):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  config = dataclasses.replace(BRIEF, workdir=str(tmp_path / 'run'), **{option: True})
  with pytest.raises(ConfigError) as refused:
    rounds.run(config, False)
  assert f"pip install 'depthprune[{option}]'" in str(refused.value)
  assert len(str(refused.value).splitlines()) == 1
  assert not (tmp_path / 'run').exists()
