"""Anything may come: what comes back is of the promised shape, or the documented error, and never a silent NaN.

Few cases by default, many with ``HYPOTHESIS_PROFILE=thorough`` (see conftest.py).
"""

import dataclasses
import math
import pathlib
import shutil

from hypothesis import given, HealthCheck, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import circle, faces, mnist, novelty
import kkt_jax
from kkt_jax import deformations, priors
from kkt_jax.checkpoint import Checkpointer, CheckpointError
from kkt_jax.classifiers import make_classifier
from kkt_jax.cli import flags
from kkt_jax.kkt import conditions, losses, multipliers

any_case = settings(suppress_health_check=list(HealthCheck))
SHAPES = st.lists(st.integers(0, 3), max_size=4).map(tuple)
DTYPES = st.sampled_from([jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.bool_])
ARRAYS = st.builds(jax.ShapeDtypeStruct, SHAPES, DTYPES)

# Functions of arrays, with the number of them and the shape of the result for M samples of C classes.
FUNCTIONS = {
  "margins": (losses.margins, 2, lambda a: a[0].shape),
  "runner_up_margin": (losses.runner_up_margin, 2, lambda a: a[0].shape[:1]),
  "runner_up_set": (losses.runner_up_set, 2, lambda a: a[0].shape),
  "duality_loss": (lambda logits, y: losses.duality_loss(logits, y, 0.0, delta=0.1), 2, lambda a: a[0].shape[:1]),
  "from_network": (multipliers.from_network, 1, lambda a: a[0].shape),
  "from_softmax": (multipliers.from_softmax, 1, lambda a: a[0].shape),
  "on_runner_up": (multipliers.on_runner_up, 3, lambda a: a[1].shape),
  "shortfall": (lambda mu: multipliers.shortfall(mu, least=1.0), 1, lambda a: a[0].shape[:1]),
  "total_variation": (priors.total_variation, 1, lambda a: a[0].shape[:1]),
  "binarisation": (priors.binarisation, 1, lambda a: a[0].shape[:1]),
  "out_of_range": (priors.out_of_range, 1, lambda a: a[0].shape[:1]),
  "contrast": (priors.contrast, 2, lambda a: ()),
  "warp": (lambda x: deformations.warp(jax.random.key(0), x, size=1.0), 1, lambda a: a[0].shape),
}


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_arrays_of_any_shape_give_the_promised_one_or_a_value_error(name):
  function, number, promised = FUNCTIONS[name]

  @any_case
  @given(st.lists(ARRAYS, min_size=number, max_size=number))
  def attack(arrays):
    try:
      result = jax.eval_shape(function, *arrays)
    except ValueError as error:
      assert "must" in str(error), error
      return
    assert result.shape == promised(arrays)

  attack()


def _values(field):
  """Values for a flag, in and out of its bounds, and of its type."""
  if field.metadata["choices"]:
    return st.sampled_from([*field.metadata["choices"], "nonsense"])
  kinds = {bool: st.booleans(), int: st.integers(), float: st.floats(), str: st.text(max_size=5)}
  return kinds[field.metadata["type"]]


@pytest.mark.parametrize("config", [circle.Config, mnist.Config, faces.Config, novelty.Config])
def test_any_flags_are_taken_or_refused_by_name(config):
  fields = {field.name: field for field in dataclasses.fields(config)}

  @any_case
  @given(st.data())
  def attack(data):
    chosen = data.draw(st.sets(st.sampled_from(sorted(fields)), max_size=8))
    values = {name: data.draw(_values(fields[name])) for name in chosen}
    text = ",".join(f"{name}={value}" for name, value in values.items()) + data.draw(st.text(max_size=3))
    for refusable in (lambda: config(**values), lambda: flags.parse(config, text)):
      try:
        refusable()
      except flags.UsageError as error:
        assert "--" in str(error), error

  attack()


@st.composite
def trees(draw):
  """Nested dicts of small arrays, as parameters come, NaN and infinity among them."""
  names = st.sampled_from(["kernel", "bias", "scale", "Dense_0", "Dense_10", "x"])
  leaves = (
    st.lists(st.integers(0, 3), max_size=2)
    .map(tuple)
    .flatmap(
      lambda shape: st.lists(
        st.floats(-3, 3) | st.sampled_from([math.nan, math.inf]), min_size=math.prod(shape), max_size=math.prod(shape)
      ).map(lambda values: np.asarray(values, np.float32).reshape(shape))
    )
  )
  return draw(st.recursive(leaves, lambda inner: st.dictionaries(names, inner, min_size=1, max_size=3), max_leaves=4))


def test_parameter_trees_of_any_kind_have_conditions_or_a_named_fault():
  @any_case
  @given(trees(), st.floats(-1, 1))
  def attack(params, decay):
    leaves = jax.tree.leaves(params)
    sound = all(np.size(leaf) and np.all(np.isfinite(leaf)) for leaf in leaves)
    names = kkt_jax.tensor_names(params)
    assert len(set(names)) == len(names)
    try:
      condition = conditions.weight_decay_conditions(params, weight_decay=decay)
      make_classifier(lambda p, x: jnp.zeros((x.shape[0], 2)), params, (1,))
    except ValueError as error:
      assert "weight_decay must be positive" in str(error) or "params" in str(error), error
      assert decay <= 0 or not sound
      return
    assert decay > 0 and sound  # a NaN never gets past here
    for target, leaf in zip(jax.tree.leaves(condition.target), jax.tree.leaves(params), strict=True):
      np.testing.assert_allclose(target, decay * leaf, rtol=1e-5, atol=1e-37)  # XLA has no subnormal numbers

  attack()


def test_label_sets_of_any_kind_are_taken_or_named():
  @any_case
  @given(st.lists(st.integers(-3, 5), max_size=5))
  def attack(labels):
    try:
      made = make_classifier(lambda p, x: x @ p, jnp.ones((1, max(len(labels), 2))), (1,), labels=labels)
    except ValueError as error:
      assert "labels must" in str(error), error
      assert len(labels) < 2 or len(set(labels)) < len(labels)
      return
    assert made.classes_of(np.asarray(labels)).tolist() == list(range(len(labels)))

  attack()


def test_a_checkpoint_with_any_damage_is_passed_over_or_refused(tmp_path):
  state = {"w": jnp.arange(12.0).reshape(3, 4), "key": jax.random.key(1)}
  whole = tmp_path / "whole"
  with Checkpointer(whole) as checkpointer:
    checkpointer.save(1, state)
  files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
  damaged = tmp_path / "damaged"

  @any_case
  @given(st.sampled_from(files), st.floats(0, 1), st.integers(0, 255), st.booleans())
  def attack(file, place, byte, cut):
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(whole, damaged)
    path = pathlib.Path(damaged, file)
    content = bytearray(path.read_bytes())
    at = int(place * max(len(content) - 1, 0))
    if content:
      content[at] = byte
    path.write_bytes(bytes(content[:at] if cut else content))
    try:
      with Checkpointer(damaged) as checkpointer:
        found = checkpointer.restore(state)
    except CheckpointError as error:
      assert str(damaged) in str(error)
      return
    if found is not None:  # nothing of importance was hit
      np.testing.assert_array_equal(found[1]["w"], state["w"])

  attack()
