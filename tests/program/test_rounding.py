import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthprune.program import rounding
from depthprune.program.rounding import Suited, built, possible, step, suited

CHOICES = st.one_of(
  st.integers(1, 200), st.just('auto'), st.builds(Suited, st.sampled_from([8, 128]))
)


@pytest.mark.parametrize(
  'n, size, round_to, width',
  [
    (19, 32, 8, 16), (5, 32, 8, 8), (32, 32, 8, 32), (30, 30, 8, 30), (3, 6, 8, 6),
    (7, 9, 1, 7), (0, 9, 1, 1),
    (63, 64, 'auto', 56), (13, 16, 'auto', 8), (7, 64, 'auto', 4), (0, 64, 'auto', 1),
    (5, 7, 'auto', 5), (200, 256, Suited(128), 128), (100, 256, Suited(128), 64),
  ],
)  # fmt: skip
def test_widths_that_are_built(n, size, round_to, width):
  assert built(n, size, round_to) == width


def test_widths_that_are_possible():
  assert possible(10, 4) == [4, 8, 10]
  assert possible(3, 8) == [3]
  assert possible(3, 1) == possible(3, 'auto') == [1, 2, 3]
  assert possible(40, 8) == [8, 16, 24, 32, 40]
  assert possible(36, 'auto') == [1, 2, 4, 8, 16, 24, 32, 36]


def test_auto_is_a_table_of_devices_and_widths():
  """A group has several multiples to choose from, however narrow it is."""
  sizes = 1024, 256, 255, 32, 31, 16, 15, 8, 7, 1
  table = {p: [step(suited(p), n) for n in sizes] for p in ('cpu', 'gpu', 'tpu')}
  assert table['cpu'] == table['gpu'] == [8, 8, 8, 8, 8, 8, 2, 2, 1, 1]
  assert table['tpu'] == [128, 128, 8, 8, 8, 8, 2, 2, 1, 1]
  assert suited() == suited('cpu') == suited('one of the future')


@given(st.integers(1, 600), CHOICES, st.integers(0, 600))
def test_what_is_built_is_possible_and_never_above_what_is_kept(size, round_to, n):
  n = min(n, size)
  widths = possible(size, round_to)
  assert widths == sorted(set(widths)) and widths[-1] == size
  width = int(built(n, size, round_to))
  assert width == max((w for w in widths if w <= n), default=widths[0])
  traced = built(jnp.float32(n), size, round_to, jnp)
  assert (float(traced), traced.dtype) == (width, jnp.float32)


@given(st.integers(1, 600), CHOICES)
def test_widths_are_multiples_or_the_whole_axis(size, round_to):
  """Below one multiple, 'auto' has powers of two, and a number has nothing."""
  by = step(round_to, size)
  narrow = [w for w in possible(size, round_to) if w % by and w != size]
  assert narrow == [w for w in (1, 2, 4, 8, 16, 32, 64) if w < by and by != round_to]
  assert by <= max(size, by if by == round_to else 0)


@given(st.integers(16, 255), st.integers(8, 255))
def test_auto_equals_the_number_that_it_stands_for_from_one_multiple_on(size, n):
  n = min(n, size)
  assert built(n, size, 'auto') == built(n, size, suited()) == built(n, size, 8)


@pytest.mark.parametrize('wrong', [0, -8, 2.5, True, None, '8', 'AUTO'])
def test_neither_a_number_nor_auto(wrong):
  with pytest.raises((TypeError, ValueError), match="round_to: expected .* 'auto'"):
    rounding.check(wrong)


@pytest.mark.parametrize('right', [1, 8, np.int64(8), 'auto', Suited(8)])
def test_a_number_or_auto(right):
  rounding.check(right)
  assert step(right, 64) == (8 if right != 1 else 1)
