"""What the first layer alone reveals about the data: the subspace they span, and with batch norm their moments.

Beyond the paper, and data-free: everything is read off the given parameters.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kkt_jax import _checks


class InputSpan(NamedTuple):
  """A subspace in which the training inputs lie, less the constant that the classifier subtracts from them.

  Attributes:
    basis: orthonormal columns [D, r], the most important direction first.
    strengths: how strongly each direction is written into the weights [r], positive, falling.
  """

  basis: jax.Array
  strengths: jax.Array


def input_span(kernel: ArrayLike, *, tolerance: float) -> InputSpan:
  """The span of the training inputs, read off the weights of a fully connected first layer.

  With weight decay w the stationarity of the first layer is ``W = (1 / w) mean_i x_i delta_i^T`` with back-propagated
  signals delta: every column of W [D, F] is a combination of the training inputs. With F > N the singular values fall
  off a cliff behind the rank of the data, at most N, and the left singular vectors before it span the training inputs
  exactly. The classifier must be trained to convergence: what is left of the initialisation blurs the cliff.

  Args:
    kernel: W [D, F].
    tolerance: singular values up to this share of the greatest are left out, in (0, 1): between the data's last one and
      what is left of the initialisation; 2e-7 leaves out rounding errors only.

  Returns:
    An `InputSpan` of rank r <= min(D, F).

  Raises:
    ValueError: ``kernel`` is not such a matrix, holds NaN, infinities or only zeros, or ``tolerance`` is out of range.

  >>> import jax.numpy as jnp
  >>> span = input_span(jnp.array([[3.0, 0.0, 0.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0]]), tolerance=1e-6)
  >>> span.basis.shape, span.strengths.tolist()
  ((3, 2), [3.0, 2.0])
  """
  kernel = jnp.asarray(kernel)
  _checks.check_rank("kernel", kernel, 2, "[D, F]")
  _checks.check_finite("kernel", kernel)
  if not 0 < tolerance < 1:
    raise ValueError(f"tolerance must be in (0, 1); got {tolerance}.")
  basis, strengths, _ = jnp.linalg.svd(kernel, full_matrices=False)
  rank = int(jnp.sum(strengths > tolerance * strengths[0]))
  if not rank:
    raise ValueError("kernel must not be all zeros.")
  return InputSpan(basis[:, :rank], strengths[:rank])


def input_moments(kernel: ArrayLike, bias: ArrayLike, mean: ArrayLike, var: ArrayLike) -> tuple[jax.Array, jax.Array]:
  """Solves ``W^T m + b = mean`` and ``w_j^T S w_j = var_j`` for the mean m and covariance S of the inputs.

  The stored statistics of a batch-normalised first layer are those of ``W^T x + b`` over the training data. Least
  squares; exact where the layer is wide enough: F >= D for the mean, F >= D (D + 1) / 2 for the covariance.

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
