"""Texts to write: where they are from, how they are divided, packed and ordered."""

import jax
import numpy as np
import pytest

from depthprune.data import corpus
from depthprune.data.dataset import DataError
from depthprune.data.text import TextSource

tokenizers = pytest.importorskip('tokenizers')
TEXTS = [f'text {i} says ' + 'abcdefghij'[i % 10] * 20 for i in range(40)]


def characters(end='<|endoftext|>'):
  """A tokenizer with a token for each character."""
  letters = sorted({*''.join(TEXTS)} | {'\n'})
  vocab = {token: i for i, token in enumerate([end, *letters])}
  made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
  made.add_special_tokens([end])
  return made


def texts(test=0) -> TextSource:
  read = lambda split, rows: ([TEXTS[i] for i in rows], np.zeros(len(rows), np.int32))
  return TextSource(len(TEXTS), test, False, 1, (), ('train',), read)


def packed(**more) -> corpus.Corpus:
  return corpus.packed('texts', texts(), characters(), 64, length=16, **more)


def test_rows_are_texts_one_after_the_other_and_what_follows():
  made, tokenizer = packed(), characters()
  for split in (made.train, made.held_out, made.test):
    np.testing.assert_array_equal(split['image'][:, 1:], split['label'][:, :-1])
    np.testing.assert_array_equal(split['image'][1:, 0], split['label'][:-1, -1])
  joined = tokenizer.decode(made.train['image'].ravel(), skip_special_tokens=False)
  whole = joined.replace(' ', '').split('<|endoftext|>')[:-1]
  assert {*whole} <= {text.replace(' ', '') for text in TEXTS}


def test_the_first_of_the_known_ends_is_taken_though_its_number_is_0():
  tokenizer = characters()  # as that of SmolLM2, which has both
  tokenizer.add_special_tokens(['<|im_end|>'])
  made = corpus.packed('texts', texts(), tokenizer, 64, length=16)
  assert tokenizer.token_to_id('<|endoftext|>') == 0
  assert np.any(made.train['image'] == 0)
  assert not np.any(made.train['image'] == tokenizer.token_to_id('<|im_end|>'))


def test_no_text_is_in_two_splits_and_the_seed_chooses():
  tokenizer, seen = characters(), []
  made = packed()
  for split in (made.train, made.held_out, made.test):
    joined = tokenizer.decode(split['image'].ravel(), skip_special_tokens=False)
    seen.append({*joined.replace(' ', '').split('<|endoftext|>')[1:-1]})
  assert seen[0] and not seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2]
  other = packed(seed=1)
  np.testing.assert_array_equal(other.test['image'], made.test['image'])
  assert other.train['image'].shape != made.train['image'].shape or np.any(
    other.train['image'] != made.train['image']
  )


def test_an_epoch_has_every_row_once_and_another_order_each_time():
  made = packed()
  n = len(made.train['image'])
  at = made.sampler(jax.random.key(0), n, augment=True).stepwise()
  one, two = (np.asarray(at(made.on_device(), step)['image']) for step in (0, 1))
  assert sorted(map(bytes, one)) == sorted(map(bytes, made.train['image']))
  assert sorted(map(bytes, two)) == sorted(map(bytes, one)) and np.any(one != two)
  plain = made.sampler(jax.random.key(0), n, augment=False)
  np.testing.assert_array_equal(plain(made.train, 1)['image'], two)


@pytest.mark.parametrize('size', [1, 4, 1000])
def test_evaluation_sees_every_row_once(size):
  made = packed()
  batches = [*made.batches(made.test, size)]
  assert all(len(batch['image']) == size for batch in batches)
  rows = [row for b in batches for row, w in zip(b['image'], b['weight']) if w]
  np.testing.assert_array_equal(rows, made.test['image'])


def test_files_and_folders(tmp_path):
  (tmp_path / 'a.txt').write_text('first\n\nsecond\n\n\n')
  (tmp_path / 'in').mkdir()
  (tmp_path / 'in' / 'b.md').write_text('third\n\nwhole')
  (tmp_path / 'in' / 'c.bin').write_bytes(b'\xff')
  for hidden in ('.checkpoints', 'folder.txt'):
    (tmp_path / hidden).mkdir()
  (tmp_path / '.checkpoints' / 'a.txt').write_text('first')
  read = lambda path: (made := corpus.source(str(path), ('.txt', '.md'))).read(
    'train', np.arange(made.train)
  )[0]
  assert read(tmp_path / 'a.txt') == ['first', 'second']
  assert read(tmp_path) == ['first\n\nsecond\n\n\n', 'third\n\nwhole']


def test_texts_are_utf_8_wherever_they_are_read(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_bytes('\ufeffé 日本'.encode())
  found = corpus.source(str(path), ('.txt',)).read('train', np.arange(1))
  assert found[0] == ['é 日本']


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (None, 'cannot be read as text .No such file'),
    (' \n\n ', 'there is no text in it'),
  ],
)
def test_there_is_nothing_to_read(content, message, tmp_path):
  path = tmp_path / 'a.txt'
  if content is not None:
    path.write_text(content)
  with pytest.raises(DataError, match=message):
    corpus.source(str(path), ('.txt',))


def test_a_folder_of_other_files(tmp_path):
  (tmp_path / 'a.png').write_bytes(b'')
  with pytest.raises(DataError, match=r'has no file of text \(\.txt, \.md\)'):
    corpus.source(str(tmp_path), ('.txt', '.md'))


@pytest.mark.parametrize(
  ('vocab', 'length', 'message'),
  [
    (4, 16, 'has a token number .*, the network 4 tokens: pass the tokenizer that'),
    (64, 10_000, 'expected more than 10000 tokens, got'),
  ],
)
def test_what_does_not_fit(vocab, length, message):
  with pytest.raises(DataError, match=message):
    corpus.packed('texts', texts(), characters(), vocab, length=length)


def test_one_long_text_is_not_divided():
  few = texts()._replace(train=1)
  with pytest.raises(DataError, match=r'held-out split has 0 whole texts \(para'):
    corpus.packed('texts', few, characters(), 64, length=16)


def test_a_set_without_training_texts():
  with pytest.raises(DataError, match="expected a split 'train', got"):
    corpus.packed('texts', texts()._replace(train=0, test=5), characters(), 64)
