"""Decoders as folders that transformers opens, and whatever reads these.

A config.json has one width for all layers, so a network is written only if its layers
are alike.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from depthprune.exports.alike import alike
from depthprune.models import decoder_config, pretrained
from depthprune.models.decoder import Decoder
from depthprune.program import arguments
from depthprune.storage import checkpoint, directory
from depthprune.storage.checkpoint import CheckpointError


def save(
  path: str | Path,
  model: Decoder,
  variables: Mapping[str, Any],
  entries: Mapping[str, Any] | None = None,
) -> None:
  """Writes a Decoder, pruned or not, as config.json and model.safetensors.

      small = dp.prune(model, variables, keep, tokens)
      huggingface.save('small', small.model, small.variables)

  `AutoModelForCausalLM.from_pretrained('small')` of transformers computes the same. The
  folder appears at once and complete. The tokenizer is not written: it stays as it is.

  Args:
    path: the folder, which must not exist.
    model: the Decoder, whose `arch` gives all layers that are left the same sizes.
      Layers without both branches are left out.
    variables: its arrays. Gates of branches are 1, as `prune` leaves them.
    entries: further entries of config.json, such as {'eos_token_id': 2}.

  Raises:
    ValueError: sizes that differ between layers, half of a layer that is gone, a width
      of values that is not that of keys, options that no architecture of transformers
      has, arrays that are not those of the model, or gates that are not 1. The message
      says which.
    CheckpointError: there is something at the path already.
    WriteError: the disk is full.
  """
  path = Path(arguments.path('path', path))
  if path.exists():
    raise CheckpointError(f'{path}: expected nothing there: choose another path')
  plain, arrays = alike(model, variables, 'transformers')
  config = {**decoder_config.describe(plain), **(entries or {})}
  shapes = {name: x.shape for name, x in arrays.items()}
  (slots,) = pretrained.decoder_slots(shapes)
  tensors = {}
  for name, slot in slots.items():
    tensor = arrays[slot.path].reshape(slot.shape)
    tensors[name] = tensor if slot.table else tensor.T
  with directory.complete(path) as folder:
    checkpoint.save_tensors(folder / 'model.safetensors', tensors, {'format': 'pt'})
    (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
