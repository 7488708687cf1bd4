"""Per-sample parameter Jacobians: the explicit route, and the reference for the fast one in `kkt_jax.kkt.losses`."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kkt_jax import _checks
from kkt_jax._precision import full_precision
from kkt_jax._typing import ApplyFn, PyTree


@_checks.annotated
@full_precision
def per_sample_jacobians(apply_fn: ApplyFn, params: PyTree, x: ArrayLike, *, chunk_size: int | None = None) -> PyTree:
  """Jacobians of every logit of every sample with respect to the parameters, grad_zeta Phi_c(x_i; zeta).

  The result is M x C x P numbers; the backward passes that build it hold chunk_size samples at a time (`jax.lax.map`).
  For the stationarity sum alone use `kkt_jax.kkt.stationarity_sum`, which needs none of it.

  Args:
    apply_fn: ``(params, x[M, ...]) -> logits[M, C]``; the samples of a batch must not interact.
    params: zeta.
    x: inputs [M, ...], floating point.
    chunk_size: samples whose Jacobians are built at once, at least 1; all of them if None. It changes working memory
      and speed, not the result.

  Returns:
    A pytree like ``params`` with leaves ``[M, C, *leaf.shape]``.

  Raises:
    ValueError: ``x`` is no batch of floats, ``chunk_size`` is below 1, or the samples interact (batch norm on batch
      statistics), in which case a per-sample Jacobian does not exist. The last is noticed outside of jit and vmap only.

  >>> import jax.numpy as jnp
  >>> jacobians = per_sample_jacobians(lambda w, x: x @ w, jnp.ones((2, 3)), jnp.array([[5.0, 7.0]]))
  >>> jacobians.shape
  (1, 3, 2, 3)
  >>> print(jacobians[0, 1])  # the gradient of logit 1: x in column 1
  [[0. 5. 0.]
   [0. 7. 0.]]
  """
  x = jnp.asarray(x)
  _checks.check_batch("x", x)
  _checks.check_all_floating("params", params)
  if chunk_size is not None:
    _checks.check_at_least("chunk_size", chunk_size, 1)
  alone = apply_fn(params, x[:1])[0]
  together = apply_fn(params, jnp.concatenate([x[:1], x[-1:] + 1]))[0]
  size = jnp.maximum(jnp.max(jnp.abs(alone)), jnp.max(jnp.abs(together)))
  if _checks.concrete(jnp.any(jnp.abs(alone - together) > 1e-3 * size)):
    raise ValueError(
      "apply_fn must treat the samples of a batch independently; its logits change with the rest of the batch"
      " (batch norm on batch statistics?). Use kkt_jax.kkt.stationarity_sum, which differentiates through"
      " the batch, or an apply_fn with stored statistics."
    )

  jacobian = jax.jacrev(lambda p, x_i: apply_fn(p, x_i[None])[0])
  if chunk_size is None:
    return jax.vmap(jacobian, in_axes=(None, 0))(params, x)
  return jax.lax.map(lambda x_i: jacobian(params, x_i), x, batch_size=min(chunk_size, x.shape[0]))
