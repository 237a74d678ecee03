"""`arch`: the flat description of a pruned network, read by every model.

    {'stage1/block0/conv1': 9, 'stage1/block1/branch': 0, 'exit/early': 0}

says that the kernel `params/stage1/block0/conv1/kernel` has 9 outputs, that the branch
of `stage1/block1` is gone, and that the exit `early` is dropped. What is not mentioned
is as the model's fields say. In a scanned stack the value of `branch` counts the layers
that are left, and is 0 for a branch that is gone in all of them. What is no last axis
of a kernel has the name of its group: 'block0/attention/query:1' counts heads.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

Arch = Mapping[str, int]
T = TypeVar('T')


def complete(arch: Arch, widths: Arch, model: str) -> dict[str, int]:
  """`widths`, the full network's own numbers, with those in `arch` in their place.

  Args:
    arch: what differs from the full network.
    widths: every key that `arch` may hold, with its value in the full network.
    model: the model's name, for errors.

  Raises:
    ValueError: a key that the model does not have, or a value out of range.
  """
  for key, value in arch.items():
    if key not in widths:
      raise ValueError(
        f'{model}: arch has no key {key!r}; keys are paths of kernels and branches, '
        f'and exit/NAME. {nearest(key, widths)}'
      )
    least = 0 if _removable(key) else 1
    if value not in range(least, widths[key] + 1):
      hint = '' if _removable(key) else '; to remove a unit, set its branch to 0'
      raise ValueError(
        f'{model}: arch[{key!r}] is {value!r}; expected an integer from {least} to '
        f'{widths[key]}{hint}'
      )
  return {**widths, **arch}


def within(arch: Arch, name: str) -> dict[str, int]:
  """The part of `arch` beneath the submodule `name`, with keys relative to it."""
  start = f'{name}/'
  return {k[len(start) :]: v for k, v in arch.items() if k.startswith(start)}


def beneath(entries: Mapping[str, T], name: str) -> dict[str, T]:
  """The inverse of `within`: entries of the submodule `name`, keyed from its parent."""
  return {f'{name}/{key}': value for key, value in entries.items()}


def nearest(name: str, names: Iterable[str]) -> str:
  """A sentence for an error: the names most like `name`, or all of them if few."""
  names = sorted(names)
  close = get_close_matches(name, names, n=3, cutoff=0.4)
  if close:
    return f'Nearest: {", ".join(close)}.'
  shown = ', '.join(names[:8])
  return f'There are: {shown}{", …" if len(names) > 8 else ""}.'


def _removable(key: str) -> bool:
  return key.startswith('exit/') or key.rsplit('/', 1)[-1] == 'branch'
