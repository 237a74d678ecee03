"""Writes the tables of README and docs/ from the committed result files.

  python -m experiments.tables

Nothing is typed. The tables of a paper are made beside the comparison that they show,
those of the benchmarks and of progress here.
"""

import re
from pathlib import Path
from typing import Any

from experiments.auxiliary.comparison import auxiliary_tables
from experiments.auxiliary.two_methods import two_methods_tables
from experiments.decoder.healing import healing_tables
from experiments.decoder.pruning import pruning_tables
from experiments.decoder.speculation import speculation_tables
from experiments.implosion.oneshot import oneshot_tables
from experiments.implosion.retraining import retraining_tables
from experiments.netcut.sweep import netcut_tables
from experiments.result_files import (
  HERE,
  files_with,
  link,
  notes,
  path_of,
  read,
  table,
)
from experiments.run import BOTH_SIZES, Arguments, find, row_count, run
from experiments.sidenet.ablation import head_tables
from experiments.sidenet.comparison import sidenet_tables
from experiments.sidenet.small_networks import small_network_tables
from experiments.trainable_gates.ablation import ablation_tables
from experiments.trainable_gates.comparison import demo_table, gates_tables
from experiments.verdicts import verdicts, when_pruning_pays

README = HERE.parent / 'README.md'
REALISED = HERE.parent / 'docs' / 'realised.md'
RESULTS = HERE.parent / 'docs' / 'results.md'
MARKED = re.compile(r'(<!-- results:.*?-->\n).*?(<!-- end of results -->)', re.DOTALL)


def text() -> str:
  """All tables, one below the other."""
  parts = (
    demo_table,
    gates_tables,
    ablation_tables,
    gates_bench,
    milliseconds_bench,
    training_bench,
    netcut_tables,
    oneshot_tables,
    retraining_tables,
    depth_bench,
    sidenet_tables,
    head_tables,
    small_network_tables,
    cascade_bench,
    auxiliary_tables,
    two_methods_tables,
    auxiliary_bench,
    pruning_tables,
    healing_tables,
    speculation_tables,
    waiting_bench,
    progress_table,
  )
  return '\n\n'.join(part() for part in parts)


def results() -> str:
  """The page of results: claims first, then all tables."""
  page = (
    '# Results',
    'Accuracy in % on test data, mean ± standard deviation over seeds; whatever was '
    'decided was decided on held-out data. `python -m experiments.claims` runs what is '
    'missing at the size for a CPU, with `--full` at that for an accelerator, and '
    '`python -m experiments.tables` writes this page from the result files.',
    '## What the papers claim',
    verdicts(),
    '## When pruning pays, and when a smaller network does',
    when_pruning_pays(),
    '## All tables',
    text(),
  )
  return '\n\n'.join(page).replace('](experiments/', '](../experiments/')


def gates_bench() -> str:
  """What gates cost, and what the cut gains."""
  path = 'bench/results/gates.json'
  content = read(path)
  gating = content['gating']
  gains = [
    f'{fast["flop_ratio"]:.2f}× fewer FLOPs gave {_timed(fast)} ({widths})'
    for widths, fast in zip(
      ('any width', 'multiples of 8'), content['speedup'].values()
    )
  ]
  shape = '×'.join(map(str, content['shape']))
  return (
    f'A training step with gates takes {gating["ratio"]:.3f} of the time of a plain '
    f'one (quartiles {gating["quartiles"][0]:.3f} to {gating["quartiles"][1]:.3f}; '
    f'{content["model"]}, {shape}, batch {content["batch"]}, {content["device"]}). '
    f'{"; ".join(gains)} ({link(path)}).'
  )


def _timed(fast: dict) -> str:
  rows = [(batch, row) for batch, row in fast['latency_ms'].items() if batch.isdigit()]
  return ', '.join(f'{row["speedup"]:.2f}× at batch {batch}' for batch, row in rows)


def cascade_bench() -> str:
  """Executed cascades beside the part of time that their FLOPs promise."""
  path = 'bench/results/cascade.json'
  content = read(path)
  head = ('', 'FLOPs, ideal', 'padded', 'time', 'time / ideal', 'compile, s')
  part = lambda value: f'{100 * value:.1f} %'
  lines = [
    (
      name,
      part(row['ideal_share']),
      part(row['padded_share']),
      part(row['share']),
      f'{row["excess"]:.2f}',
      f'{row["compile_s"]:.0f}',
    )
    for name, row in content.items()
    if isinstance(row, dict) and 'excess' in row
  ]
  trap = content['trap']
  config = content['config']
  return (
    f'A cascade executed at batch {config["batch"]}, {100 * config["leave"]:.0f} % of '
    f'it leaving after a third, as part of the network alone ({content["device"]}; '
    f'{link(path)}):\n\n{table(head, lines)}\n\n'
    f'The same decision by `vmap(cond)`, on a transformer 128 wide: '
    f'{trap["vmap_cond_ms"]:.0f} ms, where the network alone takes '
    f'{trap["whole_ms"]:.0f} ms and the cascade {trap["cascade_ms"]:.0f} ms.'
  )


