"""`arch`: the flat description of a pruned network that every model reads.

    {'stage1/block0/conv1': 9, 'stage1/block1/branch': 0, 'exit/early': 0}

This one says that the kernel `params/stage1/block0/conv1/kernel` has 9 outputs, that
the branch of `stage1/block1` is removed, and that the exit `early` is dropped. Whatever
is not mentioned is as the model's fields say. In a scanned stack the value of `branch`
is the number of layers that are left, 0 if the branch is removed from all of them. A
size that is not the last axis of a kernel is named after its group:
'block0/attention/query:1' is the number of heads.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

Arch = Mapping[str, int]
T = TypeVar('T')


def complete(arch: Arch, widths: Arch, model: str) -> dict[str, int]:
  """Fills in the entries that `arch` leaves out with those of the full network.

  Args:
    arch: the entries in which the network differs from the full one.
    widths: every key that `arch` may hold, with its value in the full network.
    model: the model's name, for error messages.

  Returns:
    A value for every key of `widths`.

  Raises:
    ValueError: a key that the model does not have, or a value out of range.
  """
  for key, value in arch.items():
    if key not in widths:
      raise ValueError(
        f'{model}: arch has no key {key!r}; keys are paths of kernels and branches, '
        f'and exit/NAME. {nearest(key, widths)}'
      )
    removable = key.startswith('exit/') or key.rsplit('/', 1)[-1] == 'branch'
    least = 0 if removable else 1
    if value not in range(least, widths[key] + 1):
      hint = '' if removable else '; to remove a unit, set its branch to 0'
      raise ValueError(
        f'{model}: arch[{key!r}] is {value!r}; expected an integer from {least} to '
        f'{widths[key]}{hint}'
      )
  return {**widths, **arch}


def within(arch: Arch, name: str) -> dict[str, int]:
  """Returns the entries of the submodule `name`, with keys relative to it."""
  start = f'{name}/'
  return {k[len(start) :]: v for k, v in arch.items() if k.startswith(start)}


def beneath(entries: Mapping[str, T], name: str) -> dict[str, T]:
  """Prefixes entries of the submodule `name` with its name: the inverse of `within`."""
  return {f'{name}/{key}': value for key, value in entries.items()}


def nearest(name: str, names: Iterable[str]) -> str:
  """Writes the sentence of an error that suggests the names most like `name`."""
  names = sorted(names)
  close = get_close_matches(name, names, n=3, cutoff=0.4)
  if close:
    return f'Nearest: {", ".join(close)}.'
  shown = ', '.join(names[:8])
  return f'There are: {shown}{", …" if len(names) > 8 else ""}.'
