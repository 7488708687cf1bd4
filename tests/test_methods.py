"""The methods that can be chosen: every flag that they set exists, can be set, and stays within its bounds."""

import dataclasses

import pytest

from experiments import circle, common, faces, image_config, methods, mnist

CHOICES = [(circle, name) for name in methods.CIRCLE] + [
  (module, name) for module in (mnist, faces) for name in methods.IMAGES
]


@pytest.mark.parametrize(("module", "name"), CHOICES)
def test_a_method_sets_flags_that_may_be_set(module, name):
  config = module.Config(method=name)
  fields = {field.name: field for field in dataclasses.fields(config)}
  for flag in config.preset:
    assert "by" in fields[flag].metadata, flag  # a flag whose plain default hides whether the user gave it
  resolved = common.resolve(config)
  common.check_config(resolved)
  if module is not circle:
    image_config.check(resolved)
  for flag, value in config.preset.items():
    assert getattr(resolved, flag) == value


def test_what_is_given_by_hand_goes_before_the_method():
  assert common.resolve(mnist.Config(method="ce", cross_entropy_weight=3.0)).cross_entropy_weight == 3.0


def test_points_are_twice_as_many_as_the_unknown_samples():
  assert common.resolve(mnist.Config(method="points", samples_per_class=7)).codes == 14


def test_without_batch_norm_no_method_asks_for_its_statistics():
  config = common.resolve(mnist.Config(method="inversion", batch_norm=False))
  assert config.statistics_weight == 0.0


def test_every_method_is_explained():
  for method in (*methods.IMAGES.values(), *methods.CIRCLE.values()):
    assert method.kind in ("method", "baseline", "ablation")
    assert method.title
    assert method.explanation.endswith(".")
