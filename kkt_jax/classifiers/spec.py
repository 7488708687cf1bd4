"""From a flax module, or any function, to a `Classifier`.

`from_linen` and `from_nnx` take a module with its numbers. A `Subject` is the same description without the numbers,
for those who read them from a file (`kkt_jax.classifiers.files`).
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import inspect
import logging
from typing import Any, Self

from flax import errors, nnx
from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kkt_jax.classifiers import _statistics
from kkt_jax.classifiers.classifier import (
  ApplyFn,
  Classifier,
  DecayLike,
  Evaluation,
  lifted_logits,
  make_classifier,
  PyTree,
  result_shape,
  two_logits,
)

_APART = (
  0.05  # greatest difference of logits in training and at inference with the same statistics, of the greatest logit
)

# The usual names of what switches a module from inference to training, and what they are in training.
_SWITCHES = {"train": True, "training": True, "is_training": True, "deterministic": False, "use_running_average": False}


@dataclasses.dataclass(frozen=True)
class Subject:
  """A classifier without its numbers.

  Attributes:
    apply_fn: ``(variables, x[M, *input_shape]) -> logits[M, C]`` at inference, where samples do not interact; [M, 1] or
      [M] for two classes told apart by one logit. Whatever preprocessing the inputs go through belongs into this
      function.
    init_fn: ``() -> variables``, a tree of nested dicts with the names and shapes of what is stored; only the shapes
      are looked at. Either the parameters alone, or ``{"params": ..., ...}`` with constants beside them; with batch
      norm these are ``"batch_stats"``. Without ``"params"``, running statistics may stand among the parameters as in a
      PyTorch state_dict: they are recognised in pairs of ``running_mean`` and ``running_var``, ``moving_mean`` and
      ``moving_variance``, or ``mean`` and ``var``, and ``num_batches_tracked`` is passed over.
    input_shape: shape of one input.
    value_range: least and greatest value of an input; None if unbounded.
    train_fn: with batch norm: ``(variables, x) -> (logits, batch_stats)`` as in training, but without dropout or other
      noise: normalised by the batch, with the running averages that follow it, or all variables with these; or
      ``(logits, batch_stats, features)``, the latter those of ``features_fn`` in training. None without batch norm.
      Averaged variances are unbiased if they are so in the framework that trained: PyTorch divides them by n - 1, flax
      and Keras by n.
    features_fn: ``(variables, x) -> [M, F]``; see `kkt_jax.classifiers.Classifier`.
    offset: the constant [*input_shape] that ``apply_fn`` subtracts from its inputs, such as the mean image, if known.
    weight_decay: the strength of the weight decay in training, if known: a number, a tree of numbers like the
      parameters, or a function of the names of tensors; see `kkt_jax.classifiers.Classifier`.
  """

  apply_fn: ApplyFn
  init_fn: Callable[[], PyTree]
  input_shape: Sequence[int]
  value_range: tuple[float, float] | None = (0.0, 1.0)
  train_fn: Callable[[PyTree, jax.Array], tuple[Any, ...]] | None = None
  features_fn: ApplyFn | None = None
  offset: ArrayLike | None = None
  weight_decay: DecayLike | None = None

  def __post_init__(self) -> None:
    """Refuses what cannot be called."""
    for name in ("apply_fn", "init_fn"):
      if not callable(getattr(self, name)):
        raise ValueError(f"{name} must be a function; got a {type(getattr(self, name)).__name__}.")

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
      ValueError: ``variables`` lack "params" or "batch_stats", or hold running statistics without a ``train_fn``, or
        one that is not ``apply_fn`` with the statistics of the batch; or see `kkt_jax.classifiers.make_classifier`.
    """
    train_fn, params = self.train_fn, variables
    statistics: PyTree = {}
    constants: PyTree = {}
    collections = isinstance(variables, Mapping) and "params" in variables
    if collections:
      constants = {name: tree for name, tree in variables.items() if name != "params"}
      params, statistics = variables["params"], constants.pop("batch_stats", {})
    elif isinstance(variables, Mapping) and _statistics.split(variables)[1]:
      params, statistics = _statistics.split(variables)
    if train_fn is not None:
      _statistics.canonical(statistics)
    counters, statistics = _statistics.split(statistics, frozenset())
    if train_fn is not None and not statistics:
      got = sorted(map(str, variables)) if isinstance(variables, Mapping) else type(variables).__name__
      raise ValueError(f"variables must hold 'params' and 'batch_stats' of a classifier with batch norm; got {got}.")
    if train_fn is None and statistics:
      raise ValueError(
        f"train_fn must be given for the batch norm whose running statistics are {_statistics.some_names(statistics)}:"
        ' see docs/audit.md. If they were frozen in training, store them as {"params": ..., "constants": ...}.'
      )

    def whole(params: PyTree, statistics: PyTree) -> PyTree:
      own = _statistics.merge(counters, statistics)
      if not collections:
        return _statistics.merge(params, own) if own else params
      return {**constants, **({"batch_stats": own} if own else {}), "params": params}

    def train(params: PyTree, statistics: PyTree, x: jax.Array) -> tuple[Any, ...]:
      assert train_fn is not None
      logits, changed, *features = train_fn(whole(params, statistics), x)
      fresh = _statistics.split(changed, frozenset())[1] if isinstance(changed, Mapping) else changed
      needed: Any = jax.tree.structure(statistics)
      if jax.tree.structure(fresh) != needed:
        raise ValueError(
          "train_fn must return (logits, batch_stats), the latter a tree like"
          f" {_statistics.some_names(statistics)}; got {type(changed).__name__} {jax.tree.structure(changed)}."
        )
      return lifted_logits(logits), fresh, *features

    with_stored = lambda function: lambda params, x: function(whole(params, statistics), x)
    predict_fn = with_stored(self.apply_fn)
    if initial is not None:
      initial = initial["params"] if collections else _statistics.split(initial)[0] if statistics else initial
    classifier = make_classifier(
      predict_fn if train_fn is None else lambda params, x: train(params, statistics, x)[0],
      params,
      self.input_shape,
      labels=labels,
      predict_fn=predict_fn,
      batch_coupled=train_fn is not None,
      offset=self.offset,
      value_range=self.value_range,
      weight_decay=self.weight_decay,
      initial_params=initial,
    )
    found: dict[str, Any] = {}
    features_fn = self.features_fn and with_stored(self.features_fn)
    if features_fn is not None and _feeds_last_layer(features_fn, classifier):
      found |= {"features_fn": features_fn, "evaluate_fn": None}
    if train_fn is not None:
      evaluate = _evaluate_fn(train, params, statistics, self.input_shape)
      if train_fn.__module__ != __name__:  # that of a module is the same function by construction
        inference = two_logits(self.apply_fn)
        _check_train_fn(evaluate, lambda own, held, x: inference(whole(own, held), x), classifier, statistics)

      def of_batch(params: PyTree, x: jax.Array) -> Evaluation:
        found = evaluate(params, x)
        return found._replace(statistics=_statistics.canonical(found.statistics))

      found["statistics_fn"] = lambda params, x: of_batch(params, x).statistics
      found["statistics"] = _statistics.canonical(statistics)
      parts = jax.eval_shape(train, params, statistics, jnp.zeros((2, *self.input_shape)))
      if "features_fn" not in found or len(parts) == 3:
        found["evaluate_fn"] = of_batch
    return dataclasses.replace(classifier, **found)

  @classmethod
  def from_linen(
    cls,
    module: nn.Module,
    *,
    input_shape: Sequence[int],
    value_range: tuple[float, float] | None = (0.0, 1.0),
    train_argument: str | None = None,
    offset: ArrayLike | None = None,
    weight_decay: DecayLike | None = None,
  ) -> Self:
    """The subject that a flax linen module is.

    Args:
      module: called as ``module(x)``, or if it has such a switch as ``module(x, train=False)``. `flax.linen.Dropout` in
        it is never on.
      input_shape: shape of one input.
      value_range: least and greatest value of an input; None if unbounded.
      train_argument: the name of the argument or attribute that switches the module to training. If None, those of
        ``train``, ``training``, ``is_training``, ``deterministic`` and ``use_running_average`` that it has; the last
        two are False in training.
      offset: subtracted from every input before the module sees it; nothing if None.
      weight_decay: the strength of the weight decay in training, if known.

    Returns:
      The `Subject`. Modules that have nothing but parameters are stored as these alone, others as the collections
      ``{"params": ..., "batch_stats": ...}``.

    Raises:
      ValueError: ``train_argument`` names nothing that the module has, or it has batch norm and no such switch, or it
        draws random numbers in training; or it does not take such inputs.

    >>> subject = Subject.from_linen(nn.Dense(3), input_shape=(2,))
    >>> subject.num_classes, subject.variables_like()["kernel"].shape
    (3, (2, 3))
    """
    if not isinstance(module, nn.Module):
      raise ValueError(f"module must be a flax linen module, an instance; got {module!r:.80}.")
    arguments, fields = _arguments(module, train_argument), {field.name for field in dataclasses.fields(module)}
    switches = _switches(train_argument).items()
    attributes = {name: on for name, on in switches if name in fields and name not in arguments}
    attributes = {name: on for name, on in attributes.items() if isinstance(getattr(module, name), bool | None)}
    if train_argument is not None and not (arguments or attributes):
      raise ValueError(f"train_argument must name an argument or attribute of module; got {train_argument!r}.")
    mode = lambda train: {name: train == on for name, on in arguments.items()}
    own = lambda train: module.clone(**{name: train == on for name, on in attributes.items()})

    def init(_: None, x: jax.Array) -> dict[str, PyTree]:
      with nn.intercept_methods(_without_dropout):
        return dict(own(False).init(jax.random.key(0), x, **mode(False)))

    collections = result_shape("module", init, None, input_shape)
    bare = set(collections) == {"params"}

    def init_fn() -> PyTree:
      variables = init(None, jnp.zeros((1, *input_shape)))
      return variables["params"] if bare else variables

    def run(variables: PyTree, x: jax.Array, *, train: bool = False, **settings: Any) -> Any:
      collections = {"params": variables} if bare else variables
      with nn.intercept_methods(_without_dropout):
        return own(train).apply(collections, _shifted(x, offset), **mode(train), **settings)

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
    if normalised and not (arguments or attributes):
      raise ValueError(
        f"module has batch norm, and no argument or attribute {', '.join(_SWITCHES)} that switches it to the statistics"
        " of the batch: name it by train_argument."
      )
    if normalised:
      try:
        jax.eval_shape(
          train_fn, jax.eval_shape(init_fn), jax.ShapeDtypeStruct((2, *input_shape), jnp.result_type(float))
        )
      except errors.InvalidRngError as error:
        raise ValueError(f"module must draw no random numbers in training but for nn.Dropout; {error}") from error
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
    train_argument: str | None = None,
    offset: ArrayLike | None = None,
    weight_decay: DecayLike | None = None,
  ) -> Self:
    """The subject that a flax nnx module is.

    Args:
      make: builds the module, which is called as ``module(x)``; batch norm follows ``module.train()`` and ``.eval()``.
        Dropout in it is never on.
      train_argument: as in `from_linen`; attributes are those of any module in it.
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
      for _, inner in nnx.iter_modules(module):
        for name in ("rate", "dropout_rate") if train else ():
          if isinstance(getattr(inner, name, None), float):
            setattr(inner, name, 0.0)
        for name, on in _switches(train_argument).items():
          if isinstance(vars(inner).get(name), bool) and name not in ("deterministic", "use_running_average"):
            setattr(inner, name, train == on)
      drawn = lambda: jax.tree.leaves(nnx.to_pure_dict(nnx.state(module, nnx.RngCount)))
      before = drawn()
      logits = module(
        _shifted(x, offset), **{name: train == on for name, on in _arguments(module, train_argument).items()}
      )
      if any(a is not b for a, b in zip(before, drawn(), strict=True)):
        raise ValueError("module must draw no random numbers but for nnx.Dropout; it does.")
      return logits, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

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
    **known: ``value_range``, ``train_argument``, ``offset`` and ``weight_decay`` of `Subject.from_nnx`.

  Returns:
    The `Classifier`.

  Raises:
    ValueError: an argument does not fit; the message names it.

  >>> from_nnx(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), input_shape=(2,), labels=(7, 8, 9)).labels
  (7, 8, 9)
  """
  if not isinstance(model, nnx.Module):
    raise ValueError(f"model must be a flax nnx module, an instance; got {model!r:.80}.")
  subject = Subject.from_nnx(lambda _: nnx.clone(model), input_shape=input_shape, **known)
  return subject.classifier(subject.init_fn(), labels)


