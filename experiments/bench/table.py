"""What gates cost, and what the cut gains."""

from experiments.found import link, load


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
