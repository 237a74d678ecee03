"""Config: what it accepts, what it refuses and how it says so, and its JSON."""

import dataclasses
import json

import pytest

from depthprune.config import Config, ConfigError, Epochs, fraction, from_json


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
  assert Config(target='50%') == Config(target=0.5)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
  'target', [0.0, -0.1, 1.01, float('nan'), float('inf'), '120%']
)
def test_target_outside_its_range(target):
  with pytest.raises(
    ConfigError, match=r'target: expected a fraction in \(0, 1\], got'
  ):
    Config(target=target)


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('of', 'latency'),
    ('batch', 0),
    ('round_to', 0),
    ('round_to', 2.5),
    ('seed', -1),
    ('subset', 0),
    ('gate_epochs', -1),
    ('train_epochs', True),
    ('learning_rate', 0.0),
    ('learning_rate', float('nan')),
    ('strength', float('inf')),
    ('weight_decay', -1e-4),
  ],
)
def test_every_error_names_its_field_and_what_it_got(name, value):
  with pytest.raises(ConfigError, match=rf'^{name}: expected .*got {value!r}'):
    dataclasses.replace(Config(), **{name: value})


def test_no_epochs_at_all_is_allowed():
  config = Config(train_epochs=0, gate_epochs=0, finetune_epochs=0)
  assert config.epochs == Epochs(0, 0, 0)


def test_epochs_follow_the_data_set_until_they_are_given():
  digits, fashion = Config(), Config(data='fashion_mnist')
  assert digits.epochs != fashion.epochs
  assert dataclasses.replace(digits, data='fashion_mnist').epochs == fashion.epochs
  asked = dataclasses.replace(fashion, gate_epochs=3).epochs
  assert asked == fashion.epochs._replace(gates=3)


def test_the_directory_is_named_after_the_run_or_given():
  paths = {
    Config(seed=seed, target=target, of=of).path
    for seed in (0, 1)
    for target in (0.5, 0.25)
    for of in ('flops', 'params')
  }
  assert len(paths) == 8
  assert str(Config(workdir='here/run').path) == 'here/run'


def test_json_round_trip():
  config = Config(data='fashion_mnist', target=0.25, subset=1000, bfloat16=True)
  assert from_json(json.loads(json.dumps(config.to_json()))) == config


def test_json_of_another_version_names_the_field():
  with pytest.raises(ConfigError, match='unknown field momentum; it was written by'):
    from_json({**Config().to_json(), 'momentum': 0.9})
