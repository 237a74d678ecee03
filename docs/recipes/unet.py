"""A U-Net in linen: inputs in a dict, and an answer for every pixel."""

# %% Data: discs of unknown size in noise; `time` says how much noise there is
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import depthprune as dp

random, grid = np.random.RandomState(0), np.mgrid[:16, :16].astype(np.float32)
centre = random.uniform(4, 12, (400, 2, 1, 1))
radius = random.uniform(2, 5, (400, 1, 1))
label = (np.hypot(*np.moveaxis(grid - centre, 1, 0)) < radius).astype(np.int32)
time = random.uniform(size=400).astype(np.float32)
noise = time[:, None, None] * random.normal(size=label.shape)
data = {'image': (label + noise)[..., None].astype(np.float32), 'time': time}
rows_of = lambda tree, rows: jax.tree.map(lambda a: a[rows], tree)
train = rows_of((data, label), slice(300))
inputs, answer = rows_of((data, label), slice(300, None))  # held out


# %% Network
class Block(nn.Module):
  width: int

  @nn.compact
  def __call__(self, x, time):
    x = nn.GroupNorm(4)(nn.Conv(self.width, (3, 3))(x))
    x = nn.silu(x + nn.Dense(self.width, name='shift')(time)[:, None, None])
    return nn.silu(nn.Conv(self.width, (3, 3))(x))


class UNet(nn.Module):
  @nn.compact
  def __call__(self, inputs):
    angles = inputs['time'][:, None] * jnp.arange(1.0, 5.0)
    time = nn.silu(nn.Dense(16, name='time')(jnp.sin(angles)))
    here = Block(16, name='down')(inputs['image'], time)
    low = Block(32, name='middle')(nn.max_pool(here, (2, 2), (2, 2)), time)
    up = nn.ConvTranspose(16, (2, 2), (2, 2), name='up')(low)
    x = Block(16, name='last')(jnp.concatenate([here, up], -1), time)
    return nn.Conv(2, (1, 1), name='head')(x)


model, key, tx = UNet(), jax.random.key(0), optax.adam(3e-3)
example = rows_of(data, slice(1))
variables = model.init(key, example)

# %% One-shot: the groups of a GroupNorm keep their sizes alike
coupling = dp.couple(model, variables, example)
keep = dp.oneshot(coupling, variables, target='50%')
small = dp.prune(model, variables, keep, example)
print(small)
print(coupling.explain('down/Conv_0:3.0'))

# %% Trainable gates in an optax loop of your own
method = dp.trainable_gates(coupling, target=0.5)
gated, gate_tx = dp.plug(model, coupling), dp.optimizer(method, tx)
theta = method.init(coupling.gates(), {})
trained = {'params': variables['params'], 'theta': theta}
state = gate_tx.init(trained)


def loss(trained, batch):
  inputs, label = batch
  gates = method.forward(trained['theta'])
  logits = gated({'params': trained['params']}, gates, inputs)
  return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()


@jax.jit
def step(trained, state, batch):
  updates, state = gate_tx.update(jax.grad(loss)(trained, batch), state, trained)
  return optax.apply_updates(trained, updates), state


for i in range(150):
  rows = np.random.RandomState(i).randint(0, 300, 32)
  trained, state = step(trained, state, rows_of(train, rows))
keep = method.decide(trained['theta'], {}, None)
small = dp.prune(model, {'params': trained['params']}, keep, example)
accuracy = lambda logits: (logits.argmax(-1) == answer).mean()
print(small, accuracy(small.apply(small.variables, inputs)))

# %% An auxiliary path with an answer for every pixel, for training only
from depthprune.models.auxiliary_path import beside
from depthprune.models.heads import WithHeads

net, task = dp.trunk(model, variables, example), dp.segmentation(2)
path = beside(['down', 'middle', 'last'], classes=2, width=16, pool=None)
aided = WithHeads(net, {'aux': path})
wide = aided.init(key, example)
method = dp.auxiliary(dp.couple(aided, wide, example), weight=1.0, steps=100)
state = dp.init_state(aided, method, tx, wide)
step = dp.make_step(aided, method, task, tx)
state = dp.fit(step, state, key, train, steps=100, batch=32, show=False)
keep = method.decide(state.theta, {}, None)  # all exits but 'main' go
compact = dp.prune(aided, state.variables, keep, example)
back = net.original({c: tree['trunk'] for c, tree in compact.variables.items()})
print(compact, accuracy(model.apply(back, inputs)))

# %% Stored, read again, and a program without this library
dp.save('small', small)
again = dp.load('small', model)
print(accuracy(again.apply(again.variables, inputs)))
print(dp.export('door', again)['inputs'])
