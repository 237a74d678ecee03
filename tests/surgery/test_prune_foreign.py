"""prune on networks of others: linen, NNX, functions. Cut, trained, cut again."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from depthprune.program import cost
from depthprune.program.coupling import couple
from depthprune.program.trace import paths_of
from depthprune.surgery.prune import prune
from tests import masking as m
from tests import zoo

X = zoo.image(2)


class Net(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(6, rngs=rngs)
    self.hidden = nnx.Linear(6, 8, rngs=rngs)
    self.out = nnx.Linear(8, 4, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
    return self.out(nnx.relu(self.hidden(x)))


class Foreign(NamedTuple):
  """A network. train(apply)(variables, x) -> logits, the variables with new statistics.

  parameters: how many arrays' elements `cost.params` has to count."""

  model: Any
  variables: Any
  train: Callable
  parameters: Callable = lambda variables: sum(
    x.size for x in jax.tree.leaves(variables)
  )


def of_nnx() -> Foreign:
  """As a function of its state: what `nnx.split` gives, merged again inside."""
  graph, state = nnx.split(Net(nnx.Rngs(0)))

  def run(state, x, train=False):
    net = nnx.merge(graph, state)
    net.train() if train else net.eval()
    out = net(x)
    return (out, nnx.state(net)) if train else out

  own = lambda v: sum(x.size for x in jax.tree.leaves(nnx.filter_state(v, nnx.Param)))
  return Foreign(run, state, lambda f: lambda v, x: f(v, x, train=True), own)


def of_linen() -> Foreign:
  """Batch statistics, dropout and a flattened feature map."""
  case = zoo.NETWORKS['vgg']
  mode = {
    'train': True,
    'mutable': ['batch_stats'],
    'rngs': {'dropout': jax.random.key(1)},
  }

  def train(f):
    def run(v, x):
      out, new = f(v, x, **mode)
      return out, {**v, **new}

    return run

  count = lambda v: sum(x.size for x in jax.tree.leaves(v['params']))
  return Foreign(case.model, case.variables(), train, count)


def of_function() -> Foreign:
  """Control flow: a scan over the rows of an image."""
  case = zoo.NETWORKS['recurrent']
  return Foreign(case.model, case.variables(), lambda f: lambda v, x: (f(v, x), v))


NETWORKS = {'linen': of_linen, 'nnx': of_nnx, 'function': of_function}


@pytest.fixture(scope='module', params=NETWORKS)
def cut(request):
  foreign = NETWORKS[request.param]()
  coupling = couple(foreign.model, foreign.variables, X)
  keep = m.random_keep(coupling)
  return foreign, prune(foreign.model, foreign.variables, keep, X, coupling=coupling)


def test_it_is_cut_exactly_and_counted_to_the_unit(cut):
  foreign, pruned = cut
  report = pruned.report
  assert report['verify']['difference'] <= 1e-5 and report['verify']['moved'] > 1e-3
  # What takes its sizes from the arrays is its own small network; linen does not.
  fixed = hasattr(foreign.model, 'apply')
  assert pruned.arch == {} and pruned.model is (None if fixed else foreign.model)
  assert jax.tree.structure(pruned.variables) == jax.tree.structure(foreign.variables)
  assert report['params']['before'] == foreign.parameters(foreign.variables)
  assert report['params']['after'] == foreign.parameters(pruned.variables)
  small = couple(pruned.apply, pruned.variables, X)
  assert report['flops']['after'] == cost.flops(small) < report['flops']['before']
  for path, leaf in paths_of(pruned.variables).items():
    assert report['tensors'][path]['shape'][1] == [*leaf.shape]


def test_the_output_is_that_of_zeros_in_their_place(cut):
  """The masked network by other code, at another batch size."""
  foreign, pruned = cut
  x = zoo.image(5)
  zeroed = m.zeroed(pruned.coupling, foreign.variables, pruned.keep)
  run = getattr(foreign.model, 'apply', foreign.model)
  expected, got = m.quick(run)(zeroed, x), m.quick(pruned.apply)(pruned.variables, x)
  assert m.difference(expected, got) <= 1e-5


