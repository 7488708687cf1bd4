"""Full-batch gradient descent: its limits are known in closed form for linear classifiers."""

from example_networks import random_mlp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kkt_jax.kkt import pretrain


def linear(w, x):
  return x @ w


X = jnp.array([[-1.0], [1.0]])
CLASSES = jnp.array([0, 1])


def test_log_cross_entropy_matches_optax_where_both_are_representable():
  logits = jax.random.normal(jax.random.key(0), (20, 5)) * 3
  classes = jnp.arange(20) % 5
  expected = jnp.log(jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, classes)))
  np.testing.assert_allclose(pretrain.log_cross_entropy(logits, classes), expected, rtol=1e-5)


def test_log_cross_entropy_is_the_negative_margin_far_beyond_underflow():
  # log(1 + e^-500) underflows to 0 in float32 and float64; its logarithm is -500.
  assert float(pretrain.log_cross_entropy(jnp.array([[500.0, 0.0]]), jnp.array([0]))) == -500.0


def test_gradient_of_log_cross_entropy_is_finite_on_both_sides_of_the_switch():
  gradient_at = jax.jit(jax.grad(lambda g: pretrain.log_cross_entropy(jnp.array([[g, 0.0]]), jnp.array([0]))))
  for gap in (11.9, 12.0, 12.1, 500.0):
    gradient = gradient_at(gap)
    np.testing.assert_allclose(gradient, -1.0, rtol=1e-4)  # d log(log(1 + e^-g)) / dg -> -1


def test_weight_decay_minimum_of_a_linear_classifier_is_the_known_root():
  # With x = -+1 and W = [[-v, v]] the margin is 2v, the gradient of the cross-entropy by each entry is -+sigmoid(-2v),
  # so at the minimum weight_decay * v = sigmoid(-2v).
  result = pretrain.gradient_descent(
    linear,
    jnp.zeros((1, 2)),
    X,
    CLASSES,
    pretrain.Descent(num_steps=3000, learning_rate=0.5, weight_decay=0.1, gradient_tolerance=1e-7),
  )
  v = float(result.params[0, 1])
  np.testing.assert_allclose(0.1 * v, jax.nn.sigmoid(-2 * v), rtol=1e-4)
  np.testing.assert_allclose(result.margins, [2 * v, 2 * v], rtol=1e-5)


@pytest.mark.slow
def test_loss_scaled_steps_find_the_hard_margin_direction():
  # Three points on one side and one on the other: the max-margin direction is (1, 0), set by the two nearest points.
  x = jnp.array([[1.0, 0.0], [3.0, 2.0], [4.0, 1.0], [-1.0, 0.0]])
  classes = jnp.array([1, 1, 1, 0])
  start = 0.3 * jax.random.normal(jax.random.key(0), (2, 2))
  schedule = optax.schedules.exponential_decay(0.2, 500, 0.8)
  result = pretrain.gradient_descent(
    linear, start, x, classes, pretrain.Descent(num_steps=6000, learning_rate=schedule, loss_scaled=True)
  )
  direction = result.params[:, 1] - result.params[:, 0]
  assert result.log_loss < -20
  assert float(direction[0] / jnp.linalg.norm(direction)) > 0.999


def test_target_loss_stops_early_and_says_so():
  result = pretrain.gradient_descent(
    linear,
    jnp.zeros((1, 2)),
    X,
    CLASSES,
    pretrain.Descent(num_steps=10_000, learning_rate=1.0, target_loss=0.1, steps_per_call=10),
  )
  assert result.stop_reason == "target_loss"
  assert result.num_steps < 1000
  assert result.log_loss <= np.log(0.1)


def test_number_of_steps_does_not_depend_on_steps_per_call():
  def train(steps_per_call):
    return pretrain.gradient_descent(
      linear,
      jnp.zeros((1, 2)),
      X,
      CLASSES,
      pretrain.Descent(num_steps=7, learning_rate=0.3, steps_per_call=steps_per_call),
    )

  one, three, many = train(1), train(3), train(100)
  assert one.num_steps == three.num_steps == many.num_steps == 7
  np.testing.assert_allclose(one.params, three.params, rtol=1e-6)
  np.testing.assert_allclose(one.params, many.params, rtol=1e-6)


