"""Runs from Python: their options are those of the command line, by the same names."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

import depthprune as dp
from depthprune.methods.netcut import NetCutOptions
from depthprune.methods.trainable_gates import GateOptions
from depthprune.report import page
from depthprune.run.config import default
from depthprune.runs import configured
from depthprune.train.options import ConfigError
from tests.report import runs as made_up

STORED = Path(__file__).parent / 'fixtures' / 'version_0_1'
BRIEF = {'subset': 160, 'batch': 16, 'epochs': 1, 'finetune_epochs': 1}


def test_options_of_the_method_and_of_the_run_are_told_apart():
  config = configured('gates', target='25%', model='mlp', pretrain_epochs=1, epochs=2)
  fields = {'model': 'mlp', 'train_epochs': 1, 'gate_epochs': 2}
  assert config == default('gates', GateOptions(0.25), **fields)
  assert config == configured(
    'trainable_gates', target=0.25, model='mlp', train_epochs=1, gate_epochs=2
  )
  assert configured('netcut', beta=0.1) == default('netcut', NetCutOptions(0.1))


@pytest.mark.parametrize(
  ('option', 'near'),
  [('epoch', 'epochs'), ('tarjet', 'target'), ('options', 'optimizer')],
)
def test_an_option_that_there_is_not_is_named_with_the_nearest(option, near):
  with pytest.raises(ConfigError, match=f'^{option}: there is no such.*{near}'):
    configured('gates', **{option: 1})


def test_a_run_is_a_table_and_charts_and_a_network(tmp_path):
  where = {'model': 'mlp', 'workdir': str(tmp_path), 'show': False}
  run = dp.run_method('gates', **where, **BRIEF, pretrain_epochs=0, target=0.6)
  assert f'{100 * run.result.accuracy.after:.2f} %' in str(run)
  assert max(map(len, str(run).splitlines())) <= 80
  assert [*run.charts] == ['Gates over time', 'Training', 'Widths of the layers']
  assert all(isinstance(figure, Figure) for figure in run.charts.values())
  assert (tmp_path / 'report.html').is_file()
  assert dp.load(run.path / 'pruned').report['flops']['after'] == run.result.flops.after
  assert dp.load_run(tmp_path) == run


@pytest.mark.parametrize(
  'made',
  [
    (made_up.made_up_result(), made_up.made_up_gates()),
    made_up.made_up_netcut(),
    made_up.made_up_implosion(),
    made_up.made_up_auxiliary(),
  ],
  ids=['gates', 'netcut', 'implosion', 'auxiliary'],
)
def test_charts_are_those_of_the_page(made, tmp_path):
  path = made_up.write_run(tmp_path / 'run', *made)
  text = page.write(path).read_text()
  found = [*dp.load_run(path).charts]
  on_page = [
    title for title in found if title != 'Widths of the layers'
  ]  # a table there
  assert [f'<h2>{title}</h2>' in text for title in on_page] == [True] * len(on_page)
  assert text.count('role="img"') >= 2 * len(on_page) >= 4  # for two widths


def test_charts_of_a_cascade_are_on_its_page():
  path = STORED / 'workdirs' / 'sidenet'
  found = [*dp.load_run(path).charts]
  assert found == [
    'Accuracy against FLOPs',
    'Where examples leave',
    'Reliability',
    'Training',
  ]
