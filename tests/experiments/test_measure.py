"""Measuring: every control is what it says, and the judge, the distractors and the held-out images are not mixed up."""

import ast
import collections
import dataclasses
import functools
import io
import json
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from test_judge import shades

from experiments import mnist
from experiments.data import Split
from experiments.measure import circle, comparison, images
import kkt_jax
from kkt_jax._errors import InputError
from kkt_jax.auditing import matching
from kkt_jax.auditing.samples import Samples
from kkt_jax.classifiers import make_classifier
from kkt_jax.cli.workdir import Workdir
from kkt_jax.extraction import Exact
from kkt_jax.kkt import Conditions


@dataclasses.dataclass
class Finished:
  """What `kkt_jax.Reconstruction` offers to measuring, with a generator that deals out given samples in turn."""

  classifiers: list[Any]
  conditions: list[Conditions]
  all: Samples
  fresh: Samples
  owner: np.ndarray | None = None  # which classifier each fresh sample is of
  margins = np.array([0.5, 0.25])
  exact = ()
  table = None
  examinations = ()

  def every_sample(self):
    return jnp.asarray(self.all.x), self.all.y

  def choose_classifiers(self, key, y):
    return jnp.asarray(np.arange(len(y)) // 3 % len(self.classifiers))

  def sample(self, key, y, *, t=None):
    drawn, given = [], collections.Counter()
    for i, label in enumerate(y):
      own = np.flatnonzero((self.fresh.y == label) & (True if t is None else self.owner == t[i]))
      drawn.append(own[given[tuple(own)] % len(own)])
      given[tuple(own)] += 1
    return jnp.asarray(self.fresh.x[drawn])


def linear(shape, num_classes, **settings):
  """Logits x . w for given weights, and the weights."""
  w = 0.1 * jax.random.normal(jax.random.key(0), (int(np.prod(shape)), num_classes))
  return make_classifier(lambda w, x: x.reshape(len(x), -1) @ w, w, shape, **settings)


def softmax_sum(classifier, x, y, mu=None):
  """1/M sum_i sum_c mu_ic (grad Phi_y - grad Phi_c): of two classes, mu_i of the other one times +-x_i."""
  flat = np.asarray(x, np.float64).reshape(len(x), -1)
  logits = flat @ np.asarray(classifier.params, np.float64)
  other = 1 / (1 + np.exp(logits[np.arange(len(y)), y] - logits[np.arange(len(y)), 1 - y])) if mu is None else mu
  sign = np.where(np.arange(2)[None, :] == y[:, None], 1, -1)
  return jnp.asarray(flat.T @ (other[:, None] * sign) / len(y), jnp.float32)


# --- controls, similarity, retrieval ---


def test_controls_are_what_they_say():
  train, held_out = shades(5, 0), shades(4, 1)
  y = np.array([0, 0, 0, 1, 1, 1])
  sets = matching.controls(train, held_out, y, jax.random.key(0))
  assert list(sets) == ["real_held_out", "training_data", "class_means", "dataset_mean", "uniform_noise"]
  assert all(images.y.tolist() == [0, 0, 0, 1, 1, 1] for images in sets.values())
  np.testing.assert_array_equal(sets["real_held_out"].x, held_out.x[[0, 1, 2, 4, 5, 6]])
  np.testing.assert_array_equal(sets["training_data"].x, train.x[[0, 1, 2, 5, 6, 7]])
  np.testing.assert_allclose(sets["class_means"].x[1], train.x[:5].mean(0))
  np.testing.assert_allclose(sets["class_means"].x[4], train.x[5:].mean(0))
  np.testing.assert_allclose(sets["dataset_mean"].x, np.broadcast_to(train.x.mean(0), (6, 8, 8, 1)))
  noise = sets["uniform_noise"].x
  assert (noise.min() >= 0, noise.max() <= 1, 0.4 < noise.mean() < 0.6) == (True,) * 3
  assert "real_held_out" not in matching.controls(train, None, y, jax.random.key(0))


def test_controls_of_the_commonest_kind_have_as_many_as_the_rarest_class_of_the_samples():
  sets = matching.controls(shades(5, 0), shades(1, 1), np.array([0, 0, 0, 1, 1]), jax.random.key(0))
  assert np.bincount(sets["training_data"].y).tolist() == [2, 2]
  assert np.bincount(sets["real_held_out"].y).tolist() == [1, 1]  # as many as there are
  assert sets["class_means"].y.tolist() == [0, 0, 0, 1, 1]


def test_similarity_is_the_best_of_the_class_only():
  data = shades(3, 0)
  samples = Samples(data.x[[0, 1, 5, 0]], np.array([0, 0, 1, 1]))  # unequal classes of samples come to the same below
  best = matching.similarity(samples, data)
  np.testing.assert_allclose(best[[0, 1, 5]], 1, atol=1e-6)
  assert np.all(best[[2, 3, 4]] < 0.9)
  alone = matching.similarity(Samples(samples.x[:2], samples.y[:2]), data)
  np.testing.assert_allclose(alone[:3], best[:3], atol=1e-6)
  assert np.all(alone[3:] == -np.inf)


@pytest.mark.parametrize("shape", [(1,), (4, 4, 1)])
def test_similarity_of_what_is_no_image_is_the_negative_distance(shape):
  samples, data = (np.array(values, np.float32)[:, None] for values in ([0, 5, 1], [2, 3, 4, 9]))
  spread = lambda x: np.broadcast_to(x.reshape(-1, *[1] * len(shape)), (len(x), *shape)) / np.sqrt(np.prod(shape))
  near = matching.similarity(
    Samples(spread(samples), np.array([0, 0, 1])), Samples(spread(data), np.array([0, 0, 1, 2]))
  )
  np.testing.assert_allclose(near, [-2, -2, -3, -np.inf], rtol=1e-6)


def test_training_images_are_picked_out_from_distractors_of_their_own_class():
  train, others = shades(2, 0), shades(5, 1)
  found = comparison.retrieval(train, train, others)
  assert found["retrieval_top1"] == 1.0
  assert found["retrieval_candidates"] == 3  # 5 // 2 distractors each
  assert found["retrieval_p_value"] == pytest.approx(3.0**-4)
  assert found["nearer_share"] == 1.0
  assert comparison.retrieval(others, train, others)["retrieval_top1"] == 0.0


def test_retrieval_groups_hold_one_class_each_however_many_are_left_over():
  train = Samples(np.array([[0.0], [0.1], [100.0], [100.1]], np.float32), np.array([0, 0, 1, 1]))
  others = Samples(np.array([[1.0], [2.0], [3.0], [201.0], [202.0], [203.0]], np.float32), np.repeat([0, 1], 3))
  samples = Samples(np.array([[0.0], [150.0]], np.float32), np.array([0, 1]))
  # In class 1 all training points are 50 from the sample, nearer than 201 and 202, but not than the 3 of class 0 is.
  assert comparison.retrieval(samples, train, others)["retrieval_hits"] == 4


def test_retrieval_takes_as_many_as_there_are_distractors():
  found = comparison.retrieval(shades(6, 0), shades(6, 0), shades(4, 1))
  assert found["retrieval_p_value"] == pytest.approx(0.5**8)  # 4 of each class against one other each


@pytest.mark.parametrize(
  ("y", "message"),
  [
    ([0, 0, 0], "--held_out_data must hold samples of every class; it has none of class 1"),
    ([0, 1, 2], "it has class 2"),
  ],
)
def test_classes_that_are_missing_or_unknown_are_named(y, message):
  sets = {
    "--train_data": Samples(np.zeros((2, 1)), np.array([0, 1])),
    "--held_out_data": Samples(np.zeros((3, 1)), np.array(y)),
  }
  with pytest.raises(InputError, match=message):
    matching.check_classes(sets, range(2))
  with pytest.raises(InputError, match="must hold samples of every class"):
    comparison.retrieval(*[sets["--train_data"]] * 2, sets["--held_out_data"])


def test_pairs_show_the_training_image_of_the_class_that_is_most_similar():
  train = shades(3, 0)
  generated = Samples(train.x[[2, 1, 0, 5, 4, 3]], train.y)
  drawn = functools.partial(matching.similar_pairs, generated, train, columns=1, rows=3)
  picture = matplotlib.image.imread(io.BytesIO(drawn()))[:, 220:, 0]
  assert picture.shape == (7 * 30, 2 * 30)  # three pairs of rows and the mean, 8 + 2 pixels at 3 each
  for row in (0, 2, 4):
    np.testing.assert_array_equal(picture[30 * row : 30 * row + 30], picture[30 * row + 30 : 30 * row + 60])
  np.testing.assert_allclose(picture[183:207:3, 3:27:3], train.x.mean(0)[..., 0], atol=1 / 255)
  np.testing.assert_allclose(picture[3:27:3, 3:27:3], train.x[2, ..., 0], atol=1 / 255)
  framed = matplotlib.image.imread(io.BytesIO(drawn(certified=train.x[2:3])))[:, 220:]
  np.testing.assert_allclose(framed[0, 1], (0.1, 0.65, 0.2, 1.0), atol=1 / 255)  # the first image is certified
  np.testing.assert_array_equal(framed[0, 31], np.ones(4))  # the second is not


def test_draws_are_training_images_or_one_another_or_new():
  random = np.random.default_rng(0)
  train, others = random.uniform(size=(2, 3, 12, 12, 1)).astype(np.float32)
  drawn = Samples(np.concatenate([train[:2], others[:2], others[1:2]]), np.zeros(5, int))
  assert comparison.novelty(drawn, Samples(train, np.zeros(3, int))) == {
    "trained": pytest.approx(0.4),
    "repeated": pytest.approx(0.4),
    "new": pytest.approx(0.2),
  }


def polished(*claims):
  """A reconstruction with certified samples: unit, y and to_the_bit of each classifier."""
  exact = [
    Exact(unit, y, np.zeros(len(y), int), np.array(bits, bool), np.arange(len(y)) % 2) for unit, y, bits in claims
  ]
  examinations = [types.SimpleNamespace(most_samples=6)] * len(exact)
  return types.SimpleNamespace(exact=tuple(exact), examinations=examinations)


def test_what_is_certified_is_counted_beside_the_truth():
  train = shades(3, 0)
  claimed = np.concatenate([train.x[:2], 1 - train.x[2:3]]), train.y[:3], [True, False, True]
  counts, images = matching.exactness(polished(claimed, (train.x[:0], train.y[:0], [])), train)
  evidence = {"equations": 2, "levels": 1, "range": 0}
  found = {"certified": 3, "most": 6, "exact": 2, "false": 1, "to_the_bit": 2, "identical": 1}
  assert counts[0] == found | evidence
  assert counts[1] == dict.fromkeys(counts[0], 0) | {"most": 6}
  assert len(images) == 3
  assert matching.exactness(types.SimpleNamespace(exact=()), train)[0] == []  # not polished


@pytest.mark.parametrize("shape", [(30,), (3, 5), (4, 4, 1), (9, 9, 3)])
def test_certificates_of_every_shape_are_compared_by_value(shape):
  train = Samples(
    np.random.default_rng(0).integers(0, 256, size=(6, *shape)).astype(np.float32) / 255, np.zeros(6, int)
  )
  unit = train.x[[0, 1, 2, 3, 4]].copy()
  at = (slice(1, 4), *[0] * len(shape))
  unit[at] = np.where(unit[at] > 0.5, unit[at] - [0.019, 0.021, 0.5], unit[at] + [0.019, 0.021, 0.5])
  (counts,), samples = matching.exactness(polished((unit, train.y[:5], [True, True, False, False, True])), train)
  assert (counts["exact"], counts["false"], counts["to_the_bit"], counts["identical"]) == (3, 2, 3, 2)
  places, differences = matching.nearest_by_value(samples, train.x)
  assert places.tolist() == [0, 1, 2, 3, 4]
  np.testing.assert_allclose(differences, [0, 0.019, 0.021, 0.5, 0], atol=1e-6)
  assert np.isinf(matching.nearest_by_value(samples, train.x[:0])[1]).all()


# --- images ---


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
  """A generator of the training images, with a little noise if fresh; the classes are swapped for the judge."""
  folder = tmp_path_factory.mktemp("images")
  generator = np.random.default_rng(9)
  sets = {name: shades(6, seed, flipped=True) for seed, name in enumerate(("train", "distractors"))}
  noise = 0.01 * generator.standard_normal(sets["train"].x.shape).astype(np.float32)
  drawn = Samples(np.clip(sets["train"].x + noise, 0, 1), sets["train"].y)
  # What is held out is nearer to fresh samples than the training images are.
  data = Split(evaluation=shades(8, 5), held_out=drawn, **sets)
  classifier = linear((8, 8, 1), 2)
  target = softmax_sum(classifier, data.train.x, data.train.y)
  done = Finished([classifier], [Conditions(target, jnp.ones_like(target))], data.train, drawn)

  def evaluate():
    out = Workdir(folder / "run", {})
    config = mnist.Config(seed=0, judge_epochs=20, thorough=True, population=30)
    with jax.numpy_rank_promotion("raise"):  # as in the tests, so that nothing is compiled twice
      return images.evaluate(out, folder, data, done, config, num_samples=12, picture="fig6.png")

  return evaluate(), data, done, folder, evaluate


def test_the_judge_is_trained_on_the_images_for_evaluation(measured):
  metrics = measured[0]
  assert metrics["training_data"]["eval_accuracy"] == 0.0  # bright is class 1 for the judge, class 0 in training
  assert metrics["fresh_noise"]["eval_accuracy"] == 0.0
  assert metrics["training_data"]["useful_accuracy"] == 0.0  # tested on these images, too
  assert 0 <= metrics["training_data"]["taught_accuracy"] <= 1  # by a classifier of random weights


def test_retrieval_compares_with_the_distractors_and_not_with_what_is_held_out(measured):
  metrics = measured[0]
  assert metrics["fresh_noise"]["retrieval_top1"] == 1.0
  assert metrics["fresh_noise"]["nearer_share"] == 1.0
  assert metrics["fresh_noise"]["retrieval_p_value"] == pytest.approx(0.5**12)


def test_metrics_of_the_controls_are_those_of_what_they_say(measured):
  metrics = measured[0]
  assert metrics["training_data"]["ssim_cover"] == pytest.approx(1.0)
  assert metrics["training_data"]["distinct_nearest"] == 12
  assert metrics["training_data"]["coverage_pixels_k5"] == 1.0
  assert metrics["training_data"]["kernel_distance"] < 0  # unbiased, and a set against itself
  assert metrics["real_held_out"]["spread"] == pytest.approx(1.0)
  assert metrics["class_means"]["spread"] == 0.0
  assert metrics["class_means"]["label_agreement"] == 1.0
  assert metrics["dataset_mean"]["label_agreement"] == 0.5
  assert metrics["uniform_noise"]["ssim_cover"] < 0.5
  assert metrics["recovered_by_all_trained_noise"]["ssim_cover"] == pytest.approx(1.0)
  assert metrics["recovered_by_all_trained_noise"]["above_0.9"] == 12
  assert metrics["trained_noise"]["ssim_cover"] == pytest.approx(1.0)
  assert metrics["recovered_by_real_held_out"]["ssim_cover"] == pytest.approx(metrics["fresh_noise"]["ssim_cover"])
  assert 0.9 < metrics["fresh_noise"]["ssim_cover"] < 1 - 1e-4
  assert metrics["recovered_by_class_means"]["images"] == 12


def test_the_residual_is_that_of_the_conditions(measured):
  metrics, data, done, *_ = measured
  target = np.asarray(done.conditions[0].target)
  means = np.stack([data.train.x[data.train.y == label].mean(0) for label in data.train.y])
  many = np.resize([0, 1], 30)
  for name, x, y in (("class_means", means, data.train.y), ("fresh_noise", done.sample(None, many), many)):
    error = np.asarray(softmax_sum(done.classifiers[0], x, y)) - target
    assert metrics[name]["residual"][0] == pytest.approx(np.sum(error**2) / np.sum(target**2), rel=1e-3), name
  for name in ("training_data", "trained_noise"):
    assert metrics[name]["residual"][0] < 1e-10
    assert metrics[name]["residual_free"] == metrics[name]["residual"]  # it has no gates
  assert metrics["uniform_noise"]["residual"][0] > 0.1
  assert "residual" not in metrics["real_held_out"]


def test_what_a_run_leaves(measured):
  metrics, data, done, folder, _ = measured
  kept = json.loads((folder / "run" / "metrics.json").read_text())
  assert kept == {name: value for name, value in metrics.items() if name not in ("summary", "pictures")}
  assert metrics["exp_minus_alpha"] == [0.5, 0.25]
  logits = data.train.x.reshape(12, -1) @ np.asarray(done.classifiers[0].params)
  signs = np.where(data.train.y == 1, 1, -1)
  assert metrics["true_median_margin"] == [pytest.approx(np.median(signs * (logits[:, 1] - logits[:, 0])), rel=1e-4)]
  rows = [line.split()[0] for line in metrics["summary"].split("\n\n")[0].splitlines()[1:]]
  assert rows == [
    "fresh_noise",
    "trained_noise",
    "real_held_out",
    "training_data",
    "class_means",
    "dataset_mean",
    "uniform_noise",
  ]
  assert metrics["pictures"] == ["fig6.png"]
  assert (folder / "run" / "fig6.png").exists()


def test_controls_and_judge_are_not_measured_twice(measured, monkeypatch):
  metrics, *_, evaluate = measured
  monkeypatch.setattr(matching, "controls", None)
  monkeypatch.setattr("experiments.measure.judge._fit", lambda *args, **kwargs: pytest.fail("trained again"))
  kept = {True: metrics["fresh_noise"]["taught_accuracy"], False: metrics["fresh_noise"]["useful_accuracy"]}
  monkeypatch.setattr(comparison, "usefulness", lambda *args, lessons=None, **kwargs: kept[lessons is not None])
  assert evaluate() == metrics


def test_a_class_that_is_missing_is_named_before_anything_is_trained(measured, monkeypatch, tmp_path):
  _, data, done, *_ = measured
  monkeypatch.setattr(images, "train_judge", lambda *args, **kwargs: pytest.fail("trained"))
  data = dataclasses.replace(data, held_out=Samples(data.held_out.x[:6], data.held_out.y[:6]))
  config = mnist.Config(seed=0, judge_epochs=1, population=4)
  with pytest.raises(InputError, match="held_out must hold samples of every class; it has none of class 1"):
    images.evaluate(Workdir(tmp_path, {}), tmp_path, data, done, config, num_samples=4, picture="a.png")


def test_trained_samples_are_dealt_out_in_their_order_and_again_from_the_first():
  drawn = Samples(np.arange(5.0)[:, None], np.array([1, 0, 1, 0, 1]))
  dealt = images._with_labels(drawn, np.array([0, 0, 0, 1, 1]))
  assert dealt.x[:, 0].tolist() == [1, 3, 1, 0, 2]
  assert dealt.y.tolist() == [0, 0, 0, 1, 1]


def test_the_residual_of_many_samples_is_that_of_all_at_once(monkeypatch):
  classifier, own = linear((8, 8, 1), 2), shades(5, 0)
  target = softmax_sum(classifier, own.x[:4], own.y[:4])
  conditions = Conditions(target, jnp.ones_like(target))
  error = np.asarray(softmax_sum(classifier, own.x, own.y)) - target
  monkeypatch.setattr(images, "_AT_ONCE", 3)  # parts of 3, 3, 2 and 2
  residual = images._residual(classifier, conditions, jnp.asarray(own.x), jnp.asarray(own.y))
  assert residual == pytest.approx(float(np.sum(error**2) / np.sum(target**2)), rel=1e-4)


def test_multipliers_are_fitted_where_samples_interact_and_labels_of_others_are_left_out():
  classifier = dataclasses.replace(linear((8, 8, 1), 2, labels=(0, 1)), statistics={})
  own = shades(3, 0)
  target = softmax_sum(classifier, own.x, own.y, mu=np.arange(1.0, 7.0))
  more = Samples(np.concatenate([own.x, own.x]), np.concatenate([own.y, np.full(6, 7)]))  # of another classifier
  conditions = [Conditions(target, jnp.ones_like(target))]
  metrics = images._kkt_metrics([classifier], conditions, [0.1], more, thorough=False)
  assert metrics["residual"][0] < 1e-3
  assert metrics["active_multipliers"] == [1.0]


# --- the circle ---


@pytest.fixture(scope="module")
def on_the_circle(tmp_path_factory):
  """Two classifiers of every other of 12 points, and a generator that draws the points of the wanted classifier."""
  angle = 2 * np.pi * np.arange(12) / 12
  x, y = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32), np.arange(12) // 4
  parts = [np.arange(12) % 2 == t for t in range(2)]
  classifiers = [linear((2,), 3)] * 2
  # What the first point, of class 0, adds for class 2: no sum of what the second classifier's points add.
  target = jnp.asarray(np.outer(x[0], [1, 0, -1]))
  conditions = [Conditions(target, jnp.ones_like(target))] * 2
  done = Finished(classifiers, conditions, Samples(x, y), Samples(x, y), np.arange(12) % 2)
  out = Workdir(tmp_path_factory.mktemp("circle"), {})
  # A Gaussian without width, at the first point, which is of class 0 and of the first classifier.
  with jax.numpy_rank_promotion("raise"):
    metrics = circle.evaluate(out, (x, y, parts), done, seed=0, moments=(x[0], np.zeros((2, 2))))
  return metrics, out.path, (x, y, parts), done


