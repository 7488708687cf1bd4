"""Labelled samples, as an audit takes them."""

from collections.abc import Sequence
import dataclasses
import hashlib

import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kkt_jax import _checks
from kkt_jax._errors import InputError
from kkt_jax.classifiers.classifier import Classifier

_FAINT = 16  # greatest byte up to which bytes have fewer bits than eight


@dataclasses.dataclass(frozen=True)
class Samples:
  """Labelled samples.

  Attributes:
    x: [N, ...] in [0, 1], float32; in the units of the classifier if it has no range of values.
    y: classes [N] from 0, int32.
    names: of the samples, such as those of their files; "sample" and their places from 0 if there are none.

  Raises:
    InputError: no arrays of numbers, or labels or names that are not one for each sample.
  """

  x: np.ndarray
  y: np.ndarray
  names: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    for name, values in (("x", self.x), ("y", self.y)):
      if not _checks.is_numbers(values) or not np.ndim(values):
        raise InputError(f"{name} must be an array of numbers, one row for each sample; got {values!r:.60}.")
      object.__setattr__(self, name, np.asarray(values))
    if not self.names:
      object.__setattr__(self, "names", tuple(f"sample {place}" for place in range(len(self.x))))
    for name, column in (("y", self.y), ("names", self.names)):
      if len(column) != len(self.x):
        raise InputError(f"{name} must be one for each of {len(self.x)} samples; got {len(column)}.")

  @classmethod
  def of(
    cls, name: str, classifier: Classifier, x: ArrayLike, y: ArrayLike | None = None, names: Sequence[str] = ()
  ) -> "Samples":
    """Samples from arrays in the classifier's own range, with its own labels.

    Args:
      name: of the argument, for errors.
      classifier: whose samples they are.
      x: [N, *input_shape]: bytes from 0 to 255, or floating point in the classifier's own units.
      y: their labels [N], of the classifier's ``labels``: 0 to C - 1 unless it has others; what the classifier takes
        the samples for if None.
      names: of the samples.

    Raises:
      InputError: shapes, dtypes or values that do not fit; the message begins with the name.
    """
    try:
      x, shape = np.asarray(x), classifier.input_shape
    except ValueError as error:
      raise InputError(f"{name}: x must be one array; {error}") from error
    if x.shape[1:] != shape or x.ndim != len(shape) + 1:
      wanted = ", ".join(map(str, shape))
      raise InputError(f"{name}: x must have shape [N, {wanted}]; got {x.shape}.")
    if not len(x):
      raise InputError(f"{name}: x must hold at least one sample; got shape {x.shape}.")
    if not (x.dtype == np.uint8 or jnp.issubdtype(x.dtype, jnp.floating)):
      raise InputError(f"{name}: x must be uint8 or floating point; got {x.dtype}.")
    unit = _unit(name, x, classifier)
    if y is None:
      return cls(unit, np.argmax(classifier.predict(classifier.from_unit(unit)), axis=1).astype(np.int32), tuple(names))
    labels, known = np.asarray(y), classifier.labels
    if labels.shape != x.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
      raise InputError(f"{name}: y must be {len(x)} integers; got {labels.dtype} of shape {labels.shape}.")
    if not np.isin(labels, known).all():
      got = f"{labels.min()} to {labels.max()}"
      plain = known == tuple(range(len(known)))
      wanted = f"lie in 0 to {len(known) - 1}" if plain else f"be among the classifier's, {known}"
      raise InputError(f"{name}: labels must {wanted}; got {got}.")
    return cls(unit, np.asarray(classifier.classes_of(labels), np.int32), tuple(names))

  def checked(self, name: str, classifier: Classifier) -> "Samples":
    """These samples, if they suit a classifier.

    Raises:
      InputError: they are not such as `of` makes for this classifier; the message begins with the name.
    """
    x, y = np.asarray(self.x), np.asarray(self.y)
    wanted = classifier.input_shape
    if not (x.ndim == len(wanted) + 1 and x.shape[1:] == wanted and jnp.issubdtype(x.dtype, jnp.floating)):
      raise InputError(f"{name}: x must be floating point, [N, *{wanted}]; got {x.dtype} of shape {x.shape}.")
    unit = classifier.value_range is not None
    if not np.isfinite(x).all() or (unit and x.size and not -1e-3 <= x.min() <= x.max() <= 1 + 1e-3):
      raise InputError(f"{name}: x of Samples must be finite{' and lie in [0, 1]' if unit else ''}; see Samples.of.")
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer) or not np.isin(y, range(classifier.num_classes)).all():
      raise InputError(f"{name}: y of Samples must be classes, from 0 to {classifier.num_classes - 1}.")
    return self

  def only(self, places: np.ndarray) -> "Samples":
    """Some of them, by their places."""
    return Samples(self.x[places], self.y[places], tuple(self.names[place] for place in places))

  def at_most(self, count: int, random: np.random.Generator | None = None) -> "Samples":
    """These, or ``count`` of them in their order, drawn by ``random``, always the same if None."""
    if len(self.y) <= count:
      return self
    random = np.random.default_rng(0) if random is None else random
    return self.only(np.sort(random.choice(len(self.y), count, replace=False)))

  def in_proportion(self, name: str, like: "Samples") -> "Samples":
    """As many of these, called ``name``, as have the classes of others in their proportions; always the same.

    Raises:
      InputError: there is none of a class that the others have.
    """
    wanted = np.bincount(like.y)
    there = np.bincount(self.y, minlength=len(wanted))[: len(wanted)]
    if lacking := np.flatnonzero((wanted > 0) & (there == 0)).tolist():
      raise InputError(f"{name} must hold samples of every class to compare with; it has none of class {lacking[0]}.")
    share = min(there[wanted > 0] / wanted[wanted > 0])
    random, counts = np.random.default_rng(0), np.ceil(share * wanted - 1e-9).astype(int)
    drawn = [random.choice(np.flatnonzero(self.y == k), count, replace=False) for k, count in enumerate(counts)]
    return self.only(np.sort(np.concatenate(drawn)))

  def digest(self) -> str:
    """SHA-256 of the samples and their classes."""
    return hashlib.sha256(self.x.tobytes() + self.y.tobytes()).hexdigest()


