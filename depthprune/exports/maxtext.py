"""Decoders of the Llama family as checkpoints of MaxText, and back.

MaxText trains and serves decoders on many TPUs. Its scanned checkpoints hold one array
for all layers, the layer on axis 1, in a tree of orbax:

  token_embedder/embedding                                 [vocab, width]
  decoder/layers/pre_self_attention_layer_norm/scale       [width, layers]
  decoder/layers/self_attention/query/kernel               [width, layers, heads, size]
  decoder/layers/self_attention/key, value/kernel          [width, layers, groups, size]
  decoder/layers/self_attention/out/kernel                 [heads, layers, size, width]
  decoder/layers/post_self_attention_layer_norm/scale      [width, layers]
  decoder/layers/mlp/wi_0, wi_1/kernel                     [width, layers, inner]
  decoder/layers/mlp/wo/kernel                             [inner, layers, width]
  decoder/decoder_norm/scale                               [width]
  decoder/logits_dense/kernel, where it is not tied        [width, vocab]

Its attention does not divide by √size: the stored kernel of the queries is divided
already. Rotations pair the two halves of a head, as here. Layers have one size, so a
network is written only if its layers are alike.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import yaml

from depthprune.exports.alike import alike
from depthprune.models.decoder import Decoder
from depthprune.models.decoder_config import PLAIN, Count, Positive
from depthprune.program import arguments
from depthprune.program.trace import paths_of
from depthprune.storage import directory, files
from depthprune.storage.checkpoint import CheckpointError

CONFIG, ITEMS = 'maxtext.yml', Path('0', 'items')
LAYERS = 'decoder/layers'
QUERY = f'{LAYERS}/self_attention/query/kernel'
PLACES = {  # of the leaves of a layer, and of the others
  'attention/norm/scale': f'{LAYERS}/pre_self_attention_layer_norm/scale',
  'attention/query/kernel': QUERY,
  'attention/key/kernel': f'{LAYERS}/self_attention/key/kernel',
  'attention/value/kernel': f'{LAYERS}/self_attention/value/kernel',
  'attention/out/kernel': f'{LAYERS}/self_attention/out/kernel',
  'mlp/norm/scale': f'{LAYERS}/post_self_attention_layer_norm/scale',
  'mlp/gate/kernel': f'{LAYERS}/mlp/wi_0/kernel',
  'mlp/up/kernel': f'{LAYERS}/mlp/wi_1/kernel',
  'mlp/down/kernel': f'{LAYERS}/mlp/wo/kernel',
  'embed/kernel': 'token_embedder/embedding',
  'norm/scale': 'decoder/decoder_norm/scale',
  'head/kernel': 'decoder/logits_dense/kernel',
}
SIZES = {
  'vocab': 'vocab_size', 'positions': 'max_target_length', 'width': 'base_emb_dim',
  'depth': 'base_num_decoder_layers', 'heads': 'base_num_query_heads',
  'groups': 'base_num_kv_heads', 'size': 'head_dim', 'inner': 'base_mlp_dim',
}  # fmt: skip
# What a Decoder of the Llama family is in MaxText, besides its sizes.
FIXED = {
  'decoder_block': 'llama2', 'mlp_activations': ['silu', 'linear'],
  'rope_type': 'default', 'normalize_embedding_logits': False, 'scan_layers': True,
  'param_scan_axis': 1, 'enable_dropout': False,
}  # fmt: skip


def save(path: str | Path, model: Decoder, variables: Mapping[str, Any]) -> None:
  """Writes a Decoder, pruned or not, as a scanned checkpoint of MaxText.

      small = dp.prune(model, variables, keep, tokens)
      maxtext.save('small', small.model, small.variables)

  Give MaxText `load_parameters_path=small/0/items` and the entries of
  small/maxtext.yml; you may lower max_target_length. The folder appears at once
  and complete. The tokenizer is not written.

  Args:
    path: the folder, which must not exist.
    model: the Decoder, whose `arch` gives all layers that are left the same sizes.
      Layers without both branches are left out.
    variables: its arrays. Gates of branches are 1, as `prune` leaves them.

  Raises:
    ValueError: sizes that differ between layers, half of a layer that is gone, a width
      of values that is not that of keys, options that Llama lacks, arrays that are
      not those of the model, or gates that are not 1. The message says which.
    CheckpointError: there is something at the path already.
    WriteError: the disk is full.
  """
  path = Path(arguments.path('path', path))
  if path.exists():
    raise CheckpointError(f'{path}: expected nothing there: choose another path')
  plain, arrays = alike(model, variables, 'MaxText')
  others = {k: getattr(model, k) for k in (*PLAIN, 'window')}
  others = {k: v for k, v in others.items() if v != {**PLAIN, 'window': 0}[k]}
  if others:
    raise ValueError(f'expected the options of Llama, which lacks {others}')
  tree: dict[str, Any] = {}
  for place, (leaves, shape) in _by_place(plain).items():
    *inside, last = place.split('/')
    node = tree
    for name in inside:
      node = node.setdefault(name, {})
    parts = [arrays[leaf] for leaf in leaves]
    if place == QUERY:
      parts = [(x / np.float64(plain.size) ** 0.5).astype(x.dtype) for x in parts]
    if place.startswith(LAYERS):
      node[last] = np.stack([x.reshape(shape[0], *shape[2:]) for x in parts], 1)
    else:
      (node[last],) = parts
  config = {
    **{key: getattr(plain, field) for field, key in SIZES.items()},
    'rope_max_timescale': plain.theta,
    'normalization_layer_epsilon': plain.epsilon,
    'logits_via_embedding': plain.tied,
    **FIXED,
  }
  with directory.complete(path) as folder:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
      state = {'params': {'params': tree}}
      orbax.save((folder / ITEMS).absolute(), args=ocp.args.PyTreeSave(state))
    lines = (f'{key}: {_written(value)}\n' for key, value in config.items())
    (folder / CONFIG).write_text(''.join(lines))


def load(
  path: str | Path, config: str | Path | None = None
) -> tuple[Decoder, dict[str, Any]]:
  """Reads a scanned checkpoint of MaxText, such as a student that it has healed.

      model, variables = maxtext.load('run/checkpoints/1000/items', 'small/maxtext.yml')

  What `save` has written comes back to the bit where √size is a power of two, and
  otherwise but for the rounding of the queries.

  Args:
    path: a folder of `save`, or the folder `items` of a step of a run.
    config: the file of the entries by which the network was made; by default
      maxtext.yml in a folder of `save`.

  Returns:
    (Decoder, its variables).

  Raises:
    CheckpointError: there is no checkpoint or config, an entry is missing or of another
      type, the architecture is not that of Llama, or arrays are missing or unexpected.
  """
  path = Path(arguments.path('path', path))
  where = Path(path / CONFIG if config is None else arguments.path('config', config))
  model = _described(where)
  items = path / ITEMS if (path / ITEMS).is_dir() else path
  places = _by_place(model)
  found = _read(items, {place: shape for place, (_, shape) in places.items()})
  fresh = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))
  expected = paths_of(fresh)
  leaves = {path: np.ones(x.shape, x.dtype) for path, x in expected.items()}  # gates
  for place, (paths, _) in places.items():
    x = found[place]
    if place == QUERY:
      x = x.astype(np.float64) * np.float64(model.size) ** 0.5
    parts = np.moveaxis(x, 1, 0) if place.startswith(LAYERS) else [x]
    for leaf, part in zip(paths, parts, strict=True):
      like = expected[leaf]
      leaves[leaf] = part.reshape(like.shape).astype(like.dtype)
  arrays = [jax.numpy.asarray(x) for x in leaves.values()]
  return model, jax.tree.unflatten(jax.tree.structure(fresh), arrays)


def _by_place(model: Decoder) -> dict[str, tuple[list[str], tuple[int, ...]]]:
  """{path in the tree of MaxText: (paths of the leaves by layer, shape)}."""
  width, layers, inner = model.width, model.depth, model.inner
  heads, groups = ((width, layers, n, model.size) for n in (model.heads, model.groups))
  shapes = {
    'attention/norm/scale': (width, layers),
    'attention/query/kernel': heads,
    'attention/key/kernel': groups,
    'attention/value/kernel': groups,
    'attention/out/kernel': (model.heads, layers, model.size, width),
    'mlp/norm/scale': (width, layers),
    'mlp/gate/kernel': (width, layers, inner),
    'mlp/up/kernel': (width, layers, inner),
    'mlp/down/kernel': (inner, layers, width),
    'embed/kernel': (model.vocab, width),
    'norm/scale': (width,),
    'head/kernel': (width, model.vocab),
  }
  places = {}
  for leaf, shape in shapes.items():
    stacked = [f'params/layer{i}/{leaf}' for i in range(layers)]
    is_layer = PLACES[leaf].startswith(LAYERS)
    places[PLACES[leaf]] = stacked if is_layer else [f'params/{leaf}'], shape
  if model.tied:
    del places[PLACES['head/kernel']]
  return places


def _written(value: Any) -> str:
  """A value in YAML, which reads 1e-05 as a text: a float needs a dot, 1.0e-05."""
  text = json.dumps(value)
  is_bare = isinstance(value, float) and '.' not in text
  return text.replace('e', '.0e') if is_bare else text


def _described(where: Path) -> Decoder:
  """The Decoder that a config describes."""
  files.regular(where, CheckpointError)
  try:
    config = yaml.safe_load(where.read_text())
  except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
    raise CheckpointError(f'{where}: expected YAML, got {error!s:.200}') from error
  config = files.checked(config, dict[str, Any], str(where), CheckpointError)

  def entry(key: str, of: Any, default: Any = None) -> Any:
    value = config.get(key, default)
    return files.checked(value, of, f'{where}: {key}', CheckpointError)

  for key, only in {**FIXED, 'global_parameter_scale': 1}.items():
    if (value := config.get(key, only)) != only:
      raise CheckpointError(f'{where}: {key} is {value!r:.80}; expected {only!r}')
  sizes = {field: entry(key, Count) for field, key in SIZES.items()}
  heads, groups = sizes['heads'], sizes['groups']
  if heads % groups or sizes['size'] % 2:
    raise CheckpointError(
      f'{where}: expected {SIZES["groups"]} that divides {SIZES["heads"]}, and an even '
      f'head_dim, got {groups}, {heads} and {sizes["size"]}'
    )
  return Decoder(
    **sizes,
    theta=float(entry('rope_max_timescale', Positive, 10_000)),
    epsilon=float(entry('normalization_layer_epsilon', Positive)),
    tied=entry('logits_via_embedding', bool, False),
  )


def _read(items: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  """Reads the parameters of a checkpoint, if they are those that are expected."""
  if not items.is_dir():
    raise CheckpointError(f'{items}: no such folder')
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
    try:
      stored = dict(orbax.metadata(items.absolute()).item_metadata.tree)
    except Exception as error:  # orbax and tensorstore raise errors of many kinds
      what = 'expected a checkpoint of orbax: the folder items of a step'
      raise CheckpointError(f'{items}: {what}') from error
    found = paths_of(stored.get('params', {}))
    got = {path.removeprefix('params/'): x for path, x in found.items()}
    for place in {**shapes, **got}:
      want, has = (
        [*s[place]] if place in s else 'no such array'
        for s in (shapes, {path: x.shape for path, x in got.items()})
      )
      if want != has:
        raise CheckpointError(f'{items}: {place}: expected {want}, got {has}')
    as_numpy = lambda _: ocp.RestoreArgs(restore_type=np.ndarray)
    wanted = {'params': stored['params']}
    args = ocp.args.PyTreeRestore(
      wanted, jax.tree.map(as_numpy, wanted), partial_restore=True
    )
    read = paths_of(orbax.restore(items.absolute(), args=args)['params'])
  return {path.removeprefix('params/'): x for path, x in read.items()}
