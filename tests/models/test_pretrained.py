"""Import of torch's networks: every tensor used, every array filled."""

import json
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from depthprune.models import build, pretrained
from depthprune.models.resnet import ResNet
from depthprune.program.trace import paths_of

SMALL = ResNet(depth=8, width=4, classes=5)
NORM = {'weight': 1.0, 'bias': 0.0, 'running_mean': 0.0, 'running_var': 1.0}


def normed(name, norm, *shape):
  """Shapes of a convolution and of the normalisation behind it."""
  return {f'{name}.weight': shape} | {f'{norm}.{leaf}': shape[:1] for leaf in NORM}


def akamaster(blocks=1, width=4, classes=5, shortcut=False):
  """Tensors of a CIFAR ResNet of basic units as akamaster names them, all different."""
  shapes = normed('conv1', 'bn1', width, 3, 3, 3)
  for i in range(3):
    for j in range(blocks):
      name, out = f'layer{i + 1}.{j}', width * 2**i
      first = i > 0 and j == 0
      shapes |= normed(
        f'{name}.conv1', f'{name}.bn1', out, out // 2 if first else out, 3, 3
      )
      shapes |= normed(f'{name}.conv2', f'{name}.bn2', out, out, 3, 3)
      if first and shortcut:
        at = f'{name}.shortcut'
        shapes |= normed(f'{at}.0', f'{at}.1', out, out // 2, 1, 1)
  shapes |= {'linear.weight': (classes, 4 * width), 'linear.bias': (classes,)}
  draw = np.random.default_rng(0)
  return {n: draw.uniform(0.5, 1.5, s).astype(np.float32) for n, s in shapes.items()}


def torchvision(tensors):
  """The same under torchvision's names, with the counters that torch keeps."""
  renamed = {
    n.replace('shortcut', 'downsample').replace('linear', 'fc'): v
    for n, v in tensors.items()
  }
  norms = [n.removesuffix('running_var') for n in renamed if n.endswith('running_var')]
  return renamed | {f'{n}num_batches_tracked': np.asarray(9) for n in norms}


@pytest.fixture
def saved(tmp_path):
  """(tensors) → the path of a .npz with them."""

  def write(tensors):
    np.savez(tmp_path / 'weights.npz', **tensors)
    return tmp_path / 'weights.npz'

  return write


# ---- what arrives where --------------------------------------------------------------


def test_every_array_is_its_tensor(saved):
  tensors = akamaster(shortcut=True)
  model = SMALL.clone(shortcut='B')
  variables = pretrained.load(saved(tensors), model)
  expected = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))
  assert jax.tree.map(jax.typeof, variables) == jax.tree.map(jax.typeof, expected)
  assert {float(g) for g in jax.tree.leaves(variables['branches'])} == {1.0}
  leaves = paths_of(variables)
  for path, name in {
    'params/stem/norm/scale': 'bn1.weight',
    'params/stage2/block0/norm1/bias': 'layer2.0.bn1.bias',
    'batch_stats/stage3/block0/norm2/mean': 'layer3.0.bn2.running_mean',
    'batch_stats/stage3/block0/shortcut/norm/var': 'layer3.0.shortcut.1.running_var',
    'params/head/bias': 'linear.bias',
  }.items():
    np.testing.assert_array_equal(leaves[path], tensors[name])
  for path, name in {
    'params/stem/conv/kernel': 'conv1.weight',
    'params/stage1/block0/conv2/kernel': 'layer1.0.conv2.weight',
    'params/stage2/block0/shortcut/conv/kernel': 'layer2.0.shortcut.0.weight',
  }.items():
    hwio = tensors[name].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(leaves[path], hwio)
  np.testing.assert_array_equal(
    leaves['params/head/kernel'], tensors['linear.weight'].T
  )


