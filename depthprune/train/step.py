"""The training step of any method: one compiled program, state in and state out."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from depthprune.data.dataset import inputs_of
from depthprune.program.gating import plug, with_branches
from depthprune.program.trace import paths_of, runnable
from depthprune.train.distill import with_teacher
from depthprune.train.method import Method, no_stats, optimizer
from depthprune.train.task import Task, Tree, as_dict


@flax.struct.dataclass
class State:
  """Everything that training changes.

  Attributes:
    params: the weights. theta: what the method trains besides.
    model_state: every other collection of the model, by name.
    opt_state: of the optimizer over {'params': params, 'theta': theta}.
    stats: what the method observes, averaged: over all steps at first, with the
      newest step weighing 1 % from the 100th on.
    step: int32 scalar, number of steps done.
  """

  params: Tree
  theta: Tree
  model_state: Tree
  opt_state: Tree
  stats: Tree
  step: jax.Array

  @property
  def variables(self) -> dict[str, Tree]:
    """What `model.apply` takes."""
    return {'params': self.params, **self.model_state}


def init_state(
  model: Any,
  method: Method,
  tx: optax.GradientTransformation,
  variables: Tree,
  coupling: Any = None,
  batch: Tree = None,
) -> State:
  """A fresh state at step 0; `variables` are copied, a step may consume its state.

  The method's gates start open, those of branches as they are in `variables`.

  Args:
    model, method, tx, coupling: as for make_step.
    variables: {'params': ..., and any other collection}.
    batch: one batch (arrays or shapes); needed by methods that observe, and by those
      that look at exits without a coupling.
  """
  params = variables['params']
  model_state = {k: v for k, v in variables.items() if k != 'params'}
  gates, outputs = {}, {}
  run = partial(runnable(model), train=False)
  if coupling is not None:
    gates = coupling.gates()
    outputs = as_dict(jax.eval_shape(run, coupling.variables, *coupling.inputs))
  elif batch is not None:
    outputs = as_dict(jax.eval_shape(run, variables, *inputs_of(batch)))
  gates['branches'] = branches_of(variables)
  theta = method.init(gates, outputs)
  state = State(
    params=params,
    theta=theta,
    model_state=model_state,
    opt_state=optimizer(method, tx).init({'params': params, 'theta': theta}),
    stats=_no_stats_yet(model, method, variables, theta, batch),
    step=jnp.zeros((), jnp.int32),
  )
  return jax.tree.map(jnp.array, state)


def make_step(
  model: Any,
  method: Method,
  task: Task,
  tx: optax.GradientTransformation,
  coupling: Any = None,
  teacher: Callable[..., Any] | None = None,
  lay: Callable[[State], State] = lambda state: state,
  remat: bool = False,
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
  """step(state, batch, key, teacher_variables=None) -> (state, metrics), jitted.

  The state is donated: use the one that comes back. `key` is the same for every step,
  the step number is folded in. Metrics are scalars on the device, with 'loss'.

  Args:
    model: anything with `apply(variables, *inputs, train=..., mutable=..., rngs=...)`,
      or that function itself.
    tx: optimizer of the weights; the method adds what it needs (`method.optimizer`).
    coupling: from `couple`; None for a method without channel gates.
    teacher: apply function of a network whose logits go into the batch as 'teacher'.
    lay: constrains the new state to where it lies on several devices.
    remat: whether the backward pass computes again what is no convolution or matrix
      product (normalisations, activations, pooling): less memory, more time.
  """
  run, tx = gated(model, coupling), optimizer(method, tx)
  forward = partial(_forward, run, method)
  forward = economical(forward) if remat else forward

  @partial(jax.jit, donate_argnums=0)
  def step(state: State, batch, key, teacher_variables=None):
    if teacher is not None:
      batch = with_teacher(teacher, teacher_variables, batch, task.answer)
    found = _both_ways(forward, method, task, state, batch, key)
    trained = {'params': state.params, 'theta': state.theta}
    updates, opt_state = tx.update(found.grads, state.opt_state, trained)
    learnt: Any = optax.apply_updates(trained, updates)
    seen = method.observe(found.gates, found.gate_grads, found.outputs, batch)
    new = State(
      params=learnt['params'],
      theta=learnt['theta'],
      model_state={**state.model_state, **found.model_state},
      opt_state=opt_state,
      stats=_average(state.stats, seen, state.step),
      step=state.step + 1,
    )
    return lay(new), {'loss': found.loss, **found.metrics}

  return step


class _Found(NamedTuple):
  """What one pass forward and back finds; `grads` is shaped like what is trained."""

  loss: jax.Array
  metrics: dict[str, jax.Array]
  outputs: Tree
  model_state: Tree
  gates: Tree
  gate_grads: Tree
  grads: Tree


def _both_ways(forward, method: Method, task: Task, state: State, batch, key) -> _Found:
  gate_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))

  def loss(params, theta, gates):
    variables = {'params': params, **state.model_state}
    outputs, model_state = forward(variables, gates, batch, dropout_key)
    value, metrics = method.objective(task, outputs, batch, theta, state.step)
    return value, (metrics, outputs, model_state)

  gating = lambda theta: method.forward(theta, gate_key, state.step)
  gates, pull = jax.vjp(gating, state.theta)
  slopes = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
  (value, aux), (params, theta, gate_grads) = slopes(state.params, state.theta, gates)
  metrics, outputs, model_state = aux
  grads = {'params': params, 'theta': jax.tree.map(jnp.add, theta, *pull(gate_grads))}
  return _Found(value, metrics, outputs, model_state, gates, gate_grads, grads)


def economical(forward: Callable) -> Callable:
  """The function, storing convolutions and matrix products only to go backward."""
  return jax.checkpoint(forward, policy=jax.checkpoint_policies.dots_saveable)


def branches_of(variables: Tree) -> dict[str, jax.Array]:
  """{path: gate} of the collection 'branches'."""
  return paths_of(variables.get('branches', {}))


def apply_of(model: Any) -> Callable[..., Any]:
  """model.apply, or the model itself where it is a function."""
  return getattr(model, 'apply', model)


def gated(model: Any, coupling: Any = None) -> Callable[..., Any]:
  """f(variables, gates, *inputs, **kwargs): the exits of the model, with gates."""
  apply = runnable(model)
  plugged = None if coupling is None else plug(model, coupling)

  def run(variables, gates, *inputs, **kwargs):
    if gates.get('channels'):
      if plugged is None:
        raise ValueError(
          'make_step: the method gates channels, but there is no coupling; '
          'pass coupling=couple(model, variables, example)'
        )
      return plugged(variables, gates, *inputs, **kwargs)
    if gates.get('branches'):
      variables = with_branches(variables, gates['branches'])
    return apply(variables, *inputs, **kwargs)

  return run


def _forward(run, method: Method, variables, gates, batch, key):
  """(outputs by name, changed collections)."""
  inputs = inputs_of(batch)
  if not method.trunk_train:
    return as_dict(run(variables, gates, *inputs, train=False)), {}
  rngs = {'dropout': key}
  changing = [k for k in variables if k not in ('params', 'branches')]
  if not changing:
    return as_dict(run(variables, gates, *inputs, train=True, rngs=rngs)), {}
  outputs, changed = run(
    variables, gates, *inputs, train=True, mutable=changing, rngs=rngs
  )
  return as_dict(outputs), changed


def _no_stats_yet(model, method: Method, variables, theta, batch):
  """Zeros, of the shapes that the method will observe."""
  if method.observe is no_stats:
    return {}
  if batch is None:
    raise ValueError(
      'init_state: this method observes training, so the shape of a batch is needed; '
      'pass batch='
    )

  def seen(variables, theta, batch):
    outputs = as_dict(runnable(model)(variables, *inputs_of(batch), train=False))
    gates = method.forward(theta, None, jnp.zeros((), jnp.int32))
    return method.observe(gates, gates, outputs, batch)

  shapes = jax.eval_shape(seen, variables, theta, batch)
  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _average(stats, seen, step):
  """Moves stats towards what was seen: a mean over the first 100 steps, then slower."""
  rate = jnp.maximum(1 / (step.astype(jnp.float32) + 1), 0.01)
  return jax.tree.map(lambda a, b: a + rate.astype(a.dtype) * (b - a), stats, seen)
