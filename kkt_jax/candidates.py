"""Given candidates, which of them were in the training set? Scores without any training. Beyond the paper."""

import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kkt_jax import _checks, relaxation
from kkt_jax.classifier import Classifier


def hinge_shares(classifier: Classifier, x: ArrayLike, *, within: float = 0.001) -> np.ndarray:
  """The share of all gates whose kink each sample sits on.

  Gradient descent with weight decay comes to rest where ReLU kinks lie exactly on training samples, as a ball does in a
  valley. So a sample that sits on many more kinks than others do was most likely trained on.

  Args:
    classifier: any whose gates `kkt_jax.relaxation` recognises.
    x: candidates [M, *input_shape], in the classifier's units; at least two.
    within: of a kink, in standard deviations of the gate's argument among the candidates; positive.

  Returns:
    Shares [M] of the gates outside loops and branches that change among the candidates at all.

  Raises:
    ValueError: shapes that do not fit, a network without gates, or ``within`` not positive.
  """
  x = jnp.asarray(x)
  _checks.check_shape("x", x, (len(x), *classifier.input_shape), "[M, *input_shape]")
  _checks.check_positive("within", within)
  _checks.check_at_least("the number of candidates", x.shape[0], 2)
  roots = relaxation.pre_activations(classifier.predict_fn, classifier.params, x)
  roots = [root.reshape(x.shape[0], -1) for root in roots if root.shape[:1] == x.shape[:1]]
  if not roots:
    raise ValueError("classifier must have gates such as ReLU, with an argument for each sample; it has none.")
  arguments = np.concatenate([np.asarray(root) for root in roots], axis=1)
  deviations = arguments.std(axis=0)
  moving = deviations > 1e-6 * deviations.max()
  return np.mean(np.abs(arguments[:, moving]) < within * deviations[moving], axis=1)
