"""What a batch-normalised first layer gives away about the data: their mean and covariance.

The stored statistics of the first layer are those of ``W^T x + b`` over the training data, so they are linear equations
for the moments of x. Beyond the paper, and data-free: they are read off the given parameters.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kkt_jax import _checks


def input_moments(kernel: ArrayLike, bias: ArrayLike, mean: ArrayLike, var: ArrayLike) -> tuple[jax.Array, jax.Array]:
  """Solves ``W^T m + b = mean`` and ``w_j^T S w_j = var_j`` for the mean m and covariance S of the inputs.

  Least squares; exact where the layer is wide enough: F >= D for the mean, F >= D (D + 1) / 2 for the covariance.

  Args:
    kernel: W [D, F].
    bias: b [F].
    mean: stored mean of the layer's output [F].
    var: stored variance of the layer's output [F].

  Returns:
    The mean [D] and the covariance [D, D] of the training inputs, symmetric, with eigenvalues of at least 1e-6.

  Raises:
    ValueError: shapes that do not fit, or a layer too narrow for its equations to determine the moments.

  >>> import jax.numpy as jnp
  >>> kernel = jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])  # outputs x1, x2 and x1 + x2
  >>> m, s = input_moments(kernel, jnp.zeros(3), jnp.array([5.0, 7.0, 12.0]), jnp.array([4.0, 9.0, 15.0]))
  >>> bool(jnp.allclose(m, jnp.array([5.0, 7.0]), atol=1e-4))
  True
  >>> bool(jnp.allclose(s, jnp.array([[4.0, 1.0], [1.0, 9.0]]), atol=1e-4))  # covariance (15 - 4 - 9) / 2
  True
  """
  kernel = jnp.asarray(kernel)
  _checks.check_rank("kernel", kernel, 2, "[D, F]")
  size, width = kernel.shape
  for name, value in (("bias", bias), ("mean", mean), ("var", var)):
    _checks.check_shape(name, value, (width,), "[F]")
  needed = size * (size + 1) // 2
  if width < needed:
    raise ValueError(f"kernel must have at least D (D + 1) / 2 = {needed} outputs for D = {size}; got {width}.")
  input_mean = jnp.linalg.lstsq(kernel.T, jnp.asarray(mean) - jnp.asarray(bias))[0]
  rows, columns = jnp.triu_indices(size)
  # w^T S w over the upper triangle: off-diagonal entries count twice. Each equation in units of its own variance.
  coefficients = (kernel[rows] * kernel[columns] * jnp.where(rows == columns, 1.0, 2.0)[:, None]).T
  scale = jnp.maximum(jnp.asarray(var), 1e-12)
  entries = jnp.linalg.lstsq(coefficients / scale[:, None], jnp.asarray(var) / scale)[0]
  covariance = jnp.zeros((size, size)).at[rows, columns].set(entries).at[columns, rows].set(entries)
  values, vectors = jnp.linalg.eigh(covariance)
  return input_mean, (vectors * jnp.maximum(values, 1e-6)[None, :]) @ vectors.T
