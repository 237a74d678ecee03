"""Whether the devices wait for images."""

import dataclasses

import jax.numpy as jnp
import pytest

from depthprune.timing import throughput


@dataclasses.dataclass
class Clock:
  now: float = 0.0

  def perf_counter(self) -> float:
    return self.now


@dataclasses.dataclass
class Slow:
  """A sampler that takes so many seconds for a batch, but has `depth` of them ready."""

  clock: Clock
  seconds: float
  depth: int = 5
  size: int = 4

  @property
  def sampler(self):
    return self

  def stepwise(self):
    def batch_at(split, step):
      self.clock.now += self.seconds * (step >= self.depth)
      return jnp.zeros(4)

    return batch_at


@pytest.mark.parametrize(('reads', 'steps'), [(0.1, 0.02), (0.02, 0.1)])
def test_input_bound_is_said_when_it_is(reads, steps, monkeypatch):
  clock, state = Clock(), jnp.zeros(2)
  monkeypatch.setattr(throughput, 'time', clock)

  def step(given, batch, key, teacher):
    assert given is not state, 'a step may consume what it is given'
    clock.now += steps if given.sum() else 60  # the first call compiles
    return given + 1, {}

  found = throughput.measure(Slow(clock, reads), None, step, state, None, None)
  assert found.read == pytest.approx(4 / reads)
  assert found.needed == pytest.approx(4 / steps)
  assert found.input_bound == (reads > steps)
  assert ('not input-bound' in str(found)) != found.input_bound


def test_a_line_is_printed_and_kept(capsys):
  found = throughput.Throughput(200.0, 800.0)
  line = throughput.tell(found, 'gates', show=True)
  assert line == {'stage': 'gates', 'read': 200, 'needed': 800, 'input_bound': True}
  said = capsys.readouterr().out
  assert said.startswith('gates: 200 images/s are read, the step takes 800: input-')
  assert 'wait 75% of the time' in said
  throughput.tell(found, 'gates', show=False)
  assert not capsys.readouterr().out
