"""Generators: conditional on noise, label and classifier index, and what their last layers promise."""

import dataclasses
import types

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax import generators
from kkt_jax.analysis import Subspace
from kkt_jax.classifiers import make_classifier

MODULES = {
  "mlp": generators.MLPGenerator(sample_shape=(8, 8, 1), num_labels=3, num_classifiers=2, hidden=(6, 6)),
  "codebook": generators.CodebookGenerator(
    sample_shape=(8, 8, 1), num_labels=3, num_classifiers=2, codebook_size=4, hidden=(6,)
  ),
}


def started(module, noise_dim=3):
  """theta, statistics and a jitted ``generate(theta, statistics, noise, y, t, train)``."""
  make = generators.network(
    lambda examinations: module, noise=generators.normal_noise(noise_dim), noise_dim=noise_dim, batch_size=4
  )
  made = make([])
  return *jax.jit(made.init)(jax.random.key(0)), jax.jit(made.generate, static_argnums=5)


@pytest.mark.parametrize("name", MODULES)
def test_samples_depend_on_noise_label_and_classifier_and_have_the_shape(name):
  theta, statistics, generate = started(MODULES[name])
  noise = jax.random.normal(jax.random.key(1), (2, 3))
  zero, one = jnp.zeros(2, int), jnp.ones(2, int)
  x, _ = generate(theta, statistics, noise, zero, zero, False)
  assert x.shape == (2, 8, 8, 1)
  for other in ((-noise, zero, zero), (noise, one, zero), (noise, zero, one)):
    assert not np.allclose(x, generate(theta, statistics, *other, False)[0], atol=1e-6)


def test_training_updates_the_running_statistics_and_inference_treats_samples_independently():
  theta, statistics, generate = started(MODULES["mlp"])
  noise, label = 5 + jax.random.normal(jax.random.key(1), (6, 3)), jnp.zeros(6, int)
  _, updated = generate(theta, statistics, noise, label, label, True)
  assert not np.allclose(updated["BatchNorm_0"]["mean"], statistics["BatchNorm_0"]["mean"])
  together, same = generate(theta, updated, noise, label, label, False)
  jax.tree.map(np.testing.assert_array_equal, same, updated)
  alone, _ = generate(theta, updated, noise[:1], label[:1], label[:1], False)
  np.testing.assert_allclose(together[:1], alone, rtol=1e-4, atol=1e-5)


def test_first_noise_coordinate_picks_the_code_and_the_others_move_it():
  settings = {"sample_shape": (2,), "num_labels": 1, "codebook_size": 4, "hidden": (6,)}
  theta, statistics, generate = started(generators.CodebookGenerator(jitter=0.0, **settings))
  quantiles = jax.scipy.stats.norm.ppf(jnp.array([0.01, 0.24, 0.26, 0.99]))  # codes 0, 0, 1 and 3
  noise = jnp.concatenate([quantiles[:, None], jax.random.normal(jax.random.key(1), (4, 2))], axis=1)
  label = jnp.zeros(4, int)
  x, _ = generate(theta, statistics, noise, label, label, False)
  np.testing.assert_allclose(x[0], x[1], rtol=1e-6)
  assert not np.allclose(x[1], x[2], atol=1e-3)
  assert not np.allclose(x[2], x[3], atol=1e-3)
  *_, jittered = started(generators.CodebookGenerator(jitter=0.1, **settings))
  moved, _ = jittered(theta, statistics, noise, label, label, False)
  assert not np.allclose(moved[0], moved[1], atol=1e-4)
  extreme = jnp.array([[40.0, 0.0, 0.0], [-40.0, 0.0, 0.0]])
  assert bool(jnp.all(jnp.isfinite(generate(theta, statistics, extreme, label[:2], label[:2], False)[0])))


def test_a_module_sees_the_places_of_labels():
  seen = []

  class Module(nn.Module):
    def __call__(self, noise, y, t, train=False):
      seen.append(y)
      return noise

  own = examined(jnp.zeros(2), num_classes=2)
  own.classifier = dataclasses.replace(own.classifier, labels=(7, -3))
  made = generators.network(lambda _: Module(), noise=None, noise_dim=2, batch_size=1)([own])
  made.generate({}, {}, jnp.zeros((3, 2)), jnp.array([7, -3, 7], jnp.int8), jnp.zeros(3, int), False)
  np.testing.assert_array_equal(seen[0], [1, 0, 1])


@pytest.mark.parametrize("name", ["noise_dim", "batch_size"])
def test_sizes_of_a_network_generator_are_checked(name):
  with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
    generators.network(lambda _: None, **{"noise": None, "noise_dim": 1, "batch_size": 1} | {name: 0})


