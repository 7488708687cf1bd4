"""Generators: conditional on noise, label and classifier index, and what their last layers promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax import generators
from kkt_jax.first_layer import InputSpan

SHAPES = {
  "mlp": lambda **kw: generators.MLPGenerator(sample_shape=(8, 8, 1), num_labels=3, num_classifiers=2, **kw),
  "conv": lambda **kw: generators.ConvGenerator(
    sample_shape=(8, 8, 1), num_labels=3, num_classifiers=2, hidden=(6, 6), channels=(4, 3, 2), **kw
  ),
  "codebook": lambda **kw: generators.CodebookGenerator(
    sample_shape=(8, 8, 1), num_labels=3, num_classifiers=2, codebook_size=4, **kw
  ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_samples_depend_on_noise_label_and_classifier_and_have_the_shape(name):
  init, generate = generators.generator_functions(SHAPES[name](), noise_dim=3)
  theta, statistics = init(jax.random.key(0))
  noise = jax.random.normal(jax.random.key(1), (2, 3))
  zero, one = jnp.zeros(2, int), jnp.ones(2, int)
  x, _ = generate(theta, statistics, noise, zero, zero, False)
  assert x.shape == (2, 8, 8, 1)
  for other in ((-noise, zero, zero), (noise, one, zero), (noise, zero, one)):
    assert not np.allclose(x, generate(theta, statistics, *other, False)[0], atol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_training_updates_the_running_statistics_and_inference_treats_samples_independently(name):
  init, generate = generators.generator_functions(SHAPES[name](), noise_dim=3)
  theta, statistics = init(jax.random.key(0))
  noise, label = 5 + jax.random.normal(jax.random.key(1), (6, 3)), jnp.zeros(6, int)
  _, updated = generate(theta, statistics, noise, label, label, True)
  assert not np.allclose(updated["BatchNorm_0"]["mean"], statistics["BatchNorm_0"]["mean"])
  together, same = generate(theta, updated, noise, label, label, False)
  assert same is updated
  alone, _ = generate(theta, updated, noise[:1], label[:1], label[:1], False)
  np.testing.assert_allclose(together[:1], alone, rtol=1e-4, atol=1e-5)


def test_first_noise_coordinate_picks_the_code_and_the_others_move_it():
  module = generators.CodebookGenerator(sample_shape=(2,), num_labels=1, codebook_size=4, jitter=0.0)
  init, generate = generators.generator_functions(module, noise_dim=3)
  theta, statistics = init(jax.random.key(0))
  quantiles = jax.scipy.stats.norm.ppf(jnp.array([0.01, 0.24, 0.26, 0.99]))  # codes 0, 0, 1 and 3
  noise = jnp.concatenate([quantiles[:, None], jax.random.normal(jax.random.key(1), (4, 2))], axis=1)
  label = jnp.zeros(4, int)
  x, _ = generate(theta, statistics, noise, label, label, False)
  np.testing.assert_allclose(x[0], x[1], rtol=1e-6)
  assert not np.allclose(x[1], x[2], atol=1e-3)
  assert not np.allclose(x[2], x[3], atol=1e-3)
  moved, _ = generators.generator_functions(module.clone(jitter=0.1), noise_dim=3)[1](
    theta, statistics, noise, label, label, False
  )
  assert not np.allclose(moved[0], moved[1], atol=1e-4)


def test_extreme_noise_stays_inside_the_codebook():
  init, generate = generators.generator_functions(SHAPES["codebook"](), noise_dim=2)
  theta, statistics = init(jax.random.key(0))
  x, _ = generate(
    theta, statistics, jnp.array([[40.0, 0.0], [-40.0, 0.0]]), jnp.zeros(2, int), jnp.zeros(2, int), False
  )
  assert bool(jnp.all(jnp.isfinite(x)))


def test_pixel_output_starts_at_the_given_image_and_stays_in_range():
  start = jnp.linspace(0.0, 1.0, 64).reshape(8, 8, 1)  # pure black and white included
  output = generators.pixel_output(start, blur=1.0)
  np.testing.assert_allclose(output(jnp.zeros((1, 8, 8, 1)))[0], start, atol=4e-3)
  extreme = output(jnp.full((1, 8, 8, 1), 50.0))
  assert bool(jnp.all((extreme >= 0) & (extreme <= 1)))


def test_blur_spreads_a_spot_and_leaves_a_flat_image_alone():
  grey = jnp.full((9, 9, 1), 0.5)
  logit = lambda x: jnp.log(x) - jnp.log1p(-x)
  spot = jnp.zeros((1, 9, 9, 1)).at[0, 4, 4, 0].set(1.0)
  blurred = logit(generators.pixel_output(grey, blur=1.0)(spot))[0, :, :, 0]
  np.testing.assert_allclose(blurred.sum(), 1.0, rtol=1e-2)
  # A Gaussian of deviation 1 falls by e^-1/2 from one pixel to the next.
  np.testing.assert_allclose(blurred[4, 5] / blurred[4, 4], np.exp(-0.5), rtol=1e-3)
  flat = generators.pixel_output(grey, blur=1.0)(jnp.ones((1, 9, 9, 1)))
  np.testing.assert_allclose(flat, jax.nn.sigmoid(1.0), rtol=1e-5)


def test_affine_output_is_bounded_in_units_of_the_factor():
  factor = jnp.array([[2.0, 0.0], [1.0, 1.0]])
  means, factors = jnp.array([[1.0, -1.0], [0.0, 0.0]]), jnp.stack([factor, jnp.eye(2)])
  output = generators.affine_output(means, factors, bound=2.5)
  t = jnp.array([0, 1])
  np.testing.assert_allclose(output(jnp.zeros((2, 2)), t), means)
  np.testing.assert_allclose(output(jnp.full((2, 2), 1e3), t), [[1 + 5.0, -1 + 5.0], [2.5, 2.5]], rtol=1e-5)


class TestSpanFunctions:
  """Two classifiers of 2 x 3 images with spans of rank 2 and 3."""

  starts = (jnp.full((2, 3, 1), 0.5), jnp.full((2, 3, 1), 0.2))
  spans = (InputSpan(jnp.eye(6)[:, :2], jnp.array([4.0, 1.0])), InputSpan(jnp.eye(6)[:, 3:], jnp.ones(3)))

  def functions(self, **settings):
    return generators.span_functions(
      self.starts, self.spans, **{"num_labels": 3, "num_codes": 4, "deviation": 0.1} | settings
    )

  def test_samples_lie_in_the_span_of_their_classifier(self):
    init, generate = self.functions()
    theta, statistics = init(jax.random.key(0))
    noise = jax.random.normal(jax.random.key(1), (40, 1))
    y, t = jnp.arange(40) % 3, jnp.arange(40) % 2
    x, _ = generate(theta, statistics, noise, y, t, True)
    assert x.shape == (40, 2, 3, 1)
    flat = x.reshape(40, 6)
    np.testing.assert_array_equal(flat[t == 0][:, 2:], 0.5)
    np.testing.assert_allclose(flat[t == 1][:, :3], 0.2)
    assert float(jnp.min(jnp.abs(flat[t == 0][:, :2] - 0.5))) > 0

  def test_first_samples_deviate_as_much_as_asked(self):
    for power in (0.0, 0.5, 1.0):
      init, generate = self.functions(num_codes=2000, power=power)
      theta, statistics = init(jax.random.key(0))
      noise = jax.scipy.stats.norm.ppf((jnp.arange(2000) + 0.5) / 2000)[:, None]
      zero = jnp.zeros(2000, int)
      x, _ = generate(theta, statistics, noise, zero, zero, True)
      deviations = jnp.sqrt(jnp.mean(jnp.square(x - 0.5), axis=0)).reshape(-1)
      np.testing.assert_allclose(jnp.sqrt(jnp.mean(jnp.square(deviations))), 0.1, rtol=0.05)
      np.testing.assert_allclose(deviations[0] / deviations[1], 4.0**power, rtol=0.1)

  def test_a_label_has_as_many_images_as_codes(self):
    init, generate = self.functions()
    theta, statistics = init(jax.random.key(0))
    y, t = jnp.ones(200, int), jnp.zeros(200, int)
    x, _ = generate(theta, statistics, jax.random.normal(jax.random.key(1), (200, 1)), y, t, False)
    assert len(np.unique(np.asarray(x).reshape(200, -1), axis=0)) == 4

  def test_samples_are_clipped_at_inference_only(self):
    init, generate = self.functions(deviation=50.0)
    theta, statistics = init(jax.random.key(0))
    zero = jnp.zeros(4, int)
    noise = jnp.linspace(-1.0, 1.0, 4)[:, None]
    free, clipped = (generate(theta, statistics, noise, zero, zero, train)[0] for train in (True, False))
    assert float(jnp.max(jnp.abs(free))) > 1
    np.testing.assert_allclose(clipped, jnp.clip(free, 0, 1))

  @pytest.mark.parametrize(
    ("starts", "spans", "message"),
    [((), (), "at least one"), (starts, spans[:1], "got 1"), ((jnp.zeros(5),), spans[:1], "basis")],
  )
  def test_what_does_not_fit_is_named(self, starts, spans, message):
    with pytest.raises(ValueError, match=message):
      generators.span_functions(starts, spans, num_labels=3, num_codes=4, deviation=0.1)


def test_free_samples_start_around_the_given_one_and_are_clipped_only_at_inference():
  functions = lambda **s: generators.free_functions([jnp.full((3, 5), 0.5)], num_labels=2, num_codes=400, **s)
  init, generate = functions(deviation=2.0)
  theta, statistics = init(jax.random.key(0))
  zero = jnp.zeros(400, int)
  noise = jax.scipy.stats.norm.ppf((jnp.arange(400) + 0.5) / 400)[:, None]  # every code once
  x, _ = generate(theta, statistics, noise, zero, zero, True)
  assert x.shape == (400, 3, 5)
  # 6,000 normal numbers: mean 0.5 within 4 * 2 / sqrt(6000) = 0.1, deviation 2 within 2 %.
  np.testing.assert_allclose(jnp.mean(x), 0.5, atol=0.1)
  np.testing.assert_allclose(jnp.std(x), 2.0, rtol=0.04)
  np.testing.assert_allclose(generate(theta, statistics, noise, zero, zero, False)[0], jnp.clip(x, 0, 1))
  _, unbounded = functions(deviation=2.0, limits=None)
  np.testing.assert_array_equal(unbounded(theta, statistics, noise, zero, zero, False)[0], x)


def test_free_samples_of_each_classifier_have_their_own_start():
  init, generate = generators.free_functions([jnp.zeros(2), jnp.ones(2)], num_labels=1, num_codes=1, deviation=0.0)
  theta, statistics = init(jax.random.key(0))
  x, _ = generate(theta, statistics, jnp.zeros((2, 1)), jnp.zeros(2, int), jnp.array([0, 1]), True)
  np.testing.assert_array_equal(x, [[0.0, 0.0], [1.0, 1.0]])
  with pytest.raises(ValueError, match="starts must hold at least one"):
    generators.free_functions([], num_labels=1, num_codes=1, deviation=0.0)


def test_convolutional_generator_needs_multiples_of_four():
  module = generators.ConvGenerator(sample_shape=(10, 8, 1), num_labels=3)
  with pytest.raises(ValueError, match=r"sample_shape must have height and width in multiples of 4; got \(10, 8, 1\)"):
    generators.generator_functions(module, noise_dim=2)[0](jax.random.key(0))
