"""A BERT of transformers: text in, heads and layers out."""

# %% Data and network
import jax
import numpy as np
import optax
from transformers import BertConfig, FlaxBertForSequenceClassification

import depthprune as dp

# Does the word 7 stand in the text? Texts are of unlike lengths.
random = np.random.RandomState(0)
tokens = random.randint(8, 100, (800, 12)).astype(np.int32)
length = random.randint(4, 13, (800, 1))
mask = (np.arange(12) < length).astype(np.int32)
label = random.randint(0, 2, 800).astype(np.int32)
rows = np.flatnonzero(label)
tokens[rows, random.randint(0, length[rows, 0])] = 7
part = lambda s: {'tokens': tokens[s], 'mask': mask[s], 'label': label[s]}
train, held_out = part(slice(600)), part(slice(600, None))

config = BertConfig(
  vocab_size=100, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
  intermediate_size=64, max_position_embeddings=16,
)  # fmt: skip
model = FlaxBertForSequenceClassification(config)  # or .from_pretrained(...)
key, tx, example = jax.random.key(0), optax.adam(2e-3), (tokens[:1], mask[:1])

# %% As a trunk: its parts have names, and `make_step` trains it
net = dp.trunk(model, model.params, tokens[:1], attention_mask=mask[:1])
print(dp.taps(model, model.params, tokens[:1], attention_mask=mask[:1]))
task = dp.classification(2)
fit = lambda step, state, stage: dp.fit(
  step, state, key, train, steps=200, batch=64, show=False, label=stage
)
variables, plain = net.init(key, *example), dp.Method()  # nothing is pruned by it
state = dp.init_state(net, plain, tx, variables)
trained = fit(dp.make_step(net, plain, task, tx), state, 'train').variables
model.params = net.original(trained)

# %% One-shot: half of the FLOPs, in heads and in the layers between
coupling = dp.couple(model, model.params, tokens[:1], attention_mask=mask[:1])
keep = dp.oneshot(coupling, model.params, target='50%', exclude=['bert/pooler'])
small = dp.prune(model, model.params, keep, tokens[:1], coupling=coupling)
logits = small.apply(small.variables, held_out['tokens'], held_out['mask']).logits
print(small, small.report['widths'], (logits.argmax(-1) == held_out['label']).mean())

# %% SideNet: easy texts leave early, executed
from depthprune.cascades import thresholds
from depthprune.models.heads import Head, WithHeads

sides = WithHeads(net, {'early': Head('bert/encoder/layer/1', 2, hidden=16)})
wide = sides.init(key, *example)
wide['params']['trunk'] = trained['params']
method = dp.sidenet(dp.couple(sides, wide, *example), 'frozen')
state = dp.init_state(sides, method, tx, wide)
state = fit(dp.make_step(sides, method, task, tx), state, 'sidenet')
early = dp.cascade(sides, state.variables, *example)
texts = held_out['tokens'], held_out['mask']
seen = early.predictions(held_out['label'], *texts)
early = early.choosing(thresholds.for_drop(seen, 1.0))
answer = early(*texts)
print(np.bincount(answer.exit), early.cost(answer))

# %% Network Implosion: three rounds, a residual unit in each
shallow = dp.shrink(
  net, trained, example, lambda coupling: dp.implosion(coupling, depth=5), fit,
  task=task, tx=tx, held_out=held_out,
)  # fmt: skip
print(shallow, shallow.arch)

# %% Stored, read again, and a program without this library
dp.save('small', shallow)
again = dp.load('small', model)
print(dp.export('door', again)['inputs'])
