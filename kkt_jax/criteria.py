"""Every threshold that decides what is claimed of a subspace, a sample or a data set; stored with the result."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Criteria:
  """The thresholds of certificates; `kkt_jax.extraction.certificates` says what each kind of evidence assumes.

  Attributes:
    kink: equations: a unit whose argument is within so many of its layer's standard deviations is at its kink.
    distance: equations: of a signal from the row space of the first kernel, relative. Training digits .0005 to .002
      (two layers, float32, 20,000 steps), .002 to .004 (three), other digits from .006.
    scale: equations: of a signal's scale from 1. Training digits .95 to 1.03; 5 % darker ones .2 or more away.
    unrest: equations: distance from its kink of the unit that is the second nearest, in standard deviations; of 95 to
      100 of 100 training digits less, the median 1e-6, of a quarter to a half of 5 % blends more.
    usual: equations: so many times the median distance of samples that fulfil the rest is allowed, if that is less.
    shaken: equations: most that an error of the signal within the row space, as great as the one outside, may change
      the scale by. Training digits .02 to .4 (three layers; two: .02 to .1), half-and-half blends from .4.
    affine: equations: what the bias leaves of ``normal . (x - start) = 1``; training digits 1e-4.
    outside: equations: share of a sample outside of the subspace.
    refuted: range: misfit of the equations from which a sample is none, where others are certified by them.
    tight: range: distance from an end of the range, in units of the range, up to which a value is there.
    beyond: range: least share of all values that are at an end beyond the dimension of the subspace.
    overshoot: range: most outside the range that rounding of the subspace explains, the Euclidean norm.
    firmness: range: least singular value of the rows of the basis at tight values; less can be moved.
    contrast: range: the same where black may become one grey, and white another; less can be made brighter or darker.
    levels: levels: steps of the range, 255 for 8-bit images.
    off_level: levels: steps from a level up to which a value is on it, at most: half of what a step of any one value
      leaves in the subspace if that is less.
    nearly: levels: share of the values that a vertex needs at an end, from which a point may be on levels.
    grey_values: levels: least number of values between the ends, beyond one for each direction that the values at the
      surer end leave open; those at the ends say nothing of levels.
    grey_levels: levels: least number of different levels among them; sums of samples of few levels are on levels, too.
    same: greatest difference of a value of two samples that are one.
    new: least share of a sample that others do not account for.
    agreeing: samples that agree on a scale, or say of all others that they fulfil the equations, or are on levels.
    apart: so many times ``same`` two points are apart, as a Euclidean norm, that are not one.
    of_halves: equations: the share of the distance of blends that is allowed, if that is more than ``distance``.
    of_distance: equations: so many times that distance the scale may be off, if that is more than ``scale``.
    away: range: least distance of some value from the origin, in units of the range; the origin may be black.
    bent: levels: most that a value may move on the way to its level, in units of the range.
    side: least cosine of a sample with the guesses' mean that tells a sample from its mirror image.
  """

  kink: float = 1e-2
  distance: float = 4e-3
  scale: float = 0.05
  unrest: float = 3e-4
  usual: float = 1.6
  shaken: float = 0.5
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
  nearly: float = 0.85
  grey_values: int = 24
  grey_levels: int = 8
  same: float = 0.02
  new: float = 0.05
  agreeing: int = 5
  apart: float = 5.0
  of_halves: float = 0.5
  of_distance: float = 7.0
  away: float = 0.2
  bent: float = 0.25
  side: float = 0.2

  @property
  def least_distance(self) -> float:
    """The Euclidean distance from which two points count as different."""
    return self.apart * self.same


@dataclasses.dataclass(frozen=True)
class AnalysisCriteria:
  """The thresholds of `kkt_jax.examine`: what is taken for the form of the conditions, and for the data's subspace.

  Attributes:
    unexplained: form: share of the target that no data can account for, above which an audit is not worth its time.
    scaling: form: greatest error of scaling, and of rates that vanish, that counts as none.
    tie: form: relative difference of two forms' bounds that says nothing of which it is.
    missing: form: share of the balance that weight decay brings about, up to which it may be missing.
    left_out: form: most tensors that are left out.
    tried: form: of how many of the worst tensors the first possible one is left out.
    symmetric: form: change of the margins, next to that along a generic direction, that counts as none.
    moved: form: part of a symmetry up to which it does not move a tensor.
    probes: random inputs on which functions are tried.
    steady: logits: the most that they may change with the rest of a batch, of the greatest.
    alike: relative error up to which two gradients are the same; deviation of an image up to which it is one value.
    few_values: a tensor of fewer values than this says nothing of whether weights are rounded to 16 bits.
    filled: subspace: greatest share of a layer's directions that data may fill for their subspace to be recognised.
    fall: subspace: least fall of singular values that ends it.
    nothing: subspace: most that may follow the fall, relative to the greatest singular value.
    rounding: subspace: the same of what the rounding errors of training leave in every direction.
    sharp: subspace: a fall that is no chance.
    many: subspace: directions for each class that are too few where the fall is not sharp.
    groups: subspace: directions beyond two for each class that are too few where it is, or above noise; samples of a
      class that open one of few sets of gates are fitted alike, and 6 directions of two classes were measured.
    faint: noise: the most that it may reach for a subspace to be recognised above it, of the greatest singular value.
    sure: noise: Tracy-Widom's law (beta = 1) lies below it with a probability of 99.9 %.
    like_noise: noise: greatest difference of the spectrum's quantiles from the law's, in units of its edge; of K values
      one more K-th.
    quiet: noise: standard deviations of a squared row's length up to which the row is noise.
    bias_outside: most of a bias outside of its kernel's row space, as a share, where both hold one sum over the data;
      less if the fall of the singular values says so.
    moves: values: least length of a value's row of the basis for it to differ among the points of the subspace.
    together: values: cosine of two values' rows of the basis from which they are one equation.
  """

  unexplained: float = 0.05
  scaling: float = 1e-2
  tie: float = 0.01
  missing: float = 0.01
  left_out: int = 8
  tried: int = 3
  symmetric: float = 1e-4
  moved: float = 1e-3
  probes: int = 24
  steady: float = 0.01
  alike: float = 1e-3
  few_values: int = 16
  filled: float = 0.9
  fall: float = 5.0
  nothing: float = 1e-4
  rounding: float = 1e-7
  sharp: float = 50.0
  many: int = 8
  groups: int = 6
  faint: float = 0.01
  sure: float = 3.2724
  like_noise: float = 0.02
  quiet: float = 4.0
  bias_outside: float = 1e-3
  moves: float = 1e-3
  together: float = 0.999


@dataclasses.dataclass(frozen=True)
class AuditCriteria:
  """The thresholds of `kkt_jax.audit`: what counts as evidence, and when a description is refused or doubted.

  Attributes:
    significant: verdict: p-value below which something is no chance.
    fewer: verdict: p-value below which a class-level baseline identifies fewer samples.
    equal: verdict: structural similarity above which two images are the same.
    false_discovery_rate: scores: the expected share of non-members among those that are named as members, at most.
    least_counted: scores: times that the least p-value of a sample counts, besides once, among those of all scores;
      chosen on other classifiers (docs/audit.md).
    scored: scores: most samples of each kind that are scored together; the cost grows with their square.
    most_ratio: leaks: greatest ratio of distances; greater ones count as this.
    sources_samples: sources: most samples of each kind that are compared.
    sources_values: sources: most values of a sample that are compared.
    components: sources: principal components of the values that the linear classifier sees.
    folds: sources: parts of its cross-validation.
    ridge: sources: its ridge.
    shuffles: sources: how often memberships are shuffled, less one.
    classified: description: most samples of each kind that are classified, if they are small.
    least_classified: description: the same of large ones, at least.
    values: description: values of all of them beyond which there are fewer, and slips are not looked for in what seems
      right.
    fits: description: p-value below which another description fits better, and the given one is refused.
    doubted: description: the same below which it may fit better.
    worse: description: so many times the loss of guessing no training leaves on its data.
    overconfident: description: confidence minus accuracy on training data that no training leaves.
    too_sure: description: deviations of confidence over accuracy from which that is no chance.
    not_too_sure: description: the same up to which a classifier is not too sure, and may only be hardly trained.
    hardly: description: share of the way from chance to perfection below which such a one is hardly trained.
    half: description: the same from which a classifier knows its data, or another description may be right.
    mostly: description: the same from which the inputs of large data are taken for right.
    nearly: description: the same that another description must come if the given one is not too sure.
    unsure: description: confidence above chance of what was hardly trained, as a share of the accuracy above chance.
    flat: description: margin at which the gradient of the loss is 0 in single precision, in logits.
    held: description: correlation of a kernel with its start up to which nothing of that is held.
    unexplained: residuals: of its own data, above which weights may obey no equations.
    beside: residuals: the same over others', above which they obey none.
    searches: residuals: steps of the search for multipliers; the second where the first leaves too much.
    nearer: inputs: so many times as near as described are other inputs, from which the description is refused.
    nearer_doubted: inputs: the same from which it is doubted.
    least_near: inputs: nearness of the best inputs below which nothing is said.
    least_near_batch_norm: inputs: the same with batch norm.
    converged: decay: nearness from which weights tell their decay.
    other_decay: decay: times the given one, or one over it, from which it is another.
    same_statistics: batch norm: squared relative error of statistics that are the training data's.
    other_statistics: batch norm: the same of statistics that are not.
  """

  significant: float = 0.01
  fewer: float = 0.05
  equal: float = 0.99
  false_discovery_rate: float = 0.05
  least_counted: float = 4.0
  scored: int = 1500
  most_ratio: float = 1e3
  sources_samples: int = 1500
  sources_values: int = 2000
  components: int = 30
  folds: int = 5
  ridge: float = 0.1
  shuffles: int = 1999
  classified: int = 1000
  least_classified: int = 100
  values: int = 5 * 10**6
  fits: float = 1e-3
  doubted: float = 0.05
  worse: float = 1.2
  overconfident: float = 0.15
  too_sure: float = 4.0
  not_too_sure: float = 2.0
  hardly: float = 0.3
  half: float = 0.5
  mostly: float = 0.9
  nearly: float = 0.95
  unsure: float = 0.2
  flat: float = 104.0
  held: float = 0.05
  unexplained: float = 0.5
  beside: float = 0.8
  searches: tuple[int, ...] = (100, 1000)
  nearer: float = 20.0
  nearer_doubted: float = 5.0
  least_near: float = 0.5
  least_near_batch_norm: float = 10.0
  converged: float = 3.0
  other_decay: float = 1.5
  same_statistics: float = 1e-8
  other_statistics: float = 1e-6
