"""Which points are certified, and which account for one another: `unambiguous`, on points of every kind of evidence."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax.analysis import Subspace
from kkt_jax.classifiers import make_classifier
from kkt_jax.criteria import Criteria
from kkt_jax.extraction import certificates, vertices
from kkt_jax.extraction.certificates import Candidates

EQUATIONS, LEVELS, RANGE = range(3)
SIZE = 60


def images(number, seed=0):
  """Images of which most values are black, and their subspace."""
  random = np.random.default_rng(seed)
  x = np.where(random.uniform(size=(number, SIZE)) < 0.6, 0.0, random.uniform(size=(number, SIZE)))
  return x, around(x, x.mean(axis=0))


def around(x, origin):
  """The subspace of samples around their mean, moved to another origin."""
  rows = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)[2][: len(x) - 1]
  return Subspace(origin, jnp.asarray(rows.T, jnp.float32), jnp.ones(len(x) - 1))


def candidates(x, evidence, *, doubt=None, to_the_bit=None, misfit=None):
  number = len(x)
  full = lambda value: np.broadcast_to(value, (number,)).copy()
  return Candidates(
    unit=np.asarray(x),
    tight=full(40),
    evidence=full(evidence),
    doubt=np.arange(number) / 100 if doubt is None else np.asarray(doubt, float),
    whole=np.asarray(x),
    to_the_bit=full(np.asarray(evidence) == LEVELS if to_the_bit is None else to_the_bit),
    misfit=full(np.where(np.asarray(evidence) == EQUATIONS, 0.5, np.inf) if misfit is None else misfit),
    duals=np.zeros((number, SIZE)),
  )


def certified(points, subspace):
  return certificates.unambiguous(points, subspace, Criteria()).tolist()


@pytest.mark.parametrize("evidence", [EQUATIONS, LEVELS, RANGE])
def test_independent_points_are_all_certified_the_surest_first(evidence):
  x, subspace = images(6)
  assert certified(candidates(x, evidence, doubt=[5, 4, 3, 0, 1, 2]), subspace) == [3, 4, 5, 2, 1, 0]


def test_where_there_are_no_points_none_is_certified():
  x, subspace = images(6)
  assert certified(candidates(x[:0], RANGE), subspace) == []


@pytest.mark.parametrize("evidence", [EQUATIONS, LEVELS, RANGE])
def test_of_copies_the_surest_is_certified(evidence):
  x, subspace = images(6)
  points = candidates(x[[0, 0, 1, 2, 1]], evidence, doubt=[1, 0, 2, 3, 4])
  assert certified(points, subspace) == [1, 2, 3]


def test_two_points_that_come_to_one_image_on_levels_are_one():
  x, subspace = images(6)
  points = candidates(x[[0, 1, 2, 0]], LEVELS)
  bent = np.concatenate([x[:3], 0.95 * x[:1] + 0.05 * x[1:2]])
  assert certified(dataclasses.replace(points, unit=bent), subspace) == [0, 1, 2]


@pytest.mark.parametrize("evidence", [EQUATIONS, LEVELS, RANGE])
def test_a_blend_of_equal_evidence_may_be_the_sample_and_they_be_made_of_it(evidence):
  x, subspace = images(6)
  blend = 0.5 * x[0] + 0.5 * x[1]
  points = candidates(np.concatenate([x[:4], blend[None]]), evidence)
  assert certified(points, subspace) == [2, 3]


def test_a_blend_of_weaker_evidence_says_nothing_against_the_stronger():
  x, subspace = images(6)
  points = candidates(np.concatenate([0.5 * x[:1] + 0.5 * x[1:2], x[:4]]), [RANGE, *[EQUATIONS] * 2, *[RANGE] * 2])
  assert certified(points, subspace) == [1, 2, 3, 4]
  # Of what accounts for it, only that of its own evidence is ambiguous.
  mixed = candidates(np.concatenate([x[:3], 0.5 * x[:1] + 0.5 * x[1:2]]), [EQUATIONS, RANGE, RANGE, RANGE])
  assert certified(mixed, subspace) == [0, 2]


def test_three_that_can_be_put_together_to_one_more_are_ambiguous_where_no_equation_speaks():
  x, subspace = images(6)
  shape, other = np.zeros(SIZE), np.zeros(SIZE)
  shape[:10], other[40:50] = 0.5, 0.5  # two parts that come and go: a and b hold one each, c none
  ground = np.where(np.arange(SIZE) % 3 == 0, 0.3, 0.0)
  ground[:10] = ground[40:50] = 0.0
  parts = np.stack([ground + shape, ground + other, ground])
  made = parts[0] + parts[1] - parts[2]  # both: as good an image
  x[:, [0, 40]] = 0.9  # so that neither part can be put on another image
  data = np.concatenate([parts, x[:4]])
  subspace = around(data, data.mean(axis=0))
  assert (made >= 0).all() and (made <= 1).all() and (made == 0).sum() > 18
  for evidence in (LEVELS, RANGE):
    assert certified(candidates(data, evidence), subspace) == [3, 4, 5, 6]
  assert certified(candidates(data, EQUATIONS), subspace) == list(range(7))
  # Three certified by equations are no part of any other three.
  assert certified(candidates(data, [EQUATIONS, *[RANGE] * 6]), subspace) == list(range(7))


def test_around_a_start_that_is_no_blend_sums_of_two_are_another_one():
  x, *_ = images(6)
  x[:2] /= 2
  x[:2, 20:], x[2:, 0], x[:2, 0] = 0.0, 0.9, 0.4  # two that can be added to each other, and to no other
  subspace = Subspace(np.zeros(SIZE), jnp.linalg.qr(jnp.asarray(x.T))[0], jnp.ones(6))
  assert certified(candidates(x, RANGE), subspace) == [2, 3, 4, 5]
  assert certified(candidates(x, EQUATIONS), subspace) == list(range(6))


def test_where_five_are_on_levels_only_what_is_on_them_too_is_certified():
  x, subspace = images(8)
  bent = [*[EQUATIONS] * 5, LEVELS, EQUATIONS]  # the last one fulfils its equations, but is no image
  assert certified(candidates(x[:7], bent, to_the_bit=np.arange(7) < 6), subspace) == [0, 1, 2, 3, 4, 5]
  assert certified(candidates(x[:7], bent, to_the_bit=np.arange(7) == 5), subspace) == [0, 1, 2, 3, 4, 6, 5]
  evidence = [*[LEVELS] * 5, RANGE, RANGE]
  on = np.array([True] * 5 + [True, False])
  assert certified(candidates(x[:7], evidence, to_the_bit=on), subspace) == [0, 1, 2, 3, 4, 5]
  four = candidates(x[1:7], evidence[1:], to_the_bit=on[1:])
  assert certified(four, subspace) == list(range(6))  # four say nothing of the data


def test_where_five_fulfil_the_equations_what_does_not_by_far_is_refuted():
  x, subspace = images(8)
  evidence = [*[EQUATIONS] * 5, RANGE, RANGE]
  misfit = np.array([0.5] * 5 + [5.0, 7.0])  # `Criteria.refuted` is 6
  assert certified(candidates(x[:7], evidence, misfit=misfit), subspace) == [0, 1, 2, 3, 4, 5]
  assert certified(candidates(x[1:7], evidence[1:], misfit=misfit[1:]), subspace) == list(range(6))


def test_without_an_affine_subspace_r_are_independent_and_with_one_r_and_one_more():
  x, subspace = images(6)
  assert len(certified(candidates(x, EQUATIONS), subspace)) == 6
  # Six samples less their mean are dependent: any five account for the sixth, and might be made of it.
  around_grey = x - subspace.origin + 0.5
  assert certified(candidates(around_grey, EQUATIONS), around(around_grey, np.full(SIZE, 0.5))) == []


def test_of_samples_for_which_nothing_speaks_none_is_gathered():
  x, subspace = images(6)
  classifier = make_classifier(lambda w, v: v @ w, jnp.ones((SIZE, 2)), (SIZE,))
  examination = types.SimpleNamespace(classifier=classifier, subspace=subspace, form="max_margin", first=None)
  grey = np.full((3, SIZE), 0.5)
  points, led = certificates.gather(examination, grey, vertices.certify(grey, subspace), Criteria())
  assert not len(points.unit) and not led.any()
  points, led = certificates.gather(
    examination,
    np.concatenate([x, grey, x[:2]]),
    vertices.certify(np.concatenate([x, grey, x[:2]]), subspace),
    Criteria(),
  )
  np.testing.assert_allclose(points.unit, x)
  assert (points.evidence == RANGE).all() and np.isinf(points.misfit).all()
  assert led.tolist() == [True] * 6 + [False] * 3 + [True] * 2


def test_alike_are_points_no_farther_than_a_distance():
  points = np.array([[0.0, 0.0], [1.0, 0.0], [0.01, 0.0], [1.0, 0.01], [0.0, 1.0]])
  np.testing.assert_array_equal(certificates.first_alike(points, 0.05), [0, 1, 0, 1, 4])
  np.testing.assert_array_equal(certificates.first_alike(points, 0.001), range(5))


def test_candidates_are_chosen_and_put_together():
  x, *_ = images(4)
  points = candidates(x, [EQUATIONS, LEVELS, RANGE, RANGE])
  again = points[np.array([2, 0])] + points[np.array([1])]
  np.testing.assert_array_equal(again.unit, x[[2, 0, 1]])
  assert again.evidence.tolist() == [RANGE, EQUATIONS, LEVELS]
  assert jax.tree.all(jax.tree.map(len, [getattr(again, n) for n in again.__dataclass_fields__]))


@pytest.mark.parametrize(
  ("scales", "expected"),
  [
    ([2.0, 2.02, 1.98, 2.0, 2.01, 7.0], 2.0),
    ([2.0, 2.02, 1.98, 2.0], None),  # four say nothing
    ([2.0] * 5 + [1.0, 3.0, 4.0, 5.0, 6.0, 7.0], None),  # fewer than half agree
    ([-2.0] * 9, None),
  ],
)
def test_the_common_scale_is_that_of_five_and_of_half(scales, expected):
  found = certificates._common_scale(np.array(scales), Criteria())
  assert found == (None if expected is None else pytest.approx(expected, rel=0.01))
