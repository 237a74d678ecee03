"""Config: what it accepts, what it refuses and how it says so, and its JSON."""

import dataclasses
import json

import pytest

from depthprune.methods import names
from depthprune.methods.implosion import ImplosionOptions
from depthprune.methods.netcut import NetCutOptions
from depthprune.methods.sidenet import SideNetOptions
from depthprune.methods.trainable_gates import GateOptions
from depthprune.run.config import Config, continued, default, from_json, relevant
from depthprune.storage.checkpoint import CheckpointError
from depthprune.storage.keeper import same_config
from depthprune.train.options import ConfigError, Epochs, fraction

STREAMING = 'stream', 'workers', 'mixup', 'randaugment'


@pytest.mark.parametrize(
  ('given', 'expected'),
  [('0.5', 0.5), ('50%', 0.5), (' 25 % ', 0.25), ('1', 1.0), ('5e-1', 0.5)],
)
def test_fraction_reads_numbers_and_percent(given, expected):
  assert fraction(given) == expected


@pytest.mark.parametrize('given', ['half', '', '%', '0.5x', 'nan', '1e', '--'])
def test_fraction_refuses_the_rest_with_an_example(given):
  with pytest.raises(ConfigError, match=r'0\.5, or 50%'):
    fraction(given)


def test_a_percentage_is_stored_as_the_fraction():
  assert GateOptions('50%') == GateOptions(0.5)


@pytest.mark.parametrize(
  'target', [0.0, -0.1, 1.01, float('nan'), float('inf'), '120%']
)
def test_target_outside_its_range(target):
  with pytest.raises(
    ConfigError, match=r'target: expected a fraction in \(0, 1\], got'
  ):
    GateOptions(target)


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('batch', 0),
    ('seed', -1),
    ('subset', 0),
    ('gate_epochs', -1),
    ('train_epochs', True),
    ('finetune_epochs', float('inf')),
    ('learning_rate', 0.0),
    ('learning_rate', float('nan')),
    ('weight_decay', -1e-4),
    ('optimizer', 'lion'),
    ('stream', 'sometimes'),
    ('workers', 0),
    ('mixup', 0.0),
    ('mixup', float('nan')),
    ('randaugment', 0),
    ('randaugment', 31),
  ],
)
def test_every_error_names_its_field_and_what_it_got(name, value):
  with pytest.raises(ConfigError, match=rf'^{name}: expected .*got {value!r}'):
    dataclasses.replace(default('gates'), **{name: value})


@pytest.mark.parametrize(
  ('kind', 'name', 'value'),
  [
    (GateOptions, 'of', 'latency'),
    (GateOptions, 'round_to', 0),
    (GateOptions, 'round_to', 2.5),
    (GateOptions, 'round_to', 'automatic'),
    (GateOptions, 'strength', float('inf')),
    (NetCutOptions, 'beta', -0.1),
    (NetCutOptions, 'beta', float('nan')),
    (NetCutOptions, 'gamma', float('inf')),
    (NetCutOptions, 'aggregate', 'mean'),
    (NetCutOptions, 'cost', 'joules'),
    (ImplosionOptions, 'depth', 0),
    (ImplosionOptions, 'per_round', 0),
    (ImplosionOptions, 'importance', 'magnitude'),
  ],
)
def test_so_does_every_error_of_a_methods_options(kind, name, value):
  with pytest.raises(ConfigError, match=rf'^{name}: expected .*got {value!r}'):
    kind(**{name: value})


def test_augmentation_is_asked_for_where_there_is_some():
  for given in ({'mixup': 0.2}, {'randaugment': 9}):
    with pytest.raises(ConfigError, match='leave them out, or pass --augment'):
      dataclasses.replace(default('gates'), augment=False, **given)
  with pytest.raises(ConfigError, match='mixup: leave it out for sidenet, where heads'):
    dataclasses.replace(default('sidenet'), mixup=0.2)
  joint = SideNetOptions(regime='joint')
  assert dataclasses.replace(default('sidenet'), options=joint, mixup=0.2).mixup == 0.2


