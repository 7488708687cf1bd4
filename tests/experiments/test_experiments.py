"""Every door runs for a few steps, leaves what it promises, resumes, wires its parts, and names what is wrong."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import circle, duality_loss, faces, images, lambda_estimation, mnist, novelty
from experiments.attack import methods, plane
from experiments.benchmark import __main__ as benchmark
import kkt_jax
from kkt_jax import priors
from kkt_jax.auditing import matching
from kkt_jax.checkpoint import Checkpointer
from kkt_jax.cli.flags import UsageError
from kkt_jax.reconstruction import Observer, TrainingDiverged

CIRCLE = circle.Config(
  width=8,
  pretrain_steps=40,
  restarts=2,
  restart_steps=20,
  steps=60,
  log_every=20,
  save_every=20,
  codes=4,
  generator="codebook",
)
SMALL = {
  "samples_per_class": 3,
  "width": 12,
  "second_width": 8,
  "pretrain_steps": 20,
  "codes": 2,
  "steps": 6,
  "log_every": 2,
  "save_every": 2,
  "judge_epochs": 1,
  "population": 40,
  "thorough": False,
}
MNIST = mnist.Config(batch_norm=False, **SMALL)
slow = pytest.mark.slow


def assert_complete(workdir, *pictures):
  for name in ("config.json", "metrics.json", *pictures):
    assert (workdir / name).stat().st_size > 0, name
  json.loads((workdir / "metrics.json").read_text())


@slow
def test_lambda_estimation_meets_its_claim(tmp_path):
  metrics = lambda_estimation.run(lambda_estimation.Config(), tmp_path)
  assert metrics["claim_holds"]
  assert metrics["null_space_dimension"] == 1  # two layers can be rescaled against each other
  assert_complete(tmp_path, "fig3.png")


def test_duality_loss_has_the_shape_of_fig_2(tmp_path):
  metrics = duality_loss.run(duality_loss.Config(), tmp_path)
  np.testing.assert_allclose([metrics[name] for name in ("below", "left_end", "right_end", "above")], [1, 0, 0, 1])
  assert_complete(tmp_path, "fig2.png")


@slow
@pytest.mark.parametrize(("classifiers", "batch_norm"), [(2, True), (1, False)])
def test_circle_runs_and_resumes(tmp_path, classifiers, batch_norm):
  config = dataclasses.replace(CIRCLE, classifiers=classifiers, batch_norm=batch_norm)
  metrics = circle.run(config, tmp_path)
  assert_complete(tmp_path, "fig4.png" if classifiers == 1 else "fig5.png")
  assert metrics["training_data"]["precision"] == 1.0
  assert len(metrics["exp_minus_alpha"]) == classifiers
  if classifiers == 1:
    assert circle.run(config, tmp_path)["generated"] == metrics["generated"]  # nothing is trained again


@slow
def test_the_circle_ends_with_a_network_of_continuous_noise(tmp_path, monkeypatch):
  monkeypatch.setattr(circle, "_MATCH_STEPS", 20)
  config = dataclasses.replace(CIRCLE, generator="network")
  metrics = circle.run(config, tmp_path)
  assert_complete(tmp_path, "fig4.png", "network")
  assert circle.run(config, tmp_path)["generated"] == metrics["generated"]  # a finished run can be run again


@slow
@pytest.mark.parametrize(
  "settings",
  [
    {"thorough": True, "samples_per_class": 4},
    {"mean_image": False, "microbatch_size": 10, "compute_dtype": "bfloat16"},
    {"batch_norm": True, "classifiers": 2},
  ],
  ids=str,
)
def test_mnist_runs(tmp_path, settings):
  metrics = mnist.run(dataclasses.replace(MNIST, **settings), tmp_path)
  picture = "fig8.png" if settings.get("classifiers", 1) > 1 else "fig6.png"
  assert_complete(tmp_path, picture, "samples_000006.png")
  controls = {"real_held_out", "training_data", "class_means", "dataset_mean", "uniform_noise"}
  assert controls | {"trained_noise"} <= set(metrics)
  assert metrics["training_data"]["label_agreement"] == 1.0
  assert metrics["class_means"]["spread"] == 0.0
  for name in (*controls, "fresh_noise"):
    assert {"eval_accuracy", "ssim_matched", "distinct_nearest"} <= set(metrics[name])
    assert np.isfinite(metrics[name]["ssim_cover"])
  for name in ("fresh_noise", "training_data", "uniform_noise"):
    assert len(metrics[name]["residual"]) == settings.get("classifiers", 1)
  line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
  assert {"stationarity", "duality", "total", "residual", "margin"} <= {name.split("/")[0] for name in line}


@slow
def test_faces_run_on_what_a_package_ships(tmp_path):
  metrics = faces.run(faces.Config(**SMALL), tmp_path)
  assert_complete(tmp_path, "fig7.png")
  assert metrics["training_data"]["ssim_cover"] > metrics["uniform_noise"]["ssim_cover"]
  assert metrics["recovered_by_all_trained_noise"]["images"] == 4  # two codes of each of two classes


@slow
def test_methods_attack_the_same_classifier(tmp_path):
  settings = SMALL | {"shared_dir": str(tmp_path / "shared")}
  first = mnist.run(mnist.Config(method="means", **settings | {"steps": 0}), tmp_path / "means")
  controls = (tmp_path / "shared" / "controls.json").stat().st_mtime_ns
  for method in ("points_published", "paper"):
    metrics = mnist.run(mnist.Config(method=method, **settings), tmp_path / method)
    assert np.isfinite(metrics["fresh_noise"]["ssim_cover"])
    assert metrics["training_data"] == first["training_data"]
  assert (tmp_path / "shared" / "controls.json").stat().st_mtime_ns == controls  # measured once
  with pytest.raises(UsageError, match="--shared_dir=.*--width was 12, now 13"):
    mnist.run(mnist.Config(method="means", **settings | {"width": 13}), tmp_path / "other")


@slow
def test_a_stopped_mnist_run_resumes_to_the_same_figures(tmp_path, monkeypatch):
  config = dataclasses.replace(MNIST, shared_dir=str(tmp_path / "shared"))
  straight = mnist.run(config, tmp_path / "straight")
  save = Checkpointer.save

  def save_then_stop(self, step, state):
    save(self, step, state)
    if step == 4:
      raise KeyboardInterrupt

  monkeypatch.setattr(Checkpointer, "save", save_then_stop)
  with pytest.raises(KeyboardInterrupt):
    mnist.run(config, tmp_path / "stopped")
  monkeypatch.setattr(Checkpointer, "save", save)
  resumed = mnist.run(config, tmp_path / "stopped")
  paths = {"pictures", "summary"}
  assert {k: v for k, v in resumed.items() if k not in paths} == {k: v for k, v in straight.items() if k not in paths}
  steps = [json.loads(line)["step"] for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
  assert steps == list(range(2, 43, 2))  # of six tables, then of the network; nothing lost, nothing twice


# --- the wiring: a recipe's terms are what their names say, and weigh what the tables say ---


def a_classifier(*, batch_norm, input_shape=(8, 8, 1), classes=3):
  module = kkt_jax.networks.MLPClassifier(num_classes=classes, hidden=(12, 8), batch_norm=batch_norm)
  variables = module.init(jax.random.key(0), jnp.zeros((2, *input_shape)))
  decay = None if batch_norm else 0.1
  return kkt_jax.from_linen(module, variables, input_shape=input_shape, weight_decay=decay)


def known(classifier):
  """An examination that found a margin; to examine for the rest takes longer than what is tested."""
  decay = kkt_jax.kkt.weight_decay_conditions(classifier.params)
  form = "max_margin" if classifier.batch_coupled else "weight_decay"
  roles = jax.tree.map(lambda leaf: "kernel" if leaf.ndim > 1 else "other", classifier.params)
  return kkt_jax.Examination.unexamined(classifier, form, decay, roles=roles, margin=3.0)


@pytest.fixture(scope="module")
def examinations():
  examined = {True: kkt_jax.examine(a_classifier(batch_norm=True)), False: known(a_classifier(batch_norm=False))}
  # As if the first layer had revealed a subspace of 16 of the 64 dimensions, and the last one a margin.
  basis, values = jnp.eye(64)[:, :16], jnp.linspace(2.0, 1.0, 16)
  told = {kind: kkt_jax.analysis.Subspace(own.origin, basis, values) for kind, own in examined.items()}
  return {kind: dataclasses.replace(own, subspace=told[kind], margin=3.0) for kind, own in examined.items()}


@pytest.mark.parametrize(
  ("batch_norm", "weights"),
  [
    (
      True,
      {
        "stationarity": 8.0,
        "duality": 14.0,
        "range": 8000.0,
        "total_variation": 25 * 16 / 64,  # times the share of all dimensions that the span fills
        "statistics": 1000.0,
        "class_features": 30.0,
        "binarisation": 6.0,
        "contrast": 0.0,
      },
    ),
    (
      False,
      {
        "stationarity": 72.0,
        "duality": 14.0,
        "range": 8000.0,
        "total_variation": 4.0,
        "binarisation": 12.0,
        "contrast": 0.0,
      },
    ),
  ],
)
def test_images_weigh_their_terms_as_documented(examinations, batch_norm, weights):
  config = images.resolve(mnist.Config(batch_norm=batch_norm), mnist.DEFAULTS)
  recipe = images.recipe_of(config, [examinations[batch_norm]], drawings=True)
  found = {name: term.weight for name, term in recipe.terms.items()} | {"stationarity": recipe.stationarity.weight}
  assert found == weights


@pytest.mark.parametrize(("drawings", "tables"), [(True, 3), (False, 1)])
def test_a_network_is_fitted_to_as_many_samples_in_a_step_as_the_table_has(examinations, drawings, tables):
  config = images.resolve(mnist.Config(codes=7), mnist.DEFAULTS)
  recipe = images.recipe_of(config, [examinations[True]], drawings=drawings)
  assert recipe.schedule.tables == tables
  assert recipe.flow.batch_size == recipe.generator([examinations[True]]).batch_size
  assert (
    images.recipe_of(dataclasses.replace(config, generator="table"), [examinations[True]], drawings=True).flow is None
  )


def test_the_terms_are_what_their_names_say(examinations):
  own = examinations[True]
  classifier = own.classifier
  recipe = kkt_jax.reconstruction.recipes.default([own])
  x = jax.random.uniform(jax.random.key(1), (6, 8, 8, 1), minval=-0.2, maxval=1.2)
  classes = jnp.arange(6) % 3
  logits = classifier.predict_fn(classifier.params, x)
  inside = (own(classifier.params, x) for own in (classifier.statistics_fn, classifier.features_fn))
  batch = kkt_jax.reconstruction.Batch(x, x, classes, classes, None, 0, jnp.zeros(()), logits, *inside)
  features, scale = own.class_features
  expected = {
    "range": priors.out_of_range(x),
    "total_variation": priors.total_variation(x),
    "statistics": priors.statistics_distance(classifier.statistics_fn(classifier.params, x), classifier.statistics),
    "class_features": priors.collapse(classifier.features_fn(classifier.params, x), features[classes], scale),
    "duality": kkt_jax.kkt.duality_loss(logits, classes, 0.0, delta=0.01, relative=True),
  }
  assert set(expected) == set(recipe.terms)
  for name, value in expected.items():
    np.testing.assert_allclose(recipe.terms[name].function(classifier, batch), value, rtol=1e-5, err_msg=name)
  # Logits of the batch are those of training, where there is batch norm; others classify at inference.
  wanted = optax.losses.softmax_cross_entropy_with_integer_labels(logits, classes)
  in_training = batch._replace(logits=classifier.apply_fn(classifier.params, x))
  np.testing.assert_allclose(kkt_jax.reconstruction.terms.cross_entropy(classifier, in_training), wanted, rtol=1e-5)


@pytest.mark.parametrize("batch_norm", [True, False])  # without it there are no features, and logits take their place
def test_contrast_is_that_of_two_bent_views_of_the_whole_batch(examinations, batch_norm):
  classifier = examinations[batch_norm].classifier
  x = jax.random.uniform(jax.random.key(1), (6, *classifier.input_shape))
  logits = classifier.predict_fn(classifier.params, x)
  batch = kkt_jax.reconstruction.Batch(x, x, None, None, None, 0, logits, None, None)
  outputs = (classifier.features_fn or classifier.predict_fn)(classifier.params, x)
  still = kkt_jax.reconstruction.terms.contrast(size=0.0)(classifier, batch)
  np.testing.assert_allclose(still, priors.contrast(outputs, outputs), rtol=1e-4)
  bent = kkt_jax.reconstruction.terms.contrast(size=2.0)
  assert float(bent(classifier, batch)) > float(still)
  assert float(bent(classifier, batch)) != float(bent(classifier, batch._replace(unit=1 - x)))
  gradient = jax.grad(lambda x: bent(classifier, batch._replace(unit=x)))(x)
  assert float(jnp.abs(gradient).max()) > 0


@pytest.mark.parametrize("batch_norm", [True, False])
def test_stationarity_counts_after_the_warm_up_and_not_in_it(examinations, batch_norm):
  recipe = kkt_jax.reconstruction.recipes.default([examinations[batch_norm]])
  recipe = recipe.with_weights(**{name: 0.0 for name in recipe.terms if name not in ("duality", "stationarity")})
  recipe = dataclasses.replace(recipe, generator=kkt_jax.generators.table(codes=2)).with_stationarity(begin=0.5)
  logged = []
  kkt_jax.reconstruct(
    [examinations[batch_norm].classifier],
    recipe.with_schedule(steps=4),
    examinations=[examinations[batch_norm]],
    observer=Observer(log_every=1, on_log=lambda step, metrics: logged.append(metrics)),
  )
  counts = [m["total"] - 14.0 * m["duality"] for m in logged]
  weight = recipe.stationarity.weight
  expected = [0.0, 0.0, weight * logged[2]["stationarity"], weight * logged[3]["stationarity"]]
  np.testing.assert_allclose(counts, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_circle_weighs_its_terms_as_documented():
  own = known(a_classifier(batch_norm=True, input_shape=(2,)))
  recipe = plane.recipe([own], circle.Config(codes=4, steps=100, restarts=2, restart_steps=20, learning_rate=3e-3))
  assert {name: term.weight for name, term in recipe.terms.items()} == {
    "repulsion": 0.3,
    "duality": 3.0,
    "statistics": 100.0,
  }  # points are not solved for: a classifier without training reveals no margin
  assert (recipe.stationarity.weight, recipe.stationarity.begin, recipe.stationarity.ramp) == (1.0, 0.2, 0.1)


@pytest.mark.parametrize("name", methods.IMAGES)
def test_every_method_makes_a_recipe_and_ablations_change_one_thing(examinations, name):
  setting = methods.Setting([examinations[True]], codes=2, num_samples=3)
  base = images.recipe_of(images.resolve(mnist.Config(), mnist.DEFAULTS), [examinations[True]], drawings=True)
  recipe = methods.IMAGES[name].change(base, setting)
  if name == "no_polish":
    assert (base.schedule.polish_rounds, recipe.schedule.polish_rounds) == (12, 0)
  elif name.startswith("no_") and name != "no_span":
    before = {n: t.weight for n, t in base.terms.items()} | {"stationarity": base.stationarity.weight}
    after = {n: t.weight for n, t in recipe.terms.items()} | {"stationarity": recipe.stationarity.weight}
    changed = {n for n in before if before[n] != after[n]}
    assert changed == {name.removeprefix("no_")}
    assert after[name.removeprefix("no_")] == 0.0
  assert recipe.generator([examinations[True]]).batch_size >= 1


@slow
def test_the_curve_of_novelty_is_that_of_the_run_that_is_there_or_trained(tmp_path, monkeypatch):
  small = images.resolve(mnist.Config(batch_norm=False, **SMALL), mnist.DEFAULTS)
  data = mnist.digits(small)
  few = dataclasses.replace(data, evaluation=matching.first_of_each_class(data.evaluation, 5))
  monkeypatch.setattr(mnist, "digits", lambda config: few)
  monkeypatch.setattr(novelty, "_EPOCHS", 1)
  config = novelty.Config(sizes="0,2", draws=20)
  monkeypatch.setattr(images, "resolve", lambda *_: small)
  results = novelty.run(config, tmp_path / "trains")
  assert_complete(tmp_path / "trains", "novelty.png", "curve.png")
  sets = [
    "draws, 0",
    "draws, 2",
    "training digits, 0",
    "training digits, 2",
    "as many other digits",
    "200 other digits",
  ]
  assert list(results["sets"]) == sets
  plain, bent = results["sets"]["training digits, 0"], results["sets"]["training digits, 2"]
  assert plain["trained"] == plain["label"] == 1.0
  assert bent["trained"] < 0.5
  monkeypatch.setattr(mnist, "run", None)
  assert novelty.run(config, tmp_path / "trains")["sets"] == results["sets"]


@pytest.mark.parametrize("sizes", ["one", "-1", "nan"])
def test_impossible_sizes_of_displacements_are_named(tmp_path, sizes):
  with pytest.raises(UsageError, match="--sizes must be"):
    novelty.run(novelty.Config(sizes=sizes), tmp_path / "new")
  assert not (tmp_path / "new").exists()


@slow
def test_benchmark_reports_every_figure(tmp_path):
  metrics = benchmark.run(benchmark.Config(samples=4, repeats=1, wide=16, greatest=0), tmp_path)
  assert_complete(tmp_path)
  assert {"mnist, batch norm: whole step", "width 256, 10 classes: stationarity, explicit Jacobians"} <= set(
    metrics["functions"]
  )
  assert all(row["milliseconds"] > 0 for row in metrics["functions"].values())
  ratios = metrics["over_plain_step"]
  assert {f"mnist, {kind}: whole step" for kind in ("batch norm", "weight decay")} <= set(ratios)
  assert all(own["time"]["low"] <= own["time"]["median"] <= own["time"]["high"] for own in ratios.values())
  assert metrics["claim_holds"] == (not metrics["missed"])
  assert all(sentence in metrics["summary"] for sentence in metrics["missed"])


@pytest.mark.parametrize(("time", "operations", "expected"), [(2.9, 2.4, 0), (3.1, 2.4, 1), (3.1, float("nan"), 2)])
def test_the_claim_fails_by_name_when_a_whole_step_is_too_slow(time, operations, expected):
  ratio = {"time": (time, 0.0, 9.0), "operations": operations}
  found = benchmark.missed({"mnist, batch norm: whole step": ratio, "mnist, batch norm: whole step in a span": ratio})
  assert len(found) == expected
  assert all(sentence.startswith("MISSED: mnist, batch norm: whole step over") for sentence in found)


@pytest.mark.parametrize(
  ("module", "config", "message"),
  [
    (mnist, {"samples_per_class": 450}, "--samples_per_class=450 needs"),
    (mnist, {"codes": -1}, "--codes must be a non-negative integer"),
    (mnist, {"batch_norm": True, "microbatch_size": 10}, "--microbatch_size must be 0 with --batch_norm"),
    (mnist, {"weights": "duality"}, "--weights must be name=number"),
    (mnist, {"weights": "duality=-1"}, "--weights must be finite and at least 0"),
    (mnist, {"learning_rate": float("nan")}, "--learning_rate must be finite"),
    (faces, {"classifiers": 2}, "--classifiers must be 1"),
    (faces, {"data": "celeba"}, "--celeba_dir"),
    (faces, {"attribute": "Foo"}, "--attribute must be empty with --data=lfw"),
    (faces, {"samples_per_class": 80}, "--samples_per_class=80 needs"),
    (circle, {"restart_steps": 9000}, "--restart_steps must be less than --steps = 8000; got 9000"),
  ],
)
def test_impossible_flags_are_named_and_leave_no_folder(tmp_path, module, config, message):
  small = {} if module is circle else SMALL
  with pytest.raises(UsageError, match=message):
    module.run(module.Config(**small | config), tmp_path / "new")
  assert not (tmp_path / "new").exists()


@slow
def test_a_weight_of_no_term_is_named(tmp_path):
  with pytest.raises(UsageError, match="--weights: .*'dualty'. Did you mean duality?"):
    mnist.run(dataclasses.replace(MNIST, weights="dualty=5"), tmp_path)


@slow
def test_a_nan_stops_the_run_and_names_the_term(tmp_path):
  with pytest.raises(TrainingDiverged, match="became"):
    mnist.run(dataclasses.replace(MNIST, learning_rate=1e30), tmp_path)
  assert (tmp_path / "config.json").exists()
