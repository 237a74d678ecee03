"""Generation: a loop with a cache equals one without, before and after a cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.models.decoder import Decoder
from depthprune.models.generation import generate, speculate
from depthprune.program.coupling import couple
from depthprune.surgery.prune import prune
from tests import masking as m
from tests import zoo

MODEL = Decoder(
  vocab=20, positions=12, width=8, depth=2, heads=4, groups=2, size=4, inner=6
)
PROMPTS = zoo.tokens(3, 5)


@pytest.fixture(scope='module')
def cut():
  cache = MODEL.empty_cache(3, 12)
  variables = zoo.randomised(jax.eval_shape(MODEL.init, jax.random.key(0), PROMPTS))
  coupling = couple(MODEL, variables, PROMPTS, cache=cache)
  keep = {**m.random_keep(coupling), 'branches': {'layer0/mlp/branch': np.array(False)}}
  return variables, prune(MODEL, variables, keep, PROMPTS, coupling=coupling)


def one_by_one(run, variables, steps):
  """The most probable token behind the whole text, without a cache."""
  tokens = PROMPTS
  for _ in range(steps):
    best = run(variables, tokens)['main'][:, -1:].argmax(-1)
    tokens = jnp.concatenate([tokens, best.astype(tokens.dtype)], 1)
  return tokens


@pytest.mark.parametrize('network', ['full', 'small', 'function'])
def test_generation_is_that_without_a_cache(network, cut):
  variables, pruned = cut
  model, arrays, more = pruned.model, pruned.variables, {}
  if network == 'full':
    model, arrays = MODEL, variables
  if network == 'function':  # with the empty cache of the full network
    model, more = pruned.apply, {'cache': MODEL.empty_cache(3, 11)}
  run = m.quick(getattr(model, 'apply', model))
  expected = one_by_one(run, arrays, 6)
  got = generate(model, arrays, PROMPTS, 6, **more)
  np.testing.assert_array_equal(got, expected)
  assert got.shape == (3, 11) and len({*np.asarray(got)[:, 5:].ravel().tolist()}) > 1


def test_a_single_step_and_what_is_impossible(cut):
  variables, pruned = cut
  np.testing.assert_array_equal(
    generate(MODEL, variables, PROMPTS, 1), one_by_one(MODEL.apply, variables, 1)
  )
  with pytest.raises(ValueError, match='at most 12 positions, got .* length 13'):
    generate(MODEL, variables, PROMPTS, 8)
  with pytest.raises(ValueError, match='steps: expected at least 1, got 0'):
    generate(MODEL, variables, PROMPTS, 0)
  with pytest.raises(TypeError, match='the empty cache of a function'):
    generate(pruned.apply, pruned.variables, PROMPTS, 2)


def test_tokens_are_drawn_by_their_probabilities(cut):
  """One key gives one text; over many rows the first token comes as often as it is
  probable, and hardly any warmth leaves the most probable one."""
  variables, _ = cut
  rows = jnp.tile(PROMPTS[:1], (4000, 1))
  drawn = generate(MODEL, variables, rows, 2, key=jax.random.key(0), temperature=2.0)
  again = generate(MODEL, variables, rows, 2, key=jax.random.key(0), temperature=2.0)
  np.testing.assert_array_equal(drawn, again)
  assert len({*np.asarray(drawn[:, -1]).tolist()}) > 1
  logits = MODEL.apply(variables, PROMPTS[:1])['main'][0, -1]
  found = np.bincount(drawn[:, PROMPTS.shape[1]], minlength=20) / 4000
  np.testing.assert_allclose(found, jax.nn.softmax(logits / 2.0), atol=0.03)
  cold = generate(MODEL, variables, PROMPTS, 6, key=jax.random.key(1), temperature=1e-4)
  np.testing.assert_array_equal(cold, generate(MODEL, variables, PROMPTS, 6))
  with pytest.raises(ValueError, match='temperature'):
    generate(MODEL, variables, PROMPTS, 2, key=jax.random.key(0), temperature=0)


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('ahead', [1, 3])
@pytest.mark.parametrize('by', ['itself', 'small', 'first layer', 'another'])
def test_speculation_writes_what_the_large_network_writes(by, ahead, batch, cut):
  variables, pruned = cut
  model = MODEL.clone(positions=24)
  other = MODEL.init(jax.random.key(1), PROMPTS)
  draft, arrays = {
    'itself': (model, variables),
    'small': (pruned.model.clone(positions=24), pruned.variables),
    'first layer': (model.first(1), variables),
    'another': (model, other),
  }[by]
  prompts = PROMPTS[:batch]
  found = speculate(model, variables, draft, arrays, prompts, 12, ahead)
  np.testing.assert_array_equal(found.tokens, generate(model, variables, prompts, 12))
  assert 0 <= found.accepted <= 1
  if by == 'itself':  # every check brings one token more than was drafted
    assert found.accepted == 1 and found.checks == -(-11 // (ahead + 1))


def test_a_draft_that_is_never_right_costs_a_check_per_token():
  """It says the token that the large network likes least."""
  variables = MODEL.init(jax.random.key(0), PROMPTS)
  norm = variables['params']['norm']['scale']
  wrong = {'params': {**variables['params'], 'norm': {'scale': -norm}}}
  found = speculate(MODEL, variables, MODEL, wrong, PROMPTS[:1], 4, ahead=2)
  assert (found.accepted, found.checks) == (0, 3)


def test_the_first_layers_of_a_cut_network_draft_for_it(cut):
  _, pruned = cut
  model = pruned.model.clone(positions=24)
  draft = model.first(1)
  assert draft.depth == 1 and draft.arch and not any('layer1' in k for k in draft.arch)
  found = speculate(model, pruned.variables, draft, pruned.variables, PROMPTS, 12)
  expected = generate(model, pruned.variables, PROMPTS, 12)
  np.testing.assert_array_equal(found.tokens, expected)
  with pytest.raises(ValueError, match='1 to 2 first layers and scan=False, got 3'):
    model.first(3)


def test_speculation_by_a_function_is_refused(cut):
  variables, pruned = cut
  with pytest.raises(TypeError, match='draft: expected a Decoder, got a function'):
    speculate(MODEL, variables, pruned.apply, pruned.variables, PROMPTS, 2)


@pytest.mark.parametrize(
  ('draft', 'more', 'message'),
  [
    (MODEL.clone(vocab=21), {}, 'expected 20 different tokens .* got 21'),
    (MODEL, {'ahead': 0}, 'ahead: expected at least 1, got 0'),
    (MODEL, {'steps': 0}, 'steps: expected at least 1, got 0'),
    (MODEL, {'steps': 4, 'ahead': 4}, 'at most 12 positions'),
  ],
)
def test_speculation_that_is_impossible(draft, more, message, cut):
  variables, _ = cut
  with pytest.raises(ValueError, match=message):
    speculate(MODEL, variables, draft, variables, PROMPTS, **{'steps': 2, **more})
