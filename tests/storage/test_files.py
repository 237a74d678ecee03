"""Files that are read: what is not as expected is refused, and nothing hangs."""

import json
import os
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest

from depthprune.storage import directory, files
from depthprune.storage.files import CheckpointError, at_least


class Part(TypedDict):
  name: str
  at: list[Annotated[float, at_least(0)]]
  open: NotRequired[bool | None]


class Whole(TypedDict):
  parts: dict[str, Part]
  kind: Literal['a', 'b']
  size: tuple[int, int]
  more: NotRequired[Any]


GOOD = {
  'parts': {'x': {'name': 'x', 'at': [0, 1.5], 'open': None}},
  'kind': 'b',
  'size': [3, 4],
}


def changed(**parts):
  return {**GOOD, 'parts': {'x': {**GOOD['parts']['x'], **parts}}}


@pytest.mark.parametrize(
  ('values', 'said'),
  [
    ([], 'it.json: expected an object, got []'),
    ({**GOOD, 'kind': 'c'}, "kind: expected 'a' or 'b', got 'c'"),
    ({**GOOD, 'kind': True}, "kind: expected 'a' or 'b', got True"),
    ({**GOOD, 'size': [3]}, r'size: expected a list of 2, got [3]'),
    ({**GOOD, 'size': [3, True]}, r'size[1]: expected a whole number, got True'),
    ({**GOOD, 'size': [3, 2**64]}, r'size[1]: expected a whole number, got 18446744'),
    ({**GOOD, 'bigger': 1}, "expected entries kind, more, parts, size, got 'bigger'"),
    ({'kind': 'a', 'size': [1, 2]}, 'parts: expected an object, got no such entry'),
    (changed(name=3), 'parts.x.name: expected a string, got 3'),
    (changed(open='no'), "parts.x.open: expected true or false or null, got 'no'"),
    (changed(at=[1, -2]), r'parts.x.at[1]: expected a number of at least 0, got -2'),
    (changed(at=[float('nan')]), r'parts.x.at[0]: expected a finite number'),
    (changed(at=[10**400]), r'parts.x.at[0]: expected a finite number'),
    (changed(at='1'), "parts.x.at: expected a list, got '1'"),
  ],
)
def test_the_entry_the_expected_and_the_got_are_named(tmp_path, values, said):
  path = tmp_path / 'it.json'
  path.write_text(json.dumps(values))
  with pytest.raises(CheckpointError) as error:
    files.read_json(path, Whole, CheckpointError)
  assert said in str(error.value)
  assert str(error.value).startswith(str(path)) and len(str(error.value)) < 400


def test_what_is_as_expected_is_returned(tmp_path):
  path = tmp_path / 'it.json'
  values = {**GOOD, 'more': {'anything': [float('inf'), None]}}
  path.write_text(json.dumps(values))
  assert files.read_json(path, Whole, CheckpointError) == values
  (tmp_path / 'link.json').symlink_to(path)
  assert files.read_json(tmp_path / 'link.json', Whole, CheckpointError) == values


@pytest.mark.parametrize('levels', [files.DEEPEST + 1, 100_000])
def test_nesting_is_bounded(tmp_path, levels):
  path = tmp_path / 'it.json'
  path.write_text('[' * levels + ']' * levels)
  with pytest.raises(CheckpointError, match='expected 64 levels at most, got more'):
    files.read_json(path, Any, CheckpointError)


def test_only_a_regular_file_is_opened(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  (tmp_path / 'endless').symlink_to('/dev/zero')
  (tmp_path / 'nowhere').symlink_to(tmp_path / 'gone')
  for name, what in {
    'pipe': 'a pipe or device',
    'endless': 'a pipe or device',
    'nowhere': 'none',
    'absent': 'none',
    '.': 'a folder',
  }.items():
    with pytest.raises(CheckpointError, match=f'expected a file, got {what}'):
      files.read_json(tmp_path / name, Any, CheckpointError)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
  with (tmp_path / 'it.json').open('wb') as file:
    file.truncate(files.LARGEST + 1)
  with pytest.raises(CheckpointError, match='expected at most 268435456 bytes'):
    files.read_json(tmp_path / 'it.json', Any, CheckpointError)


@pytest.mark.parametrize(
  'text', [b'', b'{', b'\xff\xfe{}x', b'1' * 5000, b'{"a": nan}']
)
def test_what_is_no_json_is_refused(text):
  with pytest.raises(CheckpointError, match='expected JSON'):
    files.parsed(text, Any, 'it.json', CheckpointError)


def test_links_beside_a_file_are_replaced_and_not_followed(tmp_path):
  outside = tmp_path / 'outside'
  outside.write_text('years of work')
  run = tmp_path / 'run'
  run.mkdir()
  for name in ('it.partial', 'it.json'):
    (run / name).symlink_to(outside)
  directory.write(run / 'it.json', {'a': 1})
  assert directory.read(run / 'it.json') == {'a': 1}
  (run / '.lock').symlink_to(outside)
  with pytest.raises(directory.PathError), directory.held(run):
    pass
  assert outside.read_text() == 'years of work'


def test_a_run_file_of_another_kind_is_as_one_that_is_damaged(tmp_path):
  (tmp_path / 'it.json').write_text('{"kind": 3}')
  with pytest.warns(
    UserWarning, match='it.json: .*not looked at|not looked at: .*it.js'
  ):
    assert directory.read(tmp_path / 'it.json', Whole) is None
