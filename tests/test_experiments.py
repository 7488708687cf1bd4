"""Every experiment runs for a few steps, leaves what it promises, resumes, and says clearly what is wrong."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from experiments import benchmark, circle, common, duality_loss, faces, images, lambda_estimation, merits, mnist
from kkt_jax import training
from kkt_jax.checkpoint import Checkpointer

CIRCLE = circle.Config(
  width=8, pretrain_steps=40, restarts=2, restart_steps=20, steps=60, log_every=20, checkpoint_every=20, codes=4
)
SMALL = {
  "samples_per_class": 3,
  "width": 12,
  "second_width": 8,
  "pretrain_steps": 20,
  "codes": 2,
  "steps": 6,
  "warmup": 2,
  "log_every": 2,
  "grid_every": 2,
  "judge_epochs": 1,
  "population": 40,
  "thorough": False,
}
MNIST = mnist.Config(batch_norm=False, **SMALL)
NETWORK = {"generator": "mlp", "batch_size": 20, "num_fresh": 10}


def assert_complete(workdir, *pictures):
  for name in ("config.json", "metrics.jsonl", "metrics.json", *pictures):
    assert (workdir / name).stat().st_size > 0, name
  json.loads((workdir / "metrics.json").read_text())


def test_lambda_estimation_meets_its_claim(tmp_path):
  metrics = lambda_estimation.run(lambda_estimation.Config(), tmp_path)
  assert metrics["claim_holds"]
  assert metrics["null_space_dimension"] == 1  # two layers can be rescaled against each other
  assert_complete(tmp_path, "fig3.png")


def test_duality_loss_has_the_shape_of_fig_2(tmp_path):
  metrics = duality_loss.run(duality_loss.Config(), tmp_path)
  np.testing.assert_allclose([metrics[name] for name in ("below", "left_end", "right_end", "above")], [1, 0, 0, 1])
  assert_complete(tmp_path, "fig2.png")


@pytest.mark.parametrize(("classifiers", "batch_norm"), [(1, True), (2, True), (1, False)])
def test_circle_runs_and_resumes(tmp_path, classifiers, batch_norm):
  config = dataclasses.replace(CIRCLE, classifiers=classifiers, batch_norm=batch_norm)
  metrics = circle.run(config, tmp_path)
  assert_complete(tmp_path, "fig4.png" if classifiers == 1 else "fig5.png")
  assert metrics["controls"]["training_data"]["precision"] == 1.0
  assert len(metrics["exp_minus_alpha"]) == classifiers
  if classifiers == 1:
    assert circle.run(config, tmp_path) == metrics  # nothing is trained again


@pytest.mark.parametrize(
  "settings",
  [
    {"thorough": True, "samples_per_class": 4},
    {"mean_image": False, "microbatch_size": 10, "compute_dtype": "bfloat16"},
    {"batch_norm": True, "classifiers": 2},
    NETWORK | {"classifiers": 2, "multiplier_form": "softplus", "fixed_noise": False},
  ],
  ids=str,
)
def test_mnist_runs(tmp_path, settings):
  metrics = mnist.run(dataclasses.replace(MNIST, **settings), tmp_path)
  figure = "fig8.png" if settings.get("classifiers", 1) > 1 else "fig6.png"
  assert_complete(tmp_path, figure, "samples_000006.png")
  controls = {"real_held_out", "training_data", "class_means", "dataset_mean", "uniform_noise"}
  assert controls <= set(metrics)
  assert ("trained_noise" in metrics) == settings.get("fixed_noise", True)
  assert metrics["training_data"]["label_agreement"] == 1.0
  assert metrics["class_means"]["spread"] == 0.0
  for name in (*controls, "fresh_noise"):
    figures = merits.of_images(metrics[name])
    assert np.all(np.isfinite(list(figures.values()))), name
    assert {"eval_accuracy", "ssim_matched", "distinct_nearest"} <= set(figures)
    if (
      settings.get("thorough") and name != "real_held_out"
    ):  # too few images a class for k = 5; minutes are not kept here
      assert set(merits.IMAGES_HEADLINE) - {"coverage_features_k5", "minutes"} <= set(figures)
  for name in ("fresh_noise", "training_data", "uniform_noise"):
    assert len(metrics[name]["residual"]) == settings.get("classifiers", 1)
  line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
  terms = {name.split("/")[0] for name in line}
  assert {"stationarity", "duality", "total", "residual", "margin"} <= terms
  assert ("fresh_duality" in terms) == ("num_fresh" in settings)


def test_faces_run_on_what_a_package_ships(tmp_path):
  metrics = faces.run(faces.Config(**SMALL), tmp_path)
  assert_complete(tmp_path, "fig7.png")
  assert metrics["training_data"]["ssim_cover"] > metrics["uniform_noise"]["ssim_cover"]
  assert metrics["recovered_by_all_trained_noise"]["images"] == 4  # two codes of each of two classes


def test_methods_attack_the_same_classifier(tmp_path):
  settings = {name: value for name, value in SMALL.items() if name not in ("codes", "steps", "warmup")}
  settings["shared_dir"] = str(tmp_path / "shared")
  first = mnist.run(mnist.Config(method="means", **settings), tmp_path / "means")
  controls = (tmp_path / "shared" / "controls.json").stat().st_mtime_ns
  for method in ("points_published", "paper"):
    metrics = mnist.run(mnist.Config(method=method, steps=4, warmup=0, **settings), tmp_path / method)
    assert np.isfinite(metrics["fresh_noise"]["ssim_cover"])
    assert metrics["training_data"] == first["training_data"]
  assert (tmp_path / "shared" / "controls.json").stat().st_mtime_ns == controls  # measured once
  with pytest.raises(common.UsageError, match="--shared_dir=.*--width was 12, now 13"):
    mnist.run(mnist.Config(method="means", **settings | {"width": 13}), tmp_path / "other")


def test_a_stopped_mnist_run_resumes_to_the_same_figures(tmp_path, monkeypatch):
  config = dataclasses.replace(MNIST, shared_dir=str(tmp_path / "shared"))
  straight = mnist.run(config, tmp_path / "straight")
  save, saved = Checkpointer.save, []

  def save_then_stop(self, step, state):
    save(self, step, state)
    saved.append(step)
    if step == 4:
      raise KeyboardInterrupt

  monkeypatch.setattr(Checkpointer, "save", save_then_stop)
  with pytest.raises(KeyboardInterrupt):
    mnist.run(config, tmp_path / "stopped")
  monkeypatch.setattr(Checkpointer, "save", save)
  resumed = mnist.run(config, tmp_path / "stopped")
  assert resumed == straight
  steps = [json.loads(line)["step"] for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
  assert steps == [2, 4, 6]  # nothing lost, nothing twice


def test_the_generator_is_trained_without_the_data(tmp_path):
  # The function that trains it takes the configuration, the classifiers and the folder: no data can reach it.
  names = images.train_generator.__code__.co_varnames[: images.train_generator.__code__.co_argcount]
  assert names == ("config", "classifiers", "out")


def test_benchmark_reports_every_figure(tmp_path):
  metrics = benchmark.run(benchmark.Config(samples=4, repeats=1, wide=16, greatest=0), tmp_path)
  assert_complete(tmp_path, "times.png")
  assert len(metrics["functions"]) == 10
  assert all(row["milliseconds"] > 0 for row in metrics["functions"].values())


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"warmup": 6}, "--warmup must be less than --steps = 6; got 6"),
    (NETWORK | {"mean_image": False}, "--mean_weight and --ink_weight must be 0 with --nomean_image"),
    ({"samples_per_class": 450}, "--samples_per_class=450 needs"),
    ({"batch_size": 1}, "--batch_size must be at least 2"),
    ({"codes": 0}, "--codes must be at least 1"),
    ({"batch_norm": True, "generator": "conv"}, "--generator must be span or free with --batch_norm; got conv"),
    ({"batch_norm": True, "multiplier_form": "softmax"}, "--multiplier_form must not be softmax with --batch_norm"),
    (NETWORK | {"multiplier_form": "runner_up"}, "--generator must be span or free with --multiplier_form=runner_up"),
    ({"rule": "least_norm"}, "--rule and --target_scale need --batch_norm"),
    ({"collapse_weight": 1.0}, "--statistics_weight and --collapse_weight must be 0 without --batch_norm"),
    ({"batch_norm": True, "microbatch_size": 10}, "--microbatch_size must be 0 with --batch_norm"),
    ({"num_fresh": 5}, "--num_fresh must be 0 .* with --generator=span"),
  ],
)
def test_impossible_mnist_flags_are_named(tmp_path, settings, message):
  with pytest.raises(common.UsageError, match=message):
    mnist.run(dataclasses.replace(MNIST, **settings), tmp_path)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"classifiers": 2}, "--classifiers must be 1"),
    ({"data": "celeba"}, "--celeba_dir"),
    ({"samples_per_class": 80}, "--samples_per_class=80 needs"),
  ],
)
def test_impossible_faces_flags_are_named(tmp_path, settings, message):
  with pytest.raises(common.UsageError, match=message):
    faces.run(faces.Config(**SMALL | settings), tmp_path)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"restart_steps": 60}, "--restart_steps must be less than --steps = 60; got 60"),
    ({"log_every": 30}, "--log_every must be a multiple of 20; got 30"),
    ({"multiplier_form": "softmax"}, "--multiplier_form must not be softmax with --batch_norm"),
    ({"multiplier_form": "runner_up"}, "--generator must be free with --multiplier_form=runner_up"),
  ],
)
def test_impossible_circle_flags_are_named(tmp_path, settings, message):
  with pytest.raises(common.UsageError, match=message):
    circle.run(dataclasses.replace(CIRCLE, **settings), tmp_path)


def test_a_nan_stops_the_run_and_names_the_term(tmp_path):
  with pytest.raises(training.TrainingDiverged, match="became"):
    mnist.run(dataclasses.replace(MNIST, learning_rate=1e30), tmp_path)
  assert (tmp_path / "config.json").exists()


def command(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "experiments.lambda_estimation", *arguments], capture_output=True, text=True, check=False
  )


def test_the_command_line_prints_one_error_and_no_traceback(tmp_path):
  (tmp_path / "config.json").write_text('{"seed": 5}')
  result = command(f"--workdir={tmp_path}")
  assert result.returncode == 1
  assert result.stderr.startswith("error: --workdir=")
  assert "--seed was 5, now 0" in result.stderr
  assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
  ("argument", "named"),
  [("--rule=best", "rule"), ("--hidden=0", "hidden"), ("--hiden=3", "hiden"), ("surplus", "surplus")],
)
def test_bad_flags_are_named_on_the_command_line(tmp_path, argument, named):
  result = command(f"--workdir={tmp_path / 'new'}", argument)
  assert result.returncode != 0
  assert named in result.stderr
  assert "Traceback" not in result.stderr
  assert not (tmp_path / "new").exists()


def test_help_lists_every_flag_with_its_meaning():
  text = command("--help").stdout
  for field in dataclasses.fields(lambda_estimation.Config):
    assert f"--{field.name}" in text.replace("--[no]", "--"), field.name
  assert "--workdir" in text
  assert "Width of the hidden layer." in text


def test_the_workdir_is_required():
  result = command()
  assert result.returncode != 0
  assert "--workdir" in result.stderr
