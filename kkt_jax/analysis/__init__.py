"""What the weights reveal without any data: subspace, margin, form of the conditions."""

from kkt_jax.analysis.examination import Examination, examine
from kkt_jax.analysis.first_layer import FirstLayer
from kkt_jax.analysis.subspace import Subspace
from kkt_jax.criteria import AnalysisCriteria

__all__ = ["AnalysisCriteria", "Examination", "FirstLayer", "Subspace", "examine"]
