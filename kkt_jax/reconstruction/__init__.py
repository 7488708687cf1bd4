"""The joint training of theta, eta and alpha, and what comes of it."""

from kkt_jax.reconstruction.loop import Observer, TrainingDiverged
from kkt_jax.reconstruction.recipes import Recipe, Schedule, Stationarity
from kkt_jax.reconstruction.result import Reconstruction
from kkt_jax.reconstruction.stages import distil, polish, reconstruct, start, train
from kkt_jax.reconstruction.step import Problem, TrainState
from kkt_jax.reconstruction.terms import Batch, Term
from kkt_jax.reconstruction.trainer import Trainer

__all__ = ["Batch", "Observer", "Problem", "Recipe", "Reconstruction", "Schedule", "Stationarity", "Term"]
__all__ += ["TrainState", "Trainer", "TrainingDiverged", "distil", "polish", "reconstruct", "start", "train"]
