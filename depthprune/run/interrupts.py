"""SIGTERM, which machines send before they are taken away: save, say so, and end."""

import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Preempted(BaseException):
  """SIGTERM ended the run; no `except Exception` may take it for a failure."""


@contextmanager
def deferred() -> Iterator[threading.Event]:
  """Makes SIGTERM set an Event, the context's value, instead of ending the process.

  A signal on which the block has not acted is delivered when it ends. Off the main
  thread, where Python has no signals, the Event is never set.
  """
  stopping = threading.Event()
  with _handled(lambda *_: stopping.set()):
    yield stopping
  if stopping.is_set():
    signal.raise_signal(signal.SIGTERM)


@contextmanager
def raised() -> Iterator[None]:
  """Makes SIGTERM raise Preempted, wherever the program is within the context."""

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
