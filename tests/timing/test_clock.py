"""Calls take turns, and the clock waits for them."""

import time

from depthprune.timing import clock


def test_sleeps_take_as_long_as_they_say():
  short, long = clock.interleave(
    [lambda: time.sleep(0.002), lambda: time.sleep(0.006)], seconds=0, least=5
  )
  assert len(short) == len(long) == 5
  assert short.min() >= 2.0
  assert long.min() >= 6.0
  assert short.min() < 6.0


def test_turns_alternate_and_the_warm_up_does_not_count():
  order = []
  calls = [lambda name=name: order.append(name) for name in 'ab']
  taken = clock.interleave(calls, seconds=0, least=3, warmup=2)
  assert ''.join(order) == 'abab' + 'ab' + 'ba' + 'ab'
  assert taken.shape == (2, 3)


def test_turns_are_bounded_by_time_and_by_number():
  nap = lambda: time.sleep(0.001)
  assert clock.interleave([nap], seconds=0.01, least=1, most=1000).shape[1] <= 10
  assert clock.interleave([nap], seconds=60, most=4).shape[1] == 4
