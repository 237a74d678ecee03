"""The configuration of a run: the options of the command line, and `config.json`."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import (
  Annotated,
  Any,
  Generic,
  Literal,
  NotRequired,
  TypedDict,
  TypeVar,
  get_type_hints,
)

import tyro

from depthprune import methods
from depthprune.run import own
from depthprune.storage import files
from depthprune.train.options import (
  STRONGEST,
  ConfigError,
  Epochs,
  at_least,
  axes,
  finite,
  one_of,
)
from depthprune.train.recipe import Recipe

# Names of options on the command line where they are not those of the fields, which
# stay as earlier versions have stored them.
OPTIONS = {'train_epochs': 'pretrain_epochs', 'gate_epochs': 'epochs'}


def _by_data(name: str | None = None) -> Any:
  hint = "(default: the method's own number for this data set)"
  return tyro.conf.arg(name=name, metavar='NUMBER', help_behavior_hint=hint)


ALL = tyro.conf.arg(metavar='INT', help_behavior_hint='(default: all)')
SIZE = tyro.conf.arg(metavar='INT', help_behavior_hint='(default: as they are stored)')
FRESH = tyro.conf.arg(metavar='FILE', help_behavior_hint='(default: random weights)')
BESIDE = tyro.conf.arg(
  metavar='FILE', help_behavior_hint='(default: the one beside the pretrained weights)'
)
NAMED = tyro.conf.arg(
  metavar='DIR', help_behavior_hint='(default: runs/METHOD-MODEL-DATA-OPTIONS-seedSEED)'
)
DEVICES = tyro.conf.arg(
  metavar='AXES',
  help_behavior_hint='(default: one device, or all of several processes)',
)
NONE = tyro.conf.arg(metavar='NUMBER', help_behavior_hint='(default: without)')
ARGUMENTS = tyro.conf.arg(
  metavar='KEY=VALUE [KEY=VALUE ...]', help_behavior_hint="(default: the network's own)"
)
EQUAL = tyro.conf.arg(
  metavar='balanced', help_behavior_hint='(default: every example weighs the same)'
)
ACCURACY = tyro.conf.arg(
  metavar='{balanced_accuracy,f1}', help_behavior_hint='(default: accuracy)'
)
THREADS = tyro.conf.arg(
  metavar='INT', help_behavior_hint='(default: none, threads of the run itself)'
)
BY_SIZE = tyro.conf.arg(
  metavar='{always,never}',
  help_behavior_hint='(default: where they would fill more than half of the memory)',
)
TRAIN = 'train'  # name of the first stage, which trains the network without a method
# Fields on which no training depends, and those on which only later stages depend.
LOGGED = ('tensorboard', 'wandb')
UNRELATED = (
  *('workdir', 'resume', 'checkpoint_every_s', 'mesh', 'remat', 'workers'),
  *LOGGED,
)
LATER = ('options', 'gate_epochs', 'finetune_epochs', 'distill')
O = TypeVar('O')


@dataclasses.dataclass(frozen=True)
class Config(Generic[O]):
  """The configuration of a run: train a network, cut it, fine-tune what is left.

  `default(method)` makes a config with the settings that suit a method. Making one
  raises ConfigError for a value that cannot be used. Names of models and data sets are
  checked when the run starts.
  """

  options: Annotated[O, tyro.conf.arg(name='method')]
  """Options of the method; their type says which method it is."""

  model: str = 'resnet20'
  """Network, by name: resnet20 ... resnet110, vgg16, vgg19, mlp, bert_minilm, ...
  (depthprune models lists them); or FILE.py:CLASS, a module of your own."""

  data: str = 'digits'
  """digits (comes with scikit-learn), or a TFDS set of images (with a class each, or
  masks) or texts found in $TFDS_DATA_DIR, such as cifar10, camvid or glue/sst2; or
  multi_fashion: two fashion_mnist images in one, and a class to tell of each. Of your
  own: a FOLDER with a folder of images for each class, possibly within train,
  validation and test; FILE.npz with x and y (or x_train, y_train, x_test, y_test);
  FILE.csv or .jsonl with text and label, or numbers and label; or FILE.py:FUNCTION,
  which returns such arrays or a Dataset."""

  pretrained: Annotated[str | None, FRESH] = None
  """Weights to start from: .npz or .safetensors of a ResNet or BERT, with torch's
  names, or the folder of a pruned network (RUN/pruned). Images get the normalisation
  in FILE.json beside them, or of the folder, if there is one (ImageNet ResNets: else
  torchvision's)."""

  tokenizer: Annotated[str | None, BESIDE] = None
  """tokenizer.json, for a data set of texts."""

  length: int = 128
  """Tokens of a text, at most."""

  seed: int = 0
  """Seed of the initial weights, the order of the images and the augmentation."""

  batch: int = 128
  """Images in a training step."""

  train_epochs: Annotated[int | float | None, _by_data(OPTIONS['train_epochs'])] = None
  """Passes over the data before the method begins; 0 where weights are pretrained, or
  where the method trains the network from the start."""

  gate_epochs: Annotated[int | float | None, _by_data(OPTIONS['gate_epochs'])] = None
  """Passes with the method: what it learns (gates, priorities, heads, a path) is
  trained together with the weights, unless these are frozen."""

  finetune_epochs: Annotated[int | float | None, _by_data()] = None
  """Passes after each cut."""

  optimizer: Literal['sgd', 'adam', 'adamw'] = 'sgd'
  """sgd: momentum 0.9, warm-up and cosine in every stage. adam: a constant rate. adamw:
  Adam with that schedule."""

  learning_rate: float = 0.1
  """Learning rate of the weights, at the peak of the schedule."""

  weight_decay: float = 5e-4
  """Weight decay of kernels; slices behind a closed gate are spared."""

  augment: bool = True
  """Random crops, and mirror images where these have the same class."""

  mixup: Annotated[float | None, NONE] = None
  """Blend images, and their labels, in pairs, by shares from Beta(this, this)."""

  randaugment: Annotated[int | None, NONE] = None
  """Magnitude of RandAugment, 1 to 30, for streamed images."""

  class_weights: Annotated[Literal['balanced'] | None, EQUAL] = None
  """balanced: in the loss, all classes weigh the same together, however many examples
  each has."""

  metric: Annotated[Literal['balanced_accuracy', 'f1'] | None, ACCURACY] = None
  """The score that decides whether a cut is refused, which units go, and what a cascade
  may lose, for classes of unlike sizes. f1: the mean of the classes."""

  distill: bool = False
  """Fine-tune towards the unpruned network's answers as well as the labels."""

  subset: Annotated[int | None, ALL] = None
  """Use only this many training images."""

  resize: Annotated[int | None, SIZE] = None
  """Make the images square, with this side."""

  stream: Annotated[Literal['always', 'never'] | None, BY_SIZE] = None
  """Read images from disk as they are needed, random crops to train on and centres for
  evaluation. It takes grain, and a TFDS set with a class for every image."""

  workers: Annotated[int | None, THREADS] = None
  """Processes that read streamed images."""

  scan: bool = False
  """Compile equal blocks once (scan): faster to compile, the same numbers."""

  bfloat16: bool = False
  """Compute in bfloat16; parameters stay float32."""

  remat: bool = False
  """Compute activations and normalisations again in the backward pass, instead of
  storing them: less memory, more time."""

  mesh: Annotated[str | None, DEVICES] = None
  """Devices to train on: data=8 splits every batch over 8 of them, data=4,model=2 the
  weights over 2 besides; data alone takes all."""

  checkpoint_every_s: float = 60.0
  """Seconds between checkpoints within a stage."""

  workdir: Annotated[str | None, NAMED] = None
  """Where everything is written."""

  tensorboard: bool = False
  """Write event files for TensorBoard into RUN/tensorboard too."""

  wandb: bool = False
  """Send the curves to Weights & Biases too, as WANDB_PROJECT and WANDB_MODE say."""

  resume: bool = True
  """Continue where an earlier run in the same directory stopped."""

  model_args: Annotated[tuple[str, ...], ARGUMENTS] = ()
  """Arguments of the network, such as width=32 or '{"widths": [16, 32]}'."""

  def __post_init__(self):
    for name in ('model', 'data'):
      object.__setattr__(self, name, own.absolute(getattr(self, name)))
    own.arguments(self.model_args)
    one_of(self, 'optimizer', ('sgd', 'adam', 'adamw'))
    if self.metric is not None:
      one_of(self, 'metric', ('balanced_accuracy', 'f1'))
    if self.class_weights is not None:
      one_of(self, 'class_weights', ('balanced',))
    if self.stream is not None:
      one_of(self, 'stream', ('always', 'never'))
    for name in ('train_epochs', 'gate_epochs', 'finetune_epochs'):
      if getattr(self, name) is not None:
        finite(self, name, positive=False)
    at_least(self, 'seed', 0)
    for name in ('batch', 'subset', 'resize', 'length', 'workers', 'randaugment'):
      at_least(self, name, 1)
    for name in ('weight_decay', 'checkpoint_every_s'):
      finite(self, name, positive=False)
    finite(self, 'learning_rate', positive=True)
    if self.mesh is not None:
      axes(self.mesh)
    if self.mixup is not None:
      finite(self, 'mixup', positive=True)
    if (self.randaugment or 0) > STRONGEST:
      raise ConfigError(
        f'randaugment: expected a magnitude of 1 to {STRONGEST}, got {self.randaugment}'
      )
    if (self.mixup or self.randaugment) and not self.augment:
      raise ConfigError('mixup, randaugment: leave them out, or pass --augment')
    recipe = self.recipe
    if recipe.cascade and self.distill:
      raise ConfigError(
        f'distill: expected False for {self.method}, which cuts nothing'
      )
    if recipe.heads and self.train_epochs:
      raise ConfigError(
        f'train_epochs: expected 0 for {self.method}, got {self.train_epochs}; the '
        f'network and its heads are trained together: give {OPTIONS["gate_epochs"]}'
      )
    recipe.check(self)

  @property
  def method(self) -> str:
    """Name of the method's file."""
    return methods.name_of(self.options)

  @property
  def recipe(self) -> Recipe:
    """The method's recipe."""
    return methods.recipe(self.method)

  @property
  def epochs(self) -> Epochs:
    """Passes in each stage: those of the config, else the data set's defaults."""
    by_data = self.recipe.epochs
    defaults = by_data.get(self.data, by_data[''])
    if self.pretrained is not None:
      defaults = defaults._replace(train=0)
    asked = (self.train_epochs, self.gate_epochs, self.finetune_epochs)
    return Epochs(
      *(d if a is None else a for a, d in zip(asked, defaults, strict=True))
    )

  @property
  def path(self) -> Path:
    """The run's directory: `workdir`, or one named after the method and its options."""
    if self.workdir is not None:
      return Path(self.workdir)
    options: Any = self.options
    names = (own.word(self.model), own.word(self.data))
    words = (self.method, *names, options.label, f'seed{self.seed}')
    return Path('runs') / '-'.join(words)

  def to_json(self) -> dict[str, Any]:
    """Returns plain values, as `config.json` and `result.json` contain them.

    A network or data from a file come with a hash of what the file contains.
    """
    hashes = {
      f'{k}_file_sha256': own.digest(getattr(self, k)) for k in ('model', 'data')
    }
    values = {'method': self.method, **dataclasses.asdict(self)}
    for name in ('model_args', *LOGGED):  # as in runs before there were any
      if not values[name]:
        del values[name]
    values |= {k: v for k, v in hashes.items() if v is not None}
    return json.loads(json.dumps(values))  # where tuples are lists


def default(method: str, options: Any = None, **fields) -> Config:
  """Returns the config that suits a method.

  Args:
    method: name of the method's file, or the last word of it: 'netcut', 'gates'.
    options: an instance of its recipe's `options`; None for the defaults.
    **fields: fields of Config that are to have other values.

  Raises:
    ValueError: there is no such method; the message names the nearest.
    ConfigError: a value cannot be used.
  """
  recipe = methods.recipe(method)
  return Config(options or recipe.options(), **{**recipe.defaults, **fields})


COMPLETE = files.Rule(
  'an object with method, model and options',
  lambda c: (
    [type(c.get(k)) for k in ('method', 'model', 'options')] == [str, str, dict]
  ),
)


class ConfigFile(TypedDict):
  """The entries of `config.json`."""

  config: Annotated[dict[str, Any], COMPLETE]
  classes: NotRequired[Any]
  versions: NotRequired[dict[str, str]]
  device: NotRequired[str]
  command: NotRequired[str]


def from_json(values: Mapping[str, Any]) -> Config:
  """Returns the Config of some `to_json()` values; later fields get their defaults.

  Raises:
    ConfigError: a field is unknown, of another type, or cannot be used.
  """
  values = {k: v for k, v in values.items() if not k.endswith('_file_sha256')}
  method = values.pop('method', '')
  files.checked(method, str, 'config: method', ConfigError)
  try:
    recipe = methods.recipe(method)
  except ValueError as error:
    raise ConfigError(f'config: {error}') from error
  options = values.pop('options', None)
  files.checked(options, dict[str, Any], 'config: options', ConfigError)
  options = {**recipe.formerly, **(options or {})}
  return _made(Config, values, options=_made(recipe.options, options))


def continued(config: Config, stored: Mapping[str, Any]) -> Config:
  """Returns a config for a directory that has a run, whose config was `stored`.

  An option at its default takes the default of an earlier version, if the stored run
  has that: so the command that made the run continues it.
  """
  recipe, options = config.recipe, stored.get('options')
  if stored.get('method') != config.method or not isinstance(options, dict):
    return config
  default = recipe.options()
  former = {
    name: value
    for name, value in recipe.formerly.items()
    if options.get(name, value) == value
    and getattr(config.options, name) == getattr(default, name)
  }
  options = dataclasses.replace(config.options, **former)
  return dataclasses.replace(config, options=options)


def check_options(method: str, values: Mapping[str, Any]) -> None:
  """Checks the types of a method's options, those of other versions left out.

  Raises:
    ConfigError: one is of another type.
  """
  hints = get_type_hints(methods.recipe(method).options)
  for name, value in values.items():
    if name in hints:
      files.checked(value, hints[name], f'options: {name}', ConfigError)


def relevant(values: Mapping[str, Any], stage: str = '') -> dict[str, Any]:
  """Returns the part of `Config.to_json()` on which a stage depends, or any stage."""
  if stage == TRAIN:
    return {k: v for k, v in values.items() if k not in (*UNRELATED, *LATER)}
  decides_only = methods.recipe(values['method']).decides_only
  options = {k: v for k, v in values['options'].items() if k not in decides_only}
  rest = {k: v for k, v in values.items() if k not in UNRELATED}
  return {**rest, 'options': options}


def _made(kind: type, values: Mapping[str, Any], **made: Any) -> Any:
  known = {f.name for f in dataclasses.fields(kind)}
  unknown = sorted(set(values) - known)
  if unknown:
    raise ConfigError(
      f'config: unknown field {", ".join(unknown)}; it was written by another version, '
      f'this one knows {json.dumps(sorted(known))}'
    )
  hints = get_type_hints(kind)
  for name, value in values.items():
    files.checked(value, hints[name], f'config: {name}', ConfigError)
  tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
  return kind(**tuples, **made)