def test_samples_on_the_points_of_their_classifier_are_perfect(on_the_circle):
  metrics = on_the_circle[0]
  for name in ("generated", "training_data"):
    assert (metrics[name]["precision"], metrics[name]["coverage"]) == (1.0, 1.0)
    assert metrics[name]["median_distance"] == pytest.approx(0, abs=1e-6)
  for own in metrics["per_classifier"]:
    assert (own["nearest_in_own_subset"], own["precision"], own["coverage"]) == (1.0, 1.0, 1.0)


def test_samples_of_another_classifier_are_not_on_its_points(on_the_circle, tmp_path):
  _, _, (x, y, parts), done = on_the_circle
  own = circle._own_subset(x[parts[1]], y[parts[1]], (x, y, parts), 0)
  assert own["nearest_in_own_subset"] == own["precision"] == own["coverage"] == 0.0


def test_the_gaussian_control_uses_the_given_moments_and_the_square_is_flat(on_the_circle):
  metrics = on_the_circle[0]
  gaussian, square = metrics["gaussian_of_the_stored_moments"], metrics["uniform_in_the_square"]
  assert gaussian["precision"] == pytest.approx(1 / 3)  # all on one point, of one of three classes
  assert gaussian["coverage"] == pytest.approx(1 / 12)
  # Four discs of radius 0.15 of the class in the square of side 3: 4 * pi 0.15^2 / 9 = 0.031.
  assert 0.015 < square["precision"] < 0.05


