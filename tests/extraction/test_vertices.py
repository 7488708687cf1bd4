"""Training samples as vertices of what the span and the range leave: polished, certified, searched and put in place."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax import generators
from kkt_jax.analysis import Subspace
from kkt_jax.analysis import subspace as subspaces
from kkt_jax.analysis.noise import directions_above_noise
from kkt_jax.classifiers import make_classifier
from kkt_jax.criteria import Criteria
from kkt_jax.extraction import exact, vertices

NUM, SIZE = 12, 80


@functools.cache
def data():
  """Samples, most of whose values are 0 or 1, their subspace, and others of the same kind."""
  random = np.random.default_rng(0)
  grey = random.uniform(size=(2, NUM, SIZE))
  x = np.where(random.uniform(size=grey.shape) < 0.15, grey, grey > 0.6).astype(np.float32)
  return x[0], around_mean(x[0]), x[1]


def around_mean(x):
  """The subspace of all samples, around their mean."""
  start = x.mean(axis=0)
  _, values, rows = np.linalg.svd(x - start, full_matrices=False)
  return Subspace(jnp.asarray(start), jnp.asarray(rows[: len(x) - 1].T), jnp.asarray(values[: len(x) - 1]))


def near(samples, amount=0.25):
  return jnp.asarray((1 - amount) * samples + amount * np.roll(samples, 1, axis=0))


def test_a_system_is_the_same_whether_products_of_directions_are_kept_or_not(monkeypatch):
  rows, weights = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3))), jnp.arange(7.0)
  kept = vertices._weighted_gram(rows)(weights)
  monkeypatch.setattr(vertices, "_PRODUCTS", 0)
  np.testing.assert_allclose(kept, vertices._weighted_gram(rows)(weights), rtol=1e-5)
  np.testing.assert_allclose(kept, rows.T @ jnp.diag(weights) @ rows, rtol=1e-5)


def test_what_is_near_a_training_sample_is_polished_to_it_and_certified():
  x, subspace, _ = data()
  polished = vertices.polish(near(x), subspace)
  np.testing.assert_allclose(polished, x, atol=2e-3)
  certificates = vertices.certify(polished, subspace)
  assert certificates.certified.all()
  np.testing.assert_array_equal(certificates.tight, ((x == 0) | (x == 1))[:, subspace.free_coordinates].sum(axis=1))
  assert certificates.overshoot.max() < 2e-3
  assert certificates.firmness.min() > 0.2


def test_known_samples_lead_to_others():
  x, subspace, _ = data()
  one_more = np.concatenate([subspace.coordinates(x), np.ones((NUM, 1))], axis=1)
  duals = np.linalg.inv(one_more).T[:4]  # 1 on a known sample and 0 on all others
  others = vertices.Others(jnp.asarray(1e4 * duals.T @ duals), jnp.eye(NUM))
  start = jnp.asarray(0.6 * x[:4] + 0.4 * x[4:8])
  np.testing.assert_allclose(vertices.polish(start, subspace), x[:4], atol=2e-3)
  np.testing.assert_allclose(vertices.polish(start, subspace, others=others), x[4:8], atol=2e-3)


def test_samples_that_came_to_one_vertex_are_certified_as_each_alone():
  x, subspace, _ = data()
  mixed = jnp.concatenate(
    [vertices.polish(near(x[:4], amount), subspace) for amount in (0.1, 0.2)] + [near(x[:2], 0.5)]
  )
  together, alone = vertices.certify(mixed, subspace), [vertices.certify(one[None], subspace) for one in mixed]
  assert together.certified[:8].all() and not together.certified[8:].any()
  for name in ("firmness", "contrast", "certified"):
    np.testing.assert_allclose(getattr(together, name), [getattr(own, name)[0] for own in alone], rtol=1e-5)


def test_a_point_of_the_span_is_left_where_it_is_pinned_down_by_no_more_than_chance():
  x, subspace, others = data()
  inside = subspace.points(subspace.coordinates(others))
  certificates = vertices.certify(vertices.polish(inside, subspace), subspace)
  found = vertices.polish(inside, subspace)[certificates.certified]
  for sample in np.asarray(found):  # what is certified is a training sample, wherever it came from
    assert np.abs(x - sample).max(axis=1).min() < 5e-3
  assert not vertices.certify(inside, subspace).certified.any()


@pytest.mark.parametrize(("noise", "least"), [(1e-4, NUM), (3e-3, 0), (0.03, 0)])
def test_a_span_that_noise_blurs_proves_less_and_nothing_that_is_false(noise, least):
  x, subspace, others = data()
  random = np.random.default_rng(1)
  kernel = (x - subspace.origin[None]).T @ random.normal(size=(NUM, 100)) + noise * random.normal(size=(SIZE, 100))
  blurred = subspaces.Subspace(subspace.origin, *directions_above_noise(kernel))
  assert blurred.dimension == NUM - 1
  for guesses in (near(x), others):
    polished = vertices.polish(guesses, blurred)
    proven = np.asarray(polished)[vertices.certify(polished, blurred).certified]
    assert all(np.abs(x - sample).max(axis=1).min() < 0.02 for sample in proven)
    assert len(proven) >= (least if guesses is not others else 0)


def test_mixtures_of_two_and_what_leaves_the_range_are_not_certified():
  # A value for each pair of samples, 1 in these two alone: a mixture has most of its values at an end of the range.
  pairs = list(itertools.combinations(range(NUM), 2))
  x = np.array([[float(index in pair) for pair in pairs] for index in range(NUM)], np.float32)
  x *= np.random.default_rng(0).choice([1.0, 0.4], x.shape, p=[0.8, 0.2]).astype(np.float32)
  subspace = around_mean(x)
  assert vertices.certify(x, subspace).certified.all()
  mixture = vertices.certify((x + np.roll(x, 1, axis=0)) / 2, subspace)
  assert (mixture.tight >= subspace.required_active()).all()
  assert mixture.firmness.max() < 1e-3
  assert not mixture.certified.any()
  beyond = vertices.certify(2 * x - np.roll(x, 1, axis=0), subspace)
  assert (beyond.overshoot > 0.5).all()
  assert not beyond.certified.any()


def test_a_picture_made_brighter_is_not_certified():
  x = np.array(data()[0])
  x[0], x[1], x[1, ::4] = 0.0, 0.7, 0.0  # black, and even areas of black and grey
  x[1, :20:4] = np.linspace(0.1, 0.6, 5)
  subspace = around_mean(x)
  brighter = vertices.certify(x[1:2] / 0.7, subspace)
  assert brighter.tight[0] > 50 and brighter.overshoot[0] < 1e-5 and brighter.firmness[0] > 0.3
  assert brighter.vertex.all()
  assert brighter.contrast[0] < 1e-3 and not brighter.certified.any()
  # With a black image in the span every other could be brighter than it was.
  assert not vertices.certify(x[2:], subspace).certified.any()


def test_images_of_whole_levels_are_found_to_the_bit_and_nothing_else_is():
  random = np.random.default_rng(0)
  x = random.choice([0, 0, 0, 1, 253, 254, 255], size=(NUM, 300)) / 255
  subspace = around_mean(x)
  white = np.where(x > 0.9, 1.0, np.where(x < 0.01, 0.0, x))  # as polishing leaves them
  bent = subspace.points(subspace.coordinates(white))
  found, off = vertices.to_levels(bent, subspace)
  np.testing.assert_allclose(found, x, atol=1e-7)
  assert off.max() < 0.05
  mixed, off = vertices.to_levels((x + np.roll(x, 1, axis=0)) / 2, subspace)
  same = (np.abs(mixed[:, None] - x[None]).max(axis=2) < 1e-6).any(axis=1)
  assert ((off > Criteria().off_level) | same).all() and not same.all()


def test_a_value_that_can_move_by_itself_is_on_no_level():
  random = np.random.default_rng(0)
  x = random.choice([0, 0, 1, 254, 255], size=(NUM, 300)) / 255
  wide, narrow = around_mean(x), around_mean(np.concatenate([x, x[:1]]) + np.eye(NUM + 1, 300) / 255)
  assert vertices.off_level(wide) == Criteria().off_level  # all values hold one another
  step = narrow.basis @ narrow.basis[0]
  left = np.abs(np.asarray(step) - np.eye(300)[0]).max()
  assert vertices.off_level(narrow) <= left / 2 + 1e-6
  assert vertices.off_level(Subspace(jnp.zeros(3), jnp.eye(3)[:, :1], jnp.ones(1))) == 0


def test_images_come_to_their_levels_where_black_values_alone_leave_directions_open():
  random = np.random.default_rng(0)
  x = random.integers(20, 120, size=(NUM, 300)) / 255
  x[:, :5], x[:, 5:60] = 0, random.integers(252, 256, size=(NUM, 55)) / 255
  x = random.permuted(x, axis=1)
  subspace = around_mean(x).in_float64
  assert (vertices.left_open(x, subspace) == subspace.dimension - 5).all()
  bent = []
  for own in x:  # as polishing leaves them: black and white are where they can be
    ends = (own == 0) | (own > 0.98)
    c, *_ = np.linalg.lstsq(subspace.basis[ends], (np.round(own) - subspace.origin)[ends])
    bent.append(subspace.points(c[None])[0])
  assert np.abs(np.array(bent) - x).max() > 1 / 255
  found, off = vertices.to_levels(np.array(bent), subspace)
  np.testing.assert_allclose(found, x, atol=1e-7)
  assert off.max() < 0.05


def test_white_values_are_the_surest_of_light_images():
  images = np.array([[0.0, 0.0, 1.0, 0.2], [1.0, 1.0, 1.0, 0.8]])
  assert vertices.left_open(images, Subspace.whole(jnp.full(4, 0.5))).tolist() == [2, 1]


def test_values_that_always_move_together_count_once(monkeypatch):
  x, subspace, _ = data()
  basis = jnp.concatenate([subspace.basis, subspace.basis[:1], -2 * subspace.basis[1:2], 0 * subspace.basis[:1]]) / 2
  count = lambda: Subspace(jnp.zeros(SIZE + 3), basis, subspace.singular_values).free_coordinates
  counted = count()
  np.testing.assert_array_equal(counted[:SIZE], subspace.free_coordinates)
  monkeypatch.setattr(subspaces, "_ROWS", 7)
  np.testing.assert_array_equal(counted, count())  # in blocks
  assert counted[:2].all() and not counted[SIZE:].any()


def test_values_end_where_similar_samples_of_the_label_do():
  x = np.array([[0.0, 0.9, 0.5], [0.0, 0.9, 0.5]])
  others = np.array([[0.1, 1.0, 0.5], [0.0, 0.2, 0.9], [1.0, 1.0, 1.0]])
  black, white = vertices.likely_ends(x, [0, 1], others, [0, 0, 1])
  np.testing.assert_allclose(black, [[0.95, 0.05, 0.05], [0.05, 0.05, 0.05]], atol=1e-6)
  np.testing.assert_allclose(white, [[0.05, 0.5, 0.5], [0.95, 0.95, 0.95]], atol=1e-6)
  many = np.concatenate([np.zeros((8, 3)), np.ones((50, 3))])  # only the nearest are asked
  np.testing.assert_allclose(vertices.likely_ends(x[:1], [0], many, [0] * 58)[1], 0.05, atol=1e-6)
  np.testing.assert_allclose(vertices.likely_ends(x[:1], [3], many, [0] * 58), 0.05, atol=1e-6)


def test_neighbouring_pixels_are_mixed_and_other_values_are_not():
  values = jnp.arange(12.0)
  np.testing.assert_array_equal(vertices._with_neighbours(values, (12,)), values)
  image = jnp.zeros((3, 4, 1)).at[1, 1, 0].set(1.0)
  mixed = vertices._with_neighbours(image.reshape(-1), image.shape).reshape(3, 4)
  np.testing.assert_allclose(mixed[1], [0.09375, 0.5625, 0.09375, 0.0], atol=1e-6)
  np.testing.assert_allclose(jnp.sum(mixed), 1.0, atol=1e-6)


def test_what_similar_samples_say_helps_the_polish():
  x, subspace, _ = data()
  far = near(x, 0.45)
  alone = vertices.certify(vertices.polish(far, subspace), subspace).certified.sum()
  likely = jnp.stack([jnp.where(x == 0, 0.95, 0.05), jnp.where(x == 1, 0.95, 0.05)])
  helped = vertices.certify(vertices.polish(far, subspace, likely=likely), subspace).certified.sum()
  assert helped == NUM
  assert helped >= alone
  with pytest.raises(ValueError, match="likely"):
    vertices.polish(far, subspace, likely=likely[:, :2])


def test_the_start_is_no_training_sample_though_it_lies_at_the_ends_of_the_range():
  x, *_ = data()
  x = 1 - x  # mostly white
  black = jnp.zeros(SIZE)  # what a network that subtracts nothing starts from
  basis = jnp.linalg.qr(jnp.asarray(x).T)[0]
  certificates = vertices.certify(np.concatenate([x, np.zeros((1, SIZE))]), Subspace(black, basis, jnp.ones(NUM)))
  assert certificates.tight[-1] == SIZE
  assert certificates.vertex.tolist() == [True] * NUM + [False]
  assert not certificates.certified.any()  # around one value throughout, nothing tells a sample from a brighter one


def test_around_black_a_darker_sample_is_no_vertex_and_a_sample_that_may_be_one_is_not_certified():
  x, *_ = data()
  basis = jnp.linalg.qr(jnp.asarray(x).T)[0]
  subspace = Subspace(jnp.zeros(SIZE), basis, jnp.ones(NUM))
  certificates = vertices.certify(np.concatenate([x, x / 2]), subspace)
  assert ((x == 0).sum(axis=1) > (x == 1).sum(axis=1)).all()  # a darker one has as many black values
  assert certificates.tight.min() >= subspace.required_active()
  assert certificates.vertex.tolist() == [True] * NUM + [False] * NUM
  assert not certificates.certified.any()


def test_random_points_find_what_is_not_known_yet():
  x, subspace, _ = data()
  points = vertices.search(jax.random.key(0), subspace, 40, known=x[:6])
  start = np.asarray(subspace.origin)
  np.testing.assert_allclose((np.asarray(points) - start) @ (x[:6] - start).T, 0.0, atol=1e-4)
  polished = np.asarray(vertices.polish(points, subspace))
  sure = polished[vertices.certify(polished, subspace).certified]
  found = np.abs(sure[:, None] - x[None]).max(axis=2).argmin(axis=1)
  assert len(set(found) - set(range(6))) >= 4


def examined(**changes):
  """What the search asks of an examination of a classifier whose weights are those of the nearest training sample."""
  x, subspace, _ = data()
  weights = jnp.asarray((x - x.mean(axis=0)).T)
  classifier = make_classifier(lambda w, v: v @ w, weights, (SIZE,), value_range=(-1.0, 1.0), labels=range(5, 5 + NUM))
  own = {"classifier": classifier, "subspace": subspace, "origin": subspace.origin, "tells_mean": True}
  own |= {"share": (NUM - 1) / SIZE, "form": "max_margin", "first": None} | changes
  return types.SimpleNamespace(**own)


@pytest.mark.parametrize("num_steps", [20, 60])
def test_all_training_samples_are_found_each_once_with_their_labels(num_steps):
  x, *_ = data()
  told = []
  guesses = jnp.concatenate([near(x[:4], 0.1), near(x[:4], 0.05), jnp.full((40, SIZE), 0.5)])
  tell = lambda *row: told.append(row)
  found, led = exact.find(examined(), guesses, np.zeros(48, int), exact.Effort(12, num_steps=num_steps), on_round=tell)
  assert told[0][0] == 1 and told[0][1] >= 4 and told[0][2] == NUM
  assert told[-1][1] == NUM == len(found.y)
  assert led.all()  # there are no others
  order = np.abs(found.unit[:, None] - x[None]).max(axis=2).argmin(axis=1)
  assert sorted(order) == list(range(NUM))
  np.testing.assert_allclose(found.unit, x[order], atol=5e-3)
  assert len(set(found.y)) > NUM // 2 and set(found.y) <= set(range(5, 5 + NUM))


def test_one_round_only_polishes_the_guesses():
  x, *_ = data()
  found, led = exact.find(
    examined(), jnp.concatenate([near(x[:3], 0.1), jnp.full((2, SIZE), 0.5)]), np.arange(5), exact.Effort(1)
  )
  assert 3 <= len(found.y) < NUM
  assert led[:3].all()


def test_where_too_few_guesses_become_training_samples_nothing_is_tried():
  x, *_ = data()
  guesses = jnp.concatenate([near(x[:3], 0.1), jnp.full((2, SIZE), 0.5)])
  hope = exact.hope(examined(), guesses, np.arange(5))
  assert hope >= 0.6
  find = lambda least: exact.find(examined(), guesses, np.arange(5), exact.Effort(1, least_hope=least))[0]
  assert len(find(hope - 0.1).y) >= 3 and not len(find(hope).y)


def test_what_was_certified_before_stays_so():
  x, *_ = data()
  hopeless, guesses = jnp.full((2, SIZE), 0.5), [jnp.concatenate([near(own, 0.1)] * 2) for own in (x[:3], x[3:6])]
  found, _ = exact.find(examined(), jnp.concatenate([guesses[0], hopeless]), np.arange(8), exact.Effort(1))
  bent = found._replace(unit=found.unit + 2e-3)  # would not be certified anew
  assert not vertices.certify(bent.unit, examined().subspace).certified.any()
  copies = jnp.concatenate([guesses[1], bent.unit])
  both, led = exact.find(examined(), copies, np.arange(len(copies)), exact.Effort(1), known=bent)
  assert led[6:].all()
  kept = np.abs(both.unit[:, None] - bent.unit[None]).max(axis=2).min(axis=0)
  assert len(both.y) >= len(found.y) + 3 >= 6 and (kept < 1e-6).all()
  same, led = exact.find(examined(), jnp.asarray(bent.unit), bent.y, exact.Effort(2), known=bent)
  assert same is bent and led.all()


@pytest.mark.parametrize("changes", [{"subspace": None}, {"classifier": "unbounded"}])
def test_without_a_subspace_or_a_range_nothing_is_claimed(changes):
  x, *_ = data()
  if "classifier" in changes:
    changes = {"classifier": make_classifier(lambda w, v: v @ w, jnp.ones((SIZE, 2)), (SIZE,), value_range=None)}
  found, led = exact.find(examined(**changes), near(x), np.zeros(NUM, int), exact.Effort(3))
  assert not len(found.y) and not led.any()


def test_what_cannot_be_pinned_down_is_not_tried():
  found, led = exact.find(
    examined(), jnp.full((6, SIZE), 0.5), np.zeros(6, int), exact.Effort(3), on_round=lambda *row: pytest.fail("tried")
  )
  assert not len(found.y) and not led.any()


def test_a_table_takes_samples_in_units_of_the_range():
  x, *_ = data()
  generator = generators.table(codes=3)([examined()])
  theta, _ = generator.init(jax.random.key(0))
  changed = generator.put(theta, 0, np.array([6, 5]), np.array([2, 0]), jnp.asarray(x[:2]))
  noise = jax.scipy.stats.norm.ppf(jnp.array([2.5, 0.5]) / 3)[:, None]
  drawn, _ = generator.generate(changed, {}, noise, jnp.array([6, 5]), jnp.zeros(2, int), False)
  np.testing.assert_allclose(drawn, 2 * x[:2] - 1, atol=1e-4)
  same = np.ones(changed[0].shape[:2], bool)
  same[[1, 0], [2, 0]] = False  # the places of labels 6 and 5
  np.testing.assert_array_equal(changed[0][same], theta[0][same])


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda x, subspace: vertices.polish(x[:, :9], subspace), "x must have shape"),
    (lambda x, subspace: vertices.certify(x * jnp.nan, subspace), "x must be finite"),
    (lambda x, subspace: vertices.polish(x[0], subspace), "x must be a batch"),
  ],
)
def test_what_does_not_fit_is_refused_by_name(call, message):
  x, subspace, _ = data()
  with pytest.raises(ValueError, match=message):
    call(jnp.asarray(x), subspace)