@pytest.mark.slow
def test_given_parameters_survive_the_training():
  start = jnp.zeros((1, 2))
  pretrain.gradient_descent(linear, start, X, CLASSES, pretrain.Descent(num_steps=2, learning_rate=0.1))
  assert start.sum() == 0  # would raise had their memory been given away


@pytest.mark.slow
def test_a_classifier_with_batch_norm_fits_its_data():
  classifier, x, classes = random_mlp(num_samples=12, num_classes=2, batch_norm=True, hidden=(8,))
  apply_fn = classifier.apply_fn  # on batch statistics
  result = pretrain.gradient_descent(
    apply_fn, classifier.params, x, classes, pretrain.Descent(num_steps=200, learning_rate=0.3)
  )
  assert result.margins.min() > 0


def test_the_recipe_of_the_experiments_holds_its_steps_and_lets_them_fall_or_decays_weights():
  start, common = jnp.full((1, 2), 0.1), {"num_steps": 20, "steps_per_call": 20}
  schedule = lambda step: 0.2 * jnp.where(step < 4, 1.0, 0.5 ** ((step - 4) / 16))  # a fifth, then to a half
  for expected, got in (
    (
      pretrain.gradient_descent(
        linear, start, X, CLASSES, pretrain.Descent(learning_rate=schedule, loss_scaled=True, **common)
      ),
      pretrain.gradient_descent(
        linear, start, X, CLASSES, pretrain.Descent.to_convergence(learning_rate=0.2, last_share=0.5, **common)
      ),
    ),
    (
      pretrain.gradient_descent(
        linear, start, X, CLASSES, pretrain.Descent(learning_rate=0.2, weight_decay=0.1, momentum=0.9, **common)
      ),
      pretrain.gradient_descent(
        linear, start, X, CLASSES, pretrain.Descent.to_convergence(learning_rate=0.2, weight_decay=0.1, **common)
      ),
    ),
  ):
    np.testing.assert_allclose(got.params, expected.params, rtol=1e-5)


@pytest.mark.parametrize(
  ("changed", "named"),
  [
    ({"classes": jnp.array([0, 2])}, "classes must lie in 0..1"),
    ({"classes": jnp.array([0, -1])}, "classes must lie in 0..1"),
    ({"classes": jnp.array([1, 1])}, "classes must hold at least two classes"),
    ({"classes": jnp.array([0.0, 1.0])}, "classes must be integers"),
    ({"classes": jnp.array([0, 1, 1])}, "classes must have shape"),
    ({"x": jnp.zeros((0, 1)), "classes": jnp.zeros(0, int)}, "x must hold at least one sample"),
    ({"x": jnp.array([[-1], [1]])}, "x must be floating point"),
    ({"x": jnp.array([[jnp.nan], [1.0]])}, "x must be finite"),
    ({"params": jnp.full((1, 2), jnp.inf)}, "params must be finite"),
    ({"num_steps": 0}, "num_steps"),
    ({"steps_per_call": 0}, "steps_per_call"),
    ({"learning_rate": 0.0}, "learning_rate"),
    ({"weight_decay": -1.0}, "weight_decay"),
    ({"momentum": 1.0}, "momentum"),
    ({"loss_scaled": True, "weight_decay": 0.1}, "loss_scaled"),
  ],
)
def test_bad_arguments_are_named(changed, named):
  arguments = {"params": jnp.zeros((1, 2)), "x": X, "classes": CLASSES, "num_steps": 5, "learning_rate": 0.1} | changed
  data = {name: arguments.pop(name) for name in ("params", "x", "classes")}
  with pytest.raises(ValueError, match=named):
    pretrain.gradient_descent(linear, **data, descent=pretrain.Descent(**arguments))


def test_divergence_names_the_learning_rate():
  with pytest.raises(FloatingPointError, match="learning_rate"):
    pretrain.gradient_descent(
      linear,
      jnp.ones((1, 2)),
      X,
      CLASSES,
      pretrain.Descent(num_steps=3000, learning_rate=100.0, weight_decay=1.0, steps_per_call=500),
    )
