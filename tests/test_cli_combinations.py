"""Options with several values stand for several runs."""

import pytest

from depthprune.cli import combinations


@pytest.mark.parametrize(
  ('words', 'runs'),
  [
    ('gates', ['gates']),
    ('gates --target 0.5', ['gates --target 0.5']),
    ('gates --target 0.3 50%', ['gates --target 0.3', 'gates --target 50%']),
    (
      '--at-once 2 gates --beta 0 -1 --distill --seed 0 1',
      [
        f'--at-once 2 gates --beta {beta} --distill --seed {seed}'
        for beta in (0, -1)
        for seed in (0, 1)
      ],
    ),
    ('netcut -h', ['netcut -h']),
    (
      'implosion --units stage1/block1 stage2/block1 --depth 5 6',
      [
        f'implosion --units stage1/block1 stage2/block1 --depth {depth}'
        for depth in (5, 6)
      ],
    ),
    ('sidenet --taps a b', ['sidenet --taps a b']),
  ],
)
def test_every_combination_is_a_run(words, runs):
  assert combinations(words.split()) == [run.split() for run in runs]


def test_patterns_of_what_is_kept_are_one_value():
  words = ['sweep', 'gates', '--keep', 'stage3/*', 'stem', '--target', '0.3', '0.5']
  kept = words[:5]
  assert combinations(words) == [[*kept, '--target', x] for x in ('0.3', '0.5')]
