"""Language models with early exits, saved to a folder and loaded from it.

A folder holds `exits.json` with the thresholds, the network with its heads in
`network/` as `save` writes it, and `tokenizer.json` if one was given.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from depthprune.cascades import generation
from depthprune.cascades.thresholds import Choice
from depthprune.exports import records
from depthprune.exports.networks import TOKENIZER, load, save_with
from depthprune.exports.records import EXITS_RECORD, ExitsRecord
from depthprune.models.decoder import Decoder
from depthprune.models.heads import WithHeads
from depthprune.program import arguments
from depthprune.storage import files
from depthprune.storage.checkpoint import CheckpointError
from depthprune.surgery.prune import Pruned


class SavedExits(NamedTuple):
  """A language model with early exits, as it was read from disk.

  Attributes:
    model: the network, possibly with heads, for `generate_early`.
    variables: its arrays.
    exits: {exit: threshold}.
    confidence: the kind of score that is compared with the thresholds.
    tokenizer: the path of its tokenizer.json, or None.
  """

  model: Decoder | WithHeads
  variables: Any
  exits: dict[str, float]
  confidence: Any
  tokenizer: Path | None


def save_exits(
  path: str | Path,
  network: Pruned,
  exits: Mapping[str, float] | Choice,
  confidence: str = 'probability',
  tokenizer: Any = None,
  tensors: bool = False,
) -> None:
  """Writes a language model with early exits as a folder, for `load_exits`.

      network = dp.prune(model, variables, {}, tokens)  # cuts nothing
      dp.save_exits('early', network, {'early': 0.9})

  Args:
    path: the folder.
    network: the network that `prune` returned, a Decoder or a `WithHeads` on one.
    exits: {exit: threshold}, or what the functions of `cascades.thresholds` chose.
    confidence: the kind of score, as `generate_early` takes it.
    tokenizer: the path of a tokenizer.json, or a `tokenizers.Tokenizer`; None for none.
    tensors: whether to write the arrays as a file of safetensors instead of an orbax
      checkpoint.

  Raises:
    TypeError: `network` is not what `prune` returned, or not of such a model.
    ValueError: it has no such exit, a threshold is no number, or the confidence is
      unknown.
    FileNotFoundError: there is no such tokenizer.json.
    CheckpointError: as for `save`.
  """
  write = 'write save_exits(path, prune(model, variables, {}, tokens), exits)'
  arguments.kind_of('network', network, Pruned, 'what prune returned', write)
  path, exits = Path(arguments.path('path', path)), generation.thresholds_of(exits)
  generation.check(network.model, [*exits], confidence)
  text = None
  if tokenizer is not None:
    own = hasattr(tokenizer, 'to_str')
    text = tokenizer.to_str() if own else Path(tokenizer).read_text('utf-8')
  thresholds = {name: records.threshold(value) for name, value in exits.items()}
  record = {'thresholds': thresholds, 'confidence': confidence}
  save_with(path / EXITS_RECORD, record, network, text, tensors=tensors)


def load_exits(path: str | Path) -> SavedExits:
  """Reads a language model that `save_exits` or `depthprune run sidenet` wrote.

      early = dp.load_exits('runs/...')
      text = dp.generate_early(
        early.model, early.variables, tokens, 20, early.exits, early.confidence
      )

  Args:
    path: the folder, or that of a run.

  Returns:
    The SavedExits.

  Raises:
    CheckpointError: the folder has no such network, or is damaged.
  """
  path = Path(arguments.path('path', path))
  if (path / 'exits' / EXITS_RECORD).is_file():
    path /= 'exits'
  file = path / EXITS_RECORD
  if not file.is_file():
    raise CheckpointError(
      f'{path}: expected a language model with exits (with {EXITS_RECORD} and '
      'network/), got none; load_cascade reads networks that classify'
    )
  record = files.read_json(file, ExitsRecord, CheckpointError)
  network = load(path / 'network')
  exits = {name: float(value) for name, value in record['thresholds'].items()}
  with records.refused(f'{file}: thresholds'):
    generation.check(network.model, [*exits], record['confidence'])
  tokenizer = path / TOKENIZER
  return SavedExits(
    network.model,
    network.variables,
    exits,
    record['confidence'],
    tokenizer if tokenizer.is_file() else None,
  )
