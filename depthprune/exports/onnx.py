"""A traced function as an ONNX model, by jax2onnx, proven equal by onnxruntime.

The converter gets the equations of our own trace, so that what it does to modules and
to jnp while it traces is not met; where it lacks an equation in our programs, or makes
of one what onnxruntime does not run, an equal one stands in its place:

  pad                    constants joined to the array (a symbolic batch is refused)
  max and sum of windows pooling as linen has it (of [b, h, w, c] it is taken for 4-D)
  cond of n branches     n - 1 of two
  own derivatives        what they compute, as nobody asks for them
"""

import contextlib
import importlib.metadata
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from depthprune.program import jaxpr as jx
from depthprune.program.jaxpr import bind, interpret

CONVERTER = 'jax2onnx'
TOLERANCE = 1e-4  # of the largest number that is said, at least of 1
POOLS = ('reduce_window_max', 'reduce_window_sum')


class ExportError(ValueError):
  """What cannot be exported, and what to do."""


def convert(
  fn: Callable, inputs: Sequence[Any], names: Sequence[str], probe: Sequence[Any]
) -> tuple[bytes, float]:
  """fn(*inputs) -> {name: array} as (an ONNX model, how far it is from fn).

  inputs: abstract; a symbolic batch stays one. names: of the inputs. probe: concrete
  ones, on which both are run. The distance is the largest, in parts of the largest
  number that is said (of 1, if that is more). Arrays that fn closes over are in it.

  Raises: ExportError where the converter or onnxruntime is not installed, has no word
    for something, or says something else.
  """
  try:
    import onnxruntime
    from jax2onnx import to_onnx
  except ImportError as error:
    raise ExportError(
      f"onnx: {error}: install the converter, pip install 'depthprune[onnx]'"
    ) from error
  expected = jax.jit(fn)(*probe)
  program, _ = jx.trace(fn, tuple(inputs))
  with _quiet():
    try:
      model = to_onnx(
        lambda *x: _run(program, x),
        [*inputs],
        input_names=[*names],
        output_names=[*expected],
      )
    except Exception as error:  # whatever a converter meets
      raise _refused('cannot convert this program', error) from error
    del model.graph.value_info[:]  # shapes of before its own rewriting, some wrong
    content = model.SerializeToString()
    try:
      options = onnxruntime.SessionOptions()
      options.log_severity_level = 4
      session = onnxruntime.InferenceSession(content, options)
      given = dict(zip(names, map(np.asarray, probe), strict=True))
      known = {x.name for x in session.get_inputs()}
      answers = session.run([*expected], {k: x for k, x in given.items() if k in known})
    except Exception as error:  # onnxruntime has no class of its own errors
      raise _refused('made what onnxruntime cannot run', error) from error
  said = zip(expected.values(), answers, strict=True)
  far = max(_distance(np.asarray(mine), np.asarray(theirs)) for mine, theirs in said)
  if not far <= TOLERANCE:
    raise _refused(
      f'made another network, {far:.1e} apart where {TOLERANCE:.0e} is allowed', ''
    )
  return content, far


def _refused(what: str, error: Any) -> ExportError:
  version = importlib.metadata.version(CONVERTER)
  first = next((line for line in str(error).splitlines() if line.strip()), '')
  why = f': {type(error).__name__}: {first}' if first else ''
  return ExportError(
    f'onnx: {CONVERTER} {version} {what}{why}. Leave ONNX out: StableHLO has all of it'
  )


def _distance(mine: np.ndarray, theirs: np.ndarray) -> float:
  if mine.shape != theirs.shape:
    return math.inf
  mine, theirs = mine.astype(np.float64), theirs.astype(np.float64)
  if not mine.size or not np.array_equal(np.isnan(mine), np.isnan(theirs)):
    return math.inf if mine.size else 0.0
  apart = np.abs(np.nan_to_num(mine) - np.nan_to_num(theirs)).max()
  return float(apart / max(1.0, np.abs(np.nan_to_num(mine)).max()))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Without what the converter says of its plug-ins and of shapes that it guesses.

  It mixes types, which a reader's strict promotion would refuse; ours are traced. What
  it puts in the place of functions of jax, and leaves there (jnp.cumsum), is undone.
  """
  before = logging.root.manager.disable
  functions = [(module, dict(vars(module))) for module in (jnp, lax, jax.nn, nn)]
  logging.disable(logging.ERROR)
  try:
    with warnings.catch_warnings(), jax.numpy_dtype_promotion('standard'):
      warnings.simplefilter('ignore')
      yield
  finally:
    logging.disable(before)
    for module, names in functions:
      vars(module).update(names)


# ---- equations in other words --------------------------------------------------------


def _run(program: jx.Program, args: Sequence) -> list:
  return interpret(program, args, _equation)


def _equation(e: jx.Equation, ins: list) -> list:
  if e.name == 'pad':
    low, high, holes = zip(*e.params['padding_config'], strict=True)
    if min(*low, *high) >= 0 == max(holes):
      return [_padded(ins[0], ins[1], [*zip(low, high, strict=True)])]
  if e.name in POOLS and _of_images(e.params):
    return [_pooled(e, ins[0])]
  if e.name == 'cond':
    branches = [lambda *a, body=body: _run(body, a) for body in e.bodies]
    return _chosen(ins[0], branches, ins[1:])
  if e.name in jx.OWN_DERIVATIVE:
    return _run(e.bodies[0], ins)
  return bind(e, ins, e.params, _run)


def _padded(x: jax.Array, value: Any, sides: Sequence[tuple[int, int]]) -> jax.Array:
  for axis, amounts in enumerate(sides):
    shape, value = [*x.shape], jnp.asarray(value, x.dtype)
    before, behind = (
      [jnp.broadcast_to(value, [*shape[:axis], n, *shape[axis + 1 :]])] * bool(n)
      for n in amounts
    )
    x = lax.concatenate([*before, x, *behind], axis) if any(amounts) else x
  return x


def _of_images(params: dict) -> bool:
  """Whether windows lie in the two middle axes of four."""
  window = params['window_dimensions']
  dilations = (*params['base_dilation'], *params['window_dilation'])
  return len(window) == 4 and window[0] == window[3] == 1 == max(dilations)


def _pooled(e: jx.Equation, x: jax.Array) -> jax.Array:
  window, strides = (e.params[k][1:3] for k in ('window_dimensions', 'window_strides'))
  largest = e.name == 'reduce_window_max'
  x = _padded(x, -jnp.inf if largest else 0, e.params['padding'])
  pool: Any = nn.max_pool if largest else nn.avg_pool
  pooled = pool(x, window_shape=window, strides=strides, padding='VALID')
  return pooled if largest else pooled * math.prod(window)


def _chosen(index: jax.Array, branches: Sequence[Callable], args: Sequence) -> list:
  first, *others = branches
  if not others:
    return first(*args)
  rest = lambda *a: _chosen(index - 1, others, a)
  return lax.cond(index < 1, first, rest, *args)
