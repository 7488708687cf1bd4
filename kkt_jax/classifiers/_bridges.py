"""What the doors from other frameworks share: layouts, names, and a comparison with the framework itself."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kkt_jax._precision import full_precision
from kkt_jax._typing import PyTree
from kkt_jax.classifiers.classifier import Classifier, result_shape
from kkt_jax.classifiers.decay import DecayLike

_APART = 1e-4  # greatest difference from the framework's own logits, of the greatest logit, or of probabilities
_SAMPLES = 3  # random inputs that are compared

# (variables, x in the framework's layout, whether batch norm follows the batch) -> logits, batch statistics
Run = Callable[[Mapping[str, PyTree], jax.Array, bool], tuple[jax.Array, PyTree]]


def nested(flat: Mapping[str, Any], separator: str = "/") -> dict[str, Any]:
  """A tree of dicts from names that are joined by a separator.

  Raises:
    ValueError: the name of a tensor is that of a layer, too.

  >>> nested({"dense/kernel": 1, "dense/bias": 2})
  {'dense': {'kernel': 1, 'bias': 2}}
  """
  tree: dict[str, Any] = {}
  for name, value in flat.items():
    *layers, last = name.split(separator)
    place = tree
    for layer in layers:
      place = place.setdefault(layer, {})
      if not isinstance(place, dict):
        raise ValueError(f"names of tensors must differ from those of layers; {layer!r} in {name!r} is both.")
    if last in place:
      raise ValueError(f"names of tensors must differ; {name!r} is the name of two, or of a layer, too.")
    place[last] = value
  return tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bridge:
  """A framework's network as a function in JAX, beside what the framework itself gives.

  Attributes:
    argument: the name of the caller's argument, for messages.
    run: see `Run`; at inference the statistics are passed over.
    variables: ``{"params": ...}``, with ``"batch_stats"``, ``{"mean": ..., "var": ...}`` of each layer, if there is
      batch norm on the batch.
    reference: the framework's own outputs at inference, of inputs [M, *shape of the framework].
    input_shape: shape of one input as the framework has it.
    training: the framework's own outputs in training, but for random numbers; None if it cannot go without.
    turned: whether these are channels, rows, columns, which become rows, columns, channels.
    probabilities: whether the reference gives softmax or sigmoid of the logits.
    samples: inputs [M, *input_shape] to compare; random ones within ``value_range`` if None.
  """

  argument: str
  run: Run
  variables: Mapping[str, PyTree]
  reference: Callable[[np.ndarray], ArrayLike]
  input_shape: Sequence[int]
  training: Callable[[np.ndarray], ArrayLike | None] | None = None
  turned: bool = False
  probabilities: bool = False
  samples: np.ndarray | None = None

  @full_precision
  def classifier(
    self,
    labels: Sequence[int] | None,
    initial: Mapping[str, PyTree] | None = None,
    *,
    value_range: tuple[float, float] | None = (0.0, 1.0),
    offset: ArrayLike | None = None,
    weight_decay: DecayLike | None = None,
  ) -> Classifier:
    """The network as a `Classifier`, if it gives the framework's own logits.

    Args:
      labels: the label of each output; 0..C-1 if None.
      initial: the variables from which it was trained, if known.
      value_range: least and greatest value of an input; None if unbounded.
      offset: subtracted from every input before the network sees it, in the library's layout.
      weight_decay: the strength of the weight decay in training, if known.

    Raises:
      ValueError: the network gives several outputs, or other ones than the framework; or see `Subject.classifier`.
    """
    from kkt_jax.classifiers.spec import Subject

    own_shape = (*self.input_shape[1:], self.input_shape[0]) if self.turned else tuple(self.input_shape)
    shift = None if offset is None else np.asarray(offset, np.float32)[None]

    def arranged(x: Any) -> Any:
      x = x if shift is None else x - shift.astype(x.dtype)
      return x.transpose(0, 3, 1, 2) if self.turned else x

    def called(variables: PyTree, x: jax.Array, on_batch: bool) -> tuple[jax.Array, PyTree]:
      with jax.numpy_rank_promotion("allow"):  # which the framework's layers may need
        return self.run(variables, arranged(x), on_batch)

    apply_fn = lambda variables, x: called(variables, x, False)[0]
    train_fn = lambda variables, x: called(variables, x, True)
    whole = result_shape(self.argument, apply_fn, self.variables, own_shape)
    if not hasattr(whole, "shape"):
      raise ValueError(f"{self.argument} must give one array of logits; it gives a {type(whole).__name__}.")
    subject = Subject(
      apply_fn,
      lambda: dict(self.variables),
      own_shape,
      value_range=value_range,
      train_fn=train_fn if "batch_stats" in self.variables else None,
      offset=offset,
      weight_decay=weight_decay,
    )
    classifier = subject.classifier(dict(self.variables), labels, initial=initial)
    low, high = value_range or (-1.0, 1.0)
    x = self.samples
    x = np.random.default_rng(0).uniform(low, high, (_SAMPLES, *own_shape)) if x is None else x
    self._compare(classifier, x.astype(np.float32), arranged)
    return classifier

  def _compare(self, classifier: Classifier, x: np.ndarray, arranged: Callable[[Any], Any]) -> None:
    """Raises ValueError if the classifier gives other logits of inputs x than the framework does of ``arranged(x)``."""
    with jax.numpy_rank_promotion("allow"):
      theirs = np.asarray(self.reference(arranged(x)))
    _check_alike(self.argument, classifier.predict(jnp.asarray(x)), theirs, self.probabilities)
    if self.training is not None and (trained := self.training(arranged(x))) is not None:
      logits = classifier.apply_fn(classifier.params, jnp.asarray(x))
      _check_alike(f"{self.argument}, in training,", logits, np.asarray(trained), self.probabilities)


def _check_alike(argument: str, logits: jax.Array, theirs: np.ndarray, probabilities: bool) -> None:
  """Raises ValueError if logits [M, C] are not what the framework gives, [M, C], or [M, 1] or [M] for two classes."""
  ours = np.asarray(logits, np.float64)
  if probabilities:
    ours = np.asarray(jax.nn.softmax(logits), np.float64)
  if theirs.size == len(theirs):
    ours = ours[:, 1:] if probabilities else ours[:, 1:] - ours[:, :1]
    theirs = theirs.reshape(-1, 1)
  if ours.shape != theirs.shape:
    raise ValueError(f"{argument} must give logits [M, C]; it gives {theirs.shape} for M = {len(theirs)}.")
  sums = np.abs(theirs.sum(axis=-1) - 1)
  if not probabilities and theirs.shape[1] > 1 and np.all(theirs >= 0) and np.max(sums) < 1e-5:
    raise ValueError(f"{argument} must give logits, not probabilities: leave out the softmax at its end.")
  apart = float(np.max(np.abs(ours - theirs)) / max(1e-30, 1.0 if probabilities else np.max(np.abs(theirs))))
  if not apart <= _APART:
    raise ValueError(
      f"{argument} must give the same outputs in JAX as in its framework; they differ by {apart:.1e} of the greatest."
      " Does it draw random numbers at inference, keep a state, normalise by the batch in no layer of batch norm, or"
      " end in probabilities that are no softmax?"
    )
