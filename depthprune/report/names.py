"""Names of layers as a person would say them."""

import re
from collections import Counter
from collections.abc import Iterable

ORDINALS = 'first second third fourth fifth sixth'.split()
OPERATIONS = {'conv': 'convolution', 'norm': 'normalisation', 'dense': 'dense layer'}
WORDS = {
  **OPERATIONS,
  'mlp': 'MLP',
  'query': 'queries',
  'key': 'keys',
  'value': 'values',
  'out': 'output',
  'up': 'up projection',
  'down': 'down projection',
  'gate': 'gate projection',
}


def spoken(name: str) -> str:
  """Returns `stage 3, block 2, first convolution` for `stage3/block2/conv1:3`.

  Numbers are those of the program, so that both names can be matched by eye.

  Args:
    name: name of a group or a branch, or path of an array. A word alone, such as the
      name of an exit, stays as it is.
  """
  path, _, axis = name.partition(':')
  path = re.sub(r'^(params/)?(trunk/)?|/(kernel|weight)(/value)?$', '', path)
  parts = re.sub(r'(layer\d+)/dense$', r'\1', path).split('/')
  if parts == [name]:
    return name
  said: list[str] = []
  for i, part in enumerate(parts):
    word = _word(part)
    # 'stem convolution', but 'block 2, first convolution'.
    is_of_last = i and not re.search(r'\d', parts[i - 1]) and part in WORDS
    if is_of_last:
      said[-1] += f' {word}'
    else:
      said.append(word)
  if parts[-2:-1] == ['attention']:  # an array [input, head, position in the head]
    if axis == '1':
      said[-1] = 'attention heads'
    elif axis == '2':  # queries may be [input, group, head of the group, position]
      said[-1] += ', axis 2' if parts[-1] == 'query' else ', size of a head'
  return ', '.join(said)


def spoken_apart(names: Iterable[str]) -> dict[str, str]:
  """Returns {name: as a person would say it}, or itself where two would be the same."""
  said = {name: spoken(name) for name in names}
  times = Counter(said.values())
  return {name: text if times[text] == 1 else name for name, text in said.items()}


def _word(part: str) -> str:
  numbered = re.fullmatch(r'([A-Za-z]+)_?(\d+)', part)
  if not numbered:
    return WORDS.get(part, part.replace('_', ' '))
  word, number = numbered[1], int(numbered[2])
  if word in OPERATIONS and 0 < number <= len(ORDINALS):
    return f'{ORDINALS[number - 1]} {OPERATIONS[word]}'
  return f'{word} {number}'
