"""The roof: what was measured, and the bandwidth that fits what is moved."""

import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.timing import roofline
from depthprune.timing.roofline import Peak

PEAK = Peak(flops=1e9, side=512, bytes={100: 8e6, 200: 9e6, 400: 1e6}, dtype='float32')


@pytest.mark.parametrize(
  ('moved', 'speed'), [(50, 9e6), (101, 9e6), (200, 9e6), (201, 1e6), (10_000, 1e6)]
)
def test_bandwidth_is_of_the_best_copy_that_is_no_smaller(moved, speed):
  assert PEAK.bandwidth(moved) == speed


def test_the_roof_is_what_takes_longer():
  assert PEAK.milliseconds(flops=1e6, moved=90) == pytest.approx(1.0)
  assert PEAK.milliseconds(flops=1e2, moved=300) == pytest.approx(0.3)


@pytest.mark.parametrize('times', [0, 1, 7])
def test_a_copy_is_made_as_often_as_it_says(times):
  done = roofline._copies(64, jnp.dtype('float32'))(times)()
  np.testing.assert_array_equal(done, np.full(16, times, np.float32))


def test_the_first_call_that_is_long_enough_is_taken(monkeypatch):
  taken = {1: 5.0, 2: 30.0, 3: 60.0}
  monkeypatch.setattr(
    roofline.clock,
    'interleave',
    lambda calls, seconds, least, warmup: np.array([[calls[0](), 2 * calls[0]()]]),
  )
  make = lambda size: lambda: taken[size]
  assert roofline._long_enough(make, (1, 2, 3), 0.1) == (2, 30.0)
  assert roofline._long_enough(make, (1,), 0.1) == (1, 5.0)


def test_this_machine_has_a_roof(monkeypatch):
  monkeypatch.setattr(roofline, 'MATMUL', (64, 256))
  monkeypatch.setattr(roofline, 'COPIES', (2**12, 2**16))
  monkeypatch.setattr(roofline, 'ENOUGH', 0.5)
  peak = roofline.measure('bfloat16', seconds=0.01)
  assert peak.dtype == 'bfloat16' and peak.side in (64, 256)
  assert 1e6 < peak.flops < 1e16
  assert [*peak.bytes] == [2**12, 2**16]
  assert all(1e6 < speed < 1e14 for speed in peak.bytes.values())
