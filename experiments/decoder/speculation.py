"""Writing ahead with a small network: how much of it stays, and how fast that is.

Every draft is one row: the same prompts are continued by the whole network alone and
with the draft, by turns, and the texts are compared token by token.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import depthprune as dp
from experiments.decoder.pruning import NETWORK, cut, whole
from experiments.result_files import Case, Row, Rows, files_with, link, path_of, table
from experiments.run import Arguments, fill

PROMPTS, LENGTH, STEPS, AHEAD = 20, 16, 32, 4
DRAFTS = {
  'first 10 layers': None,
  'first 20 layers': None,
  'first 25 layers': None,
  'width, 90 %': {'part': 0.9, 'by': 'activation', 'refitted': True},
  'width, 70 %': {'part': 0.7, 'by': 'activation', 'refitted': True},
  'depth, 90 %': {'part': 0.9, 'by': 'again', 'refitted': False},
}


def run(name: str, arguments: Arguments) -> list[Case]:
  """Fills the result file of an experiment and returns the cases that are left."""
  config = {'network': NETWORK, 'prompts': PROMPTS, 'length': LENGTH}
  config |= {'steps': STEPS, 'ahead': AHEAD}
  rows = Rows(path_of('decoder', name, arguments.full), config, ('draft',))
  cases = [{'draft': draft} for draft in DRAFTS]
  return fill(rows, lambda: cases, _row, arguments)


def _row(case: Case) -> Row:
  network = whole()
  model, variables = network.model, network.variables
  if (how := DRAFTS[case['draft']]) is None:
    draft, small = model.clone(depth=int(case['draft'].split()[1])), variables
  else:
    draft, small = cut(**how)
  texts = np.concatenate([batch['image'] for batch in network.texts['report']])
  prompts = jnp.asarray(texts[:PROMPTS, None, :LENGTH])
  alone = lambda prompt: dp.generate(model, variables, prompt, STEPS)
  both = lambda prompt: dp.speculate(
    model, variables, draft, small, prompt, STEPS, AHEAD
  )
  jax.block_until_ready((alone(prompts[0]), both(prompts[0]).tokens))  # compiles
  seconds: dict[str, list[float]] = {'alone': [], 'both': []}
  found: list[Any] = []
  same = 0
  for prompt in prompts:
    start = time.perf_counter()
    expected = jax.block_until_ready(alone(prompt))
    middle = time.perf_counter()
    found.append(both(prompt))
    jax.block_until_ready(found[-1].tokens)
    seconds['alone'].append(middle - start)
    seconds['both'].append(time.perf_counter() - middle)
    same += int(np.array_equal(expected, found[-1].tokens))
  rate = lambda name: STEPS / statistics.median(seconds[name])
  return {
    'same_texts': same,
    'accepted': statistics.mean(each.accepted for each in found),
    'checks_per_token': statistics.mean(each.checks for each in found) / STEPS,
    'tokens_per_s': rate('both'),
    'tokens_per_s_alone': rate('alone'),
  }


def speculation_tables() -> str:
  """What drafts are worth; a table for each result file, or a dash."""
  contents = files_with('decoder', 'draft', 'accepted')
  return '\n\n'.join(_table(*file) for file in contents.items()) or (
    'A small network that writes ahead: –'
  )


def _table(path: Path, content: dict[str, Any]) -> str:
  config = content['config']
  lines = [
    (
      row['draft'],
      f'{row["same_texts"]} of {config["prompts"]}',
      f'{100 * row["accepted"]:.0f}',
      f'{row["tokens_per_s"]:.1f}',
      f'{row["tokens_per_s_alone"]:.1f}',
      f'{row["tokens_per_s"] / row["tokens_per_s_alone"]:.2f}',
    )
    for row in content['rows']
  ]
  head = ('draft', 'same text', 'accepted, %', 'tokens/s', 'alone', 'speed-up')
  return (
    f'{config["network"]} continues {config["prompts"]} prompts of {config["length"]} '
    f'tokens by {config["steps"]}, a draft writes {config["ahead"]} ahead; none of the '
    f'drafts was trained; {content["device"]} ({link(path)}):\n\n' + table(head, lines)
  )