@pytest.mark.parametrize('shortcut', [False, True])
def test_both_namings_and_both_kinds_of_file_give_the_same(shortcut, saved, tmp_path):
  tensors = akamaster(shortcut=shortcut)
  model = SMALL.clone(shortcut='AB'[shortcut])
  other = tmp_path / 'weights.safetensors'
  safetensors.numpy.save_file(
    {n: np.ascontiguousarray(v) for n, v in torchvision(tensors).items()}, other
  )
  one, two = pretrained.load(saved(tensors), model), pretrained.load(other, model)
  jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_scanned_stage_is_the_stack_of_its_units(saved):
  path = saved(akamaster(blocks=3))
  model = SMALL.clone(depth=20)
  flat = pretrained.load(path, model)
  stacked = pretrained.load(path, model.clone(scan=True))
  for part in ('params', 'batch_stats', 'branches'):
    for stage in ('stage1', 'stage3'):
      units = [flat[part][stage][f'block{i}'] for i in (1, 2)]
      expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *units)
      jax.tree.map(
        np.testing.assert_array_equal, stacked[part][stage]['blocks'], expected
      )
      jax.tree.map(
        np.testing.assert_array_equal,
        stacked[part][stage]['block0'],
        flat[part][stage]['block0'],
      )


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float64'])
def test_other_floats_become_float32(dtype, tmp_path):
  tensors = {n: v.astype(jnp.dtype(dtype)) for n, v in akamaster().items()}
  path = tmp_path / 'weights.safetensors'
  safetensors.numpy.save_file(tensors, path)
  variables = pretrained.load(path, SMALL)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype('float32')}
  np.testing.assert_array_equal(
    variables['params']['head']['bias'], tensors['linear.bias'].astype(np.float32)
  )


def test_images_may_have_other_channels(saved):
  tensors = akamaster()
  tensors['conv1.weight'] = tensors['conv1.weight'][:, :1]
  variables = pretrained.load(saved(tensors), SMALL, (28, 28, 1))
  assert variables['params']['stem']['conv']['kernel'].shape == (3, 3, 1, 4)
  with pytest.raises(ValueError, match='1 differences in shape: conv1.weight as'):
    pretrained.load(saved(tensors), SMALL)


# ---- what does not fit ---------------------------------------------------------------

TENSORS = akamaster()


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(sorted(TENSORS)), st.sampled_from(['gone', 'renamed', 'longer']))
def test_one_wrong_tensor_is_named(tmp_path_factory, name, what):
  tensors = dict(TENSORS)
  value = tensors.pop(name)
  if what == 'renamed':
    tensors[f'{name}s'] = value
  if what == 'longer':
    tensors[name] = np.concatenate([value, value])
  path = tmp_path_factory.mktemp('weights') / 'weights.npz'
  np.savez(path, **tensors)
  with pytest.raises(ValueError) as error:
    pretrained.load(path, SMALL)
  text = str(error.value)
  assert text.startswith(f'{path}: does not fit.')
  assert ('1 unfilled arrays: ' in text) == (what != 'longer')
  assert (f'1 unused tensors: {name}s {value.shape}' in text) == (what == 'renamed')
  assert (f'1 differences in shape: {name} as (' in text) == (what == 'longer')
  assert (f' (from {name})' in text) == (what != 'longer')