def test_affine_output_is_bounded_in_units_of_the_factor():
  factor = jnp.array([[2.0, 0.0], [1.0, 1.0]])
  means, factors = jnp.array([[1.0, -1.0], [0.0, 0.0]]), jnp.stack([factor, jnp.eye(2)])
  output = generators.affine_output(means, factors, bound=2.5)
  t = jnp.array([0, 1])
  np.testing.assert_allclose(output(jnp.zeros((2, 2)), t), means)
  np.testing.assert_allclose(output(jnp.full((2, 2), 1e3), t), [[1 + 5.0, -1 + 5.0], [2.5, 2.5]], rtol=1e-5)


class TestNoise:
  classes = np.array([0, 1, 2, 0, 1, 0])

  def test_stratified_noise_is_normal_and_falls_once_into_each_interval(self):
    classes = np.arange(3000) % 3
    z = generators.stratified_noise(2, size=lambda progress: 0.1 * progress)(jax.random.key(0), 3.0, classes)
    first = np.asarray(jax.scipy.stats.norm.cdf(z[:, 0]))
    for own in range(3):  # 1,000 of each class, so that the i-th lies in [i, i + 1] / 1,000
      place = first[own::3] * 1000 - np.arange(1000)
      assert np.all((place > -1e-3) & (place < 1 + 1e-3))
    # 3,000 normal numbers; the other coordinates are as large as wanted at that point.
    np.testing.assert_allclose([z[:, 0].mean(), z[:, 0].std()], [0.0, 1.0], atol=0.02)
    np.testing.assert_allclose(z[:, 1].std(), 0.3, rtol=0.05)

  @pytest.mark.parametrize("make", [generators.normal_noise, generators.stratified_noise])
  def test_noise_is_new_in_every_step(self, make):
    a, b = (make(3)(key, 0.0, self.classes) for key in jax.random.split(jax.random.key(0), 2))
    assert a.shape == (6, 3)
    assert not np.any(np.isclose(a, b))


def examined(start, basis=None, singular_values=None, *, value_range=(0.0, 1.0), num_classes=3):
  """What `table` asks of an examination; the start is in units of the range."""
  start = jnp.asarray(start)
  apply_fn = lambda w, x: x.reshape(x.shape[0], -1) @ w
  classifier = make_classifier(apply_fn, jnp.ones((start.size, num_classes)), start.shape, value_range=value_range)
  subspace = None if basis is None else Subspace(start, basis, singular_values)
  share = 1.0 if subspace is None else subspace.dimension / start.size
  tells_mean = float(jnp.std(start)) > 1e-3
  own = {"origin": start, "tells_mean": tells_mean, "subspace": subspace, "share": share}
  return types.SimpleNamespace(classifier=classifier, **own)


def every_code(codes):
  """Noise [codes, 1] that picks each code once."""
  return jax.scipy.stats.norm.ppf((jnp.arange(codes) + 0.5) / codes)[:, None]


