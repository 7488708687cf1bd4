"""From a fitted scikit-learn estimator to a `Classifier`."""

from collections.abc import Callable, Sequence
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kkt_jax._typing import PyTree
from kkt_jax.classifiers._bridges import Bridge
from kkt_jax.classifiers.classifier import Classifier

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "identity": lambda h: h,
  "logistic": jax.nn.sigmoid,
  "relu": jax.nn.relu,
  "tanh": jnp.tanh,
}
_COVERED = "an MLPClassifier, a LogisticRegression, or a Pipeline of scalers and one of them"


def from_sklearn(estimator: Any, *, labels: Sequence[int] | None = None, **known: Any) -> Classifier:
  """A `Classifier` from a fitted scikit-learn `MLPClassifier` or ``LogisticRegression`` (tried with 1.9).

  Its parameters are ``coefs_`` and ``intercepts_``, or ``coef_`` and ``intercept_``, in scikit-learn's layouts. What a
  ``Pipeline`` does to each column before (``StandardScaler``, ``MinMaxScaler``, ...) is part of the function, not of
  its parameters. Logits are what scikit-learn takes the softmax or the sigmoid of.

  Args:
    estimator: the fitted estimator, of one label per sample; it stays as it is.
    labels: the label of each output; if None the estimator's ``classes_`` if they are integers, else 0..C-1 in their
      order.
    **known: ``value_range`` (None unless given), ``offset`` and ``weight_decay`` of `kkt_jax.from_linen`. Of alpha and
      C, docs/frameworks.md tells what weight decay they are.

  Returns:
    The `Classifier`, for inputs of ``(n_features_in_,)``.

  Raises:
    ValueError: the estimator is another, is not fitted, tells several labels at once, or comes after a step that mixes
      columns or is no scaling.

  >>> from sklearn.linear_model import LogisticRegression
  >>> from_sklearn(LogisticRegression().fit([[0.0], [1.0], [2.0]], [3, 5, 5])).labels
  (3, 5)
  """
  before, last = [], estimator
  while hasattr(last, "steps"):
    *inner, last = [step for _, step in last.steps if step is not None and not isinstance(step, str)]
    before += inner
  kinds = {kind.__name__ for kind in type(last).__mro__} & {"LogisticRegression", "MLPClassifier"}
  network = "MLPClassifier" in kinds
  if not kinds or not hasattr(last, "n_features_in_"):
    raise ValueError(f"estimator must be {_COVERED}, and fitted; got {type(last).__name__}.")
  if network and last.out_activation_ == "logistic" and last.n_outputs_ > 1:
    raise ValueError("estimator must tell one label per sample; it was fitted to several at once.")
  if labels is None and np.issubdtype(np.asarray(last.classes_).dtype, np.integer):
    labels = list(map(operator.index, last.classes_))
  features = int([*before, last][0].n_features_in_)

  def scaled(x: np.ndarray) -> np.ndarray:
    for step in before:
      x = step.transform(x)
    return np.asarray(x, np.float64)

  between = np.linspace(-3, 3, features)
  ends = scaled(np.stack([np.zeros(features), np.ones(features), between]))
  scale = ends[1] - ends[0]
  if ends.shape != (3, features) or np.any(scale == 0) or not np.allclose(ends[2], ends[0] + between * scale):
    names = ", ".join(type(step).__name__ for step in before)
    raise ValueError(f"estimator must scale columns one by one before it classifies; got {names}.")
  centre = -ends[0] / scale
  likely = centre + np.random.default_rng(0).uniform(-1, 1, (8, features)) / scale
  as_arrays = lambda tensors: {str(i): jnp.asarray(tensor) for i, tensor in enumerate(tensors)}
  if network:
    params: PyTree = {"coefs_": as_arrays(last.coefs_), "intercepts_": as_arrays(last.intercepts_)}
    activation = _ACTIVATIONS[last.activation]
  else:
    params = {"coef_": jnp.asarray(last.coef_), "intercept_": jnp.asarray(last.intercept_)}

  def run(variables: Any, x: jax.Array, _: bool) -> tuple[jax.Array, PyTree]:
    weights = variables["params"]
    h = (x - jnp.asarray(centre, x.dtype)[None]) * jnp.asarray(scale, x.dtype)[None] if before else x
    if not network:
      return h @ weights["coef_"].T + weights["intercept_"][None], {}
    for i in range(len(weights["coefs_"])):
      h = (activation(h) if i else h) @ weights["coefs_"][str(i)] + weights["intercepts_"][str(i)][None]
    return h, {}

  def reference(x: np.ndarray) -> np.ndarray:
    probabilities = estimator.predict_proba(x)
    return probabilities[:, 1:] if probabilities.shape[1] == 2 else probabilities

  bridge = Bridge(
    argument="estimator",
    run=run,
    variables={"params": params},
    reference=reference,
    input_shape=(features,),
    probabilities=True,
    samples=likely,  # after scaling
  )
  return bridge.classifier(labels, **{"value_range": None, **known})