DIFFER = {
  'deeper': (akamaster(blocks=3), SMALL, 'depth=20', 'depth=8'),
  'less deep': (TENSORS, SMALL.clone(depth=14), 'depth=8', 'depth=14'),
  'wider': (akamaster(width=8), SMALL, 'width=8', 'width=4'),
  'classes': (TENSORS, SMALL.clone(classes=7), 'classes=5', 'classes=7'),
  'shortcut': (
    torchvision(akamaster(shortcut=True)), SMALL, "shortcut='B'", "shortcut='A'"
  ),
  'kind': (
    TENSORS,
    build('resnet50', width=4, classes=5),
    "depth=8, imagenet=False, bottleneck=False, shortcut='A'",
    "depth=50, imagenet=True, bottleneck=True, shortcut='B'",
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', DIFFER)
def test_a_file_of_another_network_says_which_it_is(name, saved):
  tensors, model, held, asked = DIFFER[name]
  with pytest.raises(ValueError) as error:
    pretrained.load(saved(tensors), model)
  assert str(error.value).splitlines()[1] == (
    f'  The file holds a ResNet with {held}; the model has {asked}.'
  )


@pytest.mark.parametrize(
  ('blocks', 'bottleneck', 'depth'),
  [
    ((2, 2, 2), True, 20),
    ((2, 2, 2, 2), False, 18),
    ((3, 4, 6, 3), False, 34),
    ((3, 4, 6, 3), True, 50),
  ],
)
def test_depths_are_told_from_names(blocks, bottleneck, depth, saved):
  names = [
    f'layer{i}.{j}.conv{2 + bottleneck}.weight'
    for i, n in enumerate(blocks, 1)
    for j in range(n)
  ]
  with pytest.raises(ValueError, match=f'holds a ResNet with depth={depth}, '):
    pretrained.load(saved(dict.fromkeys(names, np.ones(1))), SMALL)


def test_a_long_list_is_cut_and_its_length_told(saved):
  with pytest.raises(ValueError, match=r'60 unused tensors: (\S+ \([\d, ]+\), ){8}…$'):
    pretrained.load(saved(akamaster(blocks=3)), SMALL)


def test_whole_numbers_are_no_weights(saved):
  tensors = akamaster() | {'linear.bias': np.arange(5)}
  with pytest.raises(ValueError, match='1 tensors without floats: linear.bias int64'):
    pretrained.load(saved(tensors), SMALL)


def test_networks_without_a_naming_are_refused(saved):
  for model in (build('mlp20x200'), SMALL.clone(preact=True)):
    with pytest.raises(ValueError, match='no known naming .* preact=False'):
      pretrained.load(saved(TENSORS), model)


def test_an_erased_unit_takes_no_tensors(saved):
  """Strict in both directions: the file has them, and they are not used."""
  model = SMALL.clone(arch={'stage1/block0/branch': 0})
  with pytest.raises(ValueError, match='10 unused tensors: layer1.0.conv1.weight'):
    pretrained.load(saved(TENSORS), model)
  rest = {n: v for n, v in TENSORS.items() if not n.startswith('layer1.')}
  assert 'stage1' not in pretrained.load(saved(rest), model)['params']


# ---- BERTs ---------------------------------------------------------------------------

BERT = build('bert_tiny', depth=2, classes=3, segments=2)


def transformers(classes=0, prefix='', norms=('weight', 'bias'), **fields):
  """Tensors of a BERT as transformers names them, all different."""
  sizes = {'vocab': 64, 'positions': 16, 'types': 2, 'width': 16, 'inner': 24}
  sizes |= {'depth': 2} | fields
  width, inner = sizes['width'], sizes['inner']
  shapes = {}

  def dense(name, *shape):
    shapes.update({f'{name}.weight': shape, f'{name}.bias': shape[:1]})

  def normed(name):
    shapes.update({f'{name}.LayerNorm.{leaf}': (width,) for leaf in norms})

  for kind, rows in {
    'word': 'vocab',
    'position': 'positions',
    'token_type': 'types',
  }.items():
    shapes[f'embeddings.{kind}_embeddings.weight'] = (sizes[rows], width)
  normed('embeddings')
  for i in range(sizes['depth']):
    layer = f'encoder.layer.{i}'
    for name in ('self.query', 'self.key', 'self.value', 'output.dense'):
      dense(f'{layer}.attention.{name}', width, width)
    dense(f'{layer}.intermediate.dense', inner, width)
    dense(f'{layer}.output.dense', width, inner)
    normed(f'{layer}.attention.output')
    normed(f'{layer}.output')
  dense('pooler.dense', width, width)
  shapes = {f'{prefix}{name}': shape for name, shape in shapes.items()}
  if classes:
    dense('classifier', classes, width)
  draw = np.random.default_rng(0)
  return {n: draw.uniform(0.5, 1.5, s).astype(np.float32) for n, s in shapes.items()}


def test_every_array_of_a_bert_is_its_tensor(saved):
  tensors = transformers(classes=3)
  leaves = paths_of(pretrained.load(saved(tensors), BERT))
  layer, theirs = 'params/layer1', 'encoder.layer.1'
  for path, name in {
    'params/word/kernel': 'embeddings.word_embeddings.weight',
    'params/position/kernel': 'embeddings.position_embeddings.weight',
    'params/type/kernel': 'embeddings.token_type_embeddings.weight',
    'params/norm/scale': 'embeddings.LayerNorm.weight',
    f'{layer}/norm1/bias': f'{theirs}.attention.output.LayerNorm.bias',
    f'{layer}/norm2/scale': f'{theirs}.output.LayerNorm.weight',
    f'{layer}/mlp/up/bias': f'{theirs}.intermediate.dense.bias',
  }.items():
    np.testing.assert_array_equal(leaves[path], tensors[name])
  for path, name in {
    f'{layer}/mlp/down/kernel': f'{theirs}.output.dense.weight',
    f'{layer}/attention/query/kernel': f'{theirs}.attention.self.query.weight',
    f'{layer}/attention/out/kernel': f'{theirs}.attention.output.dense.weight',
    'params/pooler/kernel': 'pooler.dense.weight',
    'params/head/kernel': 'classifier.weight',
  }.items():
    expected = tensors[name].T.reshape(leaves[path].shape)
    np.testing.assert_array_equal(leaves[path], expected)
  assert leaves[f'{layer}/attention/query/kernel'].shape == (16, 4, 4)


@pytest.mark.parametrize('norms', [('weight', 'bias'), ('gamma', 'beta')])
@pytest.mark.parametrize('prefix', ['', 'bert.'])
def test_every_naming_of_a_bert_gives_the_same(prefix, norms, saved):
  expected = pretrained.load(saved(transformers(classes=3)), BERT)
  tensors = transformers(3, prefix, norms)
  tensors |= {f'{prefix}embeddings.position_ids': np.arange(16)[None]}
  tensors |= {'cls.predictions.bias': np.ones(64, np.float32)}
  variables = pretrained.load(saved(tensors), BERT)
  jax.tree.map(np.testing.assert_array_equal, variables, expected)


def test_stacks_of_a_bert_are_filled_in_order(saved):
  path, model = saved(transformers(3, depth=4)), BERT.clone(depth=4)
  flat = pretrained.load(path, model)
  stacked = pretrained.load(path, model.clone(scan=True))
  for part in ('params', 'branches'):
    for stack, rows in {'layers0': (0, 1), 'layers1': (2, 3)}.items():
      layers = [flat[part][f'layer{i}'] for i in rows]
      expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
      jax.tree.map(np.testing.assert_array_equal, stacked[part][stack], expected)


def test_an_encoder_leaves_the_head_as_init_gives_it(saved):
  variables = pretrained.load(saved(transformers()), BERT)
  fresh = BERT.init(jax.random.key(0), jnp.zeros((1, 1), int))
  jax.tree.map(
    np.testing.assert_array_equal, variables['params']['head'], fresh['params']['head']
  )
  assert jax.tree.map(jax.typeof, variables) == jax.tree.map(jax.typeof, fresh)


@pytest.mark.parametrize(
  ('gone', 'more', 'message'),
  [
    ('classifier.bias', {}, '1 unfilled arrays: params/head/bias'),
    ('pooler.dense.bias', {}, r'1 unfilled arrays: .* \(from pooler.dense.bias\)$'),
    ('', {'encoder.layer.0.adapter': np.ones(3)}, r'1 unused .*adapter \(3,\)$'),
    ('', {'pooler.dense.bias': np.ones(9)}, r'1 differences in shape: pooler.dense.bi'),
  ],
)  # fmt: skip
def test_a_wrong_tensor_of_a_bert_is_named(gone, more, message, saved):
  tensors = transformers(classes=3) | more
  tensors.pop(gone, None)
  with pytest.raises(ValueError, match=message):
    pretrained.load(saved(tensors), BERT)


@pytest.mark.parametrize(
  ('field', 'held', 'asked'),
  [('depth', 3, 2), ('width', 24, 16), ('inner', 32, 24), ('vocab', 99, 64)]
  + [('positions', 9, 16), ('types', 1, 2), ('classes', 5, 3)],
)
def test_a_file_of_another_bert_says_which_it_is(field, held, asked, saved):
  tensors = transformers(**{'classes': 3, field: held})
  with pytest.raises(ValueError) as error:
    pretrained.load(saved(tensors), BERT)
  assert str(error.value).splitlines()[1] == (
    f'  The file holds a BERT with {field}={held}; the model has {field}={asked}.'
  )


def test_the_heads_of_a_bert_are_those_of_its_config(saved):
  """No tensor tells them: with 2 heads for 4 all would fit and be wrong."""
  path = saved(transformers(classes=3))
  beside = path.with_name('config.json')
  beside.write_text(json.dumps({'num_attention_heads': 2}))
  with pytest.raises(ValueError, match='a BERT with heads=2; the model has heads=4.$'):
    pretrained.load(path, BERT)
  pretrained.load(path, BERT.clone(heads=2))
  beside.write_text(json.dumps({'num_attention_heads': 4, 'hidden_act': 'relu'}))
  with pytest.raises(ValueError, match="json: hidden_act is 'relu'; .* 'gelu' only"):
    pretrained.load(path, BERT)


# ---- files ---------------------------------------------------------------------------


def damaged(path, position):
  content = bytearray(path.read_bytes())
  content[position] ^= 255
  path.write_bytes(content)


def test_files_that_cannot_be_read(saved, tmp_path):
  path = saved(TENSORS)
  with zipfile.ZipFile(path) as file:
    inside = file.getinfo('linear.weight.npy').header_offset
  damaged(path, inside + 200)
  with pytest.raises(ValueError, match='weights.npz: cannot be read as an .npz .*CRC'):
    pretrained.load(path, SMALL)
  path.write_bytes(path.read_bytes()[:5000])
  with pytest.raises(ValueError, match='weights.npz: cannot be read as an .npz'):
    pretrained.load(path, SMALL)
  np.savez(path, **TENSORS, extra=np.asarray([None]))
  with pytest.raises(ValueError, match='cannot be read as an .npz .*objects'):
    pretrained.load(path, SMALL)
  other = tmp_path / 'weights.safetensors'
  safetensors.numpy.save_file(TENSORS, other)
  damaged(other, 12)
  with pytest.raises(ValueError, match='cannot be read as .safetensors'):
    pretrained.load(other, SMALL)
  other.write_bytes(b'')
  with pytest.raises(ValueError, match='cannot be read as .safetensors'):
    pretrained.load(other, SMALL)
  with pytest.raises(ValueError, match='nothing.npz: expected a file, got none'):
    pretrained.load(tmp_path / 'nothing.npz', SMALL)
  for name in ('weights.th', 'weights'):
    with pytest.raises(ValueError, match='.npz, .safetensors or .gguf; .*save_file'):
      pretrained.load(tmp_path / name, SMALL)


def test_normalisation_is_read_from_beside_the_file(tmp_path):
  path = tmp_path / 'weights.npz'
  beside = tmp_path / 'weights.json'
  np.savez(path, **akamaster())
  assert pretrained.normalisation(path) is None
  beside.write_text('{}')
  assert pretrained.normalisation(path) is None
  entry = {'scale': 'x/255', 'mean': [0.5, 0.25], 'std': [1, 0.5]}
  beside.write_text(json.dumps({'normalisation': entry}))
  assert pretrained.normalisation(path) == ((0.5, 0.25), (1.0, 0.5), 255.0)
  for wrong in ({'scale': 'x'}, {'scale': 255}, {'mean': None}, {'std': 'abc'}):
    beside.write_text(json.dumps({'normalisation': entry | wrong}))
    with pytest.raises(ValueError, match='weights.json: normalisation'):
      pretrained.normalisation(path)


# ---- oracles -------------------------------------------------------------------------


def torch_resnet(torch, blocks, width, classes, bottleneck, imagenet):
  """A ResNet in torch, its submodules named and wired as torchvision's are."""
  nn = torch.nn

  def conv(inputs, outputs, size, stride=1):
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)

  class Block(nn.Module):
    def __init__(self, inputs, inner, stride):
      super().__init__()
      outputs = inner * (4 if bottleneck else 1)
      sizes = (1, 3, 1) if bottleneck else (3, 3)
      widths = (inner, inner, outputs) if bottleneck else (inner, outputs)
      before = inputs
      for i, (size, after) in enumerate(zip(sizes, widths), 1):
        at = stride if i == (2 if bottleneck else 1) else 1
        setattr(self, f'conv{i}', conv(before, after, size, at))
        setattr(self, f'bn{i}', nn.BatchNorm2d(after))
        before = after
      self.count, self.downsample = len(sizes), None
      if stride > 1 or inputs != outputs:
        projection = conv(inputs, outputs, 1, stride)
        self.downsample = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x):
      kept = x if self.downsample is None else self.downsample(x)
      for i in range(1, self.count + 1):
        x = torch.relu(x) if i > 1 else x
        x = getattr(self, f'bn{i}')(getattr(self, f'conv{i}')(x))
      return torch.relu(kept + x)

  class Network(nn.Module):
    def __init__(self):
      super().__init__()
      self.conv1 = conv(3, width, 7 if imagenet else 3, 2 if imagenet else 1)
      self.bn1 = nn.BatchNorm2d(width)
      inputs = width
      for i, n in enumerate(blocks):
        layer = []
        for j in range(n):
          layer.append(Block(inputs, width * 2**i, 2 if i and not j else 1))
          inputs = width * 2**i * (4 if bottleneck else 1)
        setattr(self, f'layer{i + 1}', nn.Sequential(*layer))
      self.fc = nn.Linear(inputs, classes)

    def forward(self, x):
      x = torch.relu(self.bn1(self.conv1(x)))
      x = nn.functional.max_pool2d(x, 3, 2, 1) if imagenet else x
      for i in range(len(blocks)):
        x = getattr(self, f'layer{i + 1}')(x)
      return self.fc(x.mean((2, 3)))

  return Network().eval()


