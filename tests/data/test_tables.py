"""Tables of a user's own: which column is what, and lines that are refused."""

import json

import pytest

from depthprune.data import tables
from depthprune.data.dataset import DataError


def table(tmp_path, content: str, name: str = 'mine.csv') -> str:
  (tmp_path / name).write_text(content, encoding='utf-8')
  return str(tmp_path / name)


@pytest.mark.parametrize(
  ('content', 'x', 'y'),
  [
    ('text,label\ngood,1\n"bad, very",0\n', ['good', 'bad, very'], [1, 0]),
    ('id,Sentence,label\n7,good,pos\n8,bad,neg\n', ['good', 'bad'], ['pos', 'neg']),
    ('\ufeffreview,opinion\ngood,1\nbad,2\n', ['good', 'bad'], [1, 2]),
    ('label,review\n1,good\n2,bad\n', ['good', 'bad'], [1, 2]),
    ('sentence1,sentence2,label\na,b,1\nc,d,0\n', [('a', 'b'), ('c', 'd')], [1, 0]),
    ('a,b,class\n1,2.5,x\n3,-4e1,y\n', [[1.0, 2.5], [3.0, -40.0]], ['x', 'y']),
    ('text,label\n1999,1\n2001,0\n', ['1999', '2001'], [1, 0]),
    ('a,target\n1,0\n2,1\n', [[1.0], [2.0]], [0, 1]),
  ],
)
def test_columns_are_found_by_their_names(tmp_path, content, x, y):
  assert tables.read(table(tmp_path, content)) == {'x_train': x, 'y_train': y}


def test_tabs_and_objects(tmp_path):
  assert tables.read(table(tmp_path, 'text\tlabel\na, b\t1\n', 'a.tsv')) == {
    'x_train': ['a, b'],
    'y_train': [1],
  }
  lines = [{'text': 'ü\n', 'label': 'x'}, {'label': 'y', 'text': 'b'}]
  content = '\n'.join(map(json.dumps, lines)) + '\n\n'
  assert tables.read(table(tmp_path, content, 'a.jsonl')) == {
    'x_train': ['ü\n', 'b'],
    'y_train': ['x', 'y'],
  }


def test_a_column_says_the_split(tmp_path):
  content = 'text,label,split\na,0,train\nb,1,Train\nc,1,val\nd,0,test\n'
  assert tables.read(table(tmp_path, content)) == {
    'x_train': ['a', 'b'],
    'y_train': [0, 1],
    'x_validation': ['c'],
    'y_validation': [1],
    'x_test': ['d'],
    'y_test': [0],
  }


@pytest.mark.parametrize(
  ('content', 'said'),
  [
    ('', 'expected rows, got none'),
    ('text,label\n', 'expected rows, got none'),
    ('a,b,c\n1,2,3\n', 'expected a column y or label.*got a, b, c'),
    ('label\n1\n', 'expected something beside label'),
    ('a,b,label\nx,y,1\n', 'expected a column text or sentence.*got a, b'),
    ('text,label\ngood,1\nbad\n', 'line 3: expected 2 columns.*fewer'),
    ('text,label\ngood,1,2\n', 'line 2: expected 2 columns.*more'),
    ('text,label\ngood,\n', 'line 2: expected a label'),
    ('text,label,split\ngood,1,now\n', 'line 2: expected a split train'),
  ],
)
def test_lines_that_cannot_be_read_are_named(tmp_path, content, said):
  with pytest.raises(DataError, match=said):
    tables.read(table(tmp_path, content))


@pytest.mark.parametrize(
  ('content', 'said'),
  [
    ('{"text": "a"\n', 'line 1: not JSON'),
    ('[1]\n', 'line 1: expected an object'),
    ('{"text": "a", "label": 1}\n{"text": "a"}\n', 'line 2: expected the columns'),
    ('{"text": "a", "label": null}\n', 'line 1: expected a label'),
  ],
)
def test_objects_that_cannot_be_read_are_named(tmp_path, content, said):
  with pytest.raises(DataError, match=said):
    tables.read(table(tmp_path, content, 'mine.jsonl'))


def test_another_encoding_is_refused(tmp_path):
  (tmp_path / 'mine.csv').write_bytes('text,label\nü,1\n'.encode('latin-1'))
  with pytest.raises(DataError, match=r'mine.csv: expected text in UTF-8'):
    tables.read(str(tmp_path / 'mine.csv'))
  with pytest.raises(DataError, match='no such file'):
    tables.read(str(tmp_path / 'none.csv'))
