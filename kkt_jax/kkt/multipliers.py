"""Where the KKT multipliers mu >= 0 come from: the network h of the paper, the classifier's softmax, or a table.

As in `kkt_jax.kkt.losses`, 16-bit numbers are computed with in float32.
"""

from collections.abc import Callable
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kkt_jax import _checks
from kkt_jax._typing import PyTree
from kkt_jax.kkt import losses
from kkt_jax.kkt.conditions import Conditions


def from_network(
  raw: ArrayLike, *, positive: Callable[[jax.Array], jax.Array] = jax.nn.softplus, log_scale: ArrayLike = 0.0
) -> jax.Array:
  """Multipliers from the output mu' of the network h: dual feasibility, Eqs. 2c and 3c.

  Where it departs from the paper: ``mu = ReLU(mu')`` is ``positive=jax.nn.relu``. Started at random it dies within a
  hundred steps (every mu 0, no gradient). Softplus, the default, cannot: its gradient is positive everywhere.

  Args:
    raw: mu' [M, C].
    positive: an elementwise function without negative values.
    log_scale: logarithm of a learned positive factor, a scalar; see `initial_log_scale`.

  Returns:
    mu [M, C], not negative.

  Raises:
    ValueError: shapes that do not fit.

  >>> import jax.numpy as jnp
  >>> print(from_network(jnp.array([[-1.0, 2.0]]), positive=jax.nn.relu))
  [[0. 2.]]
  """
  _checks.check_rank("raw", raw, 2, "[M, C]")
  _checks.check_rank("log_scale", log_scale, 0, "()")
  return jnp.exp(_checks.floats(log_scale)) * positive(_checks.floats(raw))


@_checks.annotated
def from_softmax(logits: ArrayLike, *, log_scale: ArrayLike = 0.0) -> jax.Array:
  """Multipliers tied to the classifier: its own probabilities p_c, exact at a minimum with weight decay.

  Cross-entropy's gradient is ``-sum_c p_c [grad Phi_y - grad Phi_c]``; at a stationary point with weight decay w it
  balances ``w zeta``, so that mu_c = p_c with the target ``w zeta``, or mu_c = p_c / w with the target ``zeta``.
  Without weight decay the late gradients of gradient descent have the same form with an unknown factor.

  Args:
    logits: [M, C].
    log_scale: logarithm of the factor, a scalar. It is added before the exponential, so that a large factor saves the
      tiny probabilities of a sure classifier from underflow.

  Returns:
    mu [M, C], positive.

  Raises:
    ValueError: shapes that do not fit, or no floating-point numbers.

  >>> import jax.numpy as jnp
  >>> print(from_softmax(jnp.zeros((1, 4))))
  [[0.25 0.25 0.25 0.25]]
  """
  _checks.check_rank("logits", logits, 2, "[M, C]")
  _checks.check_floating("logits", logits)
  _checks.check_rank("log_scale", log_scale, 0, "()")
  exponent = _checks.floats(log_scale) + jax.nn.log_softmax(_checks.floats(logits))
  # The true class of a sure sample is the first to overflow. It does not count, but the gradient of an inf is NaN.
  return jnp.exp(jnp.minimum(exponent, math.log(jnp.finfo(exponent.dtype).max) - 1))


@_checks.annotated
def on_runner_up(raw: ArrayLike, logits: ArrayLike, classes: ArrayLike) -> jax.Array:
  """One free multiplier per sample, on the runner-up class alone: the form of Buzaglo et al. (2023).

  The sum over samples is then that of ``raw_i [grad Phi_y - grad max_{c != y} Phi_c]``.

  Args:
    raw: the multipliers [M, 1]. They may be negative; see `shortfall`.
    logits: [M, C].
    classes: true classes [M].

  Returns:
    mu [M, C]; tied runners-up share it. Which class is the runner-up has no gradient.

  Raises:
    ValueError: shapes do not fit.

  >>> import jax.numpy as jnp
  >>> print(on_runner_up(jnp.array([[2.0]]), jnp.array([[9.0, 1.0, 5.0]]), jnp.array([0])))
  [[0. 0. 2.]]
  """
  _checks.check_rank("logits", logits, 2, "[M, C]")
  _checks.check_shape("raw", raw, (jnp.shape(logits)[0], 1), "[M, 1]")
  runner_up = jax.lax.stop_gradient(losses.runner_up_set(logits, classes))
  raw = _checks.floats(raw)
  return jnp.where(runner_up, raw / jnp.sum(runner_up, axis=1, keepdims=True, dtype=raw.dtype), 0.0)


