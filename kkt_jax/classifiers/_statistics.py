"""Running statistics of batch norm among other variables, recognised by the names that frameworks give them."""

from collections.abc import Mapping
import dataclasses
import re
from typing import Any, Self

from kkt_jax._typing import PyTree

COUNTER = "num_batches_tracked"  # of PyTorch, which no function needs
_BEFORE = ("running_", "moving_", "", "ema_", "stored_", "batch_", "population_", "global_", "bn_")
_PAIRS = [(f"{before}mean", f"{before}{var}") for before in _BEFORE for var in ("var", "variance")]
_PAIRS += [("mean_ema", "var_ema"), ("running_avg", "running_var"), ("moving_avg", "moving_var")]
_USUAL = ("running_mean", "running_var", "moving_mean", "moving_variance", "mean", "var")  # PyTorch, Keras, flax
_KINDS = {name: kind for pair in _PAIRS for name, kind in zip(pair, ("mean", "var"), strict=True)}


def _parts(key: Any) -> tuple[str, str]:
  """The layer and the last part of a name, which a flat tree such as a state_dict joins by dots or slashes."""
  layer, _, last = re.fullmatch(r"(?:(.*)([./]))?([^./]*)", str(key), re.DOTALL).groups(default="")  # type: ignore[union-attr]
  return layer, last


def split(tree: PyTree, keep: frozenset[str] = frozenset({COUNTER})) -> tuple[dict[Any, Any], dict[Any, Any]]:
  """The parameters of a tree of nested mappings, and its running statistics and counters.

  A mean and a variance are statistics if both stand in one layer and neither is a mapping.

  >>> split({"0": {"weight": 1.0}, "1": {"weight": 2.0, "running_mean": 3.0, "running_var": 4.0}})
  ({'0': {'weight': 1.0}, '1': {'weight': 2.0}}, {'1': {'running_mean': 3.0, 'running_var': 4.0}})
  """
  names = {_parts(key) for key, value in tree.items() if not isinstance(value, Mapping)}
  known = {(layer, end) for layer, _ in names for pair in _PAIRS for end in pair if {(layer, p) for p in pair} <= names}
  known |= {name for name in names if name[1] in keep}
  params: dict[Any, Any] = {}
  others: dict[Any, Any] = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      kept, rest = split(value, keep)
      params |= {key: kept} if kept or not value else {}
      others |= {key: rest} if rest else {}
    else:
      (others if _parts(key) in known else params)[key] = value
  return params, others


def merge(params: PyTree, others: PyTree) -> PyTree:
  """What `split` took apart."""
  both = dict(params)
  for key, value in others.items():
    both[key] = merge(both.get(key, {}), value) if isinstance(value, Mapping) else value
  return both


def canonical(statistics: PyTree) -> dict[Any, Any]:
  """Statistics named as in flax, ``{"mean": ..., "var": ...}`` of each layer, without counters.

  Raises:
    ValueError: a name that is none of a mean or a variance.

  >>> canonical({"bn.running_mean": 1.0, "bn.running_var": 2.0, "bn.num_batches_tracked": 3})
  {'bn': {'mean': 1.0, 'var': 2.0}}
  """
  tree: dict[Any, Any] = {}
  for key, value in statistics.items():
    layer, last = _parts(key)
    if isinstance(value, Mapping):
      tree[key] = canonical(value)
    elif last in _KINDS:
      (tree.setdefault(layer, {}) if layer else tree)[_KINDS[last]] = value
    elif last != COUNTER:
      raise ValueError(
        f"batch_stats must hold a mean and a variance of each layer, as {', '.join(map(repr, _USUAL))} are; got"
        f" {key!r}."
      )
  return tree


def names_of(tree: PyTree, before: str = "") -> list[str]:
  """The names of statistics, as `split` gives them, without counters."""
  names = []
  for key, value in tree.items():
    name = f"{before}{key}"
    names += names_of(value, f"{name}/") if isinstance(value, Mapping) else [name]
  return [name for name in names if _parts(name)[1] != COUNTER]


def some_names(tree: PyTree) -> str:
  """The first names of statistics, for messages."""
  names = names_of(tree)
  return ", ".join(map(repr, names[:4])) + (", ..." if len(names) > 4 else "")


def is_variance(key: Any) -> bool:
  """Whether a name is that of a variance."""
  return _KINDS.get(_parts(key)[1]) == "var"


def is_unbiased(key: Any) -> bool:
  """Whether a framework that names a variance so divides by n - 1, as PyTorch does."""
  return _parts(key)[1] == "running_var"


@dataclasses.dataclass(frozen=True)
class Stored:
  """Variables in their parts.

  Attributes:
    params: what was trained.
    statistics: the running ones of batch norm; empty if there are none.
    counters: what else stands among them, such as the number of batches.
    constants: further collections; None if the variables are no collections.
  """

  params: PyTree
  statistics: PyTree
  counters: PyTree
  constants: Mapping[str, PyTree] | None

  @classmethod
  def of(cls, variables: PyTree) -> Self:
    """The parts of collections with "params", or of parameters among which running statistics may stand."""
    params, statistics, constants = variables, {}, None
    if isinstance(variables, Mapping) and "params" in variables:
      constants = {name: tree for name, tree in variables.items() if name != "params"}
      params, statistics = variables["params"], constants.pop("batch_stats", {})
    elif isinstance(variables, Mapping) and split(variables)[1]:
      params, statistics = split(variables)
    counters, running = split(statistics, frozenset())
    return cls(params, running, counters, constants)

  def params_of(self, variables: PyTree) -> PyTree:
    """The parameters among other variables of the same kind."""
    if self.constants is not None:
      return variables["params"]
    return split(variables)[0] if self.statistics else variables

  def whole(self, params: PyTree, statistics: PyTree) -> PyTree:
    """All variables, with other parameters and running statistics."""
    stored = merge(self.counters, statistics)
    if self.constants is None:
      return merge(params, stored) if stored else params
    return {**self.constants, **({"batch_stats": stored} if stored else {}), "params": params}
