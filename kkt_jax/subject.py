"""From a flax module, or any function, to a `Classifier`.

`from_linen` and `from_nnx` take a module with its numbers. A `Subject` is the same description without the numbers,
for those who read them from a file (`kkt_jax.weights`).
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import inspect
from typing import Any, Self

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kkt_jax.classifier import (
  ApplyFn,
  Classifier,
  Evaluation,
  lifted_logits,
  make_classifier,
  PyTree,
  result_shape,
  two_logits,
)


@dataclasses.dataclass(frozen=True)
class Subject:
  """A classifier without its numbers.

  Attributes:
    apply_fn: ``(variables, x[M, *input_shape]) -> logits[M, C]`` at inference, where samples do not interact; [M, 1] or
      [M] for two classes told apart by one logit. Whatever preprocessing the inputs go through belongs into this
      function.
    init_fn: ``() -> variables``, a tree of nested dicts with the names and shapes of what is stored; only the shapes
      are looked at. Either the parameters alone, or ``{"params": ..., ...}`` with constants beside them; with batch
      norm these are ``"batch_stats"``.
    input_shape: shape of one input.
    value_range: least and greatest value of an input; None if unbounded.
    train_fn: with batch norm: ``(variables, x) -> (logits, batch_stats)`` as in training: normalised by the batch, with
      the running averages that follow it; or ``(logits, batch_stats, features)``, the latter those of ``features_fn``
      in training. None without batch norm.
    features_fn: ``(variables, x) -> [M, F]``; see `kkt_jax.classifier.Classifier`.
    offset: the constant [*input_shape] that ``apply_fn`` subtracts from its inputs, such as the mean image, if known.
    weight_decay: the strength of the weight decay in training, if known.
  """

  apply_fn: ApplyFn
  init_fn: Callable[[], PyTree]
  input_shape: Sequence[int]
  value_range: tuple[float, float] | None = (0.0, 1.0)
  train_fn: Callable[[PyTree, jax.Array], tuple[Any, ...]] | None = None
  features_fn: ApplyFn | None = None
  offset: ArrayLike | None = None
  weight_decay: float | None = None

  def variables_like(self) -> PyTree:
    """The shapes of the variables, without any memory for them."""
    return jax.eval_shape(self.init_fn)

  @property
  def num_classes(self) -> int:
    """C, the number of classes: that of the logits, and two for one logit."""
    return result_shape("apply_fn", two_logits(self.apply_fn), self.variables_like(), self.input_shape).shape[1]

  def classifier(
    self, variables: PyTree, labels: Sequence[int] | None = None, *, initial: PyTree | None = None
  ) -> Classifier:
    """The classifier with these numbers.

    Args:
      variables: the stored values, a tree like the result of ``init_fn``.
      labels: the label of each output; 0..C-1 if None.
      initial: the variables from which it was trained, a tree like ``variables``, if known.

    Returns:
      A `Classifier`.

    Raises:
      ValueError: ``variables`` lack "params" or "batch_stats", or see `kkt_jax.classifier.make_classifier`.
    """
    train_fn, collections = self.train_fn, isinstance(variables, Mapping) and "params" in variables
    if train_fn is not None and not (collections and "batch_stats" in variables):
      got = sorted(map(str, variables)) if isinstance(variables, Mapping) else type(variables).__name__
      raise ValueError(f"variables must hold 'params' and 'batch_stats' of a classifier with batch norm; got {got}.")

    def with_constants(function: Callable[[PyTree, jax.Array], Any]) -> Callable[[PyTree, jax.Array], Any]:
      if not collections:
        return function
      constants = {name: tree for name, tree in variables.items() if name != "params"}
      return lambda params, x: function({**constants, "params": params}, x)

    predict_fn = with_constants(self.apply_fn)
    classifier = make_classifier(
      predict_fn if train_fn is None else with_constants(lambda variables, x: train_fn(variables, x)[0]),
      variables["params"] if collections else variables,
      self.input_shape,
      labels=labels,
      predict_fn=predict_fn,
      batch_coupled=train_fn is not None,
      offset=self.offset,
      value_range=self.value_range,
      weight_decay=self.weight_decay,
      initial_params=initial["params"] if collections and initial is not None else initial,
    )
    found: dict[str, Any] = {}
    features_fn = self.features_fn and with_constants(self.features_fn)
    if features_fn is not None and _feeds_last_layer(features_fn, classifier):
      found |= {"features_fn": features_fn, "evaluate_fn": None}
    if train_fn is not None:
      whole = _evaluate_fn(train_fn, variables, self.input_shape)
      own = with_constants(lambda variables, x: whole(variables, x).statistics)
      found |= {"statistics_fn": own, "statistics": variables["batch_stats"]}
      if "features_fn" not in found or len(jax.eval_shape(train_fn, variables, jnp.zeros((2, *self.input_shape)))) == 3:
        found["evaluate_fn"] = with_constants(whole)
    return dataclasses.replace(classifier, **found)

  @classmethod
  def from_linen(
    cls,
    module: nn.Module,
    *,
    input_shape: Sequence[int],
    value_range: tuple[float, float] | None = (0.0, 1.0),
    train_argument: str = "train",
    offset: ArrayLike | None = None,
    weight_decay: float | None = None,
  ) -> Self:
    """The subject that a flax linen module is.

    Args:
      module: called as ``module(x)``, or if it takes ``train_argument`` as ``module(x, train=False)``.
      input_shape: shape of one input.
      value_range: least and greatest value of an input; None if unbounded.
      train_argument: the name of the argument that switches batch norm to the statistics of the batch.
      offset: subtracted from every input before the module sees it; nothing if None.
      weight_decay: the strength of the weight decay in training, if known.

    Returns:
      The `Subject`. Modules that have nothing but parameters are stored as these alone, others as the collections
      ``{"params": ..., "batch_stats": ...}``.

    >>> subject = Subject.from_linen(nn.Dense(3), input_shape=(2,))
    >>> subject.num_classes, subject.variables_like()["kernel"].shape
    (3, (2, 3))
    """
    apply: Any = module.apply
    switchable = train_argument in inspect.signature(type(module).__call__).parameters
    mode = lambda train: {train_argument: train} if switchable else {}

    def init(_: None, x: jax.Array) -> dict[str, PyTree]:
      return dict(module.init(jax.random.key(0), x, **mode(False)))

    collections = result_shape("module", init, None, input_shape)
    bare = set(collections) == {"params"}

    def init_fn() -> PyTree:
      variables = init(None, jnp.zeros((1, *input_shape)))
      return variables["params"] if bare else variables

    def run(variables: PyTree, x: jax.Array, *, train: bool = False, **settings: Any) -> Any:
      collections = {"params": variables} if bare else variables
      return apply(collections, _shifted(x, offset), **mode(train), **settings)

    def observed(variables: PyTree, x: jax.Array, **settings: Any) -> tuple[jax.Array, PyTree, jax.Array]:
      order = []

      def is_norm(module: nn.Module, _: str) -> bool:
        order.extend([module.path] if isinstance(module, nn.BatchNorm) else [])
        return isinstance(module, nn.BatchNorm)

      logits, changed = run(variables, x, capture_intermediates=is_norm, **settings)
      outputs = changed["intermediates"]
      for name in order[-1]:
        outputs = outputs[name]
      return logits, changed.get("batch_stats"), outputs["__call__"][-1]

    def train_fn(variables: PyTree, x: jax.Array) -> tuple[jax.Array, PyTree, jax.Array]:
      return observed(variables, x, train=True, mutable=["batch_stats"])

    def features_fn(variables: PyTree, x: jax.Array) -> jax.Array:
      return observed(variables, x)[2]

    normalised = "batch_stats" in collections
    return cls(
      run,
      init_fn,
      input_shape,
      value_range=value_range,
      train_fn=train_fn if normalised else None,
      features_fn=features_fn if normalised else None,
      offset=offset,
      weight_decay=weight_decay,
    )

  @classmethod
  def from_nnx(
    cls,
    make: Callable[[nnx.Rngs], nnx.Module],
    *,
    input_shape: Sequence[int],
    value_range: tuple[float, float] | None = (0.0, 1.0),
    offset: ArrayLike | None = None,
    weight_decay: float | None = None,
  ) -> Self:
    """The subject that a flax nnx module is.

    Args:
      make: builds the module, which is called as ``module(x)``; batch norm follows ``module.train()`` and ``.eval()``.
      input_shape: shape of one input.
      value_range: least and greatest value of an input; None if unbounded.
      offset: subtracted from every input before the module sees it; nothing if None.
      weight_decay: the strength of the weight decay in training, if known.

    Returns:
      The `Subject`, stored as `flax.nnx.to_pure_dict` of its parameters, or with batch norm as
      ``{"params": ..., "batch_stats": ...}`` of such.

    >>> subject = Subject.from_nnx(lambda rngs: nnx.Linear(2, 3, rngs=rngs), input_shape=(2,))
    >>> subject.num_classes, subject.variables_like()["kernel"].shape
    (3, (2, 3))
    """

    def parts() -> tuple[Any, ...]:
      return nnx.split(make(nnx.Rngs(0)), nnx.Param, nnx.BatchStat, ...)

    def init_fn() -> PyTree:
      _, params, averages, _ = parts()
      stored, batch_stats = nnx.to_pure_dict(params), nnx.to_pure_dict(averages)
      return {"params": stored, "batch_stats": batch_stats} if batch_stats else stored

    normalised = "batch_stats" in jax.eval_shape(init_fn)

    def run(variables: PyTree, x: jax.Array, *, train: bool = False) -> tuple[jax.Array, PyTree]:
      graph, params, averages, others = parts()
      nnx.replace_by_pure_dict(params, variables["params"] if normalised else variables)
      if normalised:
        nnx.replace_by_pure_dict(averages, variables["batch_stats"])
      module = nnx.merge(graph, params, averages, others)
      (module.train if train else module.eval)()
      return module(_shifted(x, offset)), nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

    return cls(
      lambda variables, x: run(variables, x)[0],
      init_fn,
      input_shape,
      value_range=value_range,
      train_fn=(lambda variables, x: run(variables, x, train=True)) if normalised else None,
      offset=offset,
      weight_decay=weight_decay,
    )


def from_linen(
  module: nn.Module, variables: PyTree, *, input_shape: Sequence[int], labels: Sequence[int] | None = None, **known: Any
) -> Classifier:
  """A `Classifier` from a flax linen module and its variables.

  Args:
    module: see `Subject.from_linen`.
    variables: ``{"params": ..., "batch_stats": ...}``, the latter with batch norm only.
    input_shape: shape of one input.
    labels: the label of each output; 0..C-1 if None.
    **known: ``value_range``, ``train_argument``, ``offset`` and ``weight_decay`` of `Subject.from_linen`.

  Returns:
    The `Classifier`.

  Raises:
    ValueError: an argument does not fit; the message names it.

  >>> module = nn.Dense(3)
  >>> from_linen(module, module.init(jax.random.key(0), jnp.zeros((1, 2))), input_shape=(2,)).num_classes
  3
  """
  if "params" not in variables:
    raise ValueError(f"variables must hold 'params'; got {sorted(map(str, variables))}.")
  subject = Subject.from_linen(module, input_shape=input_shape, **known)
  bare = "params" not in subject.variables_like()
  return subject.classifier(variables["params"] if bare else dict(variables), labels)


def from_nnx(
  model: nnx.Module, *, input_shape: Sequence[int], labels: Sequence[int] | None = None, **known: Any
) -> Classifier:
  """A `Classifier` from a flax nnx module with its numbers.

  Args:
    model: see `Subject.from_nnx`; it stays as it is.
    input_shape: shape of one input.
    labels: the label of each output; 0..C-1 if None.
    **known: ``value_range``, ``offset`` and ``weight_decay`` of `Subject.from_nnx`.

  Returns:
    The `Classifier`.

  Raises:
    ValueError: an argument does not fit; the message names it.

  >>> from_nnx(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), input_shape=(2,), labels=(7, 8, 9)).labels
  (7, 8, 9)
  """
  subject = Subject.from_nnx(lambda _: nnx.clone(model), input_shape=input_shape, **known)
  return subject.classifier(subject.init_fn(), labels)


def _shifted(x: jax.Array, offset: ArrayLike | None) -> jax.Array:
  return x if offset is None else x - jnp.asarray(offset, x.dtype)[None]  # in the precision of the inputs


def _evaluate_fn(
  train_fn: Callable[[PyTree, jax.Array], tuple[Any, ...]], variables: PyTree, input_shape: Sequence[int]
) -> Callable[[PyTree, jax.Array], Evaluation]:
  """A pass as in training, with the statistics of the batch, of which running averages hold a share, 1 - momentum."""
  stored = variables["batch_stats"]

  @jax.jit
  def kept() -> PyTree:  # what the next averages keep of a one
    x = jnp.zeros((2, *input_shape))
    filled = [jax.tree.map(lambda leaf, v=v: jnp.full_like(leaf, v), stored) for v in (0.0, 1.0)]
    zeros, ones = (train_fn({**variables, "batch_stats": own}, x)[1] for own in filled)
    return jax.tree.map(lambda zero, one: jnp.mean(one - zero), zeros, ones)

  share = jax.tree.map(lambda part: 1 - float(part), kept())
  if max(jax.tree.leaves(share)) <= 0:
    raise ValueError("train_fn must return running averages that follow the batch; they do not change with it.")

  def evaluate(variables: PyTree, x: jax.Array) -> Evaluation:
    logits, fresh, *features = train_fn({**variables, "batch_stats": jax.tree.map(jnp.zeros_like, stored)}, x)
    statistics = jax.tree.map(lambda leaf, part, own: leaf / part if part > 0 else own, fresh, share, stored)
    return Evaluation(lifted_logits(logits), statistics, *features)

  return evaluate


def _feeds_last_layer(features_fn: ApplyFn, classifier: Classifier) -> bool:
  """Whether the ReLU of features is the last layer's input, which is a logit's gradient by a column of its kernel."""
  x = jax.random.normal(jax.random.key(0), (4, *classifier.input_shape))

  @jax.jit
  def evaluate(params: PyTree) -> tuple[jax.Array, PyTree]:
    first_logit = lambda params: jnp.sum(classifier.predict_fn(params, x)[:, 0])
    return jax.nn.relu(features_fn(params, x)), jax.grad(first_logit)(params)

  rectified, gradient = evaluate(classifier.params)
  if rectified.ndim != 2 or not jnp.any(rectified > 0):
    return False
  wanted = jnp.sum(rectified, axis=0)
  matrices = [leaf for leaf in jax.tree.leaves(gradient) if leaf.ndim == 2]
  columns = [matrix[:, 0] for leaf in matrices for matrix in (leaf, leaf.T)]
  near = lambda column: jnp.max(jnp.abs(column - wanted)) <= 1e-4 * jnp.max(jnp.abs(wanted))
  return any(column.shape == wanted.shape and bool(near(column)) for column in columns)
