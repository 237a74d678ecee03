"""SIGTERM, as a machine sends it before it is taken away: save, say so, end."""

import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Preempted(BaseException):
  """The run was told to end, and did; no `except Exception` takes it for a failure."""


@contextmanager
def noticed() -> Iterator[threading.Event]:
  """An Event that SIGTERM sets, instead of what it would do.

  What nobody has acted on when the block ends is delivered then. Off the main thread,
  where Python has no signals, the Event is never set.
  """
  told = threading.Event()
  with _handled(lambda *_: told.set()):
    yield told
  if told.is_set():
    signal.raise_signal(signal.SIGTERM)


@contextmanager
def ends() -> Iterator[None]:
  """Within, SIGTERM raises Preempted wherever the program is."""

  def end(*_):
    raise Preempted('stopped by SIGTERM; the same command continues from here')

  with _handled(end):
    yield


@contextmanager
def _handled(handler: Callable) -> Iterator[None]:
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = signal.signal(signal.SIGTERM, handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def speaks(error: Exception) -> bool:
  """Whether the message says it all, or the traceback is needed to find a mistake.

  Errors of our own classes, and a ValueError that our own code raises, name what was
  given, what was expected and what to do. What comes from below is a mistake of ours.
  """
  if type(error).__module__.split('.')[0] == 'depthprune':
    return True
  frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
  raised_in = frames[-1].f_globals.get('__name__', '') if frames else ''
  return isinstance(error, ValueError) and raised_in.split('.')[0] == 'depthprune'
