"""Milliseconds of every layer of a network, each timed alone on the device at hand.

A layer is what contracts an array: a convolution or a product, without the
normalisations, activations and additions around it, which a compiler may fuse into it.
So the layers of a network do not add up to its latency. Layers that do the same at the
same shapes are timed once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from depthprune.program import cost
from depthprune.program import jaxpr as jx
from depthprune.program.coupling import Coupling
from depthprune.timing import clock

TURNS = 3  # at least; a network may have a hundred layers of unlike shapes


def milliseconds_alone(
  couplings: Sequence[Coupling], seconds: float = 1.0
) -> list[dict[str, float]]:
  """Times the layers of networks in turns, at the shapes with which they were coupled.

  Inputs and weights are made up.

  Args:
    couplings: of the networks, made by `couple`, such as one before and after a cut.
    seconds: how long to measure, compilation not counted, though every layer has at
      least three turns.

  Returns:
    For each network {path: milliseconds}, the median of all calls of a layer in one
    call of the network, by the path of its array as in `cost.layers`.
  """
  calls: dict[Any, Callable[[], Any]] = {}
  networks: list[Counter[tuple[str, Any]]] = []
  for coupling in couplings:
    networks.append(Counter())
    for path, _, e, times in cost.contractions(coupling):
      kind = e.name, str(e.params), *((v.shape, str(v.dtype)) for v in e.inputs)
      networks[-1][path, kind] += times
      if kind not in calls:
        calls[kind] = _call(e)
  taken = (
    clock.interleave([*calls.values()], seconds, least=TURNS, warmup=1) if calls else ()
  )
  median = dict(zip(calls, map(np.median, taken), strict=True))
  found: list[dict[str, float]] = []
  for network in networks:
    found.append({})
    for (path, kind), times in network.items():
      found[-1][path] = found[-1].get(path, 0.0) + times * float(median[kind])
  return found


def _call(e: jx.Equation) -> Callable[[], Any]:
  """Returns a call of one equation, which is compiled the first time."""
  inputs = tuple(dict.fromkeys(v for v in e.inputs if not isinstance(v, jx.Literal)))
  program = jx.Program(inputs, {}, (e,), e.outputs)
  arrays = [clock.made_up(v.shape, v.dtype) for v in inputs]
  run = jax.jit(lambda *arrays: jx.run(program, arrays))
  return lambda: run(*arrays)
