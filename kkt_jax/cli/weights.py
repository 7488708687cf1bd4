"""The flag ``--weights``: other weights of terms of the loss."""

import kkt_jax
from kkt_jax.cli.flags import UsageError


def parse_weights(text: str) -> dict[str, float]:
  """Weights of terms by name.

  >>> parse_weights("stationarity=0, duality=2.5")
  {'stationarity': 0.0, 'duality': 2.5}
  """
  weights = {}
  for part in filter(None, (part.strip() for part in text.split(","))):
    name, _, value = part.partition("=")
    try:
      weights[name] = float(value)
    except ValueError as error:
      raise UsageError(f"--weights must be name=number, separated by commas; got {part!r}.") from error
    if not 0 <= weights[name] < float("inf"):
      raise UsageError(f"--weights must be finite and at least 0; got {part!r}.")
  return weights


def with_weights(recipe: "kkt_jax.Recipe", text: str) -> "kkt_jax.Recipe":
  """The recipe with the weights of the flag ``--weights``."""
  try:
    return recipe.with_weights(**parse_weights(text))
  except ValueError as error:
    raise UsageError(f"--weights: {error}") from error
