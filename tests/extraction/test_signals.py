"""What one sample says alone: of a network trained to convergence with weight decay, training samples and no others."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kkt_jax
from kkt_jax.analysis.first_layer import read_first_layer
from kkt_jax.analysis.probing import Probes
from kkt_jax.classifiers import relaxation
from kkt_jax.criteria import Criteria
from kkt_jax.extraction import certificates, signals

NUM, SIZE, WIDTH, CLASSES, HIGH, DECAY = 24, 32, 128, 8, 2.0, 3e-3


def net(p, x):
  return jax.nn.relu(x @ p["w"] + p["b"][None]) @ p["v"] + p["c"][None]


def trained(x, y, *, num_steps, bias_decay=DECAY):
  """Parameters after full-batch descent with momentum and weight decay, whose steps become small in the end."""
  draw = np.random.default_rng(2).standard_normal
  start = {"w": 0.05 * draw((SIZE, WIDTH)), "b": np.zeros(WIDTH)}
  start |= {"v": 0.04 * draw((WIDTH, CLASSES)), "c": np.zeros(CLASSES)}
  start = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), start)
  decay = dict.fromkeys(start, DECAY) | {"b": bias_decay}
  loss = lambda p: -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(net(p, x)), y[:, None], axis=1))

  def step(index, state):
    p, v = state
    rate = 0.4 * jnp.minimum(1.0, jnp.exp(4 - 10 * index / num_steps))
    v = jax.tree.map(lambda v, g, w, own: 0.9 * v + g + w * own, v, jax.grad(loss)(p), decay, p)
    return jax.tree.map(lambda own, v: own - rate * v, p, v), v

  return jax.jit(lambda p: jax.lax.fori_loop(0, num_steps, step, (p, jax.tree.map(jnp.zeros_like, p)))[0])(start)


@functools.cache
def samples():
  """Samples in units of the range, mostly dark, and their classes."""
  unit = jax.random.uniform(jax.random.key(0), (NUM, SIZE)) ** 3
  return np.asarray(unit), np.arange(NUM) % CLASSES


@functools.cache
def examined():
  unit, y = samples()
  params = trained(HIGH * jnp.asarray(unit), jnp.asarray(y), num_steps=20000)
  classifier = kkt_jax.make_classifier(net, params, (SIZE,), value_range=(0.0, HIGH), weight_decay=DECAY)
  return kkt_jax.examine(classifier)


def misfit(found, unit, **settings):
  return certificates.by_equations(found, np.asarray(unit), Criteria(), **settings)[0]


def otherwise(apply_fn, params, value_range=(0.0, HIGH), weight_decay=DECAY):
  """What is found of the same weights that are stored, or fed, in another way."""
  classifier = kkt_jax.make_classifier(apply_fn, params, (SIZE,), value_range=value_range, weight_decay=weight_decay)
  probes = classifier.from_unit(jax.random.uniform(jax.random.key(1), (24, SIZE)))
  start, first, *_ = read_first_layer(Probes(classifier, probes))
  return dataclasses.replace(examined(), classifier=classifier, start=start, first=first, probes=probes)


def test_training_samples_fulfil_their_equations_and_no_others_do():
  found, (unit, y) = examined(), samples()
  assert certificates.applicable(found) and found.first.rank == NUM
  assert misfit(found, unit).max() < 1
  assert misfit(found, unit, labels=y).max() < 1
  others = np.asarray(jax.random.uniform(jax.random.key(5), (NUM, SIZE))) ** 3
  blends = 0.5 * unit + 0.5 * np.roll(unit, 1, axis=0)
  alike = 0.5 * unit + 0.5 * np.roll(unit, CLASSES, axis=0)  # of one class
  for kind in (others, blends, alike, 0.95 * unit):
    assert misfit(found, kind).min() > 2
  assert misfit(found, unit, labels=np.roll(y, 1)).min() > 2
  basis, start = found.subspace.in_float64.basis, found.subspace.in_float64.origin
  inside = start + (others - start) @ basis @ basis.T  # the subspace alone does not make them pass
  assert misfit(found, inside).min() > 2


def test_a_darker_sample_fulfils_all_but_the_scale_and_what_the_bias_says():
  found, (unit, _) = examined(), samples()
  x = HIGH * jnp.asarray(unit)
  own, darker = signals.signals(found, x), signals.signals(found, 0.95 * x)
  np.testing.assert_allclose(own.scale, 1.0, atol=0.05)
  assert np.median(np.abs(darker.scale / own.scale - 1)) > 0.1
  normal = found.first.normal
  np.testing.assert_allclose(x @ normal, 1.0, atol=1e-3)
  np.testing.assert_allclose(0.95 * x @ normal, 0.95, atol=1e-3)


def test_free_gates_can_be_fitted_to_the_scale_as_well():
  found, x = examined(), HIGH * jnp.asarray(samples()[0])
  free, fitted = signals.signals(found, x), signals.signals(found, x, scale=(1.0, 12.5))
  off = lambda own: np.abs(own.scale - 1)
  assert np.median(off(fitted)) < 0.5 * np.median(off(free))
  assert (fitted.distance < free.distance + 1e-3).all()
  moved = signals.signals(found, x, scale=(2.0, 12.5))
  assert np.abs(moved.scale - 2).max() > 0.5  # gates cannot bring it anywhere
  np.testing.assert_allclose(fitted.leverage, free.leverage, rtol=0.05)


def test_every_samples_dual_is_0_on_all_others():
  found, (unit, _) = examined(), samples()
  x = HIGH * np.asarray(unit, np.float64)
  _, duals = certificates.by_equations(found, unit, Criteria())
  assert np.median(np.abs(duals @ (x - found.first.start).T - np.eye(NUM))) < 0.01
  np.testing.assert_allclose(duals @ (x - found.first.start).T, np.eye(NUM), atol=0.2)
  known = certificates.Candidates(unit[:6], *np.zeros((3, 6)), unit[:6], np.ones(6, bool), np.zeros(6), duals[:6])
  others = certificates.of_the_others(found, known, Criteria())
  c = np.asarray(found.subspace.coordinates(unit))
  homogeneous = np.concatenate([c, np.ones((NUM, 1))], axis=1)
  angles = np.sum(homogeneous @ others.gram * homogeneous, axis=1) / np.sum((homogeneous @ others.size.T) ** 2, axis=1)
  assert angles[6:].max() < 6 * 20 and angles[:6].min() > 6 * 500  # squares, in units of their errors
  fewer = Criteria(agreeing=7)
  assert certificates.of_the_others(found, known, fewer) is None


def test_a_kernel_may_be_stored_turned():
  turned = lambda p, x: net(p | {"w": p["w"].T}, x)
  params = examined().classifier.params
  found = otherwise(turned, params | {"w": params["w"].T})
  assert found.first.turned
  expected = misfit(examined(), samples()[0])
  np.testing.assert_allclose(misfit(found, samples()[0]), expected, atol=0.1)


def test_inputs_may_be_normalised_by_the_network_itself():
  middle, scale = 40.0, 25.0
  within = lambda p, x: net(p, (x - middle) / scale)
  found = otherwise(within, examined().classifier.params, (middle, middle + HIGH * scale))
  assert found.first.gain == pytest.approx(1 / scale, rel=1e-3)
  np.testing.assert_allclose(found.first.start, middle, rtol=1e-3)
  unit, _ = samples()
  assert misfit(found, unit).max() < 1
  assert misfit(found, 0.95 * unit).min() > 2
  assert misfit(found, 0.5 * unit + 0.5 * np.roll(unit, 1, axis=0)).min() > 2


def test_without_the_weight_decay_samples_must_agree_on_one_scale():
  given, (unit, _) = examined().classifier, samples()
  classifier = dataclasses.replace(given, weight_decay=None)
  found = kkt_jax.examine(classifier, form="weight_decay")
  scales = signals.signals(found, HIGH * jnp.asarray(unit)).scale
  np.testing.assert_allclose(scales, DECAY, rtol=0.05)
  assert misfit(found, unit).max() < 1
  assert misfit(found, np.concatenate([unit[:6], 0.95 * unit[6:10]]))[6:].min() > 2
  assert np.isinf(misfit(found, unit[:4])).all()  # too few agree to say what it is


def test_equations_hold_for_no_other_training():
  found, (unit, _) = examined(), samples()
  blurred = dataclasses.replace(found.subspace, blur=0.1)
  for changes in ({"form": "max_margin"}, {"subspace": None}, {"first": None}, {"subspace": blurred}):
    other = dataclasses.replace(found, **changes)
    misfits, duals = certificates.by_equations(other, unit, Criteria())
    assert not certificates.applicable(other) and np.isinf(misfits).all() and not duals.any()


def test_the_bias_tells_brightness_only_if_it_had_the_kernels_weight_decay():
  unit, y = samples()
  x = HIGH * jnp.asarray(unit)
  for bias_decay in (DECAY, 0.0):
    params = trained(x, jnp.asarray(y), num_steps=8000, bias_decay=bias_decay)
    first = otherwise(net, params).first
    assert first.rank == NUM
    if not bias_decay:
      assert first.normal is None
    else:
      np.testing.assert_allclose(x @ first.normal, 1.0, atol=0.01)


def test_a_bias_that_is_known_to_have_another_weight_decay_tells_nothing():
  unit, y = samples()
  x = HIGH * jnp.asarray(unit)
  params = trained(x, jnp.asarray(y), num_steps=20000, bias_decay=DECAY / 2)
  as_if_equal = otherwise(net, params).first.normal
  assert as_if_equal is None or np.abs(x @ as_if_equal - 1).min() > 0.3  # the row space alone would not tell
  first = otherwise(net, params, weight_decay=dict.fromkeys(params, DECAY) | {"b": DECAY / 2}).first
  assert first.rank == NUM and first.decay == DECAY
  assert first.bias is None and first.normal is None


def test_given_gates_that_are_the_exact_ones_leave_the_gradient_as_it_is():
  params, x = examined().classifier.params, HIGH * jnp.asarray(samples()[0])
  steps = [(root > 0).astype(x.dtype) for root in relaxation.pre_activations(net, params, x)]
  assert [own.shape for own in steps] == [(NUM, WIDTH)]
  given = relaxation.given_gates(net)
  np.testing.assert_allclose(given(params, x, steps), net(params, x), atol=1e-6)
  weights = jnp.sin(jnp.arange(NUM * CLASSES, dtype=x.dtype)).reshape(NUM, CLASSES)
  expected = jax.grad(lambda p: jnp.vdot(net(p, x), weights))(params)
  found = jax.grad(lambda p: jnp.vdot(given(p, x, steps), weights))(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
  shut = jax.grad(lambda p: jnp.vdot(given(p, x, [0 * own for own in steps]), weights))(params)
  assert not shut["w"].any() and not shut["b"].any()


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda found, x: (dataclasses.replace(found, first=None), x, {}), "examination must be of a classifier without"),
    (lambda found, x: (found, x[:, :3], {}), "x must have shape"),
    (lambda found, x: (found, x, {"kink": 0.0}), "kink must be positive"),
  ],
)
def test_what_does_not_fit_is_named(make, message):
  found, x, settings = make(examined(), HIGH * jnp.asarray(samples()[0]))
  with pytest.raises(ValueError, match=message):
    signals.signals(found, x, **settings)


def test_one_wrong_sample_leaves_one_value_more():
  found, (unit, _) = examined(), samples()
  others = np.roll(unit, 7, axis=0)
  half = slice(0, NUM // 2)

  def left(own):
    x, duals = unit[half].copy(), certificates.by_equations(found, unit[half], Criteria())[1]
    x[:1], duals[:1] = own, certificates.by_equations(found, own, Criteria())[1]
    return signals.left_over(found.first, HIGH * x, duals)

  true = left(unit[:1])  # the values of the unknown half, and what is left of the known one
  assert true.shape == (NUM,) and true[half].min() > 0.99 and true[NUM // 2 :].max() < 0.1
  for wrong in (0.5 * unit + 0.5 * others, unit + others, 0.95 * unit + 0.05 * others, 0.85 * unit):
    assert left(wrong[:1])[NUM // 2] > 0.2