ORACLES = {
  'resnet18': (
    build('resnet18', width=4, classes=7),
    {'blocks': (2, 2, 2, 2), 'bottleneck': False, 'imagenet': True},
  ),
  'bottlenecks': (
    ResNet(depth=11, width=4, classes=7, bottleneck=True, shortcut='B'),
    {'blocks': (1, 1, 1), 'bottleneck': True, 'imagenet': False},
  ),
}


@pytest.mark.parametrize('name', ORACLES)
def test_the_imported_network_computes_what_torch_computes(name, tmp_path):
  torch = pytest.importorskip('torch', reason='the oracle is torch itself')
  from safetensors.torch import save_file

  model, fields = ORACLES[name]
  torch.manual_seed(0)
  network = torch_resnet(torch, width=4, classes=7, **fields)
  for key, value in network.state_dict().items():
    if key.split('.')[-1] in NORM and value.ndim == 1:
      value.uniform_(0.5, 1.5)
  path = tmp_path / 'weights.safetensors'
  save_file(network.state_dict(), path)
  x = np.random.default_rng(0).normal(size=(2, 48, 48, 3)).astype(np.float32)
  with torch.no_grad():
    expected = network(torch.tensor(x.transpose(0, 3, 1, 2))).numpy()
  variables = pretrained.load(path, model)
  got = jax.jit(model.apply)(variables, x)['main']
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
  assert np.ptp(expected) > 0.1


