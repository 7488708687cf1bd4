"""The strength of weight decay: one for all tensors, or one for each."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from kkt_jax import _checks
from kkt_jax._typing import PyTree

# The strength of weight decay: one for all tensors, a tree of strengths like the parameters, or a function of the names
# that `kkt_jax.tensor_names` gives; 0 where there is none.
DecayLike = float | PyTree | Callable[[str], float]


class WeightDecay(float):
  """Strengths of weight decay that differ from tensor to tensor; as a number, the greatest.

  Attributes:
    strengths: of every tensor, in the order of the leaves.

  >>> decay = WeightDecay((0.0, 0.01))
  >>> float(decay), decay.strengths, decay == WeightDecay((0.01, 0.01))
  (0.01, (0.0, 0.01), False)
  """

  strengths: tuple[float, ...]

  def __new__(cls, strengths: Sequence[float]) -> Self:
    """The strengths in the order of the leaves."""
    decay = super().__new__(cls, max(strengths))
    decay.strengths = tuple(map(float, strengths))
    return decay

  def __eq__(self, other: object) -> bool:
    """Only those of the same strengths are equal, which jit needs to know."""
    return isinstance(other, WeightDecay) and self.strengths == other.strengths

  def __hash__(self) -> int:
    """That of the strengths."""
    return hash(self.strengths)

  def __reduce__(self) -> tuple[Any, ...]:
    """For copies and pickles."""
    return WeightDecay, (self.strengths,)


def decay_of_tensors(weight_decay: DecayLike, params: PyTree) -> PyTree:
  """The strength of weight decay of every tensor, a tree of scalars like the parameters.

  Raises:
    ValueError: a strength is negative, not finite or no scalar, or none is positive.

  >>> decay_of_tensors(lambda name: 0.1 if name.endswith("kernel") else 0.0, {"kernel": 1.0, "bias": 2.0})
  {'bias': 0.0, 'kernel': 0.1}
  """
  leaves, structure = jax.tree_util.tree_flatten_with_path(params)
  names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
  alike: Any = jax.tree.structure(weight_decay)
  if isinstance(weight_decay, WeightDecay):
    strengths: list[Any] = list(weight_decay.strengths)
  elif callable(weight_decay):
    strengths = [weight_decay(name) for name in names]
  elif _is_number(weight_decay):
    _checks.check_positive("weight_decay", weight_decay)
    strengths = [weight_decay] * len(names)
  elif alike == structure:
    strengths = jax.tree.leaves(weight_decay)
  else:
    strengths = []
  if len(strengths) != len(names) or not all(map(_is_number, strengths)):
    raise ValueError(
      "weight_decay must be a number, a tree of numbers like params, or a function of the names of tensors, such as"
      f" {names[0]!r}; got {next((value for value in strengths if not _is_number(value)), weight_decay)!r}."
    )
  for name, value in zip(names, strengths, strict=True):
    if _checks.concrete((value >= 0) & (value < np.inf)) is False:
      raise ValueError(f"weight_decay must be positive and finite, or 0 where there is none; got {value} for {name!r}.")
  if all(_checks.concrete(value > 0) is False for value in strengths):
    raise ValueError(f"weight_decay must be positive and finite, at least of one tensor; got {weight_decay!r}.")
  return jax.tree.unflatten(structure, strengths)


def _is_number(value: Any) -> bool:
  """Whether it is a real number, which strings, None and truth values are not."""
  if isinstance(value, bool | str | Mapping | Sequence | None):
    return False
  return _checks.is_numbers(value) and jnp.ndim(value) == 0
