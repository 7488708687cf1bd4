"""Fig. 3: the rates Lambda of Linear(2, 10)-ReLU-Linear(10, 1), solved from its derivative equations.

Solves Lambda by least squares with each rule of selection, prints its rank, null space and groups of parameters, and
plots Phi(x; e^(alpha Lambda) zeta) (solid) over e^alpha Phi(x; zeta) (dotted) for several inputs. They coincide exactly
when the estimate is right.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from experiments import common, figures
from kkt_jax import homogeneity, networks

_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the run; each is a flag of the same name."""

  seed: int = common.flag(0, "Seed of the network and of the inputs.", lower=0)
  hidden: int = common.flag(10, "Width of the hidden layer.", lower=1)
  num_inputs: int = common.flag(20, "K, the number of random inputs whose equations are solved.", lower=1)
  num_curves: int = common.flag(6, "Inputs that are plotted.", lower=1)
  rule: str = common.flag("balanced", "Which solution is plotted; all are printed.", choices=homogeneity.RULES)
  higher_order: bool = common.flag(True, "Add the rows of Eq. 10 for two parameters.")


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Solves, prints, plots; returns the scaling error of each rule and whether the claim holds."""
  out = common.Workdir(workdir, config)
  module = networks.MLPClassifier(num_classes=1, hidden=(config.hidden,))
  init_key, bias_key, input_key, check_key = jax.random.split(jax.random.key(config.seed), 4)
  params = module.init(init_key, jnp.zeros((1, 2)))["params"]
  for layer, key in zip(sorted(params), jax.random.split(bias_key, len(params)), strict=True):
    params[layer]["bias"] = 0.5 * jax.random.normal(key, params[layer]["bias"].shape)  # zero biases would hide theirs

  def apply_fn(params: Any, x: jax.Array) -> Any:
    return module.apply({"params": params}, x)

  chosen = (("Dense_0/kernel", (0, 0)), ("Dense_1/kernel", (0, 0))) if config.higher_order else ()
  x = jax.random.normal(input_key, (config.num_inputs, 2))
  equations = homogeneity.derivative_equations(apply_fn, params, x, higher_order=chosen)
  fresh = jax.random.normal(check_key, (config.num_curves, 2))  # inputs that no equation has seen
  alphas = jnp.linspace(-1.0, 1.0, 41)

  metrics: dict[str, Any] = {}
  for rule in homogeneity.RULES:
    solution = homogeneity.solve_rates(equations, params, rule=rule)
    error = homogeneity.scaling_error(apply_fn, params, solution.rates, fresh, alphas)
    common.say(
      f"\n{rule}: rank {int(solution.rank)}, null space {int(solution.null_space_dimension)},"
      f" residual {float(solution.residual):.1e}, scaling error {float(error):.1e}"
    )
    common.say(homogeneity.groups_table(solution))
    metrics[f"scaling_error_{rule}"] = float(error)
    metrics[f"residual_{rule}"] = float(solution.residual)
    metrics["rank"] = int(solution.rank)
    metrics["null_space_dimension"] = int(solution.null_space_dimension)
    if rule == config.rule:
      scaled = jax.vmap(lambda a, rates: apply_fn(homogeneity.scale_params(params, rates, a), fresh)[:, 0], (0, None))(
        alphas, solution.rates
      )
      expected = jnp.exp(alphas)[:, None] * apply_fn(params, fresh)[None, :, 0]
      figures.scaling_curves(out.path / "fig3.png", alphas, scaled, expected)
  metrics["claim_holds"] = all(metrics[f"scaling_error_{rule}"] <= _TOLERANCE for rule in homogeneity.RULES)
  out.log(0, {name: float(value) for name, value in metrics.items()})
  out.finish(metrics)
  return metrics


if __name__ == "__main__":
  common.main(Config, run)
