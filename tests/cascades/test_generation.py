"""Early exits of a decoder that writes, by the same rule without cache and loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprune.cascades import confidence as confidences
from depthprune.cascades import thresholds
from depthprune.cascades.generation import (
  early_answers,
  exit_predictions,
  generate_early,
)
from depthprune.models import build, decoder
from depthprune.models.decoder import Decoder
from depthprune.models.generation import generate
from depthprune.models.heads import Head, Unembedding, WithHeads
from depthprune.program.coupling import couple
from depthprune.surgery.prune import prune
from tests import masking as m
from tests import zoo

MODEL = Decoder(
  vocab=20, positions=16, width=8, depth=3, heads=4, groups=2, size=4, inner=6
)
PROMPTS = zoo.tokens(3, 5)
VARIABLES = zoo.randomised(jax.eval_shape(MODEL.init, jax.random.key(0), PROMPTS))
VARIABLES['params']['norm']['scale'] *= 4  # which makes answers surer
for unit in (VARIABLES['params'][f'layer{i}']['attention'] for i in range(3)):
  unit['query']['kernel'] *= 3  # tokens attend to few others, and to much of them
  unit['out']['kernel'] *= 4
SURE = {'layer0': 0.5, 'layer1': 0.6}  # some tokens leave at each, some at none
TAPS = {'near': 'layer0', 'far': 'layer1'}
HEADS = WithHeads(MODEL, {n: Unembedding(tap, hidden=5) for n, tap in TAPS.items()})
OWN = zoo.randomised(jax.eval_shape(HEADS.init, jax.random.key(0), PROMPTS), seed=4)
WITH_HEADS = {name: {**OWN[name], 'trunk': tree} for name, tree in VARIABLES.items()}


@pytest.fixture(scope='module')
def cut():
  """Without the middle layer, and half as wide elsewhere."""
  coupling = couple(MODEL, VARIABLES, PROMPTS)
  gone = {f'layer1/{unit}/branch': np.array(False) for unit in ('attention', 'mlp')}
  keep = {**m.random_keep(coupling), 'branches': gone}
  return prune(MODEL, VARIABLES, keep, PROMPTS, coupling=coupling)


def features(text, left):
  """The features of one text after every layer; `left` [length]: where each stops."""
  run = lambda x, **kw: MODEL.apply(VARIABLES, x, **kw)
  found = [run(text, until='layer0')['layer0']]
  for i in (1, 2):
    x = found[-1]  # keys and values of what has stopped are those of its features
    further = run(x, since=f'layer{i - 1}', until=f'layer{i}')[f'layer{i}']
    found.append(jnp.where((left > i)[None, :, None], further, x))
  return found


def own_answer(name, x):
  """What a head makes of features, by the formula."""
  head = WITH_HEADS['params'][f'head_{name}']
  y = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + MODEL.epsilon)
  y = np.maximum(y * head['norm']['scale'] @ head['hidden']['kernel'], 0)
  return x + y @ head['out']['kernel']


def check(text, left, answers, exits, kind, start=0):
  """Every token of a text [length] from `start` on left where its confidence says.

  `left` are the layers that each went through, and `answers` what it was followed by.
  """
  behind = features(text[None], left)
  read = lambda x: MODEL.apply(VARIABLES, x, since='layer2')['main'][0]
  logits = [read(x) for x in behind]
  for name, tap in TAPS.items():
    if name in exits:
      i = int(tap[-1])
      logits[i] = read(own_answer(name, behind[i]))
  memory = confidences.start(len(left))
  scores = []
  after = [int(TAPS.get(name, name)[-1]) + 1 for name in exits]  # layers of each exit
  for count in after:
    score, memory = confidences.score(kind, logits[count - 1], memory)
    scores.append(score)
  for p in range(start, len(left)):
    sure = [n for n, s, t in zip(after, scores, exits.values()) if s[p] > t]
    assert left[p] == (sure or [3])[0]
  for p in range(max(start - 1, 0), len(left)):
    assert logits[int(left[p]) - 1][p].argmax() == answers[p]


@pytest.mark.parametrize(
  ('kind', 'exits'),
  [
    ('probability', SURE),
    ('margin', {'layer1': 0.3}),
    ('patience', {'layer0': 0.5, 'layer1': 0.5}),
    ('probability', {'near': 0.7, 'far': 0.8}),
    ('margin', {'far': 0.5}),
  ],
)
def test_tokens_leave_where_they_are_sure_and_copy_their_state(kind, exits):
  own = HEADS, WITH_HEADS
  network = own if {*exits} <= {*TAPS} else (MODEL, VARIABLES)
  found = generate_early(*network, PROMPTS, 10, exits, kind)
  layers = np.asarray(found.layers)
  assert len({*layers.ravel().tolist()}) > 1
  prompt = PROMPTS.shape[1]
  for text, its in zip(found.tokens, layers):
    left = jnp.asarray([*[3] * (prompt - 1), *its])
    check(text[:-1], left, text[1:], exits, kind, prompt)
  assert found.executed == pytest.approx(layers.max(0).mean() / 3)


def test_a_head_that_adds_nothing_is_an_exit_on_its_layer():
  """So begins every head: its last kernel is of zeros."""
  params = HEADS.init(jax.random.key(1), PROMPTS)['params']
  fresh = {f'head_{name}': params[f'head_{name}'] for name in TAPS}
  assert all(not head['out']['kernel'].any() for head in fresh.values())
  variables = {**WITH_HEADS, 'params': {**WITH_HEADS['params'], **fresh}}
  exits = {name: SURE[tap] for name, tap in TAPS.items()}
  found = generate_early(HEADS, variables, PROMPTS, 10, exits)
  plain = generate_early(MODEL, VARIABLES, PROMPTS, 10, SURE)
  jax.tree.map(np.testing.assert_array_equal, found, plain)
  texts = zoo.tokens(4, 9)
  found = exit_predictions(HEADS, variables, texts, [*TAPS])
  plain = exit_predictions(MODEL, VARIABLES, texts, [*TAPS.values()])
  assert found.exits == ('near', 'far', 'main') and found.whole == plain.whole
  for name in ('logits', 'scores', 'labels'):
    np.testing.assert_array_equal(getattr(found, name), getattr(plain, name))
  bare = WithHeads(MODEL, {name: Unembedding(tap) for name, tap in TAPS.items()})
  none = generate_early(bare, WITH_HEADS, PROMPTS, 10, exits)
  np.testing.assert_array_equal(
    none.tokens, generate_early(MODEL, VARIABLES, PROMPTS, 10, SURE).tokens
  )


@pytest.mark.parametrize('exits', [SURE, {'near': 0.7, 'far': 0.8}])
def test_answers_on_given_texts_are_executed_too(exits):
  own = (MODEL, VARIABLES) if exits is SURE else (HEADS, WITH_HEADS)
  texts = zoo.tokens(4, 9)
  answers, left = early_answers(*own, texts, exits)
  assert answers.shape == left.shape == texts.shape
  assert len({*np.asarray(left).ravel().tolist()}) == 3
  for each in zip(texts, left, answers):
    check(*each, exits, 'probability')
  answers, left = early_answers(*own, texts, dict.fromkeys(exits, np.inf))
  whole = MODEL.apply(VARIABLES, texts)['main'].argmax(-1)
  np.testing.assert_array_equal(answers, whole)
  assert (np.asarray(left) == 3).all()


def test_every_text_of_a_batch_is_written_as_if_it_were_alone():
  whole = generate_early(MODEL, VARIABLES, PROMPTS, 10, SURE)
  for i in range(3):
    alone = generate_early(MODEL, VARIABLES, PROMPTS[i : i + 1], 10, SURE)
    np.testing.assert_array_equal(alone.tokens[0], whole.tokens[i])
    np.testing.assert_array_equal(alone.layers[0], whole.layers[i])
    assert alone.executed <= whole.executed


def test_nobody_leaves_above_every_score_and_all_below():
  never = generate_early(MODEL, VARIABLES, PROMPTS, 6, {'layer0': 1.0, 'layer1': 1.5})
  np.testing.assert_array_equal(never.tokens, generate(MODEL, VARIABLES, PROMPTS, 6))
  assert never.executed == 1 and (np.asarray(never.layers) == 3).all()
  always = generate_early(MODEL, VARIABLES, PROMPTS, 6, {'layer1': 0})
  assert always.layers.tolist() == [[3, 2, 2, 2, 2, 2]] * 3
  assert always.executed == pytest.approx(13 / 18)
  unused = generate_early(MODEL, VARIABLES, PROMPTS, 6, {'layer0': np.inf})
  np.testing.assert_array_equal(unused.tokens, never.tokens)
  one = generate_early(MODEL, VARIABLES, PROMPTS, 1, {'layer0': 0})
  np.testing.assert_array_equal(one.tokens, generate(MODEL, VARIABLES, PROMPTS, 1))


def test_heads_that_nobody_is_sure_of_change_nothing():
  whole = generate(MODEL, VARIABLES, PROMPTS, 6)
  for high in (2.0, np.inf):
    exits = dict.fromkeys(TAPS, high)
    never = generate_early(HEADS, WITH_HEADS, PROMPTS, 6, exits)
    np.testing.assert_array_equal(never.tokens, whole)
    assert never.executed == 1


def test_tokens_are_drawn_as_without_exits():
  draw = {'key': jax.random.key(3), 'temperature': 1.5}
  found = generate_early(MODEL, VARIABLES, PROMPTS, 6, {'layer1': 2}, **draw)
  np.testing.assert_array_equal(
    found.tokens, generate(MODEL, VARIABLES, PROMPTS, 6, **draw)
  )


def test_layers_after_an_exit_are_not_executed(monkeypatch):
  """Counted while the program runs: a token that leaves after the first layer runs
  both branches of that one alone."""
  ran = []
  add = decoder.add_branch

  def counted(module, x, y):
    jax.debug.callback(lambda: ran.append(module.path[0]))
    return add(module, x, y)

  monkeypatch.setattr(decoder, 'add_branch', counted)
  model = MODEL.clone(epsilon=2e-5)  # is compiled anew
  found = generate_early(model, VARIABLES, PROMPTS, 5, {'layer0': 0})
  jax.effects_barrier()
  assert found.layers[0].tolist() == [3, 1, 1, 1, 1]
  counts = {name: ran.count(name) for name in ran}
  assert counts == {'layer0': 2 * 5, 'layer1': 2, 'layer2': 2}


def test_a_cut_network_counts_the_layers_that_are_left(cut):
  model, variables = cut.model, cut.variables
  never = generate_early(model, variables, PROMPTS, 6, {'layer1': 2})
  np.testing.assert_array_equal(never.tokens, generate(model, variables, PROMPTS, 6))
  assert (np.asarray(never.layers) == 2).all() and never.executed == 1
  early = generate_early(model, variables, PROMPTS, 6, {'layer1': 0})
  assert early.layers.tolist() == [[2, 1, 1, 1, 1, 1]] * 3


def test_a_network_is_cut_with_its_heads():
  """Small equals masked, heads included; and it writes as its arrays say."""
  coupling = couple(HEADS, WITH_HEADS, PROMPTS)
  keep = m.random_keep(coupling)
  assert {'head_near/hidden:1', 'trunk/layer0/mlp/gate:1'} <= {*keep['channels']}
  small = prune(HEADS, WITH_HEADS, keep, PROMPTS, coupling=coupling)
  assert small.arch['head_near/out'] == small.arch['trunk/embed'] < 8
  assert small.arch['head_near/hidden'] < 5
  found = small.model.apply(small.variables, PROMPTS)
  for name, logits in small.apply(small.variables, PROMPTS).items():
    np.testing.assert_allclose(found[name], logits, rtol=1e-5, atol=1e-5)
  text = generate_early(small.model, small.variables, PROMPTS, 6, {'far': 0.0}).tokens
  far, rest = (small.model.apply(small.variables, text)[k] for k in ('far', 'main'))
  np.testing.assert_array_equal(rest[:, 4].argmax(-1), text[:, 5])
  np.testing.assert_array_equal(far[:, 5].argmax(-1), text[:, 6])
  trunk = {name: tree['trunk'] for name, tree in small.variables.items()}
  never = generate_early(small.model, small.variables, PROMPTS, 6, {'near': 2.0})
  whole = generate(small.model.trunk, trunk, PROMPTS, 6)
  np.testing.assert_array_equal(never.tokens, whole)


def test_a_token_leaves_after_a_first_layer_that_is_empty():
  """It has gone through no layer at all."""
  gone = {f'layer0/{unit}/branch': 0 for unit in ('attention', 'mlp')}
  model = MODEL.clone(arch=gone)
  early = generate_early(model, VARIABLES, PROMPTS, 3, {'layer0': 0})
  assert early.layers.tolist() == [[2, 0, 0]] * 3


# ---- thresholds ----------------------------------------------------------------------


def test_predictions_are_those_of_the_whole_vocabulary():
  texts, labels = np.asarray(zoo.tokens(5, 9)), np.array(zoo.tokens(5, 9))[:, ::-1]
  labels = np.where(labels == 3, -1, labels)
  seen = exit_predictions(
    MODEL, VARIABLES, texts, ['layer1', 'layer0'], labels, batch=2
  )
  told = labels.ravel() >= 0
  assert seen.exits == ('layer0', 'layer1', 'main') and (~told).sum() > 0
  outputs = MODEL.apply(VARIABLES, texts)
  for k, tap in enumerate(('layer0', 'layer1', 'layer2')):
    logits = MODEL.apply(VARIABLES, outputs[tap], since='layer2')['main']
    logits = np.asarray(logits).reshape(-1, 20)[told]
    right = logits.argmax(-1) == labels.ravel()[told]
    np.testing.assert_array_equal(seen.logits[k].argmax(-1) == seen.labels, right)
    if k < 2:
      expected = jax.nn.softmax(logits).max(-1)
      np.testing.assert_allclose(seen.scores[k], expected, rtol=1e-5)


def test_costs_are_counted_by_hand():
  """Of a token after 8 others: q, k, v, out, 9 keys, the perceptron and the logits."""
  layer = 2 * (8 * 16 + 2 * 8 * 8 + 16 * 8 + 2 * 9 * 16 + 3 * 8 * 6)
  copied, logits = 2 * (2 * 8 * 8), 2 * 8 * 20
  seen = exit_predictions(MODEL, VARIABLES, zoo.tokens(1, 9), ['layer0', 'layer1'])
  assert seen.cost.tolist() == [
    layer + logits + 2 * copied,
    2 * (layer + logits) + copied,
    3 * (layer + logits),
  ]
  assert seen.whole == 3 * layer + logits


def test_costs_count_the_heads():
  texts = zoo.tokens(1, 9)
  plain = exit_predictions(MODEL, VARIABLES, texts, [*TAPS.values()])
  seen = exit_predictions(HEADS, WITH_HEADS, texts, [*TAPS])
  head = 2 * (8 * 5 + 5 * 8)
  np.testing.assert_array_equal(seen.cost - plain.cost, [head, 2 * head, 2 * head])
  assert seen.whole == plain.whole
  far = exit_predictions(HEADS, WITH_HEADS, texts, ['far'])
  assert far.cost[-1] == far.whole + head + 2 * 8 * 20


def test_thresholds_are_chosen_by_agreement_or_by_a_budget():
  texts = np.random.default_rng(1).integers(0, 20, (20, 9))
  seen = exit_predictions(MODEL, VARIABLES, texts, ['layer0', 'layer1'])
  own = thresholds.measured(np.full(2, np.inf), seen)
  assert own.accuracy == 1 and own.cost == seen.cost[-1]
  chosen = thresholds.for_drop(seen, 10.0, least=5)
  assert 0.9 <= chosen.held_out.accuracy < 1
  found = generate_early(MODEL, VARIABLES, PROMPTS, 8, chosen)
  limits = dict(zip(('layer0', 'layer1'), chosen.thresholds.tolist()))
  again = generate_early(MODEL, VARIABLES, PROMPTS, 8, limits)
  np.testing.assert_array_equal(found.tokens, again.tokens)
  cheap = thresholds.for_budget(seen, 0.8 * seen.cost[-1], least=5)
  assert cheap.held_out.cost <= 0.8 * seen.cost[-1]
  assert cheap.held_out.accuracy < chosen.held_out.accuracy


@pytest.mark.parametrize(
  ('more', 'error', 'message'),
  [
    ({'exits': {'layer2': 0.5}}, ValueError, "some of layer0, layer1, got 'layer2'"),
    ({'exits': {'layer0': np.nan}}, ValueError, r"exits\['layer0'\]: expected a num"),
    ({'exits': 0.5}, TypeError, 'exits: expected {exit: threshold}, got the number'),
    ({'confidence': 'learned'}, ValueError, "entropy, margin, patience, got 'learned'"),
    ({'steps': 0}, ValueError, 'steps: expected a whole number of 1 or more, got'),
    ({'steps': 12}, ValueError, 'at most 16 positions, got .* length 17'),
    ({'temperature': 0}, ValueError, 'temperature'),
    ({'model': MODEL.apply}, TypeError, 'model: expected a Decoder'),
    ({'model': HEADS}, ValueError, "exits: expected some of near, far, got 'layer0'"),
    (
      {
        'model': WithHeads(
          MODEL, {'layer': Head('layer0'), 'last': Unembedding('layer2')}
        )
      },
      ValueError,
      "exits: 'layer0': this network has no exit before its last",
    ),
    (
      {'model': HEADS.clone(arch={'exit/main': 0, 'exit/near': 0})},
      ValueError,
      "exits: 'layer0': this network has no exit before its last",
    ),
    ({'model': WithHeads(build('mlp'), {'e': Head('layer1')})}, TypeError, 'heads on'),
  ],
)
def test_writing_that_is_impossible_is_refused(more, error, message):
  given = {'model': MODEL, 'variables': VARIABLES, 'tokens': PROMPTS, 'steps': 2}
  with pytest.raises(error, match=message):
    generate_early(**{**given, 'exits': {'layer0': 0.5}, **more})


@pytest.mark.parametrize(
  ('more', 'message'),
  [
    ({'exits': []}, 'exits: expected some of layer0, layer1'),
    ({'exits': ['layer9']}, "got 'layer9'"),
    ({'tokens': PROMPTS[0]}, r'tokens: expected int \[texts, length\]'),
    ({'labels': PROMPTS[:, 1:]}, r'labels: expected int \[3, 5\]'),
    ({'batch': 0}, 'batch: expected a whole number of 1'),
  ],
)
def test_predictions_that_are_impossible_are_refused(more, message):
  given = {'tokens': PROMPTS, 'exits': ['layer0'], **more}
  with pytest.raises(ValueError, match=message):
    exit_predictions(MODEL, VARIABLES, **given)
