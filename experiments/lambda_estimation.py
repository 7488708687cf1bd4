"""Fig. 3: the rates Lambda of Linear(2, 10)-ReLU-Linear(10, 1), solved from its derivative equations.

Solves Lambda by least squares under each rule, shows its rank, null space and groups of parameters, and plots
Phi(x; e^(alpha Lambda) zeta) (solid) over e^alpha Phi(x; zeta) (dotted) for several inputs. They coincide exactly when
the estimate is right.
"""

from collections.abc import Mapping
import dataclasses
import functools
import pathlib
from typing import Any

from kkt_jax.cli import flags
from kkt_jax.cli.workdir import Workdir

_TOLERANCE = 1e-3  # single precision, where the ratio of logits that are almost 0 shows rounding errors


@dataclasses.dataclass(frozen=True)
class Config(flags.Checked):
  """Settings of the run; each is a flag of the same name."""

  seed: int = flags.flag(0, "Seed of the network and of the inputs.", lower=0)
  hidden: int = flags.flag(10, "Width of the hidden layer.", lower=1, upper=100_000)
  num_inputs: int = flags.flag(20, "K, the number of random inputs whose equations are solved.", lower=1, upper=100_000)
  num_curves: int = flags.flag(6, "Inputs that are plotted.", lower=1, upper=100)
  rule: str = flags.flag(
    "balanced", "Whose solution is plotted; all are shown.", choices=("balanced", "least_norm", "last_layer")
  )
  higher_order: bool = flags.flag(True, "Add the rows of Eq. 10 for two parameters.")


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Solves and plots; returns the scaling error of each rule and whether the claim holds."""
  import jax
  import jax.numpy as jnp

  from experiments.measure import pictures
  from kkt_jax import kkt

  out = Workdir(workdir, config)
  keys = iter(jax.random.split(jax.random.key(config.seed), 6))
  shapes = {"first": (2, config.hidden), "last": (config.hidden, 1)}
  params = {
    layer: {
      "kernel": (2 / shape[0]) ** 0.5 * jax.random.normal(next(keys), shape),
      "bias": 0.5 * jax.random.normal(next(keys), shape[1:]),
    }
    for layer, shape in shapes.items()
  }

  def apply_fn(params: Any, x: jax.Array) -> jax.Array:
    first, last = params["first"], params["last"]
    return jax.nn.relu(x @ first["kernel"] + first["bias"][None]) @ last["kernel"] + last["bias"][None]

  chosen = (("first/kernel", (0, 0)), ("last/kernel", (0, 0))) if config.higher_order else ()
  x = jax.random.normal(next(keys), (config.num_inputs, 2))
  equations = kkt.derivative_equations(apply_fn, params, x, higher_order=chosen)
  fresh = jax.random.normal(next(keys), (config.num_curves, 2))  # inputs that no equation has seen
  alphas = jnp.linspace(-1.0, 1.0, 41)
  rules: dict[str, Any] = {**kkt.RULES, "last_layer": functools.partial(kkt.last_layer, layer="last")}

  metrics: dict[str, Any] = {}
  summary = []
  for rule, solve in rules.items():
    solution = solve(equations, params)
    error = kkt.scaling_error(apply_fn, params, solution.rates, fresh, alphas)
    metrics |= {f"scaling_error_{rule}": float(error), f"residual_{rule}": float(solution.residual)}
    metrics |= {"rank": int(solution.rank), "null_space_dimension": int(solution.null_space_dimension)}
    summary.append(
      f"{rule}: rank {metrics['rank']}, null space {metrics['null_space_dimension']},"
      f" residual {float(solution.residual):.1e}, scaling error {float(error):.1e}\n" + kkt.groups_table(solution)
    )
    if rule == config.rule:
      scale = functools.partial(kkt.scale_params, params, solution.rates)
      scaled = jax.vmap(lambda alpha, scale=scale: apply_fn(scale(alpha), fresh)[:, 0])(alphas)
      expected = jnp.exp(alphas)[:, None] * apply_fn(params, fresh)[None, :, 0]
      pictures.scaling_curves(out.path / "fig3.png", alphas, scaled, expected)
  metrics["claim_holds"] = all(metrics[f"scaling_error_{rule}"] <= _TOLERANCE for rule in rules)
  metrics |= {"summary": "\n\n".join(summary), "pictures": ["fig3.png"]}
  out.finish(metrics)
  return metrics


if __name__ == "__main__":
  flags.main(Config, run)
