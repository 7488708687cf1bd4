"""Checkpoints: what comes back is bitwise what went in, and damage is recognised."""

import dataclasses
import functools
import logging
import pathlib
import shutil
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax.checkpoint import Checkpointer, CheckpointError, fingerprint


def state(value):
  return {"w": jnp.full((3, 4), value), "step": jnp.int32(5), "key": jax.random.key(7)}


def like():
  return state(0.0)


def test_arrays_of_any_shape_come_back_beside_a_state(tmp_path):
  beside = {"empty": np.zeros((0, 3), np.float32), "0/bits": np.array([True, False]), "number": np.array(2)}
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, state(0.5))
    checkpointer.save(2, state(0.1), beside=beside)
    assert checkpointer.beside(1) == {}
    assert checkpointer.restore(like())[0] == 2
    found = checkpointer.beside(2)
  assert {name: (own.dtype, own.tolist()) for name, own in found.items()} == {
    name: (own.dtype, own.tolist()) for name, own in beside.items()
  }
  assert found["empty"].shape == (0, 3)


def test_a_fingerprint_tells_settings_apart_and_nothing_else():
  @dataclasses.dataclass
  class Setting:
    function: Any
    value: Any = 1.0

  def scaled(size):
    return lambda x: size * x

  def recursive(x):
    return recursive(x)

  same = [Setting(scaled(2), {"a": 1, "b": jnp.ones(2)}), Setting(scaled(2), {"b": np.ones(2, np.float32), "a": 1})]
  assert len({fingerprint(own) for own in same}) == 1
  others = [scaled(2), scaled(3), scaled(jnp.ones(2)), scaled(jnp.ones(3)), lambda x: 0.5 * x, lambda x: 0.25 * x]
  others += [functools.partial(scaled, 2), functools.partial(scaled, size=2), jnp.ones(2), jnp.ones(3), "2", (2, 3)]
  others += [recursive, max, None, False, *same[:1], Setting(scaled(2)), Setting(scaled(2), 0.5)]
  assert len({fingerprint(own) for own in others}) == len(others)
  assert fingerprint(scaled(jnp.ones(2))) == fingerprint(scaled(jnp.zeros(2)))  # which another machine rounds otherwise


def data_files(directory, step):
  return [path for path in pathlib.Path(directory, str(step), "state").rglob("*") if path.is_file()]


def test_round_trip_is_bitwise_and_keeps_the_random_key(tmp_path):
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(3, state(0.1))
    step, restored = checkpointer.restore(like())
  assert step == 3
  expected = state(0.1)
  chex.assert_trees_all_equal(
    jax.tree.map(jax.random.key_data, restored.pop("key")), jax.random.key_data(expected.pop("key"))
  )
  chex.assert_trees_all_equal(restored, expected)


def test_an_empty_directory_restores_nothing(tmp_path):
  with Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.restore(like()) is None


def test_only_the_newest_are_kept(tmp_path):
  with Checkpointer(tmp_path, max_to_keep=2) as checkpointer:
    for step in (1, 2, 3):
      checkpointer.save(step, state(float(step)))
    assert checkpointer.steps() == [2, 3]


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage, caplog):
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, state(1.0))
    checkpointer.save(2, state(2.0))
  for path in data_files(tmp_path, 2):
    content = bytearray(path.read_bytes())
    if damage == "truncate":
      path.write_bytes(content[: len(content) // 2])
    elif damage == "flip" and content:
      content[len(content) // 2] ^= 0x40
      path.write_bytes(content)
    elif damage == "delete":
      path.unlink()
  with caplog.at_level(logging.WARNING), Checkpointer(tmp_path) as checkpointer:
    step, restored = checkpointer.restore(like())
  assert step == 1
  assert float(restored["w"][0, 0]) == 1.0
  assert "Checkpoint 2" in caplog.text


def test_when_every_checkpoint_is_damaged_the_error_names_the_directory_and_nothing_is_deleted(tmp_path):
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, state(1.0))
  shutil.rmtree(tmp_path / "1" / "state")
  with Checkpointer(tmp_path) as checkpointer, pytest.raises(CheckpointError, match=str(tmp_path)):
    checkpointer.restore(like())
  assert (tmp_path / "1").exists()


def test_a_step_is_saved_in_place_of_an_earlier_one(tmp_path):
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, state(1.0))
    checkpointer.save(1, state(2.0))
    assert float(checkpointer.restore(like())[1]["w"][0, 0]) == 2.0


def test_a_state_of_another_shape_is_refused(tmp_path):
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, state(1.0))
    other = like() | {"w": jax.ShapeDtypeStruct((3, 5), jnp.float32)}
    with pytest.raises(CheckpointError, match="step 1"):
      checkpointer.restore(other)


def test_at_least_one_checkpoint_is_kept(tmp_path):
  with pytest.raises(ValueError, match="max_to_keep"):
    Checkpointer(tmp_path, max_to_keep=0)


def test_what_cannot_be_saved_is_one_error_and_costs_no_older_checkpoint(tmp_path, monkeypatch):
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, state(1.0))

    def full(*args, **settings):
      raise ValueError("RESOURCE_EXHAUSTED: no space left\nand much more")

    monkeypatch.setattr(checkpointer._manager, "save", full)
    with pytest.raises(CheckpointError, match="step 2 could not be saved in .*no space left") as caught:
      checkpointer.save(2, state(2.0))
    assert "much more" not in str(caught.value)
    assert checkpointer.restore(like())[0] == 1
