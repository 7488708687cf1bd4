"""Certified training samples: vertices, equations of single samples, and the search."""

from kkt_jax.extraction.certificates import EVIDENCE
from kkt_jax.extraction.exact import Exact
from kkt_jax.extraction.signals import Signals
from kkt_jax.extraction.vertices import Certificates

__all__ = ["Certificates", "EVIDENCE", "Exact", "Signals"]
