"""What decides whether a sample is certified: every threshold, in one place, stored with the result."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Criteria:
  """The thresholds of certificates; `kkt_jax.extraction.certificates` says what each kind of evidence assumes.

  Attributes:
    kink: equations: a unit whose argument is within so many of its layer's standard deviations is at its kink.
    distance: equations: of a signal from the row space of the first kernel, relative. Training digits .0005 to .002
      (two layers, float32, 20,000 steps), .002 to .004 (three), other digits from .006.
    scale: equations: of a signal's scale from 1. Training digits .95 to 1.03; 5 % darker ones .2 or more away.
    unrest: equations: median distance of units between their slopes from their kink, in standard deviations; of nine
      of ten training digits less than 1e-4 (two layers) and 5e-4 (three), of nine of ten 5 % blends more than 3e-4.
    affine: equations: what the bias leaves of ``normal . (x - start) = 1``; training digits 1e-4.
    outside: equations: share of a sample outside of the subspace.
    refuted: range: misfit of the equations from which a sample is none, where others are certified by them.
    tight: range: distance from an end of the range, in units of the range, up to which a value is there.
    beyond: range: least share of all values that are at an end beyond the dimension of the subspace.
    overshoot: range: most outside the range that rounding of the subspace explains, the Euclidean norm.
    firmness: range: least singular value of the rows of the basis at tight values; less can be moved.
    contrast: range: the same where black may become one grey, and white another; less can be made brighter or darker.
    levels: levels: steps of the range, 255 for 8-bit images.
    off_level: levels: steps from a level up to which a value is on it.
    grey_values: levels: least number of values between the ends; those at the ends say nothing of levels.
    grey_levels: levels: least number of different levels among them; sums of samples of few levels are on levels, too.
    same: greatest difference of a value of two samples that are one.
    new: least share of a sample that others do not account for.
  """

  kink: float = 1e-2
  distance: float = 4e-3
  scale: float = 0.05
  unrest: float = 3e-4
  affine: float = 3e-3
  outside: float = 1e-2
  refuted: float = 6.0
  tight: float = 1e-3
  beyond: float = 0.21
  overshoot: float = 0.06
  firmness: float = 0.04
  contrast: float = 6e-3
  levels: int = 255
  off_level: float = 0.1
  grey_values: int = 24
  grey_levels: int = 8
  same: float = 0.02
  new: float = 0.05