def test_what_a_run_on_the_circle_leaves(on_the_circle):
  metrics, folder, (x, y, parts), done = on_the_circle
  assert metrics["pictures"] == ["fig5.png"]
  assert (folder / "fig5.png").exists()
  kept = json.loads((folder / "metrics.json").read_text())
  assert kept == {name: value for name, value in metrics.items() if name not in ("summary", "pictures")}
  assert len(metrics["summary"].splitlines()) == 5
  logits = x @ np.asarray(done.classifiers[0].params)
  wrong = np.where(np.arange(3)[None, :] == y[:, None], -np.inf, logits).max(1)
  margin = logits[np.arange(12), y] - wrong
  expected = [np.median(margin[part]) for part in parts]
  np.testing.assert_allclose(metrics["true_median_margin"], expected, rtol=1e-5)


def test_residuals_are_of_the_points_of_each_classifier(on_the_circle):
  metrics = on_the_circle[0]
  for name in ("generated", "training_data"):
    first, second = metrics[name]["residual"]
    assert first < 1e-4
    assert 0.01 < second < 1
  np.testing.assert_allclose(metrics["gaussian_of_the_stored_moments"]["residual"], 0, atol=1e-4)


def test_measuring_knows_nothing_of_training():
  folder = pathlib.Path(images.__file__).parent
  known = {"training", "recipes", "attack", "circle", "mnist", "faces"}
  for path in folder.glob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
      module = (node.module or "").split(".") if isinstance(node, ast.ImportFrom) else []
      assert not known & {*names, *module} - {"measure"}, path


def test_the_trial_picks_out_as_the_metric_does_and_knows_which():
  random = np.random.default_rng(0)
  draw = lambda y: Samples(random.normal(size=(len(y), 5)).astype(np.float32), y)
  train, held_out = draw(np.array([1, 0, 1, 0, 0])), draw(np.array([0, 1, 1, 0, 0, 1, 1]))
  samples = Samples(train.x[[2, 1]], train.y[[2, 1]])
  own = matching.trial(samples, train, held_out)
  assert own.places.tolist() == [1, 3, 0, 2] and own.y.tolist() == [0, 0, 1, 1] and own.best == 0
  assert own.others.shape == (4, 1)  # three and four others: one for each of two
  assert own.hits[[0, 3]].all() and np.isinf(own.ratios[[0, 3]]).all()
  expected = kkt_jax.metrics.retrieval(own.members, own.others.ravel())
  assert (own.hits.sum(), own.chance) == (expected["hits"], expected["chance"])