def auxiliary_bench() -> str:
  """What a path costs in training beside its FLOPs, and what is left of it."""
  path = 'bench/results/auxiliary_cpu.json'
  content = read(path)
  head = ('', 'step / plain', 'FLOPs / plain', 'time / FLOPs', 'stripped / plain')
  lines = [
    (
      f'{name}, {structure}',
      f'{row["ratio"]:.2f}',
      f'{row["flop_ratio"]:.2f}',
      f'{row["over_flops"]:.2f}',
      ', '.join(
        f'{1 / each["speedup"]:.2f} (batch {batch})'
        for batch, each in row['stripped_ms'].items()
      ),
    )
    for name, case in content['models'].items()
    for structure, row in case.items()
    if isinstance(row, dict)
  ]
  return (
    f'A training step beside an auxiliary path ({content["device"]}; {link(path)}).'
    f'{notes(content)}\n\n{table(head, lines)}'
  )


def depth_bench() -> str:
  """NetCut's time beside PyTorch's, and the cut ResNet-110 beside ones built so."""
  path, cut = 'bench/results/netcut.json', 'bench/results/depth.json'
  content, blocks = read(path), read(cut)['blocks']
  line = (
    f'NetCut of the MLP, 20 epochs on one core, data, compilation and evaluation '
    f'included: {content["seconds"]:.0f} s ({content["device"]}; {link(path)}).'
  )
  if 'step_over_torch' in content:
    line += (
      f' A training step takes {content["step_over_torch"]:.2f} of the time of the '
      f'same network in PyTorch, by turns ({content["step_ms"]:.1f} and '
      f'{content["torch_step_ms"]:.1f} ms).'
    )
  ratios = [
    1 / row['speedup'] for b in blocks.values() for row in b['latency_ms'].values()
  ]
  return (
    f'{line} A ResNet-110 cut at {", ".join(blocks)} blocks takes '
    f'{min(ratios):.2f} to {max(ratios):.2f} of the time of networks built so, at '
    f'batch 1 and 128 ({link(cut)}).'
  )


def milliseconds_bench() -> str:
  """What a target in milliseconds reached, and one in FLOPs beside it."""
  path = 'bench/results/milliseconds_cpu.json'
  content = read(path)
  head = ('', 'widths', 'asked for, %', 'foreseen', 'reached', 'by as many FLOPs')
  part = lambda row: f'{100 * row["reached"]:.1f}'
  lines = []
  for name, case in content['models'].items():
    of = lambda kind, case=case: [row for row in case['rows'] if row['of'] == kind]
    lines += [
      (
        name,
        'any' if row['round_to'] == 1 else f'multiples of {row["round_to"]}',
        f'{100 * row["asked"]:.0f}',
        f'{100 * row["foreseen"]["milliseconds"]:.1f}',
        part(row),
        part(other),
      )
      for row, other in zip(of('milliseconds'), of('flops'), strict=True)
    ]
  return (
    f'L1 cuts to a part of the time at batch {content["batch"]}, all networks by '
    'turns, beside cuts to the same part of the FLOPs '
    f'({content["device"]}; {link(path)}):\n\n'
    f'{table(head, lines)}'
  )


def training_bench() -> str:
  """A step of training beside the roof of the device, and where the time goes."""
  path = 'bench/results/training_cpu.json'
  content = read(path)
  head = ('', 'step, ms', 'images / s', 'roof, ms', 'temporary, MiB', 'compile, s')
  lines = [
    (
      name,
      f'{row["step_ms"]:.0f}',
      f'{row["images_per_second"]:.0f}',
      f'{row["roof_ms"]:.0f}',
      f'{row["temporary_bytes"] / 2**20:.0f}',
      f'{row["compile_s"]:.0f}',
    )
    for name, row in content['variants'].items()
  ]
  other = ''
  if 'step_over_torch' in content:
    other = (
      f' The same network in PyTorch, by turns: {content["torch_step_ms"]:.0f} ms, of '
      f'which ours takes {content["step_over_torch"]:.2f}.'
    )
  spent = ', '.join(
    f'{name.replace("_", " ")} {ms:.1f}' for name, ms in content['split_ms'].items()
  )
  return (
    f'Training {content["model"]}, {"×".join(map(str, content["shape"]))}, batch '
    f'{content["batch"]} ({content["device"]}; {link(path)}); the roof is what the '
    'device does at most with the FLOPs and bytes that XLA counts. Milliseconds of '
    f'parts: {spent}.{other}\n\n{table(head, lines)}'
  )


