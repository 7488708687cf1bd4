"""From classifiers to a generator of their training data, in one call."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import ArrayLike
import numpy as np

from kkt_jax import _checks, sharding
from kkt_jax._precision import full_precision
from kkt_jax.analysis.examination import Examination, examine
from kkt_jax.checkpoint import Checkpointer, CheckpointError, fingerprint
from kkt_jax.classifiers.classifier import Classifier
from kkt_jax.classifiers.relaxation import computed_in, relaxed
from kkt_jax.criteria import Criteria
from kkt_jax.extraction import exact
from kkt_jax.extraction.exact import Exact
from kkt_jax.generators.flows import Flow
from kkt_jax.kkt.conditions import Conditions
from kkt_jax.reconstruction import recipes, training
from kkt_jax.reconstruction.recipes import Recipe
from kkt_jax.reconstruction.training import OnLog, Problem, Saver, TrainState

_LOOKS = (0.4, 0.7)  # shares of the training after which it may end, if all training samples are certified
_QUICK, _QUICK_STEPS = 4, 20  # rounds of polishing then, and steps of each
_HOPEFUL = 0.5  # share of a few samples that polishing must certify then, and more, before all are polished
OnSave = Callable[["Reconstruction"], None]
OnRound = Callable[[int, int, int, int], None]


@dataclasses.dataclass(frozen=True)
class Reconstruction:
  """A generator together with what it was trained from; made by `reconstruct`.

  Attributes:
    examinations: what each classifier's weights said.
    recipe: how it is trained; no part is None.
    state: the trained parameters; ``state.params`` holds theta, eta and alpha.
    microbatch_size: samples in memory at once while training, all if None.
    mesh: devices over which training splits the samples.
    exact: for each classifier the certified training samples, once it is polished; empty before.
    table: what a network of continuous noise was fitted to, if it was.
  """

  examinations: tuple[Examination, ...]
  recipe: Recipe
  state: TrainState
  microbatch_size: int | None = None
  mesh: Mesh | None = None
  exact: tuple[Exact, ...] = ()
  table: "Reconstruction | None" = None

  @functools.cached_property
  def classifiers(self) -> list[Classifier]:
    """The classifiers, with the derivatives that the stationarity uses."""
    return [_with_gradients(own.classifier, self.recipe.stationarity) for own in self.examinations]

  @property
  def conditions(self) -> list[Conditions]:
    """The stationarity condition of each classifier, as its examination has it, whatever was trained."""
    return [own.conditions for own in self.examinations]

  @property
  def margins(self) -> np.ndarray:
    """e^-alpha, the learned margin of each classifier's training data [T], in logits."""
    return np.exp(-np.asarray(self.state.params["alpha"]))

  @property
  def certified_share(self) -> float:
    """The least share of a classifier's training samples that are certified, of the most that its subspace can hold."""
    pairs = zip(self.exact, self.examinations, strict=False)
    return min((len(own.y) / max(examination.most_samples, 1) for own, examination in pairs), default=0.0)

  @functools.cached_property
  def problem(self) -> Problem:
    """What a training step is made of."""
    return _problem(self.recipe, self.examinations, microbatch_size=self.microbatch_size, mesh=self.mesh)

  @functools.cached_property
  def _origin(self) -> jax.Array:
    """What tells whether a saved state is of these classifiers and of this recipe [2, 8]."""
    own = [(c.params, c.input_shape, c.labels, c.value_range) for c in (e.classifier for e in self.examinations)]
    return jnp.asarray(np.stack([np.frombuffer(fingerprint(part), np.int32) for part in (own, self.recipe)]))

  def _resumed(self, state: TrainState) -> "Reconstruction":
    """The same with a saved state; a CheckpointError if it is of other classifiers or of another recipe."""
    same = np.all(np.asarray(state.origin) == np.asarray(self._origin), axis=1)
    for name, fits in zip(("classifiers", "recipe"), same, strict=True):
      if not fits:
        raise CheckpointError(
          f"{name} must be what the saved state was trained with, and are not. Give the same, or another folder."
        )
    return self._at(state)

  @functools.cached_property
  def _trained_conditions(self) -> list[Conditions]:
    return _trained_conditions(self.recipe, self.examinations)

  @functools.cached_property
  def _step(self) -> training.TrainStep:
    return training.make_train_step(self.problem)

  @functools.cached_property
  def _generate(self) -> Callable[[TrainState, jax.Array, jax.Array, jax.Array], jax.Array]:
    """``(state, noise, y, t) -> x``, at inference."""
    generate = self.problem.generator.generate
    of_state = lambda state, noise, y, t: generate(state.params["theta"], state.statistics, noise, y, t, False)[0]
    return jax.jit(full_precision(of_state))

  @classmethod
  @full_precision
  def begin(
    cls,
    classifiers: Sequence[Classifier],
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    examinations: Sequence[Examination] | None = None,
    microbatch_size: int | None = None,
    mesh: Mesh | None = None,
  ) -> "Reconstruction":
    """The random start of `reconstruct`, before any training."""
    if not classifiers:
      raise ValueError("classifiers must hold at least one classifier; got none.")
    shapes = {classifier.input_shape for classifier in classifiers}
    if len(shapes) > 1:
      raise ValueError(f"classifiers must have inputs of one shape; got {sorted(shapes)}.")
    if examinations is None:
      examinations = [examine(classifier) for classifier in classifiers]
    if len(examinations) != len(classifiers):
      raise ValueError(
        f"examinations must hold one for each of {len(classifiers)} classifiers; got {len(examinations)}."
      )
    examinations = tuple(
      dataclasses.replace(own, classifier=classifier) for own, classifier in zip(examinations, classifiers, strict=True)
    )
    recipe = recipes.complete(recipe or Recipe(), examinations)
    problem = _problem(recipe, examinations, microbatch_size=microbatch_size, mesh=mesh)
    made = cls(examinations, recipe, _random_state(problem, recipe, examinations, seed), microbatch_size, mesh)
    return made._at(made.state)

  def sample(self, key: jax.Array, y: ArrayLike, *, t: ArrayLike | None = None) -> jax.Array:
    """Draws from the generator with fresh noise.

    Args:
      key: typed random key.
      y: wanted labels [S]; ``[1]`` for one sample of label 1.
      t: classifier indices [S]; if None, drawn uniformly from T_y, the classifiers that know label y (the end of
        section 4 of the paper).

    Returns:
      Samples [S, *input_shape], in the classifiers' own units.

    Raises:
      ValueError: a label that no classifier knows, or that classifier ``t`` does not know. Inside a transformation,
        where values cannot be seen, its samples are NaN.
    """
    labels = _seen(y)
    _checks.check_rank("y", labels, 1, "[S]")
    noise_key, index_key = jax.random.split(key)
    t = self.choose_classifiers(index_key, labels) if t is None else t
    noise = jax.random.normal(noise_key, (len(labels), self.problem.generator.noise_dim))
    return self.generate(noise, labels, t)

  def generate(self, noise: ArrayLike, y: ArrayLike, t: ArrayLike) -> jax.Array:
    """What the generator makes of given noise [S, D], labels [S] and classifier indices [S]; see `sample`."""
    labels, own = _seen(y), _seen(t)
    knows = self._knows(labels)
    _checks.check_labels("t", own, len(knows))
    fits = (knows & (own[:, None] == np.arange(len(self.examinations))[None])).any(axis=1)
    known = _checks.concrete(fits.all())
    if known is False:
      raise ValueError("t must hold indices of classifiers that know the label at the same place of y.")
    x = self._generate(self.state, jnp.asarray(noise), _checks.integers(labels), _checks.integers(own))
    return x if known else jnp.where(fits.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.nan)

  def choose_classifiers(self, key: jax.Array, y: ArrayLike) -> jax.Array:
    """For each label y [S] one of the classifiers that know it, at random [S].

    Raises:
      ValueError: a label that no classifier knows.
    """
    labels = _seen(y)
    knows = self._knows(labels)
    if _checks.concrete(knows.any(axis=1).all()) is False:
      unknown = sorted(set(labels[~knows.any(axis=1)].tolist()))
      raise ValueError(f"y must hold labels that a classifier knows; no classifier knows {unknown}.")
    return jax.random.categorical(key, jnp.where(knows, 0.0, -jnp.inf), axis=1)

  def every_sample(self) -> tuple[jax.Array, np.ndarray]:
    """All samples that a finite generator can draw, of an endless one those of one training step, and their labels."""
    if not self.problem.generator.codes:
      own = training.batch_samples(self.problem, self.state, self.classifiers)
      return jnp.concatenate([x for x, _ in own]), np.concatenate([np.asarray(y) for _, y in own])
    places = (np.arange(self.problem.generator.codes) + 0.5) / self.problem.generator.codes
    batches = zip(self.examinations, self.problem.classes, strict=True)
    pairs = [(own.classifier.labels[k], t) for t, (own, classes) in enumerate(batches) for k in np.unique(classes)]
    y, t = np.repeat(pairs, len(places), axis=0).T
    noise = np.tile(jax.jit(jax.scipy.stats.norm.ppf)(places), len(pairs))[:, None]
    return self.generate(noise, y, t), y

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Writes the state and ``exact`` into a folder, under the step.

    Raises:
      CheckpointError: it cannot be written.
    """
    proofs = enumerate(own._asdict() | {"criteria": dataclasses.astuple(own.criteria)} for own in self.exact)
    arrays = {f"{t}/{name}": np.asarray(value) for t, own in proofs for name, value in own.items()}
    with Checkpointer(folder) as checkpointer:
      checkpointer.save(int(self.state.step), self.state, beside=arrays)

  @classmethod
  def load(
    cls,
    folder: str | os.PathLike[str],
    classifiers: Sequence[Classifier],
    recipe: Recipe | None = None,
    **settings: Any,
  ) -> "Reconstruction":
    """What `save` wrote, for the same classifiers and recipe.

    Whether they are the same is told by the classifiers' parameters, labels, input shape and range, and by the names
    and settings of the recipe's functions; what a function of your own computes cannot be told.

    Args:
      folder: what `save` was given.
      classifiers: the same.
      recipe: the same; of a network of continuous noise what `kkt_jax.reconstruction.Recipe.joint` makes of the
        complete one.
      **settings: ``seed``, ``examinations``, ``microbatch_size`` and ``mesh`` of `begin`.

    Returns:
      The reconstruction, with ``exact``.

    Raises:
      CheckpointError: there is no state of these classifiers and this recipe in the folder.
      FileNotFoundError: there is none at all.
    """
    start = cls.begin(classifiers, recipe, **settings)
    with Checkpointer(folder) as checkpointer:
      restored = checkpointer.restore(start.state)
      if restored is None:
        raise FileNotFoundError(f"folder must hold a saved reconstruction; {os.fspath(folder)} holds none.")
      beside = checkpointer.beside(restored[0])
    proofs: list[dict[str, Any]] = [{} for _ in start.examinations] if beside else []
    for name, array in beside.items():
      t, _, field = name.partition("/")
      proofs[int(t)][field] = array
    sizes = {len(own.get("criteria", ())) for own in proofs}
    if not all(set(own) == set(Exact._fields) for own in proofs) or sizes - {len(dataclasses.fields(Criteria))}:
      raise CheckpointError(f"what is certified in {os.fspath(folder)} was written by another version of kkt_jax.")
    proven = tuple(Exact(**{**own, "criteria": Criteria(*own["criteria"].tolist())}) for own in proofs)
    return dataclasses.replace(start._resumed(restored[1]), exact=proven)

  @full_precision
  def continue_training(
    self,
    num_steps: int | None = None,
    *,
    saver: Saver | None = None,
    on_log: OnLog | None = None,
    on_save: OnSave | None = None,
    until: Callable[["Reconstruction"], bool] | None = None,
    log_every: int = 50,
    save_every: int = 500,
  ) -> "Reconstruction":
    """Trains on until ``num_steps`` steps altogether, those of the recipe if None; see `reconstruct`.

    It ends early where ``until`` says so, which is asked after 40 % and 70 % of the recipe's steps.
    """
    schedule = self.recipe.schedule
    state = training.fit(
      self._step,
      *self._arguments(self.state),
      num_steps=schedule.steps if num_steps is None else num_steps,
      steps_per_call=schedule.steps_per_call,
      log_every=log_every,
      on_log=on_log,
      saver=saver,
      save_every=save_every,
      on_save=None if on_save is None else lambda state: on_save(self._at(state)),
      until=None if until is None else lambda state: until(self._at(state)),
      looks=[] if until is None else [int(share * schedule.steps) for share in _LOOKS],
    )
    return self._at(state)

  @full_precision
  def polished(
    self, rounds: int | None = None, *, quick: bool = False, on_round: OnRound | None = None
  ) -> "Reconstruction":
    """Puts training samples in the place of what comes near to them, where the weights alone certify that they are.

    See `kkt_jax.extraction.exact.find`. A label's certified samples, as the classifier labels them, take the places of
    those that led to one, and of others if there are more of them. Nothing in this looks at data.

    Args:
      rounds: how many; those of the recipe if None.
      quick: whether nothing is tried unless half of a few samples become training samples, later rounds start from
        twice as many places as there can be training samples, not from every one, and each takes a third of the steps.
      on_round: called with (classifier, round, number of certified samples, most that there can be).

    Returns:
      The reconstruction with these samples, and with ``exact``. As it was, but for ``exact``, where no subspace is told
      or the generator is not finite.
    """
    rounds = self.recipe.schedule.polish_rounds if rounds is None else rounds
    generator = self.problem.generator
    if generator.put is None or not rounds:
      return self
    x, y = self.every_sample()
    parts, theta = self._parts(), self.state.params["theta"]
    found: list[Exact] = []
    for t, (own, part) in enumerate(zip(self.examinations, parts, strict=True)):
      tell = None if on_round is None else functools.partial(on_round, t)
      less: dict[str, Any] = {}
      if quick:
        less = {"points": 2 * own.most_samples, "num_steps": _QUICK_STEPS, "least_hope": _HOPEFUL}
      samples, led = exact.find(own, own.classifier.to_unit(x[part]), y[part], rounds=rounds, on_round=tell, **less)
      labels, codes, chosen = exact.places(samples.y, led, y[part])
      if len(chosen):
        theta = generator.put(theta, t, labels, codes, jnp.asarray(samples.unit[chosen]))
      found.append(samples)
    state = self.state._replace(params=self.state.params | {"theta": theta})
    return dataclasses.replace(self, state=state, exact=tuple(found))

  @full_precision
  def continuous(
    self,
    flow: Flow | None = None,
    *,
    others: "Sequence[Reconstruction]" = (),
    seed: int = 0,
    on_match: Callable[[int, float], None] | None = None,
    on_log: OnLog | None = None,
    log_every: int = 50,
  ) -> "Reconstruction":
    """A network of continuous noise in place of a generator: fitted to its samples, then trained by the equations.

    Samples lean on one another before they are fitted, see `kkt_jax.generators.Flow`, unless they are certified. In the
    second stage theta, eta and alpha move together on fresh noise in every step, by all terms of the recipe; what that
    does is taken back if the loss is not smaller after it.

    Args:
      flow: the network; that of the recipe if None.
      others: further reconstructions from the same classifiers, to whose samples it is fitted, too.
      seed: of its first weights and its noise.
      on_match: called with (step, mean squared error) while it is fitted.
      on_log: called with (step, metrics) while it is trained.
      log_every: steps between logged metrics.

    Returns:
      The reconstruction with this generator, with ``exact``, and with this one as its ``table``.

    Raises:
      ValueError: multipliers belong to the samples of the generator.
    """
    flow = flow or self.recipe.flow or Flow(batch_size=self.problem.generator.batch_size)
    begin = dataclasses.replace(self, recipe=self.recipe.joint(flow), table=self)
    init_key, match_key, state_key = jax.random.split(jax.random.key(seed), 3)
    theta, statistics = begin.problem.generator.init(init_key)
    tables = [(*own.every_sample(), own._parts()) for own in (self, *others)]
    samples = []
    for index, own in enumerate(self.examinations):
      unit = own.classifier.to_unit(jnp.concatenate([x[parts[index]] for x, _, parts in tables]))
      labels = np.concatenate([y[parts[index]] for _, y, parts in tables])
      certified = self.exact[index].unit if self.exact else None
      samples.append((flow.leaning_on_others(unit, labels, certified), labels))
    steps = self.recipe.schedule.match_steps
    theta = flow.match(match_key, theta, self.examinations, samples, num_steps=steps, on_progress=on_match)
    params = {name: own for name, own in self.state.params.items() if name != "gates"}  # those of a table's samples
    params["theta"] = theta
    opt_state = begin.problem.optimizer.init(params)
    state = TrainState(jnp.zeros((), jnp.int32), params, statistics, opt_state, state_key, begin._origin)
    begin = begin._at(state)
    made = begin.continue_training(on_log=on_log, log_every=log_every)
    return min((begin, made), key=lambda own: begin._loss(own.state._replace(step=made.state.step)))

  def _loss(self, state: TrainState) -> float:
    """The loss of a state, a mean over a few batches of noise that are the same for every state."""
    count = None if self.recipe.schedule.steps_per_call == 1 else 1
    keys = jax.random.split(jax.random.key(0), 4)
    return float(np.mean([self._step(*self._arguments(state._replace(key=key)), count)[1]["total"] for key in keys]))

  def _arguments(self, state: TrainState) -> tuple[TrainState, list[Classifier], list[Conditions]]:
    """Of a training step, where its devices are."""
    arguments = (state, self.classifiers, self._trained_conditions)
    return arguments if self.mesh is None else sharding.replicate(arguments, self.mesh)

  def _parts(self) -> list[np.ndarray]:
    """Which of `every_sample` belong to each classifier."""
    codes = self.problem.generator.codes
    sizes = [len(np.unique(classes)) * codes if codes else len(classes) for classes in self.problem.classes]
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])

  def _at(self, state: TrainState) -> "Reconstruction":
    """The same with another state; what is compiled is kept."""
    state = (sharding.fetch(state) if self.mesh is not None else state)._replace(origin=self._origin)
    made = dataclasses.replace(self, state=state)
    vars(made).update({name: value for name, value in vars(self).items() if name not in vars(made)})
    return made

  def _knows(self, y: Any) -> Any:
    """[S, T]: whether each classifier knows each label; a NumPy array unless labels are traced."""
    _checks.check_rank("y", y, 1, "[S]")
    _checks.check_labels("y", y, len(y))
    labels = [np.asarray(own.classifier.labels, np.int32) for own in self.examinations]
    xp: Any = jnp if isinstance(y, jax.core.Tracer) else np
    return xp.stack([(y[:, None] == own[None]).any(axis=1) for own in labels], axis=1)


def _seen(labels: ArrayLike) -> Any:
  """Integers as a NumPy array, which compiles nothing, unless they are traced."""
  return _checks.integers(labels) if isinstance(labels, jax.core.Tracer) else np.asarray(labels)


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
  on_log: OnLog | None = None,
  on_save: OnSave | None = None,
  on_restart: Callable[[int, int, dict[str, float]], None] | None = None,
  on_round: OnRound | None = None,
  on_match: Callable[[int, float], None] | None = None,
  log_every: int = 50,
  save_every: int = 500,
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
    on_log: called with (step, metrics as floats) every ``log_every`` steps.
    on_save: called with the reconstruction so far every ``save_every`` steps, after the saver.
    on_restart: called with (restart, step, metrics) while starts are tried.
    on_round: called while samples are polished; see `Reconstruction.polished`.
    on_match: called while a network is fitted to the samples; see `Reconstruction.continuous`.
    log_every: steps between logged metrics.
    save_every: steps between saved states.

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
  begin = Reconstruction.begin(
    classifiers, recipe, seed=seed, examinations=examinations, microbatch_size=microbatch_size, mesh=mesh
  )
  schedule = begin.recipe.schedule
  restored = saver.restore(begin.state) if saver is not None else None
  if restored is not None:
    begin = begin._resumed(restored[1])
  elif schedule.restart_steps and schedule.steps:
    begin = _best_start(begin, seed, on_restart)
  looks: list[Reconstruction] = []

  def complete(now: Reconstruction) -> bool:
    if looks and not looks[-1].certified_share:
      return False  # nothing was certified before, and looking takes long
    looks.append(now.polished(min(_QUICK, schedule.polish_rounds), quick=True, on_round=on_round))
    return looks[-1].certified_share == 1

  made = begin.continue_training(
    saver=saver, on_log=on_log, on_save=on_save, until=complete, log_every=log_every, save_every=save_every
  )
  made = looks[-1] if looks and looks[-1].certified_share == 1 else made.polished(on_round=on_round)
  if not schedule.match_steps:
    return made
  later = lambda number: None if on_log is None else lambda step, m: on_log(number * schedule.steps + step, m)
  others = []
  for number in range(1, 1 if any(len(own.y) for own in made.exact) else schedule.tables):
    another = _best_start(begin, seed + number * schedule.restarts, on_restart)
    others.append(another.continue_training(on_log=later(number), log_every=log_every))
  return made.continuous(
    others=others, seed=seed, on_match=on_match, on_log=later(schedule.tables), log_every=log_every
  )


def _random_state(problem: Problem, recipe: Recipe, examinations: Sequence[Examination], seed: int) -> TrainState:
  generator_key, state_key, multiplier_key = jax.random.split(jax.random.key(seed), 3)
  theta, statistics = problem.generator.init(generator_key)
  given = recipe.schedule.margin
  return training.init_state(
    state_key,
    problem,
    [_with_gradients(own.classifier, recipe.stationarity) for own in examinations],
    _trained_conditions(recipe, examinations),
    theta=theta,
    statistics=statistics,
    eta=problem.multipliers.init(multiplier_key),
    margins=[own.margin if given is None else given for own in examinations],
  )


def _best_start(
  begin: Reconstruction, seed: int, on_restart: Callable[[int, int, dict[str, float]], None] | None
) -> Reconstruction:
  """Trains several starts without stationarity and returns the one with the least loss; no data are used.

  Where the schedule has no restarts it is the random start of the seed.
  """
  recipe = begin.recipe.with_weights(stationarity=0.0)
  schedule, terms = recipe.schedule, recipe.terms
  if not (schedule.restart_steps and schedule.steps):
    return begin._at(_random_state(begin.problem, begin.recipe, begin.examinations, seed))
  lasting = {name: term.weight for name, term in terms.items() if term.weight and term.schedule is None}
  problem = _problem(recipe, begin.examinations, microbatch_size=begin.microbatch_size, mesh=begin.mesh)
  step = training.make_train_step(problem)
  every = max(schedule.steps_per_call, schedule.restart_steps // 100)
  tried: list[tuple[float, TrainState]] = []
  for restart in range(schedule.restarts):
    values: list[float] = []

    def on_log(number: int, now: dict[str, float], restart: int = restart, values: list[float] = values) -> None:
      values.append(sum(w * v for n, w in lasting.items() for k, v in now.items() if k.split("/")[0] == n))
      if on_restart is not None:
        on_restart(restart, number, now)

    state = training.fit(
      step,
      _random_state(problem, recipe, begin.examinations, seed + restart),
      begin.classifiers,
      begin.conditions,
      num_steps=schedule.restart_steps,
      steps_per_call=schedule.steps_per_call,
      log_every=every,
      on_log=on_log,
    )
    tried.append((float(np.mean(values[-10:])), state))  # noise makes single values uncertain
  return begin._at(min(tried, key=lambda own: own[0])[1])


@full_precision
def _trained_conditions(recipe: Recipe, examinations: Sequence[Examination]) -> list[Conditions]:
  return [recipe.stationarity.conditions(own) for own in examinations]


@full_precision
def _problem(
  recipe: Recipe, examinations: Sequence[Examination], *, microbatch_size: int | None, mesh: Mesh | None
) -> Problem:
  generator = recipe.generator(examinations)
  return Problem(
    generator=generator,
    multipliers=recipe.multipliers(examinations, generator),
    stationarity=recipe.stationarity,
    terms=recipe.terms,
    optimizer=recipe.schedule.optimizer(),
    classes=[
      training.class_sequence(own.classifier, generator.batch_size, recipe.label_weights) for own in examinations
    ],
    num_steps=recipe.schedule.steps,
    microbatch_size=microbatch_size,
    mesh=mesh,
  )


def _with_gradients(classifier: Classifier, stationarity: recipes.Stationarity) -> Classifier:
  """The classifier with the derivatives that the stationarity uses: those of ``gradient_fn``, its gates relaxed."""
  own = relaxed(dataclasses.replace(classifier, apply_fn=classifier.gradient_fn), stationarity.gate_sharpness)
  own = dataclasses.replace(own, apply_fn=classifier.apply_fn)
  if stationarity.compute_dtype is None:
    return own
  rough = computed_in(own.gradient_fn, stationarity.compute_dtype)
  return dataclasses.replace(own, gradient_fn=rough, evaluate_fn=None)  # margins and statistics stay exact
