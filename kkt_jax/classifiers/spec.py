"""From a flax module, or any function, to a `Classifier`.

`from_linen` and `from_nnx` take a module with its numbers. A `Subject` is the same description without the numbers,
for those who read them from a file (`kkt_jax.classifiers.files`).
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import inspect
from typing import Any, Self

from flax import core, errors, nnx
from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kkt_jax import _checks
from kkt_jax._typing import ApplyFn, PyTree
from kkt_jax.classifiers import _normalised, _statistics
from kkt_jax.classifiers.classifier import Classifier, Evaluation, make_classifier, result_shape, two_logits
from kkt_jax.classifiers.decay import DecayLike

# The usual names of what switches a module from inference to training, and what they are in training.
_SWITCHES = {"train": True, "training": True, "is_training": True, "deterministic": False, "use_running_average": False}


@dataclasses.dataclass(frozen=True)
class Subject:
  """A classifier without its parameters: its functions, and what is known of its inputs and its training.

  Attributes:
    apply_fn: ``(variables, x[M, *input_shape]) -> logits[M, C]`` at inference, where samples do not interact; [M, 1] or
      [M] for two classes with one logit. Whatever preprocessing the inputs go through belongs into this
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
    features_fn: ``(variables, x) -> (logits [M, C], features [M, F])`` at inference, in one pass, if ``train_fn``
      returns features, too, or is None; see `kkt_jax.classifiers.Classifier`.
    offset: the constant [*input_shape] that ``apply_fn`` subtracts from its inputs, such as the mean image, if known.
    weight_decay: the strength of the weight decay in training, if known: a number, a tree of numbers like the
      parameters, or a function of the names of tensors; see `kkt_jax.classifiers.Classifier`.
  """

  apply_fn: ApplyFn
  init_fn: Callable[[], PyTree]
  input_shape: Sequence[int]
  value_range: tuple[float, float] | None = (0.0, 1.0)
  train_fn: Callable[[PyTree, jax.Array], tuple[Any, ...]] | None = None
  features_fn: Callable[[PyTree, jax.Array], tuple[jax.Array, jax.Array]] | None = None
  offset: ArrayLike | None = None
  weight_decay: DecayLike | None = None

  def __post_init__(self) -> None:
    """Raises ValueError for functions that cannot be called."""
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
    """The classifier with these variables.

    Args:
      variables: the stored values, a tree like the result of ``init_fn``.
      labels: the label of each output; 0..C-1 if None.
      initial: the variables from which it was trained, a tree like ``variables``, if known.

    Returns:
      A `Classifier`.

    Raises:
      ValueError: ``variables`` have other parameters than ``init_fn``.
      ValueError: ``variables`` lack "params" or "batch_stats", or hold running statistics without a ``train_fn``, or
        one that is not ``apply_fn`` with the statistics of the batch; or see `kkt_jax.classifiers.make_classifier`.
    """
    thaw: Callable[[Any], Any] = core.unfreeze
    variables, initial = thaw(variables), thaw(initial)
    stored = _statistics.Stored.of(variables)
    if self.train_fn is not None:
      _statistics.canonical(_statistics.merge(stored.counters, stored.statistics))
      if not stored.statistics:
        got = sorted(map(str, variables)) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(f"variables must hold 'params' and 'batch_stats' of a classifier with batch norm; got {got}.")
    elif stored.statistics:
      raise ValueError(
        "train_fn must be given for the batch norm whose running statistics are"
        f" {_statistics.some_names(stored.statistics)}:"
        ' see docs/audit.md. If they were frozen in training, store them as {"params": ..., "constants": ...}.'
      )
    known: dict[str, Any] = {"labels": labels, "value_range": self.value_range, "weight_decay": self.weight_decay}
    known["initial_params"] = None if initial is None else stored.params_of(initial)
    params, statistics, shape = stored.params, stored.statistics, self.input_shape
    inference, has_features = self._inference(stored)
    if self.train_fn is None:
      classifier = make_classifier(lambda params, x: inference(params, statistics, x), params, shape, **known)
    else:
      train = functools.partial(_normalised.train, self.train_fn, stored)
      result_shape("train_fn", lambda params, x: train(params, statistics, x), params, shape)
      evaluate = _normalised.evaluate_fn(train, params, statistics, shape)

      def forward(params: PyTree, x: jax.Array, train: bool) -> Evaluation:
        if not train:
          return inference(params, statistics, x)
        evaluation = evaluate(params, x)
        features = evaluation.features if has_features else None
        return Evaluation(evaluation.logits, _statistics.canonical(evaluation.statistics), features)

      classifier = make_classifier(forward, params, shape, statistics=_statistics.canonical(statistics), **known)
      if self.train_fn.__module__ != __name__:  # that of a module is the same function by construction
        _normalised.check_train_fn(evaluate, inference, classifier, statistics)
    wanted = core.unfreeze(self.variables_like())  # last: a function that fails on others says more
    like = _statistics.Stored.of(wanted).params
    _checks.check_same_shapes("variables", stored.params, "what init_fn returns", like)
    return classifier if self.offset is None else classifier.with_offset(self.offset)

  def _inference(self, stored: _statistics.Stored) -> tuple[Callable[[PyTree, PyTree, jax.Array], Evaluation], bool]:
    """``(params, statistics, x) -> Evaluation`` at inference; whether with features: if the last layer takes them."""
    features_fn = self.features_fn
    if features_fn is not None:

      def featured(params: PyTree, statistics: PyTree, x: jax.Array) -> Evaluation:
        logits, features = features_fn(stored.whole(params, statistics), x)
        return Evaluation(logits, None, features)

      evaluate = lambda params, x: featured(params, stored.statistics, x)
      whole = stored.whole(stored.params, stored.statistics)
      for name, function in (("apply_fn", self.apply_fn), ("features_fn", features_fn)):
        result_shape(name, function, whole, self.input_shape)
      if _normalised.feeds_last_layer(evaluate, stored.params, self.input_shape):
        return featured, True
    return lambda params, statistics, x: Evaluation(self.apply_fn(stored.whole(params, statistics), x)), False

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
    """A `Subject` from a flax linen module.

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
    arguments, attributes = _arguments(module, train_argument), _attributes(module, train_argument)
    if train_argument is not None and not (arguments or attributes):
      raise ValueError(f"train_argument must name an argument or attribute of module; got {train_argument!r}.")
    mode = lambda train: {name: train == on for name, on in arguments.items()}
    switched = lambda train: module.clone(**{name: train == on for name, on in attributes.items()})

    def init(_: None, x: jax.Array) -> dict[str, PyTree]:
      with nn.intercept_methods(_without_dropout):
        return dict(switched(False).init(jax.random.key(0), x, **mode(False)))

    collections = result_shape("module", init, None, input_shape)
    bare = set(collections) == {"params"}

    def init_fn() -> PyTree:
      variables = init(None, jnp.zeros((1, *input_shape)))
      return variables["params"] if bare else variables

    def run(variables: PyTree, x: jax.Array, *, train: bool = False, **settings: Any) -> Any:
      collections = {"params": variables} if bare else variables
      with nn.intercept_methods(_without_dropout):
        return switched(train).apply(collections, _shifted(x, offset), **mode(train), **settings)

    def train_fn(variables: PyTree, x: jax.Array) -> tuple[jax.Array, PyTree, jax.Array]:
      return _with_features(run, variables, x, train=True, mutable=["batch_stats"])

    def features_fn(variables: PyTree, x: jax.Array) -> tuple[jax.Array, jax.Array]:
      logits, _, features = _with_features(run, variables, x)
      return logits, features

    normalised = "batch_stats" in collections
    if normalised:
      _statistics.canonical(collections["batch_stats"])  # spectral norm has others there
      if not (arguments or attributes):
        raise ValueError(
          f"module has batch norm, and no argument or attribute {', '.join(_SWITCHES)} that switches it to the"
          " statistics of the batch: name it by train_argument."
        )
      try:
        batch = jax.ShapeDtypeStruct((2, *input_shape), jnp.result_type(float))
        jax.eval_shape(train_fn, jax.eval_shape(init_fn), batch)
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
    """A `Subject` from a flax nnx module.

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
  if not isinstance(variables, Mapping) or "params" not in variables:
    got = sorted(map(str, variables)) if isinstance(variables, Mapping) else f"a {type(variables).__name__}"
    raise ValueError(f"variables must hold 'params'; got {got}.")
  subject = Subject.from_linen(module, input_shape=input_shape, **known)
  bare = "params" not in subject.variables_like()
  return subject.classifier(variables["params"] if bare else dict(variables), labels)


def from_nnx(
  model: nnx.Module, *, input_shape: Sequence[int], labels: Sequence[int] | None = None, **known: Any
) -> Classifier:
  """A `Classifier` from a flax nnx module with its parameters.

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
  """The names that may switch a module to training, and the value that does."""
  return _SWITCHES if train_argument is None else {train_argument: _SWITCHES.get(train_argument, True)}