def _switches(train_argument: str | None) -> Mapping[str, bool]:
  """What may switch a module to training, and what it is there."""
  return _SWITCHES if train_argument is None else {train_argument: _SWITCHES.get(train_argument, True)}


def _arguments(module: Any, train_argument: str | None) -> dict[str, bool]:
  """Those of them that are arguments of a module's call."""
  parameters = inspect.signature(type(module).__call__).parameters
  return {name: on for name, on in _switches(train_argument).items() if name in parameters}


def _without_dropout(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
  """An interceptor that passes dropout over."""
  if isinstance(context.module, nn.Dropout) and context.method_name == "__call__":
    return args[0] if args else kwargs["inputs"]
  return call(*args, **kwargs)


def _shifted(x: jax.Array, offset: ArrayLike | None) -> jax.Array:
  return x if offset is None else x - jnp.asarray(offset, x.dtype)[None]  # in the precision of the inputs


def _evaluate_fn(
  train: Callable[[PyTree, PyTree, jax.Array], tuple[Any, ...]],
  params: PyTree,
  stored: PyTree,
  input_shape: Sequence[int],
) -> Callable[[PyTree, jax.Array], Evaluation]:
  """A pass as in training, with the statistics of the batch, of which running averages hold a share, 1 - momentum."""

  @jax.jit
  def kept() -> PyTree:  # what the next averages keep of a one
    x = jnp.zeros((2, *input_shape))
    filled = [jax.tree.map(lambda leaf, v=v: jnp.full_like(leaf, v), stored) for v in (0.0, 1.0)]
    zeros, ones = (train(params, own, x)[1] for own in filled)
    return jax.tree.map(lambda zero, one: jnp.mean(one - zero), zeros, ones)

  share = jax.tree.map(lambda part: 1 - float(part), kept())
  if max(jax.tree.leaves(share)) <= 0:
    raise ValueError(
      "train_fn must return running averages that follow the batch; they do not change with it. (Of a module,"
      " train_argument names what switches it to training.)"
    )

  def evaluate(params: PyTree, x: jax.Array) -> Evaluation:
    logits, fresh, *features = train(params, jax.tree.map(jnp.zeros_like, stored), x)
    statistics = jax.tree.map(lambda leaf, part, own: leaf / part if part > 0 else own, fresh, share, stored)
    return Evaluation(logits, statistics, *features)

  return evaluate


def _check_train_fn(
  evaluate: Callable[[PyTree, jax.Array], Evaluation],
  predict: Callable[[PyTree, PyTree, jax.Array], jax.Array],
  classifier: Classifier,
  stored: PyTree,
) -> None:
  """Whether a pass as in training is one at inference with the batch's own statistics; dropout would make another.

  If every sample comes twice, biased variances stay, and unbiased ones fall from n / (n - 1) to 2n / (2n - 1) times
  them, which tells n, the number of values that a feature has in the batch.
  """
  x = classifier.from_unit(jax.random.uniform(jax.random.key(0), (4, *classifier.input_shape)))

  @jax.jit
  def compared(params: PyTree) -> tuple[jax.Array, jax.Array, PyTree]:
    once, twice = (evaluate(params, own) for own in (x, jnp.concatenate([x, x])))
    total = lambda leaf: jnp.sum(leaf.astype(jnp.float32))
    ratios = jax.tree.map(
      lambda one, two: total(two) / jnp.maximum(total(one), 1e-30), once.statistics, twice.statistics
    )
    # With r = 2 (n - 1) / (2n - 1): (n - 1) / n = r / (2 - r), which is 1 for r = 1.
    biased = lambda key, own, ratio: own * ratio / (2 - ratio) if _statistics.is_variance(key[-1].key) else own
    statistics = jax.tree_util.tree_map_with_path(biased, once.statistics, ratios)
    return once.logits, predict(params, statistics, x), ratios

  trained, inferred, ratios = compared(classifier.params)
  apart = float(jnp.max(jnp.abs(trained - inferred)) / jnp.maximum(jnp.max(jnp.abs(inferred)), 1e-30))
  if not apart <= _APART:
    raise ValueError(
      "train_fn must give the logits that apply_fn gives with the statistics of the batch, which it returns; they"
      f" differ by {apart:.0%}. Is dropout or other noise on in it, or is its epsilon another?"
    )
  for (path, ratio), name in zip(
    jax.tree_util.tree_leaves_with_path(ratios), _statistics.names_of(stored), strict=True
  ):
    unbiased = float(ratio) < 1 - 1e-5
    if _statistics.is_variance(path[-1].key) and unbiased != _statistics.is_unbiased(path[-1].key):
      logging.warning(
        "train_fn returns %s variances for %r; by its name it stores %s ones (PyTorch divides by n - 1, flax and Keras"
        " by n).",
        *(("unbiased", name, "biased") if unbiased else ("biased", name, "unbiased")),
      )


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
