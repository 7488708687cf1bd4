"""Conditional generators: tables of samples, networks, flows."""

from kkt_jax.generators.base import (
  affine_output,
  all_labels,
  code_of,
  CodebookGenerator,
  codes_for,
  ConvGenerator,
  convolutional,
  GenerateFn,
  Generator,
  GeneratorFactory,
  MLPGenerator,
  network,
  noise_of,
  NoiseFn,
  normal_noise,
  num_labels,
  places_of,
  stratified_noise,
  table,
  typical_deviation,
)
from kkt_jax.generators.flows import Destination, Flow

__all__ = ["CodebookGenerator", "ConvGenerator", "Destination", "Flow", "GenerateFn", "Generator", "GeneratorFactory"]
__all__ += ["MLPGenerator", "NoiseFn", "affine_output", "all_labels", "code_of", "codes_for", "convolutional"]
__all__ += ["network", "noise_of", "normal_noise", "num_labels", "places_of", "stratified_noise", "table"]
__all__ += ["typical_deviation"]
