"""What the last layer gives away about the data: how sure the classifier was of its training samples."""

import math

import jax.numpy as jnp
from jax.typing import ArrayLike

from kkt_jax import _checks


def typical_margin(kernel: ArrayLike, *, weight_decay: float, competitors: float | None = None) -> float:
  """The margin of a typical training sample, from the last layer of a classifier trained with weight decay.

  The stationarity of the last kernel W, multiplied by W, says ``w |W|^2 = mean_i sum_c p_c (Phi_y - Phi_c)`` (without
  the last bias). Were all training samples equally sure, with equal logits of k competing classes and no probability
  for the others, the right-hand side would be ``q k / (k + e^q)`` with the margin q; the greater of the two solutions
  is returned. Beyond the paper, and data-free: multipliers of the right size need samples of the right margin.

  Args:
    kernel: W [F, C].
    weight_decay: w, positive.
    competitors: k, positive. Exact for two classes with 1 and for equal logits with C - 1; C / 2 where None, which is a
      rule of thumb for classes that are not all alike.

  Returns:
    q in logits, at least 1.

  Raises:
    ValueError: ``kernel`` is not such a matrix, has fewer than two columns, or ``weight_decay`` is not positive.

  >>> q, w = 5.0, 0.01
  >>> size = math.sqrt(q / (1 + math.exp(q)) / w / 2)
  >>> round(typical_margin(jnp.array([[size, -size]]), weight_decay=w), 3)
  5.0
  """
  _checks.check_rank("kernel", kernel, 2, "[F, C]")
  _checks.check_positive("weight_decay", weight_decay)
  num_classes = jnp.shape(kernel)[1]
  if num_classes < 2:
    raise ValueError(f"kernel must have at least two columns; got shape {jnp.shape(kernel)}.")
  others = num_classes / 2 if competitors is None else competitors
  _checks.check_positive("competitors", others)
  wanted = weight_decay * float(jnp.sum(jnp.square(jnp.asarray(kernel))))

  def product(q: float) -> float:
    return q * others / (others + math.exp(q))

  # Beyond its peak the product falls with q: halve the interval.
  low, high = max(1.0, math.log(others)), 100.0
  for _ in range(60):
    middle = (low + high) / 2
    low, high = (middle, high) if product(middle) > wanted else (low, middle)
  return low
