"""The table of a bench: what was measured, and no column for what was not."""

import io

from rich.console import Console

from depthprune.report import bench

LINE = {'ms': 2.0, 'ms_quartiles': [1.9, 2.1], 'per_second': 4e3, 'roof_ms': 0.5}
ALONE = {
  'path': 'small',
  'kind': 'network',
  'dtype': 'float32',
  'flops': {'before': None, 'after': 2_000_000},
  'batches': {'8': LINE},
  'notes': ['said aloud'],
}
BOTH = {
  **ALONE,
  'path': 'run',
  'flops': {'before': 4_000_000, 'after': 2_000_000},
  'batches': {'8': {**LINE, 'before_ms': 3.0, 'speedup': 1.5}},
}
EXITS = {**ALONE, 'kind': 'cascade', 'batches': {}, 'exits_ms': {'alone': 1, 'a': 0.25}}
RESULT = {
  'device': 'CPU, 2 cores',
  'peaks': {
    'float32': {'flops': 9.81e12, 'side': 512, 'bytes': {2**20: 3e9, 2**26: 2e9}}
  },
}


def text(*networks):
  console = Console(width=100, file=io.StringIO(), record=True)
  console.print(bench.screen({**RESULT, 'networks': networks}))
  return console.export_text()


def test_rows_have_before_and_after():
  row = ('8', '3.00 ms', '2.00 ms', 'speed-up 1.50 x', '4.00 k', '25.0 %')
  assert list(bench.rows(BOTH)) == [row]
  assert list(bench.rows(ALONE)) == [('8', '', '2.00 ms', '', '4.00 k', '25.0 %')]


def test_the_screen_names_network_device_and_peaks():
  said = text(BOTH)
  assert 'run: 2.00 M of 4.00 M FLOPs, float32' in said
  assert 'speed-up' in said and '· said aloud' in said
  assert 'CPU, 2 cores' in said
  assert '9.81 TFLOP/s (product of 512 x 512)' in said
  assert '3.00 GB/s of 1 MiB, 2.00 GB/s of 64 MiB' in said


def test_what_was_not_compared_has_no_column_and_no_legend():
  said = text(ALONE)
  assert 'small: 2.00 M FLOPs, float32' in said
  assert 'before' not in said and 'speed-up' not in said


def test_a_cascade_without_data_has_its_exits():
  said = text(EXITS)
  assert 'leaving at' in said and '0.250 ms' in said and '1.00 ms' in said
