"""A Llama-style decoder of transformers: narrower, and with fewer layers."""

# %% Data and network
import jax
import numpy as np
import optax
from transformers import FlaxLlamaForCausalLM, LlamaConfig

import depthprune as dp

# Each text counts up from a number of its own, in steps of its own.
random = np.random.RandomState(0)
start, stride = random.randint(0, 50, (500, 1)), random.randint(1, 4, (500, 1))
texts = ((start + stride * np.arange(12)) % 50).astype(np.int32)
train, held_out = texts[:400], texts[400:]

config = LlamaConfig(
  vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
  num_key_value_heads=2, intermediate_size=64, max_position_embeddings=16,
)  # fmt: skip
model = FlaxLlamaForCausalLM(config, input_shape=(1, 12))  # or .from_pretrained(...)
key, tx = jax.random.key(0), optax.adam(3e-3)
entropy = lambda logits, tokens: optax.softmax_cross_entropy_with_integer_labels(
  logits[:, :-1], tokens[:, 1:]
).mean()

# %% One-shot: heads, the layers between, and the width of the residual stream
coupling = dp.couple(model, model.params, texts[:1])
keep = dp.oneshot(coupling, model.params, target='50%')
small = dp.prune(model, model.params, keep, texts[:1])
print(small, small.report['widths'])

# %% Trainable gates in an optax loop of your own
method = dp.trainable_gates(coupling, target=0.5)
gated, gate_tx = dp.plug(model, coupling), dp.optimizer(method, tx)
trained = {'params': model.params, 'theta': method.init(coupling.gates(), {})}
state = gate_tx.init(trained)


def loss(trained, tokens):
  gates = method.forward(trained['theta'])
  return entropy(gated(trained['params'], gates, tokens).logits, tokens)


@jax.jit
def step(trained, state, tokens):
  updates, state = gate_tx.update(jax.grad(loss)(trained, tokens), state, trained)
  return optax.apply_updates(trained, updates), state


for i in range(200):
  rows = np.random.RandomState(i).randint(0, 400, 32)
  trained, state = step(trained, state, train[rows])
keep = method.decide(trained['theta'], {}, None)
small = dp.prune(model, trained['params'], keep, texts[:1])
logits = small.apply(small.variables, held_out).logits
print(small, entropy(logits, held_out))

# %% Fewer layers: a residual unit is erased in each of three rounds
net = dp.trunk(model, model.params, texts[:1])
following = np.pad(texts[:, 1:], ((0, 0), (0, 1)), constant_values=-1)  # -1: no label
part = lambda s: {'tokens': texts[s], 'label': following[s]}
fit = lambda step, state, stage: dp.fit(
  step, state, key, part(slice(400)), steps=200, batch=32, show=False, label=stage
)
shallow = dp.shrink(
  net, net.init(key, texts[:1]), texts[:1],
  lambda coupling: dp.implosion(coupling, depth=5), fit,
  task=dp.classification(50), tx=tx, held_out=part(slice(400, None)),
)  # fmt: skip
print(shallow, shallow.arch)

# %% Stored, read again, and a program without this library
dp.save('small', small)
again = dp.load('small', model)
print(entropy(again.apply(again.variables, held_out).logits, held_out))
print(dp.export('door', again)['programs'].keys())