def scored(tfds_data, depth, count):
  """(right answers on the first `count` test images, what the file's JSON states)."""
  tfds = pytest.importorskip('tensorflow_datasets', reason='CIFAR-10 is read by TFDS')
  path = tfds_data.parent / 'checkpoints' / f'resnet{depth}_cifar10.npz'
  if not path.is_file():
    pytest.skip(f'no pretrained weights at {path}')
  images = tfds.data_source('cifar10', split='test', data_dir=str(tfds_data))
  model = build(f'resnet{depth}')
  variables = pretrained.load(path, model)
  mean, std, scale = pretrained.normalisation(path) or pytest.fail('no normalisation')
  answer = jax.jit(lambda x: model.apply(variables, x)['main'].argmax(-1))
  right = 0
  for start in range(0, count, 500):
    batch = [images[i] for i in range(start, min(start + 500, count))]
    x = np.stack([example['image'] for example in batch]) / scale
    x = ((x - np.asarray(mean)) / np.asarray(std)).astype(np.float32)
    right += np.sum(np.asarray(answer(x)) == [example['label'] for example in batch])
  return right, json.loads(path.with_suffix('.json').read_text())


def test_resnet20_knows_cifar10(tfds_data):
  """374 of the first 400 images; all 10,000 give the 9173 that the file states."""
  right, record = scored(tfds_data, 20, 400)
  assert record['measured']['correct_10000'] == 9173
  assert abs(right - 374) <= 1  # float32 sums in another order


@pytest.mark.slow
def test_resnet56_scores_what_its_file_states(tfds_data):
  right, record = scored(tfds_data, 56, 10_000)
  assert abs(right / 100 - record['measured']['test_accuracy_pct_10000']) <= 0.05
