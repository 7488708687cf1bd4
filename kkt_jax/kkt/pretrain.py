"""Full-batch gradient descent to the convergence point that the method needs of its classifier.

Two kinds of convergence point satisfy the conditions of `kkt_jax.kkt.conditions`: the direction to which plain gradient
descent converges without weight decay (the paper's; a small initialisation matters more than a small loss), and a
stationary point of the loss with weight decay (exact for every differentiable network).
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from kkt_jax import _checks
from kkt_jax._precision import full_precision
from kkt_jax._typing import ApplyFn, PyTree
from kkt_jax.kkt import losses


@dataclasses.dataclass(frozen=True)
class PretrainResult:
  """A trained classifier and how far training came.

  Attributes:
    params: zeta.
    log_loss: natural logarithm of the mean cross-entropy (it may underflow float32 itself).
    relative_gradient: ``|gradient| / |zeta|`` of the objective; 0 at a stationary point.
    margins: margin to the runner-up of every training sample [N], in logits, of ``apply_fn``.
    num_steps: steps taken.
    stop_reason: which rule stopped it: ``"num_steps"``, ``"target_loss"`` or ``"gradient_tolerance"``.
  """

  params: PyTree
  log_loss: float
  relative_gradient: float
  margins: np.ndarray
  num_steps: int
  stop_reason: str


def log_cross_entropy(logits: ArrayLike, classes: ArrayLike) -> jax.Array:
  """Logarithm of the mean cross-entropy, accurate where the cross-entropy itself underflows.

  Args:
    logits: [M, C].
    classes: true classes [M].

  Returns:
    A scalar.

  >>> import jax.numpy as jnp
  >>> print(log_cross_entropy(jnp.array([[200.0, 0.0]]), jnp.array([0])))  # log(log(1 + e^-200))
  -200.0
  """
  log_odds = jax.nn.logsumexp(-losses.margins(logits, classes), axis=1)  # log sum_c exp(Phi_c - Phi_y)
  # log(log(1 + e^v)) is v for very negative v; the inner where keeps the gradient of the unused branch finite.
  tiny = log_odds < -12
  log_losses = jnp.where(tiny, log_odds, jnp.log(jax.nn.softplus(jnp.where(tiny, 0.0, log_odds))))
  return jax.nn.logsumexp(log_losses) - jnp.log(log_losses.shape[0])


@dataclasses.dataclass(frozen=True)
class Descent:
  """How to descend.

  Loss-scaled steps follow the gradient of the *logarithm* of the loss, divided by ``|zeta|``. They walk the same path
  as small plain steps, but reach in thousands of steps margins for which plain steps need millions; too large late
  steps leave the KKT point again, so let the learning rate fall.

  Attributes:
    num_steps: greatest number of steps, at least 1.
    learning_rate: step size, or an optax schedule from step to step size.
    weight_decay: w, at least 0; on every parameter, biases included.
    momentum: heavy-ball momentum in [0, 1). It changes the path: use it with weight decay, where only the end counts.
    loss_scaled: take loss-scaled steps. Not with weight decay, whose stationary point they would not reach.
    target_loss: stop once the mean cross-entropy is at most this.
    gradient_tolerance: stop once ``|gradient| / |zeta|`` of the objective is at most this.
    steps_per_call: steps in one compiled call, between which the stopping rules are looked at. 1 avoids
      ``lax.scan``, in which convolutions are 2 to 20 times slower on a CPU (findings/jax_convolutions_in_loops.sh).

  Raises:
    ValueError: a field does not fit; the message names it.
  """

  num_steps: int
  learning_rate: float | Callable[[ArrayLike], ArrayLike]
  weight_decay: float = 0.0
  momentum: float = 0.0
  loss_scaled: bool = False
  target_loss: float | None = None
  gradient_tolerance: float | None = None
  steps_per_call: int = 100

  def __post_init__(self) -> None:
    """Checks the fields."""
    _checks.check_at_least("num_steps", self.num_steps, 1)
    _checks.check_at_least("steps_per_call", self.steps_per_call, 1)
    _checks.check_at_least("weight_decay", self.weight_decay, 0)
    if not callable(self.learning_rate):
      _checks.check_positive("learning_rate", self.learning_rate)
    if not 0 <= self.momentum < 1:
      raise ValueError(f"momentum must be in [0, 1); got {self.momentum}.")
    if self.loss_scaled and self.weight_decay:
      raise ValueError(f"loss_scaled must be False with weight decay; got weight_decay = {self.weight_decay}.")

  @classmethod
  def to_convergence(
    cls,
    *,
    num_steps: int,
    learning_rate: float,
    weight_decay: float | None = None,
    last_share: float = 1e-3,
    **further: Any,
  ) -> Self:
    """The recipe of the experiments for a classifier's convergence point, with weight decay or without.

    With weight decay gradient descent with momentum 0.9. Without it loss-scaled steps, whose size is ``learning_rate``
    for the first fifth of them and falls exponentially to ``last_share`` of that.

    Args:
      num_steps: number of steps.
      learning_rate: step size; of loss-scaled steps the first.
      weight_decay: its strength; loss-scaled steps if None or 0.
      last_share: the last loss-scaled step's size over the first's.
      **further: other fields.

    >>> descent = Descent.to_convergence(num_steps=500, learning_rate=0.1)
    >>> descent.loss_scaled, round(float(descent.learning_rate(500)), 6)
    (True, 0.0001)
    """
    if weight_decay:
      return cls(num_steps, learning_rate, weight_decay, momentum=0.9, **further)
    hold = num_steps // 5
    falling = optax.schedules.exponential_decay(learning_rate, num_steps - hold, last_share, transition_begin=hold)
    return cls(num_steps, falling, loss_scaled=True, **further)


@_checks.annotated
@full_precision
def gradient_descent(
  apply_fn: ApplyFn,
  params: PyTree,
  x: ArrayLike,
  classes: ArrayLike,
  descent: Descent,
  *,
  on_progress: Callable[[int, float], None] | None = None,
) -> PretrainResult:
  """Minimises the mean cross-entropy plus ``weight_decay / 2 |zeta|^2`` by full-batch gradient descent.

  Args:
    apply_fn: ``(params, x[N, ...]) -> logits[N, C]``; with batch norm the one on batch statistics.
    params: initial zeta; of float64 under ``jax.enable_x64`` it is trained in it.
    x: the training data [N, ...], floating point.
    classes: true classes [N], at least two distinct ones.
    descent: how, and when to stop.
    on_progress: called with (step, log_loss) after every call.

  Returns:
    A `PretrainResult`.

  Raises:
    ValueError: an argument does not fit; the message names it.
    FloatingPointError: the loss became NaN or infinite; the message names the step and the cure.

  >>> import jax.numpy as jnp
  >>> result = gradient_descent(lambda w, x: x @ w, jnp.zeros((1, 2)), jnp.array([[-1.0], [1.0]]), jnp.array([0, 1]),
  ...                           Descent(num_steps=500, learning_rate=0.5, weight_decay=0.1, steps_per_call=50))
  >>> result.relative_gradient < 1e-5
  True
  """
  x = jnp.asarray(x)
  _checks.check_batch("x", x)
  _checks.check_params("params", params)
  _checks.check_labels("classes", classes, x.shape[0])
  _checks.check_label_range("classes", classes, jax.eval_shape(apply_fn, params, x).shape[1])
  classes = _checks.integers(classes)
  _checks.check_finite("x", x)
  params = jax.tree.map(jnp.array, params)  # a copy: the steps reuse the memory of their argument
  optimizer = optax.chain(optax.trace(decay=descent.momentum), optax.scale_by_learning_rate(descent.learning_rate))
  gradient_of = functools.partial(_gradient, apply_fn, descent.weight_decay, descent.loss_scaled)
  run = _compiled_steps(gradient_of, optimizer, descent.loss_scaled)
  carry = (params, optimizer.init(params))
  step, stop_reason = 0, "num_steps"
  while step < descent.num_steps:
    length = min(descent.steps_per_call, descent.num_steps - step)
    carry, log_loss, relative_gradient = run(carry, x, classes, length)
    step += length
    if not jnp.isfinite(log_loss):
      raise FloatingPointError(
        f"learning_rate must be smaller: the loss became {float(log_loss)} within {step} steps;"
        f" got {descent.learning_rate}."
      )
    if on_progress is not None:
      on_progress(step, float(log_loss))
    if descent.target_loss is not None and log_loss <= np.log(descent.target_loss):
      stop_reason = "target_loss"
      break
    if descent.gradient_tolerance is not None and relative_gradient <= descent.gradient_tolerance:
      stop_reason = "gradient_tolerance"
      break
  trained = carry[0]
  _, log_loss, relative_gradient = jax.jit(gradient_of)(trained, x, classes)
  margins = jax.jit(lambda p: losses.runner_up_margin(apply_fn(p, x), classes))(trained)
  return PretrainResult(trained, float(log_loss), float(relative_gradient), np.asarray(margins), step, stop_reason)


def _gradient(
  apply_fn: ApplyFn, weight_decay: float, loss_scaled: bool, params: PyTree, x: jax.Array, classes: jax.Array
) -> tuple[PyTree, jax.Array, jax.Array]:
  """The gradient of the objective, the logarithm of the cross-entropy, and |gradient| / |zeta|."""

  def objective(params: PyTree) -> tuple[jax.Array, jax.Array]:
    logits = apply_fn(params, x)
    log_loss = log_cross_entropy(logits, classes)
    if loss_scaled:
      return log_loss, log_loss
    cross_entropy = jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, classes))
    return cross_entropy + 0.5 * weight_decay * optax.tree.norm(params, squared=True), log_loss

  (_, log_loss), gradient = jax.value_and_grad(objective, has_aux=True)(params)
  return gradient, log_loss, optax.tree.norm(gradient) / optax.tree.norm(params)


def _compiled_steps(
  gradient_of: Callable[..., tuple[PyTree, jax.Array, jax.Array]],
  optimizer: optax.GradientTransformation,
  loss_scaled: bool,
) -> Callable[..., tuple[PyTree, jax.Array, jax.Array]]:
  """A jitted function that takes ``length`` steps, with the loss and the relative gradient before the last of them."""

  def step(carry: PyTree, x: jax.Array, classes: jax.Array) -> tuple[PyTree, tuple[jax.Array, jax.Array]]:
    params, opt_state = carry
    gradient, log_loss, relative_gradient = gradient_of(params, x, classes)
    if loss_scaled:
      gradient = optax.tree.scale(1 / optax.tree.norm(params), gradient)
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), (log_loss, relative_gradient)

  @functools.partial(jax.jit, static_argnames="length", donate_argnums=0)
  def run(carry: PyTree, x: jax.Array, classes: jax.Array, length: int) -> tuple[PyTree, jax.Array, jax.Array]:
    if length == 1:
      carry, last = step(carry, x, classes)
    else:
      carry, history = jax.lax.scan(lambda c, _: step(c, x, classes), carry, length=length)
      last = jax.tree.map(lambda values: values[-1], history)
    return carry, *last

  return run
