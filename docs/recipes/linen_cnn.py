"""A convolutional network of your own in linen, with BatchNorm and Dropout."""

# %% Data and a trained network, in a loop of your own
import flax.linen as nn
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import depthprune as dp

x, y = load_digits(return_X_y=True)
x, y = x.reshape(-1, 8, 8, 1).astype(np.float32) / 16, y.astype(np.int32)
train, held_out = (x[:1400], y[:1400]), (x[1400:], y[1400:])


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    y = nn.Conv(16, (3, 3), use_bias=False)(x)
    y = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(y))
    return x + nn.Dropout(0.1, deterministic=not train)(nn.Conv(16, (3, 3))(y))


class Net(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu(nn.Conv(16, (3, 3), name='stem')(x))
    for i in range(4):
      x = Block(name=f'block{i}')(x, train)
    return nn.Dense(10, name='head')(nn.relu(x).mean((1, 2)))


model, key, tx = Net(), jax.random.key(0), optax.adam(3e-3)
variables = model.init(key, x[:1])
task = dp.classification(10)

# %% One-shot: half of the FLOPs by the norm of the weights
coupling = dp.couple(model, variables, x[:1])
keep = dp.oneshot(coupling, variables, target='50%', exclude=['head'])
small = dp.prune(model, variables, keep, x[:1])
print(small)

# %% Trainable gates in an optax loop of your own
method = dp.trainable_gates(coupling, target=0.5)
gated, gate_tx = dp.plug(model, coupling), dp.optimizer(method, tx)
theta = method.init(coupling.gates(), {})
trained, stats = {'params': variables['params'], 'theta': theta}, variables
state = gate_tx.init(trained)


def loss(trained, stats, x, y, key):
  logits, changed = gated(
    {**stats, 'params': trained['params']}, method.forward(trained['theta']), x,
    train=True, mutable=['batch_stats'], rngs={'dropout': key},
  )  # fmt: skip
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), changed


@jax.jit
def step(trained, stats, state, x, y, key):
  grads, changed = jax.grad(loss, has_aux=True)(trained, stats, x, y, key)
  updates, state = gate_tx.update(grads, state, trained)
  return optax.apply_updates(trained, updates), {**stats, **changed}, state


for i in range(100):
  rows = np.random.RandomState(i).randint(0, 1400, 100)
  batch = train[0][rows], train[1][rows], jax.random.fold_in(key, i)
  trained, stats, state = step(trained, stats, state, *batch)
keep = method.decide(trained['theta'], {}, None)
small = dp.prune(model, {**stats, 'params': trained['params']}, keep, x[:1])
batches = [{'image': train[0][i : i + 200]} for i in range(0, 1400, 200)]
fresh = dp.recalibrate(small.apply, small.variables, batches)
accuracy = (small.apply(fresh, held_out[0]).argmax(-1) == held_out[1]).mean()
print(small, accuracy)

# %% NetCut: a head on every block, and the depth that the task needs
from depthprune.models.heads import Head, WithHeads, every_tap

net = dp.trunk(model, variables, x[:1])
print(dp.taps(model, variables, x[:1]))
heads = every_tap(net)
wide = heads.init(key, x[:1])
method = dp.netcut(dp.couple(heads, wide, x[:1]), beta=0.02, importance_lr=0.05)
state = dp.init_state(heads, method, tx, wide)
step = dp.make_step(heads, method, task, tx)
state = dp.fit(step, state, key, train, steps=150, batch=100, show=False)
judge = dp.judge(heads, method, task, state, held_out)
short = dp.prune(heads, state.variables, method.decide(state.theta, {}, judge), x[:1])
print(short.model.exits, short)

# %% SideNet: confident inputs leave early, executed
from depthprune.cascades import thresholds

sides = WithHeads(net, {'early': Head('block0', hidden=32), 'late': Head('block2')})
wide = sides.init(key, x[:1])
method = dp.sidenet(dp.couple(sides, wide, x[:1]), 'joint')
state = dp.init_state(sides, method, tx, wide)
step = dp.make_step(sides, method, task, tx)
state = dp.fit(step, state, key, train, steps=150, batch=100, show=False)
early = dp.cascade(sides, state.variables, x[:1])
seen = early.predictions(held_out[1], held_out[0])
early = early.choosing(thresholds.for_drop(seen, 1.0))
answer = early(held_out[0])
print(np.bincount(answer.exit), early.cost(answer))

# %% Network Implosion: three rounds, a residual unit in each
fit = lambda step, state, stage: dp.fit(
  step, state, key, train, steps=60, batch=100, show=False, label=stage
)
shallow = dp.shrink(
  net, net.init(key, x[:1]), x[:1], lambda coupling: dp.implosion(coupling, depth=1),
  fit, task=task, tx=tx, held_out=held_out, calibration=train,
)  # fmt: skip
print(shallow, shallow.arch)

# %% An auxiliary path: it helps to train, and is dropped
from depthprune.models.auxiliary_path import beside

aided = WithHeads(net, {'aux': beside(net.taps, width=32)})
wide = aided.init(key, x[:1])
method = dp.auxiliary(dp.couple(aided, wide, x[:1]), weight=1.0, steps=60)
state = dp.init_state(aided, method, tx, wide)
state = fit(dp.make_step(aided, method, task, tx), state, 'auxiliary')
compact = dp.prune(aided, state.variables, method.decide(state.theta, {}, None), x[:1])
back = net.original({c: tree['trunk'] for c, tree in compact.variables.items()})
print(compact, model.apply(back, x[:1]).shape)

# %% Stored, read again, and a program without this library
dp.save('small', shallow)
again = dp.load('small', model)
print(dp.export('door', again)['programs'].keys())
