"""From classifiers to a generator of their training data, in one call, and the stages that it is made of.

Each stage takes a `Reconstruction` and returns another one: `start`, `train`, `polish`, `distil`.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from kkt_jax import _checks
from kkt_jax._precision import full_precision
from kkt_jax.analysis.examination import Examination
from kkt_jax.classifiers.classifier import Classifier
from kkt_jax.extraction import certificates, exact
from kkt_jax.extraction.exact import Effort, Exact
from kkt_jax.generators.base import all_labels, Generator, places_of
from kkt_jax.generators.flows import Flow
from kkt_jax.reconstruction.loop import fit, Observer, Saver, SILENT
from kkt_jax.reconstruction.recipes import Multipliers, Recipe, Schedule
from kkt_jax.reconstruction.result import Reconstruction
from kkt_jax.reconstruction.step import TrainState
from kkt_jax.reconstruction.trainer import Trainer

_QUICK, _QUICK_STEPS = 4, 20  # rounds of polishing where training may end, and steps of each


@_checks.annotated
@full_precision
def reconstruct(
  classifiers: Sequence[Classifier],
  recipe: Recipe | None = None,
  *,
  seed: int = 0,
  examinations: Sequence[Examination] | None = None,
  microbatch_size: int | None = None,
  mesh: Mesh | None = None,
  saver: Saver | None = None,
  observer: Observer = SILENT,
) -> Reconstruction:
  """Trains a generator so that what it generates satisfies the classifiers' own equations; no data are needed.

  Args:
    classifiers: T classifiers, with one numbering of labels and inputs of one shape.
    recipe: how it is trained; what it leaves open is chosen by `kkt_jax.reconstruction.recipes.default`.
    seed: of the starts of generator and multipliers, of the noise of the training, and of a network of continuous
      noise. Examining and polishing have random numbers of their own, the same ones in every run.
    examinations: what `kkt_jax.analysis.examine` said of each classifier; examined here if None.
    microbatch_size: samples for each classifier that are in memory at once; see `kkt_jax.reconstruction.Problem`.
    mesh: devices over which the samples are split, from `kkt_jax.sharding.device_mesh`.
    saver: keeps the state, and has the one to resume from, such as an open `kkt_jax.checkpoint.Checkpointer`.
    observer: callbacks for progress, and how often the state is saved.

  Returns:
    The trained `Reconstruction`.

  Raises:
    ValueError: no classifier, inputs of different shapes, another number of examinations, or a recipe that does not
      fit.
    CheckpointError: what ``saver`` has is of other classifiers or of another recipe.
    TrainingDiverged: a NaN or an infinity appeared.

  >>> import jax, jax.numpy as jnp, kkt_jax
  >>> w = jnp.array([[1.0, -1.0], [0.5, 0.5]])
  >>> linear = kkt_jax.make_classifier(lambda w, x: jnp.maximum(x, 0) @ w, w, (2,), weight_decay=0.1)
  >>> quick = kkt_jax.Recipe(schedule=kkt_jax.reconstruction.Schedule(steps=2))
  >>> kkt_jax.reconstruct([linear], quick).sample(jax.random.key(0), jnp.array([0, 1, 1])).shape
  (3, 2)
  """
  begin = start(classifiers, recipe, seed=seed, examinations=examinations, microbatch_size=microbatch_size, mesh=mesh)
  trainer, schedule = begin.trainer, begin.recipe.schedule
  restored = saver.restore(begin.state) if saver is not None else None
  if restored is not None:
    trainer.check(restored[1])
    begin = Reconstruction(trainer, restored[1])
  elif schedule.steps:
    begin = Reconstruction(trainer, _best_start(trainer, seed, observer))
  made, others = _train_until_certified(begin, saver, observer), list[Reconstruction]()
  for number in range(1, schedule.tables):
    certified = any(len(samples.y) for samples in made.exact)
    if made.certified_share > schedule.nearly_all or not (certified or schedule.match_steps):
      break
    later = _later(observer, schedule, number)
    holding, hold = _holding(trainer, made.exact) if certified else (trainer, lambda state: state)
    another = Reconstruction(holding, _best_start(holding, seed + number * schedule.restarts, later))
    another = Reconstruction(trainer, trainer.mark(hold(train(another, observer=later).state)))
    if certified:
      made = polish(another, known=made.exact, observer=later)
    else:
      others.append(another)
  if not schedule.match_steps:
    return made
  return distil(made, others=others, seed=seed, observer=_later(observer, schedule, schedule.tables))


@_checks.annotated
def start(
  classifiers: Sequence[Classifier], recipe: Recipe | None = None, *, seed: int = 0, **settings: Any
) -> Reconstruction:
  """The random start of `reconstruct`, before any training.

  Args:
    classifiers: as for `reconstruct`.
    recipe: as for `reconstruct`.
    seed: of generator and multipliers.
    **settings: ``examinations``, ``microbatch_size`` and ``mesh`` of `reconstruct`.
  """
  trainer = Trainer.of(classifiers, recipe, **settings)
  return Reconstruction(trainer, trainer.init(seed))


@full_precision
def train(
  reconstruction: Reconstruction,
  num_steps: int | None = None,
  *,
  saver: Saver | None = None,
  observer: Observer = SILENT,
) -> Reconstruction:
  """Trains on until ``num_steps`` steps altogether, those of the recipe if None; see `reconstruct`."""
  trainer, schedule = reconstruction.trainer, reconstruction.recipe.schedule
  made = lambda state: dataclasses.replace(reconstruction, state=trainer.mark(state))
  state = fit(
    trainer.step,
    trainer.placed(reconstruction.state),
    num_steps=schedule.steps if num_steps is None else num_steps,
    steps_per_call=schedule.steps_per_call,
    saver=saver,
    observer=dataclasses.replace(observer, on_save=lambda state: observer.on_save(made(state))),
  )
  return made(state)


@full_precision
def polish(
  reconstruction: Reconstruction,
  rounds: int | None = None,
  *,
  quick: bool = False,
  known: Sequence[Exact] = (),
  observer: Observer = SILENT,
) -> Reconstruction:
  """Replaces samples by training samples nearby, where the weights alone certify these.

  See `kkt_jax.extraction.exact.find`. A label's certified samples, as the classifier labels them, take the places of
  those that led to one, and of others if there are more of them. Nothing in this looks at data.

  Args:
    reconstruction: what is polished.
    rounds: how many; those of the recipe if None.
    quick: whether nothing is tried unless more than ``hopeful`` of a few samples become training samples, later rounds
      start from twice as many places as there can be training samples, not from every one, and each takes a third of
      the steps.
    known: what another reconstruction from the same classifiers certified; these samples are put in, too, and lead to
      others.
    observer: its ``on_round`` is called.

  Returns:
    The reconstruction with these samples, and with ``exact``. As it was, but for ``exact``, where no subspace is
    revealed or the generator is not finite.
  """
  schedule = reconstruction.recipe.schedule
  rounds = schedule.polish_rounds if rounds is None else rounds
  generator = reconstruction.problem.generator
  if generator.put is None or not rounds:
    return reconstruction
  theta = reconstruction.state.params["theta"]
  certified: list[Exact] = []
  pairs = zip(reconstruction.examinations, reconstruction.samples_of_each(), strict=True)
  for t, (examination, (x, y)) in enumerate(pairs):
    tell = functools.partial(observer.on_round, t)
    effort = Effort(rounds)
    if quick:
      effort = Effort(rounds, 2 * examination.most_samples, _QUICK_STEPS, least_hope=schedule.hopeful)
    guesses, certain = examination.classifier.to_unit(x), known[t] if known else None
    samples, led = exact.find(examination, guesses, y, effort, known=certain, on_round=tell)
    labels, codes, chosen = exact.places(samples.y, led, y)
    if len(chosen):
      theta = generator.put(theta, t, labels, codes, jnp.asarray(samples.unit[chosen]))
    certified.append(samples)
  state = reconstruction.state._replace(params=reconstruction.state.params | {"theta": theta})
  return dataclasses.replace(reconstruction, state=state, exact=tuple(certified))


@full_precision
def distil(
  table: Reconstruction,
  flow: Flow | None = None,
  *,
  others: Sequence[Reconstruction] = (),
  seed: int = 0,
  observer: Observer = SILENT,
) -> Reconstruction:
  """A network of continuous noise in place of a generator: fitted to its samples, then trained by the equations.

  Samples lean on one another before they are fitted, see `kkt_jax.generators.Flow`, unless they are certified. In the
  second stage theta, eta and alpha move together on fresh noise in every step, by all terms of the recipe; what that
  does is taken back if the loss is not smaller after it.

  Args:
    table: the generator.
    flow: the network; that of the recipe if None.
    others: further reconstructions from the same classifiers, to whose samples it is fitted, too.
    seed: of its first weights and its noise.
    observer: its ``on_match`` is called while the network is fitted, its ``on_log`` while it is trained.

  Returns:
    The reconstruction with this generator, with ``exact``, and with the old one as its ``table``.

  Raises:
    ValueError: multipliers belong to the samples of the generator.
  """
  flow = flow or table.recipe.flow or Flow(batch_size=table.problem.generator.batch_size)
  trainer = dataclasses.replace(table.trainer, recipe=table.recipe.joint(flow))
  init_key, match_key, state_key = jax.random.split(jax.random.key(seed), 3)
  theta, statistics = trainer.problem.generator.init(init_key)
  tables = [reconstruction.samples_of_each() for reconstruction in (table, *others)]
  samples = []
  for index, examination in enumerate(table.examinations):
    unit = examination.classifier.to_unit(jnp.concatenate([of_each[index][0] for of_each in tables]))
    labels = np.concatenate([of_each[index][1] for of_each in tables])
    certified = table.exact[index] if table.exact else None
    known = {} if certified is None else {"certified": certified.unit, "least": certified.criteria.least_distance}
    samples.append((flow.leaning_on_others(unit, labels, **known), labels))
  steps = table.recipe.schedule.match_steps
  theta = flow.match(match_key, theta, table.examinations, samples, num_steps=steps, on_progress=observer.on_match)
  params = {name: value for name, value in table.state.params.items() if name != "gates"}  # those of a table's samples
  params["theta"] = theta
  opt_state = trainer.problem.optimizer.init(params)
  state = TrainState(jnp.zeros((), jnp.int32), params, statistics, opt_state, state_key, table.state.origin)
  begin = dataclasses.replace(table, trainer=trainer, state=trainer.mark(state), table=table)
  made = train(begin, observer=observer)
  return min(
    (begin, made), key=lambda reconstruction: _mean_total(trainer, reconstruction.state._replace(step=made.state.step))
  )


def _later(observer: Observer, schedule: Schedule, tables: int) -> Observer:
  """The same observer, whose steps and restarts go on counting after those of some tables."""
  steps, restarts = tables * schedule.steps, tables * schedule.restarts
  return dataclasses.replace(
    observer,
    on_log=lambda step, metrics: observer.on_log(steps + step, metrics),
    on_restart=lambda restart, step, metrics: observer.on_restart(restarts + restart, step, metrics),
  )


def _holding(trainer: Trainer, certified: Sequence[Exact]) -> tuple[Trainer, Callable[[TrainState], TrainState]]:
  """The same training with certified samples in some places of the table, and what puts them there in the end.

  Each weighs as much as one training sample, and the other places of a label as much as its other training samples, all
  labels being alike. With them half of the steps will do. Nothing is held where the size of the sums is unknown, or
  samples interact.
  """
  examinations, generator = trainer.examinations, trainer.problem.generator
  put, within = generator.put, generator.coordinates
  sized = all(certificates.applicable(one) and one.classifier.weight_decay is not None for one in examinations)
  if not sized or put is None or trainer.recipe.label_weights is not None:
    return trainer, lambda state: state
  codes, place_of = generator.codes, places_of(examinations)
  weights = np.ones((len(examinations), len(all_labels(examinations)), codes), np.float32)
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), jax.eval_shape(generator.init, jax.random.key(0))[0])
  ones = jax.tree.map(jnp.ones_like, zeros)
  for t, (examination, samples) in enumerate(zip(examinations, certified, strict=True)):
    labels = np.repeat(examination.classifier.labels, codes)
    y, code, chosen = exact.places(samples.y, np.zeros(len(labels), bool), labels)
    zeros, ones = (put(theta, t, y, code, jnp.asarray(samples.unit[chosen])) for theta in (zeros, ones))
    held = np.zeros(weights[t].shape, bool)
    held[np.asarray(place_of(y), int), code] = True
    each, known = examination.most_samples / examination.classifier.num_classes, held.sum(axis=1, keepdims=True)
    weights[t] = np.where(held, 1, np.maximum(each - known, 0) / np.maximum(codes - known, 1)) * codes / each
  fixed = jax.tree.map(jnp.equal, zeros, ones)  # only what was put in is the same in both
  hold = lambda theta: jax.tree.map(jnp.where, fixed, zeros, theta)

  def multipliers(examinations: Sequence[Examination], generator: Generator) -> Multipliers:
    given = trainer.recipe.multipliers(examinations, generator)
    weight_of = lambda batch: jnp.asarray(weights)[batch.t, place_of(batch.y), batch.code][:, None]
    return given._replace(apply=lambda eta, classifier, batch: weight_of(batch) * given.apply(eta, classifier, batch))

  holding = generator._replace(
    generate=lambda theta, *others: generator.generate(hold(theta), *others),
    coordinates=None if within is None else lambda theta, *others: within(hold(theta), *others),
  )
  whole = trainer.recipe.schedule
  half = whole.steps // 2 if whole.steps // 2 > whole.restart_steps else whole.steps
  recipe = dataclasses.replace(trainer.recipe, generator=lambda examinations: holding, multipliers=multipliers)
  recipe = recipe.with_schedule(steps=half)
  put_in = lambda state: state._replace(
    step=jnp.full_like(state.step, whole.steps), params=state.params | {"theta": hold(state.params["theta"])}
  )
  return dataclasses.replace(trainer, recipe=recipe), put_in


def _train_until_certified(begin: Reconstruction, saver: Saver | None, observer: Observer) -> Reconstruction:
  """Trained and polished; the training ends early where a quick look certifies every sample that there can be."""
  schedule = begin.recipe.schedule
  for look in (int(share * schedule.steps) for share in schedule.looks):
    if int(begin.state.step) <= look > 0:
      begin = train(begin, look, saver=saver, observer=observer)
      looked = polish(begin, min(_QUICK, schedule.polish_rounds), quick=True, observer=observer)
      if looked.certified_share == 1:
        return looked
      if looked.certified_share < schedule.hopeful:
        break  # looking takes long
  return polish(train(begin, saver=saver, observer=observer), observer=observer)


def _best_start(trainer: Trainer, seed: int, observer: Observer) -> TrainState:
  """Trains several starts without stationarity and returns the one with the least loss; no data are used.

  Where the schedule has no restarts it is the random start of the seed.
  """
  schedule = trainer.recipe.schedule
  if not (schedule.restart_steps and schedule.steps):
    return trainer.init(seed)
  trying = dataclasses.replace(trainer, recipe=trainer.recipe.with_weights(stationarity=0.0))
  lasting = {name: term.weight for name, term in trying.recipe.terms.items() if term.weight and term.schedule is None}
  tried: list[tuple[float, TrainState]] = []
  for restart in range(schedule.restarts):
    values: list[float] = []

    def on_log(number: int, now: dict[str, float], restart: int = restart, values: list[float] = values) -> None:
      values.append(sum(w * v for n, w in lasting.items() for k, v in now.items() if k.split("/")[0] == n))
      observer.on_restart(restart, number, now)

    state = fit(
      trying.step,
      trying.placed(trying.init(seed + restart)),
      num_steps=schedule.restart_steps,
      steps_per_call=schedule.steps_per_call,
      observer=Observer(log_every=max(schedule.steps_per_call, schedule.restart_steps // 100), on_log=on_log),
    )
    tried.append((float(np.mean(values[-10:])), state))  # noise makes single values uncertain
  return trainer.mark(min(tried, key=lambda pair: pair[0])[1])


def _mean_total(trainer: Trainer, state: TrainState) -> float:
  """The loss of a state, a mean over a few batches of noise that are the same for every state."""
  count = None if trainer.recipe.schedule.steps_per_call == 1 else 1
  keys = jax.random.split(jax.random.key(0), 4)
  return float(np.mean([trainer.step(trainer.placed(state._replace(key=key)), count)[1]["total"] for key in keys]))
