"""How much memory there is for data: of this process, and of its devices."""

import os
from pathlib import Path

import jax

# Limits that containers and batch systems set (control groups 2 and 1).
LIMITS = '/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes'


def of_process() -> int:
  """Bytes that this process may fill: of the machine, or of its control group."""
  found = [os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')]
  for path in LIMITS:
    text = Path(path).read_text().strip() if Path(path).is_file() else ''
    found += [int(text)] if text.isdecimal() else []
  return min(found)


def of_device() -> int:
  """Bytes of the smallest of this process's devices; of a CPU those of the machine."""
  told = [device.memory_stats() or {} for device in jax.local_devices()]
  return min(one.get('bytes_limit', of_process()) for one in told)