def test_it_trains_on(cut):
  foreign, pruned = cut
  x, labels = zoo.image(4), jnp.arange(4)
  train = foreign.train(pruned.apply)

  def loss(v):
    logits, v = train(v, x)
    return -jax.nn.log_softmax(logits)[jnp.arange(4), labels].mean(), v

  @m.quick
  def step(v):
    (value, new), slopes = jax.value_and_grad(loss, has_aux=True)(v)
    return jax.tree.map(lambda a, s: a - 0.3 * s, new, slopes), value

  at, losses = pruned.variables, []
  for _ in range(40):
    at, value = step(at)
    losses.append(float(value))
  assert losses[-1] < 0.9 * losses[0]
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), at, pruned.variables)
  assert all(jax.tree.leaves(moved))
  assert jax.tree.map(jnp.shape, at) == jax.tree.map(jnp.shape, pruned.variables)


def test_what_was_cut_is_cut_again(cut):
  """`apply` is a function like any other: it can be coupled, and cut."""
  _, first = cut
  coupling = couple(first.apply, first.variables, X)
  sizes = {g.name: g.size for g in coupling.groups.values()}
  assert sizes == {g: after for g, (_, after) in first.report['widths'].items()}
  keep = m.random_keep(coupling, seed=7)
  second = prune(first.apply, first.variables, keep, X, coupling=coupling)
  assert (
    second.report['verify']['difference'] <= 1e-5 < second.report['verify']['moved']
  )
  assert second.report['flops']['before'] == first.report['flops']['after']
  zeroed = m.zeroed(coupling, first.variables, second.keep)
  x = zoo.image(3)
  expected = m.quick(first.apply)(zeroed, x)
  assert m.difference(expected, m.quick(second.apply)(second.variables, x)) <= 1e-5


OPTIMIZERS = {
  'adam': optax.adam(1e-2),
  'momentum': optax.sgd(1e-2, momentum=0.9),
  'adafactor': optax.adafactor(1e-2, min_dim_size_to_factor=4),
}


@pytest.mark.parametrize('name', OPTIMIZERS)
@pytest.mark.parametrize('as_state', [False, True])
def test_the_state_of_an_nnx_optimizer_is_cut_with_the_network(name, as_state):
  """It is of the nnx.Params alone, beside which the network has batch statistics."""
  tx, net = OPTIMIZERS[name], Net(nnx.Rngs(0))
  optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
  loss = lambda net: jnp.square(net(X)).mean()
  with jax.numpy_dtype_promotion('standard'):  # optax mixes floats and integers
    for _ in range(2):
      optimizer.update(net, nnx.grad(loss)(net))
  net.eval()
  graph, variables = nnx.split(net)
  run = lambda variables, x: nnx.merge(graph, variables)(x)
  keep = m.random_keep(couple(run, variables, X))
  state = nnx.state(optimizer)['opt_state']
  given = state if as_state else optimizer.opt_state
  pruned = prune(run, variables, keep, X, tx, given)
  small = nnx.merge(graph, pruned.variables)
  anew = nnx.Optimizer(small, tx, wrt=nnx.Param)
  if as_state:
    nnx.update(anew, nnx.State({'opt_state': pruned.opt_state}))
  else:
    wanted, got = anew.opt_state, pruned.opt_state
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, wanted)
    anew.opt_state = nnx.data(pruned.opt_state)
  if name != 'adafactor':
    of = lambda optimizer: paths_of(nnx.state(optimizer))
    before, after = of(optimizer), of(anew)
    for path, leaf in after.items():
      variable = next((p for p in paths_of(variables) if path.endswith(p)), None)
      if variable and leaf.ndim:
        kept = pruned.report['tensors'][variable]['kept']
        left = [kept.get(str(i), range(n)) for i, n in enumerate(before[path].shape)]
        np.testing.assert_array_equal(before[path][np.ix_(*left)], leaf)
  with jax.numpy_dtype_promotion('standard'):
    anew.update(small, nnx.grad(loss)(small))


def test_a_state_of_other_parameters_is_refused():
  net, tx = Net(nnx.Rngs(0)), OPTIMIZERS['adam']
  graph, variables = nnx.split(net)
  run = lambda variables, x: nnx.merge(graph, variables)(x)
  other = nnx.Optimizer(nnx.Linear(6, 9, rngs=nnx.Rngs(0)), tx, wrt=nnx.Param)
  with pytest.raises(ValueError, match='the tx and the state that belong'):
    prune(run, variables, {}, X, tx, other.opt_state)
