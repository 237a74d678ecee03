"""What is inferred of a program: the axes of every value."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from depthprune.program import jaxpr as jx
from depthprune.program.axes import Axis, Dims, Var, pin, unify


@dataclasses.dataclass
class Facts:
  """What has been inferred: the axes of every value, filled in by `infer`.

  Attributes:
    dims: the axes of every value, those inside bodies included.
    hidden: axes that lie on no array: a convolution's feature groups, a scan's loop.
    unknown: names of primitives without a rule that were met."""

  dims: dict[jx.Value, Dims] = dataclasses.field(default_factory=dict)
  hidden: dict[jx.Equation, Axis] = dataclasses.field(default_factory=dict)
  unknown: set[str] = dataclasses.field(default_factory=set)


def fresh(shape: Sequence[int], why: str | None = None) -> list[Axis]:
  return [Var(n, why) for n in shape]


def equal(a: Dims, b: Dims, e: jx.Equation):
  for x, y in zip(a, b, strict=True):
    unify(x, y, e)


def opaque(facts, e, *ins):
  """The sound default: an unknown primitive forbids slicing everything it touches."""
  why = f'no rule for the primitive {e.name}'
  if any(d.size > 1 for x in ins for d in x):
    facts.unknown.add(e.name)
  for x in ins:
    for d in x:
      pin(d, why)
  return [fresh(v.shape, why) for v in e.outputs]


def any_shape(facts, e, *_):
  return [fresh(v.shape) for v in e.outputs]