@_checks.annotated
def softmax_distance(mu: ArrayLike, logits: ArrayLike, classes: ArrayLike) -> jax.Array:
  """How far free multipliers are from the classifier's own probabilities, whatever their common factor.

  Tied to the softmax from the start, multipliers span so many orders of magnitude that a few misplaced samples make up
  the whole sum, and nothing descends. Free multipliers descend, but do not know how sure a sample has to be. A term
  whose weight grows leads from free to tied multipliers. Beyond the paper; for classifiers with weight decay.

  Args:
    mu: [M, C], not negative.
    logits: [M, C].
    classes: true classes [M].

  Returns:
    A scalar: the variance of ``log mu_c - log p_c`` over all samples and their wrong classes. A mu below 1e-30 counts
    as 1e-30 and has no gradient.

  Raises:
    ValueError: shapes do not fit.

  >>> import jax.numpy as jnp
  >>> logits, classes = jnp.array([[0.0, 1.0, 2.0]]), jnp.array([2])
  >>> print(softmax_distance(7 * from_softmax(logits), logits, classes).round(6))
  0.0
  >>> print(softmax_distance(jnp.ones((1, 3)), logits, classes).round(6))  # the variance of 0 and 1
  0.25
  """
  logits, classes = losses.checked(logits, classes)
  _checks.check_same_shapes("mu", mu, "logits", logits)
  gap = jnp.log(jnp.maximum(_checks.floats(mu), 1e-30)) - jax.nn.log_softmax(logits)
  return jnp.var(gap, where=~losses.is_true_class(gap, classes))


@_checks.annotated
def shortfall(mu: ArrayLike, *, least: float) -> jax.Array:
  """How far each sample is from being a support vector: ``relu(least - sum_c mu_ic)^2``.

  Args:
    mu: [M, C].
    least: the least wanted sum (lambda_min of Haim et al. 2022), at least 0.

  Returns:
    [M].

  Raises:
    ValueError: another rank, or ``least`` is negative.

  >>> import jax.numpy as jnp
  >>> print(shortfall(jnp.array([[0.0, -1.0], [0.0, 3.0]]), least=1.0))
  [4. 0.]
  """
  _checks.check_rank("mu", mu, 2, "[M, C]")
  _checks.check_at_least("least", least, 0)
  return jnp.square(jax.nn.relu(least - jnp.sum(_checks.floats(mu), axis=1)))


def initial_log_scale(conditions: Conditions, sums: PyTree) -> jax.Array:
  """The factor on the multipliers that makes the first stationarity sum as long as its target.

  Args:
    conditions: what the sum must be; parameters that are left out do not count.
    sums: `kkt_jax.kkt.stationarity_sum` at the start, with ``log_scale`` 0.

  Returns:
    ``log(|target| / |sums|)``, a scalar; 0 if either is 0.

  >>> import jax.numpy as jnp
  >>> conditions = Conditions(target={"w": jnp.array([jnp.e])}, mask={"w": jnp.ones(1)})
  >>> print(initial_log_scale(conditions, {"w": jnp.array([1.0])}).round(3))
  1.0
  """
  zeros = jax.tree.map(jnp.zeros_like, sums)
  wanted = losses.absolute_residual(conditions, zeros)
  got = losses.absolute_residual(Conditions(zeros, conditions.mask), sums)
  return jnp.where((wanted == 0) | (got == 0), 0.0, jnp.log(wanted) - jnp.log(got))