def _arguments(module: Any, train_argument: str | None) -> dict[str, bool]:
  """The switches that are arguments of a module's call."""
  parameters = inspect.signature(type(module).__call__).parameters
  return {name: on for name, on in _switches(train_argument).items() if name in parameters}


def _attributes(module: nn.Module, train_argument: str | None) -> dict[str, bool]:
  """The switches that are attributes of a linen module, and no arguments."""
  fields = {field.name for field in dataclasses.fields(module)} - set(_arguments(module, train_argument))
  switches = {name: on for name, on in _switches(train_argument).items() if name in fields}
  return {name: on for name, on in switches.items() if isinstance(getattr(module, name), bool | None)}


def _with_features(run: Any, variables: PyTree, x: jax.Array, **settings: Any) -> tuple[jax.Array, PyTree, jax.Array]:
  """Logits, running statistics, and the output of the last batch norm, of a linen module that ``run`` applies."""
  order = []

  def is_norm(module: nn.Module, _: str) -> bool:
    order.extend([module.path] if isinstance(module, nn.BatchNorm) else [])
    return isinstance(module, nn.BatchNorm)

  logits, changed = run(variables, x, capture_intermediates=is_norm, **settings)
  outputs = changed["intermediates"]
  for name in order[-1]:
    outputs = outputs[name]
  return logits, changed.get("batch_stats"), outputs["__call__"][-1]


def _without_dropout(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
  """An interceptor that skips dropout."""
  if isinstance(context.module, nn.Dropout) and context.method_name == "__call__":
    return args[0] if args else kwargs["inputs"]
  return call(*args, **kwargs)


def _shifted(x: jax.Array, offset: ArrayLike | None) -> jax.Array:
  return x if offset is None else x - jnp.asarray(offset, x.dtype)[None]  # in the precision of the inputs
