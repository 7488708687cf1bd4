"""The paper's conditions as pure functions: rates, stationarity, duality, multipliers; and descent to a KKT point.

Needs jax, numpy, scipy and optax only. Multipliers have names that need their module, `kkt_jax.kkt.multipliers`.
"""

from kkt_jax.kkt import multipliers
from kkt_jax.kkt.conditions import Conditions, max_margin_conditions, weigh_tensors, weight_decay_conditions
from kkt_jax.kkt.diagnostics import diagnose, Diagnosis
from kkt_jax.kkt.homogeneity import derivative_equations, DerivativeEquations, scale_params, scaling_error
from kkt_jax.kkt.jacobians import per_sample_jacobians
from kkt_jax.kkt.losses import (
  cosine_distance,
  duality_loss,
  margins,
  relative_residual,
  stationarity_residual,
  stationarity_sum,
)
from kkt_jax.kkt.pretrain import gradient_descent
from kkt_jax.kkt.rates import (
  balanced,
  given_rates,
  groups_table,
  last_layer,
  least_norm,
  parameter_groups,
  RateSolution,
  RULES,
)
from kkt_jax.kkt.symmetries import least_residual

__all__ = ["Conditions", "DerivativeEquations", "Diagnosis", "RULES", "RateSolution", "balanced", "cosine_distance"]
__all__ += ["derivative_equations", "diagnose", "duality_loss", "given_rates", "gradient_descent", "groups_table"]
__all__ += ["last_layer", "least_norm", "least_residual", "margins", "max_margin_conditions", "multipliers"]
__all__ += ["parameter_groups", "per_sample_jacobians", "relative_residual", "scale_params"]
__all__ += ["scaling_error", "stationarity_residual", "stationarity_sum", "weigh_tensors", "weight_decay_conditions"]
