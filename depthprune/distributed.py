"""Several processes that train one network, on one host or on many.

Every process runs the same program on its own devices (SPMD). Process 0 writes files,
and decides for all whatever depends on a clock, a disk or a file. When a process is
lost, the others end with a message that says so.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

EXPLICIT = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
SILENCE_S = 60  # a process that is silent for so long counts as dead, and all end
T = TypeVar('T')

QUIET = '-'
# Runs in a process of its own, and waits for its input to end: with this process.
WITNESS = f"""
import sys
said = sys.stdin.read()
if said != {QUIET!r}:
  print('\\n' + sys.argv[1], *said.splitlines()[:1], file=sys.stderr, flush=True)
"""
SIGNS = re.compile(
  'Gloo|NCCL|nccl|heartbeat|[Cc]oordination ?service|[Bb]arrier|'
  'Connection (closed|reset)|UNAVAILABLE|DEADLINE_EXCEEDED'
)
LAST_WORDS_S = 2  # jax ends all processes at once when process 0 is gone


class HostError(ValueError):
  """Processes do not belong together, or one of them failed."""


class HostLost(Exception):
  """Another process of the run is gone; what was saved is intact."""


def join() -> None:
  """Joins the other processes of the run, if there are any; safe to call again.

  jax itself recognises SLURM (srun), Open MPI, TPU pods and, with jax[k8s] installed,
  indexed Jobs on Kubernetes (GKE). Processes that are started by hand need three
  environment variables: JAX_COORDINATOR_ADDRESS (host:port of process 0),
  JAX_NUM_PROCESSES and JAX_PROCESS_ID.

  Raises:
    HostError: only some of these three are set, or not to valid numbers.
  """
  environment = os.environ
  if jax.distributed.is_initialized() or not several(environment):
    return
  # A run handles SIGTERM itself; the service of jax would catch it.
  jax.config.update('jax_enable_preemption_service', False)
  jax.distributed.initialize(
    **explicit(environment),
    heartbeat_timeout_seconds=SILENCE_S,
    shutdown_timeout_seconds=SILENCE_S,
  )


def several(environment: Mapping[str, str]) -> bool:
  """Tells whether this process may be one of several, by its environment."""
  count = lambda name: int(environment.get(name) or 1)
  step = 'SLURM_STEP_NODELIST' in environment  # absent without srun
  workers = ('TPU_PROCESS_ADDRESSES', 'TPU_WORKER_HOSTNAMES')
  return (
    any(name in environment for name in EXPLICIT)
    or (step and count('SLURM_NTASKS') > 1)
    or count('OMPI_COMM_WORLD_SIZE') > 1
    or ('JOB_COMPLETION_INDEX' in environment and _installed('kubernetes'))
    or any(',' in environment.get(name, '') for name in workers)
    or _on_tpu_vm(environment)
  )


def explicit(environment: Mapping[str, str]) -> dict[str, Any]:
  """Reads the arguments of `jax.distributed.initialize` that are set by hand.

  Returns:
    All arguments, or {} if none of the variables is set.

  Raises:
    HostError: only some are set, or not to valid numbers.
  """
  found = {name: environment[name] for name in EXPLICIT if name in environment}
  if not found:
    return {}
  address, count, index = (found.get(name, '') for name in EXPLICIT)
  complete = address and count.isdecimal() and index.isdecimal()
  if not complete or int(index) >= int(count):
    expected = f'{EXPLICIT[0]}=HOST:PORT {EXPLICIT[1]}=N {EXPLICIT[2]}=0...N-1'
    raise HostError(f'processes: expected {expected} in the environment, got {found}')
  return {
    'coordinator_address': address,
    'num_processes': int(count),
    'process_id': int(index),
  }


def _on_tpu_vm(environment: Mapping[str, str]) -> bool:
  """Tells whether this is a TPU of Google Cloud, whose metadata name all hosts."""
  devices = Path('/dev/accel0'), Path('/dev/vfio/0')
  return (
    _installed('libtpu')
    and 'TPU_SKIP_MDS_QUERY' not in environment
    and 'cpu' not in environment.get('JAX_PLATFORMS', '')
    and any(device.exists() for device in devices)
  )


def _installed(package: str) -> bool:
  return importlib.util.find_spec(package) is not None


def writes() -> bool:
  """Tells whether this process is the one that writes files and prints."""
  return jax.process_index() == 0


def wait() -> None:
  """Waits until every process has called it."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('depthprune')


def anywhere(*flags: bool) -> list[bool]:
  """Returns for every flag whether it is set in any process."""
  if jax.process_count() == 1:
    return [*flags]
  return multihost_utils.process_allgather(np.array(flags)).any(0).tolist()


