"""Membership inference: of given samples, which were in the training set."""

from kkt_jax.membership.candidates import scores

__all__ = ["scores"]
