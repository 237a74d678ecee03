"""One array of a tree, on its way to disk and back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def kind(leaf: Any) -> str:
  """dtype and shape in a word: 'float32[3,3,16,16]', 'key<fry>[]'."""
  leaf = leaf if hasattr(leaf, 'dtype') else np.asarray(leaf)
  return f'{leaf.dtype}[{",".join(map(str, leaf.shape))}]'


def stored(leaf: Any) -> Any:
  """A numpy array; of a leaf that is split over processes, each writes its part."""
  if _is_key(leaf):
    leaf = jax.random.key_data(leaf)
  if getattr(leaf, 'is_fully_addressable', True) or leaf.is_fully_replicated:
    return np.asarray(jax.device_get(leaf))
  return jnp.copy(leaf)  # it is read while the next step may consume the original


def placed(leaf: Any, like: Any) -> Any:
  """What was stored, as `like` is: a number, a numpy array, or on its devices."""
  if not hasattr(like, 'dtype'):
    return leaf.item()
  if isinstance(like, np.ndarray | np.generic):
    return leaf
  where = like.sharding if getattr(like, 'committed', False) else None
  # An alias of numpy's memory could be donated to the next step.
  return jax.device_put(leaf, where, may_alias=False)


def described(leaf: Any, array: Any) -> dict[str, Any]:
  """The leaf in a record; `array` is what is stored of it."""
  about = {'dtype': str(array.dtype), 'shape': list(array.shape)}
  return {**about, 'key': str(jax.random.key_impl(leaf))} if _is_key(leaf) else about


def _is_key(leaf: Any) -> bool:
  dtype = getattr(leaf, 'dtype', None)
  return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
