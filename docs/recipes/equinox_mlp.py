"""A residual perceptron in Equinox: its arrays are the variables."""

# %% Data
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import depthprune as dp

x, y = load_digits(return_X_y=True)
x, y = x.astype(np.float32) / 16, y.astype(np.int32)
train, held_out = (x[:1400], y[:1400]), (x[1400:], y[1400:])


# %% Network
class Block(eqx.Module):
  first: eqx.nn.Linear
  second: eqx.nn.Linear

  def __init__(self, key):
    a, b = jax.random.split(key)
    self.first, self.second = eqx.nn.Linear(32, 64, key=a), eqx.nn.Linear(64, 32, key=b)

  def __call__(self, x):
    return x + self.second(jax.nn.relu(self.first(x)))


class Net(eqx.Module):
  stem: eqx.nn.Linear
  blocks: list[Block]
  head: eqx.nn.Linear

  def __init__(self, key):
    a, b, *keys = jax.random.split(key, 6)
    self.stem, self.head = eqx.nn.Linear(64, 32, key=a), eqx.nn.Linear(32, 10, key=b)
    self.blocks = [Block(key) for key in keys]

  def __call__(self, x):  # one example: [64] -> [10]
    x = jax.nn.relu(self.stem(x))
    for block in self.blocks:
      x = block(x)
    return self.head(jax.nn.relu(x))


# %% One-shot: what comes back is a small Net
model, key, tx = Net(jax.random.key(0)), jax.random.key(0), optax.adam(3e-3)
arrays, static = eqx.partition(model, eqx.is_array)
coupling = dp.couple(model, arrays, x[0])  # an example without a batch axis
keep = dp.oneshot(coupling, arrays, target='50%', exclude=['head'])
small = dp.prune(model, arrays, keep, x[0])
print(small)
print(small.model.blocks[0].first.weight.shape, jax.vmap(small.model)(x[:2]).shape)

# %% Trainable gates in an optax loop of your own
run = lambda arrays, x: jax.vmap(eqx.combine(arrays, static))(x)
coupling = dp.couple(run, arrays, x[:1])
method = dp.trainable_gates(coupling, target=0.5)
gated, gate_tx = dp.plug(run, coupling), dp.optimizer(method, tx)
trained = {'params': arrays, 'theta': method.init(coupling.gates(), {})}
state = gate_tx.init(trained)


def loss(trained, x, y):
  logits = gated(trained['params'], method.forward(trained['theta']), x)
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@jax.jit
def step(trained, state, x, y):
  updates, state = gate_tx.update(jax.grad(loss)(trained, x, y), state, trained)
  return optax.apply_updates(trained, updates), state


for i in range(300):
  rows = np.random.RandomState(i).randint(0, 1400, 100)
  trained, state = step(trained, state, train[0][rows], train[1][rows])
keep = method.decide(trained['theta'], {}, None)
small = dp.prune(run, trained['params'], keep, x[:1])
net = eqx.combine(small.variables, static)  # a small Net
print(small, (jax.vmap(net)(held_out[0]).argmax(-1) == held_out[1]).mean())

# %% NetCut: a head on every block, and the depth that the task needs
from depthprune.models.heads import Head, WithHeads, every_tap

net, task = dp.trunk(run, arrays, x[:1]), dp.classification(10)
print(dp.taps(run, arrays, x[:1]))
fit = lambda step, state, stage: dp.fit(
  step, state, key, train, steps=200, batch=100, show=False, label=stage
)
heads = every_tap(net)
wide = heads.init(key, x[:1])
method = dp.netcut(dp.couple(heads, wide, x[:1]), beta=0.02, importance_lr=0.05)
state = dp.init_state(heads, method, tx, wide)
state = fit(dp.make_step(heads, method, task, tx), state, 'netcut')
judge = dp.judge(heads, method, task, state, held_out)
short = dp.prune(heads, state.variables, method.decide(state.theta, {}, judge), x[:1])
print(short.model.exits, short)

# %% SideNet: confident inputs leave early, executed
from depthprune.cascades import thresholds

sides = WithHeads(net, {'early': Head('blocks/0', hidden=32)})
wide = sides.init(key, x[:1])
method = dp.sidenet(dp.couple(sides, wide, x[:1]), 'joint')
state = dp.init_state(sides, method, tx, wide)
state = fit(dp.make_step(sides, method, task, tx), state, 'sidenet')
early = dp.cascade(sides, state.variables, x[:1])
seen = early.predictions(held_out[1], held_out[0])
early = early.choosing(thresholds.for_drop(seen, 1.0))
answer = early(held_out[0])
print(np.bincount(answer.exit), early.cost(answer))

# %% Network Implosion: three rounds, a residual unit in each
shallow = dp.shrink(
  net, net.init(key, x[:1]), x[:1], lambda coupling: dp.implosion(coupling, depth=1),
  fit, task=task, tx=tx, held_out=held_out,
)  # fmt: skip
print(shallow, shallow.arch)

# %% An auxiliary path: it helps to train, and is dropped
from depthprune.models.auxiliary_path import beside

aided = WithHeads(net, {'aux': beside(net.taps, width=32)})
wide = aided.init(key, x[:1])
method = dp.auxiliary(dp.couple(aided, wide, x[:1]), weight=1.0, steps=200)
state = dp.init_state(aided, method, tx, wide)
state = fit(dp.make_step(aided, method, task, tx), state, 'auxiliary')
compact = dp.prune(aided, state.variables, method.decide(state.theta, {}, None), x[:1])
back = net.original({c: tree['trunk'] for c, tree in compact.variables.items()})
print(compact, jax.vmap(eqx.combine(back, static))(x[:2]).shape)

# %% Stored, read again, and a program without this library
dp.save('small', small)
again = dp.load('small', run, variables=arrays)  # of the full network
print(jnp.array_equal(again.apply(again.variables, x), small.apply(small.variables, x)))
print(dp.export('door', again)['programs'].keys())
