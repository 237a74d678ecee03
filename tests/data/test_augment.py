"""Mixup: what becomes of images, of their labels, and of the loss."""

import jax
import jax.numpy as jnp
import numpy as np

from depthprune.data import images
from depthprune.data.augment import Augment, mixup
from depthprune.train.task import classification


def test_mixup_blends_images_and_their_labels_alike():
  image = jnp.arange(4.0)[:, None, None, None] * jnp.ones((4, 2, 2, 1))
  batch = {'image': image, 'label': jnp.arange(4, dtype=jnp.int32)}
  assert mixup(batch, jax.random.key(0), 0.0) is batch
  found = mixup(batch, jax.random.key(0), 0.5)
  a = float(found['share'][0])
  assert 0 < a < 1 and found['partner'].tolist() == [3, 2, 1, 0]
  expected = a * np.arange(4) + (1 - a) * np.arange(4)[::-1]
  np.testing.assert_allclose(found['image'][:, 0, 0, 0], expected, rtol=1e-6)
  shares = [float(mixup(batch, jax.random.key(i), 0.5)['share'][0]) for i in range(300)]
  np.testing.assert_allclose(np.mean(shares), 0.5, atol=0.06)
  np.testing.assert_allclose(np.var(shares), 1 / 8, atol=0.02)  # of Beta(1/2, 1/2)
  task, logits = classification(4), jax.random.normal(jax.random.key(1), (4, 4))
  one, other = ({'label': found[name]} for name in ('label', 'partner'))
  expected = a * task.loss(logits, one) + (1 - a) * task.loss(logits, other)
  np.testing.assert_allclose(task.loss(logits, found), expected, rtol=1e-6)


def test_images_in_memory_are_mixed_too():
  digits = images.load('digits', subset=32)
  digits = digits._replace(augment=Augment(mixup=0.4))
  sampler = digits.sampler(jax.random.key(0), 8, True)
  plain = digits.sampler(jax.random.key(0), 8, False)(digits.train, 3)
  found = sampler.stepwise()(digits.train, 3)
  np.testing.assert_array_equal(found['partner'], plain['label'][::-1])
  share = found['share'][:, None, None, None]
  expected = share * plain['image'] + (1 - share) * plain['image'][::-1]
  np.testing.assert_allclose(found['image'], expected, atol=1e-6)