def test_a_run_of_before_there_was_streaming_is_the_same_run():
  """What is added to a config is None or off, so that older directories go on."""
  old = {k: v for k, v in default('gates').to_json().items() if k not in STREAMING}
  same_config({k: v for k, v in old.items() if k != 'remat'}, old, 'here')
  same_config(relevant(old), relevant(default('gates').to_json()), 'here')
  more = dataclasses.replace(default('gates'), workers=4)
  same_config(relevant(old), relevant(more.to_json()), 'here')
  with pytest.raises(CheckpointError, match=r"stream \(asked for 'always', there None"):
    other = dataclasses.replace(default('gates'), stream='always')
    same_config(relevant(old), relevant(other.to_json()), 'here')


def test_a_stored_run_from_before_widths_were_rounded_by_default_goes_on_so():
  config = default('gates')
  old = config.to_json()
  old['options'] = old['options'] | {'round_to': 1}
  assert continued(config, old).options.round_to == 1
  same_config(old, continued(config, old).to_json(), 'here')
  assert from_json(old).options.round_to == 1
  del old['options']['round_to']
  assert from_json(old).options.round_to == 1


@pytest.mark.parametrize(('asked', 'there'), [('auto', 'auto'), ('auto', 8), (4, 1)])
def test_another_rounding_is_another_run(asked, there):
  config = default('gates', GateOptions(round_to=asked))
  stored = default('gates', GateOptions(round_to=there)).to_json()
  assert continued(config, stored) == config
  assert from_json(stored).options.round_to == there
  stored['method'] = 'netcut'
  assert continued(config, stored) == config


def test_a_run_from_before_an_option_goes_on_with_what_it_was():
  config = default('sidenet')
  assert config.options.normalise is True
  old = config.to_json()
  for name in ('heads', 'normalise', 'sees_earlier', 'taught', 'shared_threshold'):
    del old['options'][name]
  assert continued(config, old).options.normalise is False
  same_config(relevant(old), relevant(continued(config, old).to_json()), 'here')
  assert continued(config, config.to_json()) == config


def test_heads_and_network_are_trained_together():
  with pytest.raises(ConfigError, match=r'train_epochs: expected 0 for netcut, got 2'):
    Config(NetCutOptions(), train_epochs=2)
  assert Config(NetCutOptions(), train_epochs=0).epochs.train == 0


def test_what_is_pretrained_is_not_trained_first_unless_asked():
  assert default('gates', pretrained='resnet.npz').epochs == default(
    'gates'
  ).epochs._replace(train=0)
  assert default('gates', pretrained='resnet.npz', train_epochs=2).epochs.train == 2


def test_no_epochs_at_all_is_allowed():
  config = default('gates', train_epochs=0, gate_epochs=0, finetune_epochs=0)
  assert config.epochs == Epochs(0, 0, 0)


def test_epochs_follow_the_data_set_until_they_are_given():
  digits, fashion = default('gates'), default('gates', data='fashion_mnist')
  assert digits.epochs != fashion.epochs
  assert dataclasses.replace(digits, data='fashion_mnist').epochs == fashion.epochs
  asked = dataclasses.replace(fashion, gate_epochs=3).epochs
  assert asked == fashion.epochs._replace(gates=3)


def test_the_directory_is_named_after_the_run_or_given():
  paths = {
    Config(options, seed=seed).path
    for seed in (0, 1)
    for options in (
      *(
        GateOptions(target, of) for target in (0.5, 0.25) for of in ('flops', 'params')
      ),
      *(NetCutOptions(beta, 'log', gamma) for beta in (0, 0.1) for gamma in (0, 1)),
      *(ImplosionOptions(depth, 1, 'drop') for depth in (None, 3)),
    )
  }
  assert len(paths) == 2 * 10
  assert str(default('gates', workdir='here/run').path) == 'here/run'


@pytest.mark.parametrize(
  'config',
  [
    *map(default, names()),
    Config(GateOptions(0.25), data='fashion_mnist', subset=1000, bfloat16=True),
    Config(ImplosionOptions(units=('stage1/block1', 'stage1/block2'))),
  ],
)
def test_json_round_trip(config):
  assert from_json(json.loads(json.dumps(config.to_json()))) == config


def test_json_of_another_version_names_the_field():
  with pytest.raises(ConfigError, match='unknown field momentum; it was written by'):
    from_json({**default('gates').to_json(), 'momentum': 0.9})
  with pytest.raises(ConfigError, match='unknown field price'):
    from_json({'method': 'netcut', 'options': {'price': 0.1}})
  with pytest.raises(
    ConfigError, match='no method .magic.*all: auxiliary, implosion, netcut'
  ):
    from_json({'method': 'magic'})
