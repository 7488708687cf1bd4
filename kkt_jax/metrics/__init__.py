"""How near, how diverse and how recognisable generated samples are, against data known for the comparison only.

None of these functions is seen by the training. Each figure means something only beside its controls: the same figure
for the true data, other real data, the mean image and noise.

- ``similarity``: images against images, pixel by pixel or window by window.
- ``distances``: points against points within a radius, and the spread within a class.
- ``distributions``: a set of features against another, neither taken apart into pairs.
- ``memorisation``: does a generator know its training set better than other data of the same kind?
- ``membership``: how well any score tells members of a training set from others.
"""

from kkt_jax.metrics.distances import pairwise_distance, precision_coverage, within_class_distance
from kkt_jax.metrics.distributions import kernel_distance, precision_recall
from kkt_jax.metrics.membership import conformal_p_values, epsilon_lower_bound, Point, q_values, Roc, roc, Trial
from kkt_jax.metrics.memorisation import nearer_to_training, retrieval
from kkt_jax.metrics.similarity import (
  faithfulness,
  pairwise_mse,
  pairwise_ncc,
  pairwise_ssim,
  RECOVERED_SSIM,
  ssim,
  ssim_nearest_indices,
)

__all__ = ["Point", "RECOVERED_SSIM", "Roc", "Trial", "conformal_p_values", "epsilon_lower_bound", "faithfulness"]
__all__ += ["kernel_distance", "nearer_to_training", "pairwise_distance", "pairwise_mse", "pairwise_ncc"]
__all__ += ["pairwise_ssim", "precision_coverage", "precision_recall", "q_values", "retrieval", "roc", "ssim"]
__all__ += ["ssim_nearest_indices", "within_class_distance"]
