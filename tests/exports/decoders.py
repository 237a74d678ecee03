"""A Decoder that formats with one size for all layers can hold."""

import numpy as np

from depthprune.program.coupling import couple
from depthprune.surgery.prune import prune
from tests import masking as m


def cut(model, variables, tokens):
  """A network cut in every way: alike in all layers, with its middle layer removed."""
  coupling = couple(model, variables, tokens)
  keep = m.random_keep(coupling)
  kept = keep['channels'].items()
  keep['channels'] = {g: k for g, k in kept if 'value' not in g}
  stack = 'layers0' if model.scan else 'layer1'
  gone = np.array([True, False, True]) if model.scan else np.array(False)
  keep['branches'] = {f'{stack}/{part}/branch': gone for part in ('attention', 'mlp')}
  return prune(model, variables, keep, tokens, coupling=coupling)
