"""Anybody's classifier, as its owner describes it: what `experiments.audit` is given.

Three ways lead here: `from_linen` and `from_nnx` for flax modules, and `Subject` itself for plain functions.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kkt_jax import _checks
from kkt_jax.classifier import Classifier, make_classifier, PyTree


@dataclasses.dataclass(frozen=True)
class Subject:
  """What an owner says of a classifier.

  Attributes:
    apply_fn: ``(variables, x[M, *input_shape]) -> logits[M, C]`` at inference, where no samples interact. Inputs are
      as `value_range` says: what else the data go through belongs into this function.
    init_fn: ``() -> variables``, a tree of nested dicts with the names and shapes of what is stored; only the shapes
      are looked at. With batch norm ``{"params": ..., "batch_stats": ...}``, else the parameters alone.
    input_shape: shape of one input.
    num_classes: C.
    value_range: least and greatest value of an input.
    train_fn: with batch norm: ``(variables, x) -> (logits, batch_stats)`` as in training: normalised by the batch, with
      the running averages that follow it. No batch norm where None.
    offset: the constant that ``apply_fn`` subtracts from its inputs, such as the mean image, in units of the inputs,
      [*input_shape]; unknown where None.
  """

  apply_fn: Callable[[PyTree, jax.Array], jax.Array]
  init_fn: Callable[[], PyTree]
  input_shape: Sequence[int]
  num_classes: int
  value_range: tuple[float, float] = (0.0, 1.0)
  train_fn: Callable[[PyTree, jax.Array], tuple[jax.Array, PyTree]] | None = None
  offset: ArrayLike | None = None

  def __post_init__(self) -> None:
    low, high = self.value_range
    if not low < high:
      raise ValueError(f"value_range must be (least, greatest); got {self.value_range}.")
    _checks.check_at_least("num_classes", self.num_classes, 2)

  def variables_like(self) -> PyTree:
    """The shapes of the variables, without any memory for them."""
    return jax.eval_shape(self.init_fn)

  def classifier(self, variables: PyTree) -> Classifier:
    """The classifier of inputs in [0, 1], which `value_range` maps to the subject's own.

    Args:
      variables: the stored values, a tree as of ``init_fn``.

    Returns:
      A `Classifier` with labels 0..C-1.

    Raises:
      ValueError: see `kkt_jax.classifier.make_classifier`.
    """
    low, high = self.value_range
    own = lambda x: low + (high - low) * x
    offset = None if self.offset is None else (jnp.asarray(self.offset) - low) / (high - low)
    labels = range(self.num_classes)
    if self.train_fn is None:
      apply = lambda params, x: self.apply_fn(params, own(x))
      return make_classifier(apply, variables, self.input_shape, labels=labels, offset=offset)
    train_fn, stored = self.train_fn, variables["batch_stats"]
    rest = {name: tree for name, tree in variables.items() if name != "params"}
    share = _share_of_the_batch(train_fn, variables, jnp.zeros((2, *self.input_shape)))

    def statistics(params: PyTree, x: jax.Array) -> PyTree:
      empty = rest | {"params": params, "batch_stats": jax.tree.map(jnp.zeros_like, stored)}
      return jax.tree.map(lambda leaf: leaf / share, train_fn(empty, own(x))[1])

    return make_classifier(
      lambda params, x: train_fn(rest | {"params": params}, own(x))[0],
      variables["params"],
      self.input_shape,
      labels=labels,
      predict_fn=lambda params, x: self.apply_fn(rest | {"params": params}, own(x)),
      batch_coupled=True,
      statistics_fn=statistics,
      statistics=stored,
      offset=offset,
    )


def _share_of_the_batch(train_fn: Callable[..., tuple[jax.Array, PyTree]], variables: PyTree, x: jax.Array) -> float:
  """What share a batch has in the next running averages: 1 - momentum, told from what becomes of ones and of zeros."""
  stored = variables["batch_stats"]
  full = [jax.tree.map(lambda leaf, value=value: jnp.full_like(leaf, value), stored) for value in (0.0, 1.0)]
  averages = [train_fn(variables | {"batch_stats": own}, x)[1] for own in full]
  kept = jax.tree.map(lambda zero, one: jnp.mean(one - zero), *averages)
  share = 1.0 - float(jnp.mean(jnp.stack(jax.tree.leaves(kept))))
  if share <= 0:
    raise ValueError("train_fn must return running averages that follow the batch; they do not change with it.")
  return share


def from_linen(
  module: nn.Module,
  *,
  input_shape: Sequence[int],
  num_classes: int,
  value_range: tuple[float, float] = (0.0, 1.0),
  train_argument: str = "train",
  offset: ArrayLike | None = None,
) -> Subject:
  """A subject from a flax linen module.

  Args:
    module: called as ``module(x)``, or with batch norm as ``module(x, train=False)``.
    input_shape: shape of one input.
    num_classes: C.
    value_range: least and greatest value of an input.
    train_argument: what the argument is called that switches batch norm to the statistics of the batch.
    offset: what the module subtracts from its inputs, if known.

  Returns:
    The `Subject`. Modules without batch norm are stored as their parameters alone, those with it as
    ``{"params": ..., "batch_stats": ...}``.

  >>> subject = from_linen(nn.Dense(3), input_shape=(2,), num_classes=3)
  >>> {name: leaf.shape for name, leaf in subject.variables_like().items()} == {"kernel": (2, 3), "bias": (3,)}
  True
  """
  probe = jnp.zeros((1, *input_shape))
  shapes: Any = jax.eval_shape(lambda: module.init(jax.random.key(0), probe))
  apply: Any = module.apply
  described: dict[str, Any] = {
    "input_shape": input_shape,
    "num_classes": num_classes,
    "value_range": value_range,
    "offset": offset,
  }
  if "batch_stats" not in shapes:
    return Subject(
      apply_fn=lambda params, x: apply({"params": params}, x),
      init_fn=lambda: module.init(jax.random.key(0), probe)["params"],
      **described,
    )

  def train_fn(variables: PyTree, x: jax.Array) -> tuple[jax.Array, PyTree]:
    logits, updated = apply(variables, x, mutable=["batch_stats"], **{train_argument: True})
    return logits, updated["batch_stats"]

  return Subject(
    apply_fn=lambda variables, x: apply(variables, x, **{train_argument: False}),
    init_fn=lambda: dict(module.init(jax.random.key(0), probe)),
    train_fn=train_fn,
    **described,
  )


def from_nnx(
  make: Callable[[nnx.Rngs], nnx.Module],
  *,
  input_shape: Sequence[int],
  num_classes: int,
  value_range: tuple[float, float] = (0.0, 1.0),
  offset: ArrayLike | None = None,
) -> Subject:
  """A subject from a flax nnx module.

  Args:
    make: builds the module, which is called as ``module(x)``; batch norm follows ``module.train()`` and ``.eval()``.
    input_shape: shape of one input.
    num_classes: C.
    value_range: least and greatest value of an input.
    offset: what the module subtracts from its inputs, if known.

  Returns:
    The `Subject`, stored as `flax.nnx.to_pure_dict` of its parameters, or with batch norm as
    ``{"params": ..., "batch_stats": ...}`` of such.

  >>> subject = from_nnx(lambda rngs: nnx.Linear(2, 3, rngs=rngs), input_shape=(2,), num_classes=3)
  >>> subject.variables_like()["kernel"].shape
  (2, 3)
  """

  def parts() -> tuple[Any, ...]:
    return nnx.split(make(nnx.Rngs(0)), nnx.Param, nnx.BatchStat, ...)

  def init_fn() -> PyTree:
    _, params, averages, _ = parts()
    stored, batch_stats = nnx.to_pure_dict(params), nnx.to_pure_dict(averages)
    return {"params": stored, "batch_stats": batch_stats} if batch_stats else stored

  normalised = "batch_stats" in jax.eval_shape(init_fn)

  def run(variables: PyTree, x: jax.Array, *, train: bool) -> tuple[jax.Array, PyTree]:
    graph, params, averages, others = parts()
    nnx.replace_by_pure_dict(params, variables["params"] if normalised else variables)
    if normalised:
      nnx.replace_by_pure_dict(averages, variables["batch_stats"])
    module = nnx.merge(graph, params, averages, others)
    (module.train if train else module.eval)()
    logits = module(x)
    return logits, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

  return Subject(
    apply_fn=lambda variables, x: run(variables, x, train=False)[0],
    init_fn=init_fn,
    train_fn=(lambda variables, x: run(variables, x, train=True)) if normalised else None,
    input_shape=input_shape,
    num_classes=num_classes,
    value_range=value_range,
    offset=offset,
  )
