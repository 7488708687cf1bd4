"""The paper's conditions as pure functions: rates, stationarity, duality, multipliers; and descent to a KKT point."""

from kkt_jax.kkt.conditions import Conditions, max_margin_conditions, weight_decay_conditions
from kkt_jax.kkt.diagnostics import diagnose, Diagnosis
from kkt_jax.kkt.homogeneity import balanced, derivative_equations, DerivativeEquations, least_norm, RateSolution
from kkt_jax.kkt.jacobians import per_sample_jacobians
from kkt_jax.kkt.losses import cosine_distance, duality_loss, margins, stationarity_residual, stationarity_sum
from kkt_jax.kkt.pretrain import gradient_descent
from kkt_jax.kkt.symmetries import least_residual

__all__ = [
  "Conditions",
  "DerivativeEquations",
  "Diagnosis",
  "RateSolution",
  "balanced",
  "cosine_distance",
  "derivative_equations",
  "diagnose",
  "duality_loss",
  "gradient_descent",
  "least_norm",
  "least_residual",
  "margins",
  "max_margin_conditions",
  "per_sample_jacobians",
  "stationarity_residual",
  "stationarity_sum",
  "weight_decay_conditions",
]
