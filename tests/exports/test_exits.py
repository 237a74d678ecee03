"""Language models that tokens leave early, written and read again."""

import json

import jax
import numpy as np
import pytest

from depthprune.cascades.generation import exit_predictions, generate_early
from depthprune.cascades.thresholds import for_drop
from depthprune.exports import networks
from depthprune.exports.exits import load_exits, save_exits
from depthprune.models.decoder import Decoder
from depthprune.models.heads import Unembedding, WithHeads
from depthprune.program.coupling import couple
from depthprune.storage.checkpoint import CheckpointError
from depthprune.surgery.prune import prune
from tests import masking as m
from tests import zoo

DECODER = Decoder(
  vocab=20, positions=16, width=8, depth=3, heads=4, groups=2, size=4, inner=6
)
MODEL = WithHeads(DECODER, {'near': Unembedding('layer0', hidden=5)})
PROMPTS = zoo.tokens(2, 5)
VARIABLES = zoo.randomised(jax.eval_shape(MODEL.init, jax.random.key(0), PROMPTS))


@pytest.fixture(scope='module')
def cut():
  coupling = couple(MODEL, VARIABLES, PROMPTS)
  return prune(MODEL, VARIABLES, m.random_keep(coupling), PROMPTS, coupling=coupling)


def written(model, variables, exits, confidence='probability'):
  return generate_early(model, variables, PROMPTS, 8, exits, confidence)


@pytest.mark.parametrize('tensors', [False, True])
def test_a_cut_network_writes_the_same_once_it_was_stored(tensors, cut, tmp_path):
  seen = exit_predictions(
    cut.model, cut.variables, PROMPTS, ['near'], confidence='margin'
  )
  exits = {'near': float(np.median(seen.scores))}
  save_exits(tmp_path / 'early', cut, exits, 'margin', tensors=tensors)
  found = load_exits(tmp_path / 'early')
  assert (found.exits, found.confidence, found.tokenizer) == (exits, 'margin', None)
  expected = written(cut.model, cut.variables, exits, 'margin')
  assert len({*np.asarray(expected.layers)[:, 1:].ravel().tolist()}) > 1
  own = written(found.model, found.variables, found.exits, found.confidence)
  jax.tree.map(np.testing.assert_array_equal, own, expected)


def test_a_choice_and_a_tokenizer_are_stored(tmp_path):
  """Of a decoder without heads, too; a threshold may be infinite."""
  variables = {name: tree['trunk'] for name, tree in VARIABLES.items()}
  seen = exit_predictions(DECODER, variables, zoo.tokens(9, 8), ['layer0', 'layer1'])
  chosen = for_drop(seen, 0.0, least=1000)
  assert np.isinf(chosen.thresholds).all()
  (tmp_path / 'tokenizer.json').write_text('{"of": "mine"}')
  network = prune(DECODER, variables, {}, PROMPTS)
  path = tmp_path / 'early'
  save_exits(path, network, chosen, tokenizer=tmp_path / 'tokenizer.json')
  found = load_exits(path)
  assert found.exits == {'layer0': np.inf, 'layer1': np.inf}
  assert found.tokenizer == path / 'tokenizer.json'
  assert found.tokenizer.read_text() == '{"of": "mine"}'
  save_exits(path, network, {'layer1': -np.inf})
  found = load_exits(path)
  assert found.exits == {'layer1': -np.inf} and found.tokenizer is None
  assert networks.find(path).network.model == DECODER
  with pytest.raises(CheckpointError, match='got a language model .*: load_exits'):
    networks.load_cascade(path)


@pytest.mark.parametrize(
  ('more', 'error', 'message'),
  [
    ({'exits': {'far': 0.5}}, ValueError, "exits: expected some of near, got 'far'"),
    ({'exits': {'near': np.nan}}, ValueError, r"exits\['near'\]: expected a number"),
    ({'exits': {'near': '0.9'}}, ValueError, r"exits\['near'\]: expected a number"),
    ({'confidence': 'learned'}, ValueError, "margin, patience, got 'learned'"),
    ({'network': MODEL}, TypeError, 'network: expected what prune returned'),
    ({'tokenizer': 'absent.json'}, FileNotFoundError, 'absent.json'),
  ],
)
def test_nothing_is_written_of_what_is_wrong(more, error, message, cut, tmp_path):
  given = {'network': cut, 'exits': {'near': 0.5}, **more}
  with pytest.raises(error, match=message):
    save_exits(tmp_path / 'early', **given)
  assert not (tmp_path / 'early').exists()


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (None, 'expected a language model with exits .*exits.json.*got none'),
    ({'thresholds': {'far': 0.5}}, "exits.json: thresholds: .*got 'far'"),
    ({'thresholds': {'near': 'high'}}, 'exits.json: thresholds'),
    ({'confidence': 'learned'}, 'exits.json: confidence'),
  ],
)
def test_a_damaged_folder_is_refused(change, message, cut, tmp_path):
  save_exits(tmp_path, cut, {'near': 0.5})
  file = tmp_path / 'exits.json'
  if change is None:
    file.unlink()
  else:
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
  with pytest.raises(CheckpointError, match=message):
    load_exits(tmp_path)
