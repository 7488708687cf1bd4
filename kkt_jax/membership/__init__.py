"""Membership inference: of given samples, which were in the training set, and which were removed from it."""

from kkt_jax.membership.candidates import change_scores, scores

__all__ = ["change_scores", "scores"]