class TestTable:
  """Two classifiers of 2 x 3 images, whose spans have rank 2 and 3; no code is shared by anything."""

  two = (
    examined(jnp.full((2, 3, 1), 0.5), jnp.eye(6)[:, :2], jnp.array([4.0, 1.0])),
    examined(jnp.full((2, 3, 1), 0.2), jnp.eye(6)[:, 3:], jnp.ones(3)),
  )

  def draws(self, examinations, noise, y, t, *, train=True, **settings):
    generator = generators.table(**settings)(examinations)

    @jax.jit
    def first(noise, y, t):
      return generator.generate(*generator.init(jax.random.key(0)), noise, y, t, train)

    x, statistics = first(noise, y, t)
    assert statistics == {}
    return x

  def test_samples_lie_in_the_span_of_their_classifier(self):
    y, t = jnp.arange(40) % 3, jnp.arange(40) % 2
    x = self.draws(self.two, jax.random.normal(jax.random.key(1), (40, 1)), y, t, codes=4)
    assert x.shape == (40, 2, 3, 1)
    flat = x.reshape(40, 6)
    np.testing.assert_array_equal(flat[t == 0][:, 2:], 0.5)
    np.testing.assert_allclose(flat[t == 1][:, :3], 0.2)
    assert float(jnp.min(jnp.abs(flat[t == 0][:, :2] - 0.5))) > 0
    free = self.draws(self.two, jax.random.normal(jax.random.key(1), (40, 1)), y, t, codes=4, in_span=False)
    assert float(jnp.min(jnp.abs(free.reshape(40, 6) - jnp.where(t == 0, 0.5, 0.2)[:, None]))) > 0

  @pytest.mark.parametrize("labels", [(-1, 1, 4), (10**6, 7, 2)])
  def test_labels_of_any_value_have_samples_of_their_own_and_no_more_than_they_need(self, labels):
    plain, own = examined(jnp.full(5, 0.5)), examined(jnp.full(5, 0.5))
    own.classifier = dataclasses.replace(own.classifier, labels=labels)
    first, other = (generators.table(codes=2)([examination]) for examination in (plain, own))
    theta, _ = other.init(jax.random.key(0))
    assert theta[0].shape == (3, 2, 5)
    noise, t = jnp.tile(every_code(2), (3, 1)), jnp.zeros(6, int)
    drawn = other.generate(theta, {}, noise, jnp.repeat(jnp.array(sorted(labels)), 2), t, True)[0]
    np.testing.assert_array_equal(drawn, first.generate(theta, {}, noise, jnp.repeat(jnp.arange(3), 2), t, True)[0])
    assert len(np.unique(drawn, axis=0)) == 6
    put = other.put(theta, 0, np.array([max(labels)]), np.array([1]), jnp.ones((1, 5)))
    changed = np.any(np.asarray(put[0] != theta[0]), axis=2)
    np.testing.assert_array_equal(changed, [[False, False], [False, False], [False, True]])

  def test_first_samples_deviate_as_asked_along_directions_weighed_by_their_strength(self):
    # Share 2 / 6 of all dimensions: the strengths 4 and 1 enter as 4^(1/3) and 1. A flat start is no image: .3.
    zero = jnp.zeros(2000, int)
    x = self.draws(self.two[:1], every_code(2000), zero, zero, codes=2000, deviation=2.0)
    deviations = jnp.sqrt(jnp.mean(jnp.square(x - 0.5), axis=0)).reshape(-1)
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(jnp.square(deviations))), 0.6, rtol=0.05)
    np.testing.assert_allclose(deviations[0] / deviations[1], 4 ** (1 / 3), rtol=0.1)

  def test_around_a_mean_image_they_deviate_as_black_and_white_pixels_of_that_mean_do(self):
    image = jnp.array([[0.1, 0.5, 0.9]])  # p (1 - p) = .09, .25, .09
    zero = jnp.zeros(2000, int)
    x = self.draws([examined(image)], every_code(2000), zero, zero, codes=2000)
    np.testing.assert_allclose(jnp.std(x - image[None]), np.sqrt((0.09 + 0.25 + 0.09) / 3), rtol=0.03)

  def test_a_label_has_as_many_images_as_codes_and_a_training_step_uses_each_once(self):
    generator = generators.table(codes=4)(self.two)
    assert (generator.batch_size, generator.noise_dim) == (12, 1)
    noise = generator.noise(jax.random.key(3), 0.0, np.arange(12) % 3)
    x = self.draws(self.two, noise, jnp.arange(12) % 3, jnp.zeros(12, int), codes=4)
    assert len(np.unique(np.asarray(x).reshape(12, -1), axis=0)) == 12
    drawn = self.draws(
      self.two, jax.random.normal(jax.random.key(1), (200, 1)), jnp.ones(200, int), jnp.zeros(200, int), codes=4
    )
    assert len(np.unique(np.asarray(drawn).reshape(200, -1), axis=0)) == 4

  def test_without_a_span_samples_are_free_around_the_start_and_clipped_only_at_inference(self):
    zero, settings = jnp.zeros(400, int), {"codes": 400, "deviation": 2.0 / 0.3}
    own = [examined(jnp.full((3, 5), 0.5))]
    x = self.draws(own, every_code(400), zero, zero, **settings)
    # 6,000 normal numbers: mean 0.5 within 4 * 2 / sqrt(6000) = 0.1, deviation 2 within 4 %.
    np.testing.assert_allclose(jnp.mean(x), 0.5, atol=0.1)
    np.testing.assert_allclose(jnp.std(x), 2.0, rtol=0.04)
    clipped = self.draws(own, every_code(400), zero, zero, train=False, **settings)
    np.testing.assert_allclose(clipped, jnp.clip(x, 0, 1))

  def test_samples_are_in_the_units_of_the_classifier(self):
    zero, settings = jnp.zeros(4, int), {"codes": 4, "deviation": 9.0}
    unit = self.draws([examined(jnp.full(5, 0.5))], every_code(4), zero, zero, train=False, **settings)
    for value_range in ((-1.0, 1.0), (0.0, 255.0)):
      own = [examined(jnp.full(5, 0.5), value_range=value_range)]
      x = self.draws(own, every_code(4), zero, zero, train=False, **settings)
      low, high = value_range
      np.testing.assert_allclose(x, low + (high - low) * unit, rtol=1e-5, atol=1e-5)
      assert {float(x.min()), float(x.max())} == set(value_range)  # far out, then clipped
    unbounded = [examined(jnp.zeros(5), value_range=None)]
    free, kept = (self.draws(unbounded, every_code(4), zero, zero, train=train, **settings) for train in (True, False))
    np.testing.assert_array_equal(free, kept)

  def test_one_classifier_without_a_span_frees_the_samples_of_all(self):
    y, t = jnp.zeros(4, int), jnp.zeros(4, int)
    x = self.draws([self.two[0], examined(jnp.full((2, 3, 1), 0.2))], every_code(4), y, t, codes=4)
    assert float(jnp.min(jnp.abs(x - 0.5))) > 0

  @pytest.mark.parametrize(("settings", "named"), [({"codes": 0}, "codes"), ({"deviation": -1.0}, "deviation")])
  def test_bad_settings_are_named(self, settings, named):
    with pytest.raises(ValueError, match=f"{named} must be at least"):
      generators.table(**settings)