def realised_bench() -> str:
  """How much faster networks got beside their FLOPs, a table for every device."""
  found = files_with('bench', 'kind', 'network', 'variant', 'batches')
  parts = [_realised(path, content) for path, content in found.items()]
  return '# Realised speed-up\n\n' + ('\n\n'.join(parts) or 'Nothing is measured yet.')


def _realised(path: Path, content: dict[str, Any]) -> str:
  batches = [str(batch) for batch in content['config']['batches']]
  head = ('', '', '', 'FLOPs', *(f'batch {b}' for b in batches), 'Torch-Pruning')
  lines = []
  for row in content['rows']:
    times = (_realised_time(row['batches'][b]) for b in batches)
    names = row['kind'], row['network'], row['variant']
    beside = _beside(row.get('torch'), batches)
    lines.append((*names, f'{row["flop_ratio"]:.2f}×', *times, beside))
  return (
    f'On {content["device"]}, random weights, float32, evaluation, in turns '
    f'({link(path, "../")}): how many times fewer FLOPs, and for every batch size how '
    'many times faster (quartiles), and that over the FLOPs. In the last column '
    'Torch-Pruning and PyTorch, with the same network and ratio, at the same batch '
    f'sizes. A * marks exits behind which nothing is skipped, a † exits that are not '
    f'used, as the network alone was measured to be faster.{notes(content)}\n\n'
    f'{table(head, lines)}'
  )


def _realised_time(time: dict[str, Any]) -> str:
  low, high = time['quartiles']
  mark = '†' if time.get('alone') else '*' * bool(time.get('merged'))
  return (
    f'{time["speedup"]:.2f}×{mark} ({low:.2f} to {high:.2f}), {time["realised"]:.2f}'
  )


def _beside(torch: dict[str, Any] | None, batches: list[str]) -> str:
  if torch is None:
    return 'not there'
  times = (f'{torch["batches"][b]["speedup"]:.2f}×' for b in batches)
  return f'{", ".join(times)} for {torch["flop_ratio"]:.2f}× fewer FLOPs'


def waiting_bench() -> str:
  """What people wait for, beside the compilation of the whole network."""
  path = 'bench/results/waiting_cpu.json'
  content = read(path)
  parts = 'trace', 'couple', 'oneshot', 'prune', 'compile'
  head = (
    '',
    'trace by Flax, s',
    *(f'`{part}`, s' for part in parts[1:-1]),
    'compile the whole network, s',
    'Torch-Pruning: graph, cut, s',
  )

  def line(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    torch = row.get('torch_pruning')
    beside = f'{torch["couple"][0]:.2f}, {torch["prune"][0]:.2f}' if torch else '–'
    return (name, *(f'{row[part][0]:.2f}' for part in parts), beside)

  lines = [line(*item) for item in content['networks'].items()]
  commands = ', '.join(
    f'`{command}` {times[0]:.1f} s' for command, times in content['commands'].items()
  )
  return (
    'Seconds until an answer, nothing compiled before. `couple` includes the trace of '
    'the network by Flax, below which it cannot come; `prune` includes the comparison '
    'of masked and small network, which Torch-Pruning does not make: it compiles both '
    'and runs them five times, which takes half of the time of a ViT-B '
    f'({content["device"]}; {link(path)}). Commands: {commands}.\n\n'
    f'{table(head, lines)}'
  )


def progress_table() -> str:
  """Which accelerator-sized experiments have results; a dash where there are none.

  Rows that depend on others count once these are there.
  """
  progress = run(find(BOTH_SIZES), Arguments(full=True, left=True))
  lines = []
  for name, (_, left) in progress.items():
    path = path_of(*name.split('.'), full=True)
    device = read(path).get('device', '–') if path.is_file() else '–'
    rows = str(row_count(name, full=True) or '–')
    lines.append((name, rows, '–' if left is None else str(len(left)), device))
  return (
    'The accelerator-sized experiments '
    '(`python -m experiments.run --full --minutes 10`), most valuable first:\n\n'
    + table(('experiment', 'rows', 'left', 'device'), lines)
  )


if __name__ == '__main__':
  new = verdicts()
  README.write_text(
    MARKED.sub(lambda m: f'{m[1]}\n{new}\n\n{m[2]}', README.read_text())
  )
  REALISED.write_text(f'{realised_bench()}\n')
  RESULTS.write_text(f'{results()}\n')
