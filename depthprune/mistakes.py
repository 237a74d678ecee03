"""What was wrong with the words of a command line, for whoever typed them.

The parser decides whether words are a command. Where it refuses them, `explained` says
why: it reads the options from the dataclasses that the parser reads too, and finds the
one that is wrong by having each of them parsed by itself.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import (
  Annotated,
  Any,
  Literal,
  NamedTuple,
  Union,
  get_args,
  get_origin,
  get_type_hints,
)

import tyro

from depthprune import methods
from depthprune.run.config import OPTIONS, Config, ConfigError

WITH_METHOD = 'run', 'sweep'
_POSITIONAL = get_args(tyro.conf.Positional[int])[1]
_KINDS = {int: 'a whole number', float: 'a number', Path: 'a path', str: 'a word'}


class Mistake(ValueError):
  """Words that are no command; the message says why, in a few lines."""


class Syntax(NamedTuple):
  """What may follow a command, and its method if it has one.

  Attributes:
    usage: the words before the options, such as 'run gates' or 'report'.
    options: the type of every option, by its name: 'finetune-epochs'.
    positional: name and type of what is named without an option, if anything is.
  """

  usage: str
  options: dict[str, Any]
  positional: tuple[str, Any] | None = None


class Given(NamedTuple):
  """An option as it was typed, and the words that were meant for it."""

  typed: str
  values: list[str]

  @property
  def name(self) -> str:
    """The option's name, as the parser compares it."""
    return self.typed.lstrip('-').replace('_', '-')


def explained(
  words: Sequence[str],
  commands: Mapping[str, type],
  error: Callable[[Sequence[str]], BaseException | None],
) -> Mistake:
  """Returns what is wrong with words that the parser refused.

  Args:
    words: what follows `depthprune` on the command line.
    commands: the dataclass of every command.
    error: parses words, and returns the exception that refused them, or None.
  """
  if not words or words[0] not in commands:
    return _unknown_name('command', words, [*commands], '')
  if words[0] in WITH_METHOD:
    names = sorted(map(methods.word, methods.names()))
    if len(words) < 2 or words[1] not in names:
      return _unknown_name('method', words[1:], names, f'{words[0]} ')
  syntax = syntax_of(words, commands)
  loose, given = divided(words[len(syntax.usage.split()) :], syntax)
  said = next(_faults(loose, given, syntax, error), None)
  if said is None:
    whole = _config_error(error(words))
    said = 'these words are not understood' if whole is None else named(whole, given)
  return Mistake(f'{said}\n  see: depthprune {syntax.usage} --help')


def named(message: str, given: Iterable[Given]) -> str:
  """Returns a message about fields, in which they have the names of the options.

  A message begins with the fields that it is about: 'target: expected ...', or 'mixup,
  randaugment: leave them out'. Those that were typed are shown as they were typed.
  """
  typed = {each.name.partition('=')[0]: each.typed.partition('=')[0] for each in given}
  head = re.match(r"(\w+)((?:, \w+)*)(?=[:=]| ['/])", message)
  fields = head[0].split(', ') if head else []
  names = [_option(field) for field in fields]
  if not any(name in typed or f'no-{name}' in typed for name in names):
    return message
  shown = ', '.join(typed.get(name, f'--{name}') for name in names)
  return f'{shown}{message[len(head[0]) :]}' if head else message


def divided(
  words: Sequence[str], syntax: Syntax | None = None
) -> tuple[list[str], list[Given]]:
  """Returns the words without an option, and the options with their values.

  Values that an option cannot have stay with it, unless the command takes words without
  an option, to which they then belong.
  """
  loose: list[str] = []
  given: list[Given] = []
  for word in words:
    if re.match(r'--?[A-Za-z]', word):
      given.append(Given(word, []))
    elif given and not (syntax and syntax.positional and _full(given[-1], syntax)):
      given[-1].values.append(word)
    else:
      loose.append(word)
  return loose, given


def _full(option: Given, syntax: Syntax) -> bool:
  """Whether all words after an option belong to something else."""
  if '=' in option.typed:
    return True
  hint = syntax.options.get(option.name, bool)
  return not _is_list(hint) and len(option.values) >= (hint is not bool)


def syntax_of(words: Sequence[str], commands: Mapping[str, type]) -> Syntax:
  """Returns what may follow a command, and a method if the words have one."""
  command = words[0]
  positional, options = None, {}
  for name, hint in _hints(commands[command]).items():
    if _POSITIONAL in getattr(hint, '__metadata__', ()):
      positional = name.upper(), _bare(hint)
    else:
      options[name.replace('_', '-')] = _bare(hint)
  if command not in WITH_METHOD:
    return Syntax(command, options, positional)
  del options['config']
  method = words[1] if len(words) > 1 else ''
  known = {methods.word(name): name for name in methods.names()}
  if method not in known:
    return Syntax(command, options)
  return Syntax(f'{command} {method}', options | _of_method(known[method]))


def _of_method(name: str) -> dict[str, Any]:
  """Returns the types of a run's options, and of those of its method."""
  hints = _hints(Config) | _hints(methods.recipe(name).options)
  del hints['options']
  return {_option(field): _bare(hint) for field, hint in hints.items()}


