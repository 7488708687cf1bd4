"""The joint training of theta, eta and alpha, and what comes of it."""

from kkt_jax.reconstruction.recipes import Recipe, Schedule, Stationarity
from kkt_jax.reconstruction.result import reconstruct, Reconstruction
from kkt_jax.reconstruction.terms import Batch, Term
from kkt_jax.reconstruction.training import Problem, TrainingDiverged, TrainState

__all__ = [
  "Batch",
  "Problem",
  "Recipe",
  "Reconstruction",
  "Schedule",
  "Stationarity",
  "Term",
  "TrainState",
  "TrainingDiverged",
  "reconstruct",
]