def gathered(value: Any) -> list[Any]:
  """Returns the JSON values that all processes pass, in order, on each of them."""
  if jax.process_count() == 1:
    return [value]
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(text)))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: len(text)] = text
  rows = multihost_utils.process_allgather(padded)
  return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


def agreed(tree: T) -> T:
  """Returns process 0's arrays on every process, bit for bit; shapes must be equal."""
  if jax.process_count() == 1:
    return tree
  arrays = jax.tree.map(np.asarray, tree)
  data = jax.tree.map(lambda x: np.frombuffer(x.tobytes(), np.uint8), arrays)
  sent = multihost_utils.broadcast_one_to_all(data)
  return jax.tree.map(
    lambda x, y: np.frombuffer(y.tobytes(), x.dtype).reshape(x.shape), arrays, sent
  )


def fetch(tree: Any) -> Any:
  """Copies arrays from anywhere on a mesh to numpy, the same on every process."""

  def one(x):
    if getattr(x, 'is_fully_addressable', True) or x.is_fully_replicated:
      return x
    return jax.device_put(x, NamedSharding(x.sharding.mesh, P()))

  return jax.device_get(jax.tree.map(one, tree))


def local(tree: Any) -> Any:
  """Copies arrays from a mesh to the first device of this process."""
  return jax.tree.map(jnp.array, fetch(tree))


def together(work: Callable[[], T]) -> T:
  """Returns work() on every process; if it fails on one, it fails on all.

  Raises:
    Exception: the error of `work` on this process.
    HostError: it failed on another process; the message is that of its error.
  """
  value, failed = None, None
  try:
    value = work()
  except Exception as error:
    failed = error
  messages = gathered(None if failed is None else f'{type(failed).__name__}: {failed}')
  if failed is not None:
    raise failed
  for index, message in enumerate(messages):
    if message is not None:
      raise HostError(f'process {index} failed: {message}')
  return value  # pyright: ignore[reportReturnType]


def alike(what: str, values: Mapping[str, Any], advice: str) -> None:
  """Checks that all processes pass the same JSON values, by name.

  Raises:
    HostError: they differ; the message names them, says `what` they are, and ends with
      `advice`.
  """
  first, *others = gathered(dict(values))
  for index, other in enumerate(others, 1):
    differing = [
      f'{name} (process 0: {first.get(name)!r}, process {index}: {other.get(name)!r})'
      for name in sorted({*first, *other})
      if first.get(name) != other.get(name)
    ]
    if differing:
      raise HostError(
        f'{what}: not the same on all hosts: {", ".join(differing)}. {advice}'
      )


@contextmanager
def watched() -> Iterator[None]:
  """Explains, as a context manager, why this process ends when another one is lost.

  jax may end the process without an exception; a small second process then prints the
  explanation.

  Raises:
    HostLost: a connection to another process broke. Processes cannot work together
      after that: end this one by `leave`.
  """
  if jax.process_count() == 1:
    yield
    return
  words = [sys.executable, '-c', WITNESS, _message()]
  pipe = subprocess.PIPE
  witness = subprocess.Popen(words, stdin=pipe, text=True, start_new_session=True)
  last = QUIET
  try:
    yield
  except Exception as error:
    if not _is_loss(error):
      raise
    last = f'The first sign of it: {error}'
    raise HostLost(f'{_message()} {last}') from error
  finally:
    assert witness.stdin is not None
    with suppress(OSError):  # the witness itself may be gone
      witness.stdin.write(last)
      witness.stdin.flush()
    if last == QUIET:  # otherwise it prints when this process has ended
      witness.communicate()


def part() -> None:
  """Leaves the other processes, when all of them are about to end."""
  if jax.distributed.is_initialized():
    jax.distributed.shutdown()


def leave(code: int) -> None:
  """Ends this process with an exit code, without waiting for those that are gone."""
  sys.stdout.flush()
  sys.stderr.flush()
  if writes():
    time.sleep(LAST_WORDS_S)
  os._exit(code)


def _message() -> str:
  index, count = jax.process_index(), jax.process_count()
  return (
    f'stopped: process {index} of 0 to {count - 1} cannot go on. Another process of '
    f'the run is gone, or gave no sign of life for {SILENCE_S} s, or this one '
    'was killed: see what the others said. What was saved is whole: the same command, '
    'on all hosts, continues from there.'
  )


def _is_loss(error: BaseException | None) -> bool:
  """Tells whether an error below this package is about other processes."""
  while error is not None:
    ours = type(error).__module__.split('.')[0] == 'depthprune'
    if not ours and SIGNS.search(str(error)):
      return True
    error = error.__cause__
  return False