def _option(field: str) -> str:
  """Returns the option of a field, without the dashes before it."""
  return OPTIONS.get(field, field).replace('_', '-')


def _hints(kind: type) -> dict[str, Any]:
  fields = {field.name for field in dataclasses.fields(kind)}
  hints = get_type_hints(kind, include_extras=True)
  return {name: hint for name, hint in hints.items() if name in fields}


def _bare(hint: Any) -> Any:
  """Returns a type without its annotations, and without None."""
  if get_origin(hint) is Annotated:
    return _bare(get_args(hint)[0])
  if get_origin(hint) in (Union, types.UnionType):
    several = [each for each in get_args(hint) if each is not type(None)]
    return _bare(several[0]) if len(several) == 1 else hint
  return hint


def _is_list(hint: Any) -> bool:
  return get_origin(hint) is tuple


def _expected(hint: Any) -> str:
  """Returns the values of a type in words."""
  if get_origin(hint) is Literal:
    return ' or '.join(map(str, get_args(hint)))
  if get_origin(hint) in (Union, types.UnionType):
    return ' or '.join(map(_expected, get_args(hint)))
  if _is_list(hint):
    return f'{_expected(_bare(get_args(hint)[0])).removeprefix("a ")}s'
  return _KINDS.get(hint, 'a value')


def _unknown_name(
  kind: str, typed: Sequence[str], known: Sequence[str], before: str
) -> Mistake:
  """Returns what to say where the first word is no command, or no method."""
  got = f'got {typed[0]}' if typed else 'got none'
  if {*typed} & {*known}:
    got += f'; the {kind} comes before its options'
  nearest = difflib.get_close_matches(typed[0], known, 1, cutoff=0.5) if typed else ()
  lines = [f'expected a {kind}: {", ".join(known)}; {got}']
  lines += [f'  nearest: {name}' for name in nearest]
  return Mistake('\n'.join([*lines, f'  see: depthprune {before}--help']))


def _faults(
  loose: Sequence[str],
  given: Sequence[Given],
  syntax: Syntax,
  error: Callable[[Sequence[str]], BaseException | None],
) -> Iterator[str]:
  """Yields what is wrong with single words, the worst first."""
  yield from (_unknown_option(o, syntax) for o in given if not _is_known(o, syntax))
  base = syntax.usage.split()
  if syntax.positional is None and loose:
    yield f'{loose[0]}: expected an option, got a word by itself'
  if syntax.positional is not None:
    name, hint = syntax.positional
    one = not _is_list(hint)
    if one and len(loose) != 1:
      got = ' '.join(loose) or 'none'
      yield f'{syntax.usage}: expected one {name}, got {got}'
    base += ['.'] * one
  for option in given:
    refused = error([*base, option.typed, *option.values])
    if refused is not None:
      yield _refused(option, syntax, refused)


def _is_known(option: Given, syntax: Syntax) -> bool:
  name = option.name.partition('=')[0]
  return option.typed.startswith('--') and (
    name in syntax.options or syntax.options.get(name.removeprefix('no-')) is bool
  )


def _unknown_option(option: Given, syntax: Syntax) -> str:
  """Says that there is no such option, and which it could be, or whose it is."""
  name = option.name.partition('=')[0]
  lines = [f'{option.typed}: there is no such option of `{syntax.usage}`']
  if nearest := _nearest(name, syntax.options):
    lines.append(f'  nearest: {", ".join(f"--{each}" for each in nearest)}')
  elif syntax.usage.split()[0] in WITH_METHOD:
    others = [
      methods.word(each) for each in methods.names() if name in _of_method(each)
    ]
    lines += [f'  it is an option of: {", ".join(others)}'] * bool(others)
  return '\n'.join(lines)


def _nearest(name: str, options: Iterable[str]) -> list[str]:
  """Returns the options that contain the words of a name, or that are spelt like it."""
  parts = [each for each in options if {*name.split('-')} <= {*each.split('-')}]
  return parts[:3] or difflib.get_close_matches(name, [*options], 3, cutoff=0.7)


def _refused(option: Given, syntax: Syntax, refused: BaseException) -> str:
  """Says why an option that there is was refused with its values."""
  name, _, value = option.typed.partition('=')
  hint = syntax.options.get(option.name.partition('=')[0], bool)
  got = ' '.join([value] * bool(value) + option.values)
  if message := _config_error(refused):
    return named(re.sub('^value(?=:)', name.lstrip('-'), message), [option])
  if hint is bool:
    plain = option.name.partition('=')[0].removeprefix('no-')
    return f'{name}: expected --{plain} or --no-{plain} and no value, got {got}'
  if not got:
    return f'{name}: expected {_expected(hint)}, got nothing'
  if len(option.values) > 1 and not _is_list(hint):
    return f'{name}: expected one value, got {got}'
  return f'{name}: expected {_expected(hint)}, got {got}'


def _config_error(error: BaseException | None) -> str | None:
  """Returns our own words in what an exception was raised for, if there are any."""
  while error is not None:
    if isinstance(error, ConfigError):
      return str(error)
    error = error.__cause__ or error.__context__
  return None
