"""The program: `depthprune`, or `python -m depthprune`. It ends by signals in one line.

They are handled before anything else is imported, which takes seconds.
"""

import sys

from depthprune.run import interrupts


def main() -> None:
  """Runs the command of this process, and ends the process."""
  with interrupts.ending():
    from depthprune import cli

    try:
      code = cli.main()
    finally:
      interrupts.ignore()
    if code in (cli.INTERRUPTED, cli.TERMINATED):
      interrupts.leave(code)
    sys.exit(code)


if __name__ == '__main__':
  main()
