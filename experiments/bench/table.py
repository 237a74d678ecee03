"""What training costs, what cuts, cascades and targets in milliseconds gain."""

from experiments.found import link, load, notes, table


def bench() -> str:
  """What gates cost, and what the cut gains."""
  path = 'bench/results/gates.json'
  found = load(path)
  gating = found['gating']
  gains = [
    f'{fast["flop_ratio"]:.2f}× fewer FLOPs gave {_timed(fast)} ({widths})'
    for widths, fast in zip(('any width', 'multiples of 8'), found['speedup'].values())
  ]
  shape = '×'.join(map(str, found['shape']))
  return (
    f'A training step with gates takes {gating["ratio"]:.3f} of the time of a plain '
    f'one (quartiles {gating["quartiles"][0]:.3f} to {gating["quartiles"][1]:.3f}; '
    f'{found["model"]}, {shape}, batch {found["batch"]}, {found["device"]}). '
    f'{"; ".join(gains)} ({link(path)}).'
  )


def _timed(fast: dict) -> str:
  rows = [(batch, row) for batch, row in fast['latency_ms'].items() if batch.isdigit()]
  return ', '.join(f'{row["speedup"]:.2f}× at batch {batch}' for batch, row in rows)


def cascades() -> str:
  """Executed cascades beside the part of time that their FLOPs promise."""
  path = 'bench/results/cascade.json'
  found = load(path)
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
    for name, row in found.items()
    if isinstance(row, dict) and 'excess' in row
  ]
  trap = found['trap']
  config = found['config']
  return (
    f'A cascade executed at batch {config["batch"]}, {100 * config["leave"]:.0f} % of '
    f'it leaving after a third, as part of the network alone ({found["device"]}; '
    f'{link(path)}):\n\n{table(head, lines)}\n\n'
    f'The same decision by `vmap(cond)`, on a transformer 128 wide: '
    f'{trap["vmap_cond_ms"]:.0f} ms, where the network alone takes '
    f'{trap["whole_ms"]:.0f} ms and the cascade {trap["cascade_ms"]:.0f} ms.'
  )


def auxiliary_paths() -> str:
  """What a path costs in training beside its FLOPs, and what is left of it."""
  path = 'bench/results/auxiliary_cpu.json'
  found = load(path)
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
    for name, case in found['models'].items()
    for structure, row in case.items()
    if isinstance(row, dict)
  ]
  return (
    f'A training step beside an auxiliary path ({found["device"]}; {link(path)}).'
    f'{notes(found)}\n\n{table(head, lines)}'
  )


def depth_methods() -> str:
  """NetCut's time beside PyTorch's, and the cut ResNet-110 beside ones built so."""
  path, cut = 'bench/results/netcut.json', 'bench/results/depth.json'
  found, blocks = load(path), load(cut)['blocks']
  line = (
    f'NetCut of the MLP, 20 epochs on one core, data, compilation and evaluation '
    f'included: {found["seconds"]:.0f} s ({found["device"]}; {link(path)}).'
  )
  if 'step_over_torch' in found:
    line += (
      f' A training step takes {found["step_over_torch"]:.2f} of the time of the same '
      f'network in PyTorch, by turns ({found["step_ms"]:.1f} and '
      f'{found["torch_step_ms"]:.1f} ms).'
    )
  ratios = [
    1 / row['speedup'] for b in blocks.values() for row in b['latency_ms'].values()
  ]
  return (
    f'{line} A ResNet-110 cut at {", ".join(blocks)} blocks takes '
    f'{min(ratios):.2f} to {max(ratios):.2f} of the time of networks built so, at '
    f'batch 1 and 128 ({link(cut)}).'
  )


def milliseconds() -> str:
  """What a target in milliseconds reached, and one in FLOPs beside it."""
  path = 'bench/results/milliseconds_cpu.json'
  found = load(path)
  head = ('', 'widths', 'asked for, %', 'foreseen', 'reached', 'by as many FLOPs')
  part = lambda row: f'{100 * row["reached"]:.1f}'
  lines = []
  for name, case in found['models'].items():
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
    f'L1 cuts to a part of the time at batch {found["batch"]}, all networks by turns, '
    f'beside cuts to the same part of the FLOPs ({found["device"]}; {link(path)}):\n\n'
    f'{table(head, lines)}'
  )


def training() -> str:
  """A step of training beside the roof of the device, and where the time goes."""
  path = 'bench/results/training_cpu.json'
  found = load(path)
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
    for name, row in found['variants'].items()
  ]
  other = ''
  if 'step_over_torch' in found:
    other = (
      f' The same network in PyTorch, by turns: {found["torch_step_ms"]:.0f} ms, of '
      f'which ours takes {found["step_over_torch"]:.2f}.'
    )
  spent = ', '.join(
    f'{name.replace("_", " ")} {ms:.1f}' for name, ms in found['split_ms'].items()
  )
  return (
    f'Training {found["model"]}, {"×".join(map(str, found["shape"]))}, batch '
    f'{found["batch"]} ({found["device"]}; {link(path)}); the roof is what the device '
    f'does at most with the FLOPs and bytes that XLA counts. Milliseconds of parts: '
    f'{spent}.{other}\n\n{table(head, lines)}'
  )
