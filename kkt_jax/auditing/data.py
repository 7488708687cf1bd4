"""The owner's own data, for an audit to compare with; nothing else ever sees them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kkt_jax._errors import InputError
from kkt_jax.auditing import membership
from kkt_jax.auditing.matching import check_classes
from kkt_jax.auditing.samples import Samples
from kkt_jax.classifiers.classifier import Classifier
from kkt_jax.criteria import AuditCriteria


class Data(NamedTuple):
  """Data to compare with.

  Attributes:
    train: the training data, without repetitions, if they are given.
    held_out: other data of the same kind, without repetitions, if they are given.
    remarks: what limits the comparison, in words.
  """

  train: Samples | None
  held_out: Samples | None
  remarks: Sequence[str]


def compared(
  classifier: Classifier,
  train: Samples | None,
  held_out: Samples | None,
  *,
  alone: bool = False,
  criteria: AuditCriteria | None = None,
) -> Data:
  """Training data and held-out data that can be compared.

  Args:
    classifier: the classifier.
    train: its training data.
    held_out: other data.
    alone: whether held-out data can be given without training data.
    criteria: what counts as evidence; the default `AuditCriteria` if None.

  Raises:
    InputError: a class is missing, the two share samples, or the second is given without the first.
  """
  sets = {"train": train, "held_out": held_out}
  given = {name: samples for name, samples in sets.items() if samples is not None}
  check_classes(given, range(classifier.num_classes))
  if held_out is not None and train is None and not alone:
    raise InputError("held_out needs train or candidates, with which it is compared.")
  if held_out is not None and train is not None:
    check_disjoint("train", train, held_out, classifier)
  remarks: list[str] = []
  for name, samples in given.items():
    given[name], said = distinct(name, samples, classifier)
    remarks += said
  if len(given) == 2:
    remarks += membership.limits(given["train"], given["held_out"], criteria or AuditCriteria())
  return Data(given.get("train"), given.get("held_out"), remarks)


def check_disjoint(name: str, samples: Samples, held_out: Samples, classifier: Classifier) -> None:
  """Raises InputError if held-out data hold some of the samples that are called ``name``."""
  known = {row.tobytes() for row in _rounded(samples, classifier)}
  twice = [i for i, row in enumerate(_rounded(held_out, classifier)) if row.tobytes() in known]
  if twice:
    what = "training" if name == "train" else name
    raise InputError(
      f"held_out must hold none of the {what} samples; {len(twice)} of its {len(held_out.y)} are identical to one of"
      f" {name}, the first at place {twice[0]} (from 0)."
    )


def distinct(name: str, samples: Samples, classifier: Classifier) -> tuple[Samples, list[str]]:
  """Samples without repetitions of one class, and a remark if there were any."""
  keys = [(label, row.tobytes()) for label, row in zip(samples.y, _rounded(samples, classifier), strict=True)]
  first = {key: place for place, key in reversed([*enumerate(keys)])}
  repeated = [(place, first[key]) for place, key in enumerate(keys) if first[key] != place]
  if not repeated:
    return samples, []
  names = " repeats ".join(samples.names[place] for place in repeated[0])
  remark = f"{len(repeated)} of the {len(keys)} samples of {name} repeat an earlier one ({names}); each counts once."
  return samples.only(np.array(sorted(first.values()))), [remark]


def _rounded(samples: Samples, classifier: Classifier) -> np.ndarray:
  """Samples rounded so that the last bits make no difference, if they lie in a range."""
  return (samples.x if classifier.value_range is None else np.round(samples.x, 4)) + np.float32(0)  # -0 is 0
