"""Samples of text: held-out prompts, and the most probable tokens after them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.models import build
from depthprune.models.decoder import Decoder
from depthprune.run.config import default
from depthprune.run.samples import samples

tokenizers = pytest.importorskip('tokenizers')
MODEL = Decoder(
  vocab=30, positions=20, width=8, depth=2, heads=2, groups=1, size=4, inner=6
)
ROWS = np.random.default_rng(0).integers(0, 30, (7, 12)).astype(np.int32)


@pytest.fixture
def job(tmp_path):
  """Token 7 is the word '<7>'; texts of twelve tokens are held out."""
  made = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({f'<{i}>': i for i in range(30)}, '<0>')
  )
  made.save(str(tmp_path / 'tokenizer.json'))
  config = default('gates', tokenizer=str(tmp_path / 'tokenizer.json'), batch=2)
  images = SimpleNamespace(held_out={'image': ROWS})
  return SimpleNamespace(config=config, images=images)


def made(model=MODEL, seeds=(0, 1, 2)):
  network = model if isinstance(model, Decoder) else MODEL
  variables = [network.init(jax.random.key(seed), ROWS[:, :6]) for seed in seeds]
  names = 'before', 'recalibrated', 'variables'
  return SimpleNamespace(model=model, **dict(zip(names, variables, strict=True)))


def spelled(tokens):
  return ' '.join(f'<{token}>' for token in tokens)


@pytest.mark.parametrize('model', [MODEL, MODEL.clone(scan=True)])
def test_three_held_out_texts_are_continued_by_all_networks(model, job):
  small = made(model)
  found = samples(job, model, small)
  prompts = ROWS[[0, 3, 6], :6]
  assert [each['prompt'] for each in found] == [*map(spelled, prompts)]
  runs = zip(
    ('whole', 'cut', 'healed'), (small.before, small.recalibrated, small.variables)
  )
  for name, variables in runs:
    text = jnp.asarray(prompts)
    for _ in range(14):  # as many as there are positions for
      best = model.apply(variables, text)['main'][:, -1:].argmax(-1)
      text = jnp.concatenate([text, best.astype(text.dtype)], 1)
    expected = [spelled(row) for row in np.asarray(text)[:, 6:]]
    assert [each[name] for each in found] == expected


def test_what_was_not_trained_after_its_cut_is_not_called_so(job):
  config = default('gates', tokenizer=job.config.tokenizer, finetune_epochs=0)
  job.config = config
  assert [*samples(job, MODEL, made())[0]] == ['prompt', 'whole', 'cut']


@pytest.mark.parametrize(
  ('model', 'small'),
  [
    (build('resnet8'), build('resnet8')),
    (MODEL, MODEL.apply),  # a cut network that is a function
    (MODEL.clone(positions=6), MODEL.clone(positions=6)),
  ],
)
def test_networks_that_cannot_go_on_have_no_samples(model, small, job):
  assert samples(job, model, made(small)) == []
