"""Writes the README's tables from the committed result files; nothing is typed.

python -m experiments.tables
"""

import re

from experiments.auxiliary.table import auxiliary
from experiments.auxiliary.table import composed as auxiliary_composed
from experiments.bench.table import (
  auxiliary_paths,
  bench,
  cascades,
  depth_methods,
  milliseconds,
  training,
)
from experiments.found import HERE
from experiments.implosion.table import one_shot, retrained
from experiments.netcut.table import netcut
from experiments.run_all import progress
from experiments.sidenet.table import composed, sidenet
from experiments.trainable_gates.table import compared, digits

README = HERE.parent / 'README.md'
MARKED = re.compile(r'(<!-- results:.*?-->\n).*?(<!-- end of results -->)', re.DOTALL)


def text() -> str:
  """What stands between the README's markers."""
  return '\n\n'.join(
    part()
    for part in (
      digits,
      compared,
      bench,
      milliseconds,
      training,
      netcut,
      one_shot,
      retrained,
      depth_methods,
      sidenet,
      composed,
      cascades,
      auxiliary,
      auxiliary_composed,
      auxiliary_paths,
      progress,
    )
  )


if __name__ == '__main__':
  found = text()
  README.write_text(
    MARKED.sub(lambda m: f'{m[1]}\n{found}\n\n{m[2]}', README.read_text())
  )
