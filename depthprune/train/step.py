"""The training step of any method: one compiled program, state in and state out."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.core import unfreeze

from depthprune.data.dataset import inputs_of
from depthprune.program import arguments
from depthprune.program.gating import plug, with_branches
from depthprune.program.modules import explained, runnable, streams
from depthprune.program.trace import paths_of
from depthprune.train import labels
from depthprune.train.distill import with_teacher
from depthprune.train.method import Method, checked, no_stats, optimizer
from depthprune.train.task import Task, Tree, as_dict, is_task

USED = (
  'a training step consumes the state that it is given; go on with the one that it '
  'returns: state, metrics = step(state, batch, key)'
)
GIVEN = 'it was given to a training step or deleted; pass arrays that are still there'


@flax.struct.dataclass
class State:
  """Everything that training changes.

  Attributes:
    params: the weights.
    theta: what the method trains besides the weights.
    model_state: all other collections of the model, by name.
    opt_state: state of the optimizer over {'params': params, 'theta': theta}.
    stats: what the method observes, averaged over all steps at first; from the 100th
      step on, the newest step weighs 1 %.
    step: int32 scalar, the number of steps done.
  """

  params: Tree
  theta: Tree
  model_state: Tree
  opt_state: Tree
  stats: Tree
  step: jax.Array

  @property
  def variables(self) -> dict[str, Tree]:
    """The variables that `model.apply` takes."""
    return {'params': self.params, **self.model_state}


def init_state(
  model: Any,
  method: Method,
  tx: optax.GradientTransformation,
  variables: Tree,
  coupling: Any = None,
  batch: Tree = None,
) -> State:
  """Makes the state with which training by `make_step` begins.

  Channel gates start open, and branch gates as they are in `variables`, which are
  copied.

  Args:
    model: the network, as for `make_step`.
    method: how it is trained.
    tx: optax optimizer of the weights.
    variables: the network's variables, {'params': ..., and any other collection}.
    coupling: from `couple`; None for a method without channel gates.
    batch: one batch, arrays or their shapes. It is needed by methods that observe
      training, and by those that need the names of the exits without a coupling.

  Returns:
    The State at step 0.

  Raises:
    ValueError: the method observes training, and no batch was passed.
  """
  checked(method)
  arguments.optimizer(tx)
  if not isinstance(variables, Mapping) or 'params' not in variables:
    raise arguments.refused('variables', arguments.VARIABLES, variables)
  arguments.alive('variables', variables, GIVEN)
  variables = unfreeze({**variables})  # a step returns plain dicts
  params = variables['params']
  model_state = {k: v for k, v in variables.items() if k != 'params'}
  gates, outputs = {}, {}
  run = partial(runnable(model), train=False)
  if coupling is not None:
    arguments.coupling(coupling).fits(variables)
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
  """Returns the compiled training step of a method, for `fit` or for your own loop.

      step = make_step(model, method, task, tx, coupling)
      state = init_state(model, method, tx, variables, coupling)
      for batch in batches:  # {'image': [batch, height, width, channels], 'label': ...}
        state, metrics = step(state, batch, key)
      keep = method.decide(state.theta, state.stats, evaluate)

  Args:
    model: the network: a module with `apply(variables, *inputs, train=..., mutable=...,
      rngs=...)`, or that function itself.
    method: the method, such as `netcut(coupling)`.
    task: loss and metrics, such as `classification(10)`.
    tx: optax optimizer of the weights. The method adds its own learning rates and its
      penalty to it. Its `update` is also passed value, grad and value_fn, the loss, its
      gradient and the loss as a function of {'params', 'theta'}, as line searches and
      `optax.contrib.reduce_on_plateau` need.
    coupling: from `couple`; None for a method without channel gates.
    teacher: apply function of a network to learn from, whose logits go into the batch
      as 'teacher', for a method wrapped by `distill`.
    lay: (state) -> state, which constrains where the new state lies on several devices.
    remat: whether the backward pass computes normalisations, activations and pooling
      again instead of storing them, which takes less memory and more time.

  Returns:
    step(state, batch, key, teacher_variables=None) -> (state, metrics), jitted. The
    state is donated, so use only the one that is returned. `key` is the same for all
    steps, as the number of the step is folded in. metrics are scalars on the device:
    'loss', and those of the method.

  Raises:
    ValueError: in the first step, the method gates channels and there is no coupling.
  """
  checked(method)
  arguments.optimizer(tx)
  is_task(task)
  if teacher is not None:
    write = 'write teacher=model.apply, and pass its variables to the step'
    is_function = callable(teacher) and not hasattr(teacher, 'apply')
    if not is_function:
      raise arguments.refused('teacher', 'the apply of a network', teacher, write)
  run, tx = gated(model, coupling), optimizer(method, tx)
  forward = partial(_forward, run, method)
  forward = economical(forward) if remat else forward

  @partial(jax.jit, donate_argnums=0)
  def step(state: State, batch, key, teacher_variables=None):
    if teacher is not None:
      if teacher_variables is None:
        what = 'the step has a teacher, but no variables of it'
        write = 'write step(state, batch, key, teacher_variables)'
        raise arguments.wrong('teacher_variables', what, write)
      batch = with_teacher(teacher, teacher_variables, batch, task.answer)
    gate_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))

    def loss_of(params, theta, gates):
      variables = {'params': params, **state.model_state}
      outputs, model_state = forward(variables, gates, batch, dropout_key)
      loss, metrics = method.objective(task, outputs, batch, theta, state.step)
      return loss, (metrics, outputs, model_state)

    # The gates are differentiated apart, because methods observe their gradients.
    gating = lambda theta: method.forward(theta, gate_key, state.step)
    gates, pull = jax.vjp(gating, state.theta)
    slopes = jax.value_and_grad(loss_of, argnums=(0, 1, 2), has_aux=True)
    (loss, aux), (params, theta, gate_grads) = slopes(state.params, state.theta, gates)
    metrics, outputs, model_state = aux
    grads = {'params': params, 'theta': jax.tree.map(jnp.add, theta, *pull(gate_grads))}
    trained = {'params': state.params, 'theta': state.theta}

    def loss_at(trained):  # for line searches
      params, theta = trained['params'], trained['theta']
      return loss_of(params, theta, gating(theta))[0]

    seen = {'value': loss, 'grad': grads, 'value_fn': loss_at}
    updates, opt_state = tx.update(grads, state.opt_state, trained, **seen)
    learnt: Any = optax.apply_updates(trained, updates)
    observed = method.observe(gates, gate_grads, outputs, batch)
    # A mean over the first 100 steps, then an exponential one.
    rate = jnp.maximum(1 / (state.step.astype(jnp.float32) + 1), 0.01)
    average = lambda a, b: a + rate.astype(a.dtype) * (b - a)
    new = State(
      params=learnt['params'],
      theta=learnt['theta'],
      model_state={**state.model_state, **model_state},
      opt_state=opt_state,
      stats=jax.tree.map(average, state.stats, observed),
      step=state.step + 1,
    )
    return lay(new), {'loss': loss, **metrics}

  return Step(step, task.check)


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
  """The training step that `make_step` returns: state and batch in, state out.

  Attributes:
    program: the compiled function, as `jax.jit` returns it.
    check: (batch) -> None; raises ValueError for labels that are no classes.
  """

  program: Callable[..., Any]
  check: Callable[[Any], None]

  def __call__(self, state: State, batch: Any, key: Any, teacher_variables: Any = None):
    """Trains on one batch; arguments and result as `make_step` says.

    Raises:
      TypeError: an argument is of another kind.
      ValueError: the state was donated to an earlier step; the batch has nothing to
        read, no labels, or labels that are no classes.
    """
    self.check(self._checked(state, batch, key))
    return self.program(state, batch, key, teacher_variables)

  def lower(self, state: State, batch: Any, key: Any, teacher_variables: Any = None):
    """Lowers the step for such arguments, to a `jax.stages.Lowered`."""
    self._checked(state, batch, key)
    return self.program.lower(state, batch, key, teacher_variables)

  def trace(self, state: State, batch: Any, key: Any, teacher_variables: Any = None):
    """Traces the step for such arguments, as a `jax.stages.Traced`."""
    self._checked(state, batch, key)
    return self.program.trace(state, batch, key, teacher_variables)

  def _checked(self, state: Any, batch: Any, key: Any) -> Mapping[str, Any]:
    write = 'write step(state, batch, key) with state = init_state(...)'
    arguments.kind_of('state', state, State, 'the State of init_state', write)
    arguments.alive('state', state.step, USED)
    arguments.key(key)
    inputs_of(batch)
    labels.of(batch)
    return batch


def economical(forward: Callable) -> Callable:
  """Makes a function store only convolutions and matrix products for its gradient."""
  return jax.checkpoint(forward, policy=jax.checkpoint_policies.dots_saveable)


def branches_of(variables: Tree) -> dict[str, jax.Array]:
  """Returns {path: gate} of the collection 'branches'."""
  return paths_of(variables.get('branches', {}))


def gated(model: Any, coupling: Any = None) -> Callable[..., Any]:
  """Returns f(variables, gates, *inputs, **kwargs), the model with gates in place."""
  apply = runnable(model)
  if coupling is not None:
    arguments.coupling(coupling)
  plugged = None if coupling is None else plug(model, coupling)

  def run(variables, gates, *inputs, **kwargs):
    with explained(variables, inputs):
      return called(variables, gates, inputs, kwargs)

  def called(variables, gates, inputs, kwargs):
    if gates.get('channels'):
      if plugged is None:
        raise arguments.wrong(
          'coupling',
          'the method gates channels, but there is no coupling',
          'pass coupling=couple(model, variables, example)',
        )
      return plugged(variables, gates, *inputs, **kwargs)
    if gates.get('branches'):
      variables = with_branches(variables, gates['branches'])
    return apply(variables, *inputs, **kwargs)

  return run


def _forward(run, method: Method, variables, gates, batch, key):
  """Returns (outputs by name, changed collections)."""
  inputs = inputs_of(batch)
  if not method.trunk_train:
    return as_dict(run(variables, gates, *inputs, train=False)), {}
  rngs = streams(key)
  changing = [k for k in variables if k not in ('params', 'branches')]
  if not changing:
    return as_dict(run(variables, gates, *inputs, train=True, rngs=rngs)), {}
  outputs, changed = run(
    variables, gates, *inputs, train=True, mutable=changing, rngs=rngs
  )
  return as_dict(outputs), changed


def _no_stats_yet(model, method: Method, variables, theta, batch):
  """Returns zeros of the shapes that the method will observe."""
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
