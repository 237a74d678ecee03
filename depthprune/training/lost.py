"""One of several processes dies: the others say so and end, and none waits for ever.

Where a connection breaks, the next sum over all devices fails: an exception. Where a
process is silent, or the first one is gone, jax ends the others from a thread of C++,
in which nothing of ours can speak. So a child of every process does: it waits for the
end of its parent, however that comes.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import jax

from depthprune.training import hosts

QUIET = '-'
# Waits for the end of its input, which is that of the process that holds it.
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
LAST_WORDS_S = 2  # jax ends all processes at once when the first is gone


class HostLost(Exception):
  """Another process of the run is gone; what was saved is whole."""


@contextmanager
def watched() -> Iterator[None]:
  """Within, the end of a process that another one's death brings is explained.

  Raises: HostLost for the errors that broken connections raise. No further work of
    several processes is possible then: leave by `leave`.
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
    with suppress(OSError):  # should it be gone itself
      witness.stdin.write(last)
      witness.stdin.flush()
    if last == QUIET:  # else it speaks when this process has ended
      witness.communicate()


def leave(code: int) -> None:
  """Ends this process without waiting for those that are gone."""
  sys.stdout.flush()
  sys.stderr.flush()
  if hosts.writes():
    time.sleep(LAST_WORDS_S)
  os._exit(code)


def _message() -> str:
  index, count = jax.process_index(), jax.process_count()
  return (
    f'stopped: process {index} of 0 to {count - 1} cannot go on. Another process of '
    f'the run is gone, or gave no sign of life for {hosts.SILENCE_S} s, or this one '
    'was killed: see what the others said. What was saved is whole: the same command, '
    'on all hosts, continues from there.'
  )


def _is_loss(error: BaseException | None) -> bool:
  """Whether it comes from below, and speaks of other processes."""
  while error is not None:
    ours = type(error).__module__.split('.')[0] == 'depthprune'
    if not ours and SIGNS.search(str(error)):
      return True
    error = error.__cause__
  return False
