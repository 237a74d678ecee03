"""Which errors speak to the reader, and which are mistakes of ours."""

import traceback


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
