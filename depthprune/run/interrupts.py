"""Ctrl-C and SIGTERM: a run saves, says so, and ends; a second signal ends it at once.

The first signal is noted where the context is `deferred`, for a loop that looks at it,
and ends the process where it is `ending`. A later signal does what it would do outside
the context. Nothing is raised in a handler, which interrupts any code: in a destructor
or a callback of the garbage collector, an exception is printed and lost.

The file imports little, as a program should handle signals before it imports the rest.
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

NAMES = {signal.SIGINT: 'Ctrl-C', signal.SIGTERM: 'SIGTERM'}
# `timeout`, `uv run` and others pass a signal on to a process that received it too.
SAME_S = 1.0
SHOW_CURSOR = b'\x1b[?25h'  # which a progress bar hides


class Preempted(BaseException):
  """SIGTERM ended the run; no `except Exception` may take it for a failure."""


class Request:
  """What a loop was asked to do.

  Attributes:
    signal: the signal that asked it to stop, or None.
  """

  signal: int | None = None

  def __bool__(self) -> bool:
    return self.signal is not None


def stopped(
  number: int, then: str = '', before: str = ''
) -> KeyboardInterrupt | Preempted:
  """Returns the exception for a signal: `before` + 'stopped by Ctrl-C' + `then`."""
  kind = KeyboardInterrupt if number == signal.SIGINT else Preempted
  return kind(f'{before}stopped by {NAMES[signal.Signals(number)]}{then}')


def code(error: BaseException) -> int:
  """Returns the exit code of a process that such an exception ends: 130 or 143."""
  return 128 + (signal.SIGTERM if isinstance(error, Preempted) else signal.SIGINT)


@contextmanager
def deferred() -> Iterator[Request]:
  """Makes a signal set the Request, the context's value, and do nothing else.

  A signal on which the block has not acted is delivered when it ends.
  """
  request = Request()

  def note(number: int) -> None:
    request.signal = number

  with _first(note):
    yield request
  if request.signal is not None:
    signal.raise_signal(request.signal)


@contextmanager
def ending(then: Callable[[], str] = str) -> Iterator[None]:
  """Makes a signal end the process with one line, 'stopped by Ctrl-C' + then()."""

  def end(number: int) -> None:
    error = stopped(number, then())
    leave(code(error), f'{error}\n')

  with _first(end):
    yield


def leave(code: int, message: str = '') -> NoReturn:
  """Ends an interrupted process at once, without what Python does at an exit.

  Python would wait for threads, and then take the interpreter apart while those of XLA,
  orbax and TensorFlow still run, which has ended in segmentation faults. Nothing is
  lost: what was printed is flushed, and files are written so that a process may be
  killed at any moment.
  """
  with suppress(OSError, RuntimeError, ValueError):  # broken, interrupted or closed
    sys.stdout.flush()
  with suppress(OSError):
    if os.isatty(1):
      os.write(1, SHOW_CURSOR)
    os.write(2, message.encode())
  # The functions of a package are there when all of it is imported.
  children = getattr(sys.modules.get('multiprocessing'), 'active_children', tuple)
  for child in children():
    child.terminate()
  os._exit(code)


def ignore() -> None:
  """Makes signals do nothing from now on: the process ends by itself in a moment."""
  for number in NAMES:
    signal.signal(number, signal.SIG_IGN)


@contextmanager
def _first(act: Callable[[int], None]) -> Iterator[None]:
  """Calls act(number) at the first signal; later ones are as if outside the context.

  Those within a second are the same one, passed on. A signal that the process was
  started to ignore, as by `nohup` or by a shell in the background, stays ignored. Off
  the main thread, where Python has no signals, nothing changes.
  """
  since: float | None = None

  def handle(number: int, frame: FrameType | None) -> None:
    nonlocal since
    del frame
    now = time.monotonic()
    if since is None:
      since = now
      act(number)
    elif now - since > SAME_S:
      restore()
      signal.raise_signal(number)

  def restore() -> None:
    for number, handler in before.items():
      if signal.getsignal(number) is handle:
        signal.signal(number, handler)

  before = {}
  if threading.current_thread() is threading.main_thread():
    found = {number: signal.getsignal(number) for number in NAMES}
    before = {n: h or signal.SIG_DFL for n, h in found.items() if h != signal.SIG_IGN}
  try:
    for number in before:
      signal.signal(number, handle)
    yield
  finally:
    restore()


def is_explained(error: Exception) -> bool:
  """Whether an error's message is enough for the user, without a traceback.

  Errors of our own classes, and a ValueError raised in our own code, say what was
  expected and what to do. An error from another package is a mistake in ours.
  """
  if type(error).__module__.split('.')[0] == 'depthprune':
    return True
  frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
  raised_in = frames[-1].f_globals.get('__name__', '') if frames else ''
  return isinstance(error, ValueError) and raised_in.split('.')[0] == 'depthprune'
