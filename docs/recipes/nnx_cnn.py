"""A convolutional network of your own in NNX, with BatchNorm and Dropout."""

# %% Data
import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import depthprune as dp

x, y = load_digits(return_X_y=True)
x, y = x.reshape(-1, 8, 8, 1).astype(np.float32) / 16, y.astype(np.int32)
train, held_out = (x[:1400], y[:1400]), (x[1400:], y[1400:])


# %% Network
class Block(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.Conv(16, 16, (3, 3), use_bias=False, rngs=rngs)
    self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
    self.second = nnx.Conv(16, 16, (3, 3), rngs=rngs)
    self.drop = nnx.Dropout(0.1, rngs=rngs)

  def __call__(self, x):
    return x + self.drop(self.second(nnx.relu(self.norm(self.first(x)))))


class Net(nnx.Module):
  def __init__(self, rngs):
    self.stem = nnx.Conv(1, 16, (3, 3), rngs=rngs)
    self.blocks = nnx.List([Block(rngs) for _ in range(4)])
    self.head = nnx.Linear(16, 10, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.stem(x))
    for block in self.blocks:
      x = block(x)
    return self.head(nnx.relu(x).mean((1, 2)))


model, key, tx = Net(nnx.Rngs(0)), jax.random.key(0), optax.adam(3e-3)
task = dp.classification(10)

# %% One-shot: what comes back is a small Net
coupling = dp.couple(model, nnx.state(model), x[:1], train=False)
keep = dp.oneshot(coupling, nnx.state(model), target='50%', exclude=['head'])
small = dp.prune(model, nnx.state(model), keep, x[:1], train=False)
print(small, small.model.blocks[0].first.kernel.shape)
optimizer = nnx.Optimizer(small.model, tx, wrt=nnx.Param)  # it trains on as any other

# %% Trainable gates: the module as a trunk trains with `make_step`
net = dp.trunk(model, nnx.state(model), x[:1])
variables = net.init(key, x[:1])
fit = lambda step, state, stage: dp.fit(
  step, state, key, train, steps=80, batch=100, show=False, label=stage
)
small = dp.shrink(
  net, variables, x[:1], lambda coupling: dp.trainable_gates(coupling, target=0.5),
  fit, task=task, tx=tx, held_out=held_out, calibration=train,
)  # fmt: skip
print(small)

# %% NetCut, and an executed cascade of SideNets
from depthprune.cascades import thresholds
from depthprune.models.heads import Head, WithHeads, every_tap

print(dp.taps(model, nnx.state(model), x[:1]))
heads = every_tap(net)
wide = heads.init(key, x[:1])
method = dp.netcut(dp.couple(heads, wide, x[:1]), beta=0.02, force=True)
state = dp.init_state(heads, method, tx, wide)
state = fit(dp.make_step(heads, method, task, tx), state, 'netcut')
judge = dp.judge(heads, method, task, state, held_out)
short = dp.prune(heads, state.variables, method.decide(state.theta, {}, judge), x[:1])
print(short.model.exits, short)

sides = WithHeads(net, {'early': Head('blocks/0', hidden=32)})
wide = sides.init(key, x[:1])
method = dp.sidenet(dp.couple(sides, wide, x[:1]), 'joint')
state = dp.init_state(sides, method, tx, wide)
state = fit(dp.make_step(sides, method, task, tx), state, 'sidenet')
early = dp.cascade(sides, state.variables, x[:1])
seen = early.predictions(held_out[1], held_out[0])
early = early.choosing(thresholds.for_drop(seen, 1.0))
print(np.bincount(early(held_out[0]).exit))

# %% Network Implosion in three rounds, an auxiliary path, stored and exported
shallow = dp.shrink(
  net, variables, x[:1], lambda coupling: dp.implosion(coupling, depth=1), fit,
  task=task, tx=tx, held_out=held_out, calibration=train,
)  # fmt: skip
dp.save('shallow', shallow)
again = dp.load('shallow', net)
print(again, dp.export('door', again)['programs'].keys())

from depthprune.models.auxiliary_path import beside

aided = WithHeads(net, {'aux': beside(net.taps, width=32)})
wide = aided.init(key, x[:1])
method = dp.auxiliary(dp.couple(aided, wide, x[:1]), weight=1.0, steps=80)
state = dp.init_state(aided, method, tx, wide)
state = fit(dp.make_step(aided, method, task, tx), state, 'auxiliary')
compact = dp.prune(aided, state.variables, method.decide(state.theta, {}, None), x[:1])
nnx.update(model, net.original({c: t['trunk'] for c, t in compact.variables.items()}))
print(compact, model(x[:1]).shape)
