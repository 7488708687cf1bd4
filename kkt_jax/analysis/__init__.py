"""What the weights reveal without any data: subspace, margin, form of the conditions."""

from kkt_jax.analysis.examination import Examination, examine
from kkt_jax.analysis.first_layer import FirstLayer, input_span, InputSpan

__all__ = ["Examination", "FirstLayer", "InputSpan", "examine", "input_span"]