Given = Samples | ArrayLike | tuple[ArrayLike, ArrayLike]


def given_samples(name: str, classifier: Classifier, given: Given | None) -> Samples | None:
  """An argument as `Samples`: it is one already, or a pair of x and y, or for candidates x alone."""
  if given is None:
    return None
  if isinstance(given, Samples):
    return given.checked(name, classifier)
  x, y = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
  if isinstance(x, tuple) or (y is None and name != "candidates"):
    raise InputError(f"{name} must be Samples or a pair of x and y; got {type(given).__name__}.")
  names = [f"candidate {place}" for place in range(len(np.asarray(x)))] if name == "candidates" else ()
  return Samples.of(name, classifier, x, y, names)


def _unit(name: str, x: np.ndarray, classifier: Classifier) -> np.ndarray:
  """Samples in [0, 1], from bytes or from numbers in the classifier's range; as they are if it has none."""
  if classifier.value_range is None:
    with np.errstate(over="ignore"):
      unit = x.astype(np.float32)
    if x.dtype == np.uint8 or not np.all(np.isfinite(unit)):
      raise InputError(f"{name}: x must be floating point and finite, for the classifier has no value_range.")
    return unit
  low, high = classifier.value_range
  if (x.dtype == np.uint8 or (low, high) == (0, 255)) and 0 < x.max() <= _FAINT:
    raise InputError(
      f"{name}: x holds nothing above {x.max():.3g}, and 255 stands for the greatest value: it is stored in another"
      " range."
    )
  if x.dtype == np.uint8:
    return x.astype(np.float32) / 255
  unit = np.asarray(classifier.to_unit(x.astype(np.float32)))
  if not (unit.min() >= -1e-3 and unit.max() <= 1 + 1e-3):  # NaN is neither
    raise InputError(f"{name}: x must lie in the classifier's range, {low} to {high}; got {x.min()} to {x.max()}.")
  return np.clip(unit, 0, 1)
