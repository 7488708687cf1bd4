"""How steps grow: the sizes that are timed, and what is said of them."""

import jax
import pytest

from experiments.benchmark import scaling
from experiments.benchmark.scaling import Size


def test_every_sweep_changes_one_number_alone():
  for name, sizes in scaling.sweeps(greatest=16384, devices=4).items():
    first = sizes[0][1]
    changed = {field for _, size in sizes for field in vars(size) if getattr(size, field) != getattr(first, field)}
    assert len(changed) == 1, name


def test_the_longest_sweep_ends_where_it_is_told_to():
  sizes = scaling.sweeps(greatest=1024, devices=1)
  assert max(size.samples for _, size in sizes["samples M, by microbatches"]) == 1024
  assert max(size.samples for _, size in sizes["digits in a table"]) == 500
  assert "devices" not in sizes  # there is nothing to share with


def test_the_widest_and_the_most_digits_are_those_that_are_promised():
  sizes = scaling.sweeps(greatest=16384, devices=1)
  assert sizes["parameters P"][-1][1].width == 4000
  assert sizes["digits in a table"][-1] == (5000, Size(samples=5000, table=True))  # all that the package ships


@pytest.mark.slow
def test_the_number_of_parameters_is_that_of_the_network():
  size = Size(samples=2, width=8, classes=3)
  classifiers = scaling.step(size)[1][1]
  assert sum(leaf.size for leaf in jax.tree.leaves(classifiers[0].params)) == size.parameters


@pytest.mark.slow
def test_rows_hold_what_was_measured():
  tiny = {"width": 8, "classes": 2}
  sizes = {
    "samples M, by microbatches": [(m, Size(samples=m, microbatch=4, **tiny)) for m in (4, 8)],
    "classifiers T": [(t, Size(samples=4, classifiers=t, **tiny)) for t in (1, 2)],
    "digits in a table": [(4, Size(samples=4, table=True, **tiny))],
  }
  results = scaling.measure(sizes, repeats=1, rate=1.0)
  for name, expected in (("samples M, by microbatches", [4, 8]), ("classifiers T", [1, 2])):
    rows = results[name]["rows"]
    assert [row["size"] for row in rows] == expected
    assert all(row["milliseconds"] > 0 and row["megabytes"] > 0 for row in rows)
    assert results[name]["exponent"] is not None
  one, two = results["classifiers T"]["rows"]
  assert two["gigaflops"] == pytest.approx(2 * one["gigaflops"], rel=0.2)
  assert scaling.table(results).count("\n") == 6  # a head of two lines, and a line each
