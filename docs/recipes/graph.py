"""A graph network: nodes and edges are inputs, and no axis counts examples."""

# %% Data and network
import flax.linen as nn
import jax
import numpy as np
import optax

import depthprune as dp

# 300 nodes in four communities; few features, so that neighbours have to be asked.
random = np.random.RandomState(0)
label = random.randint(0, 4, 300).astype(np.int32)
nodes = np.eye(4, dtype=np.float32)[label] + random.normal(size=(300, 4)) * 1.5
pairs = random.randint(0, 300, (20000, 2))
pairs = pairs[(label[pairs[:, 0]] == label[pairs[:, 1]]) | (random.rand(20000) < 0.05)]
graph = {'nodes': nodes.astype(np.float32), 'edges': pairs.astype(np.int32)}
known = random.rand(300) < 0.5  # whose labels may be trained on


class Messages(nn.Module):
  @nn.compact
  def __call__(self, x, edges):
    sent = nn.relu(nn.Dense(32, name='send')(x))[edges[:, 0]]
    received = jax.ops.segment_sum(sent, edges[:, 1], len(x)) / 20
    return x + nn.Dense(32, name='receive')(received)


class Net(nn.Module):
  @nn.compact
  def __call__(self, graph):
    x = nn.relu(nn.Dense(32, name='embed')(graph['nodes']))
    for i in range(4):
      x = Messages(name=f'layer{i}')(x, graph['edges'])
    return nn.Dense(4, name='head')(nn.relu(x))


model, key, tx = Net(), jax.random.key(0), optax.adam(3e-3)
variables = model.init(key, graph)

# %% One-shot
coupling = dp.couple(model, variables, graph)
keep = dp.oneshot(coupling, variables, target='50%')
small = dp.prune(model, variables, keep, graph)
print(small)

# %% Trainable gates in an optax loop of your own
method = dp.trainable_gates(coupling, target=0.5)
gated, gate_tx = dp.plug(model, coupling), dp.optimizer(method, tx)
theta = method.init(coupling.gates(), {})
trained = {'params': variables['params'], 'theta': theta}
state = gate_tx.init(trained)


def entropy(logits):
  each = optax.softmax_cross_entropy_with_integer_labels(logits, label)
  return (each * known).sum() / known.sum()


def loss(trained):
  gates = method.forward(trained['theta'])
  return entropy(gated({'params': trained['params']}, gates, graph))


@jax.jit
def step(trained, state):
  updates, state = gate_tx.update(jax.grad(loss)(trained), state, trained)
  return optax.apply_updates(trained, updates), state


for _ in range(200):
  trained, state = step(trained, state)
keep = method.decide(trained['theta'], {}, None)
small = dp.prune(model, {'params': trained['params']}, keep, graph)
accuracy = lambda logits: (logits.argmax(-1) == label)[~known].mean()
print(small, accuracy(small.apply(small.variables, graph)))

# %% Network Implosion: three rounds, a layer in each
net = dp.trunk(model, variables, graph)
weighted = lambda known: {'input': graph, 'label': label, 'weight': known * 1.0}


def train(step, state, stage):
  for _ in range(100):
    state, _ = step(state, weighted(known), key)
  return state


shallow = dp.shrink(
  net, net.init(key, graph), graph, lambda coupling: dp.implosion(coupling, depth=1),
  train, task=dp.classification(4), tx=tx, held_out=[weighted(~known)],
)  # fmt: skip
print(shallow, shallow.arch)

# %% Stored and read again
dp.save('small', shallow)
again = dp.load('small', model)
print(accuracy(again.apply(again.variables, graph)['main']))
