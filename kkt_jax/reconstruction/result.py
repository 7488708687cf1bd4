"""What a reconstruction is: a trained generator that samples, enumerates its samples, is saved and loaded."""

from collections.abc import Sequence
import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kkt_jax import _checks
from kkt_jax.analysis.examination import Examination
from kkt_jax.checkpoint import Checkpointer, CheckpointError
from kkt_jax.classifiers.classifier import Classifier
from kkt_jax.criteria import Criteria
from kkt_jax.extraction.exact import Exact
from kkt_jax.generators.base import noise_of
from kkt_jax.kkt.conditions import Conditions
from kkt_jax.reconstruction.recipes import Recipe
from kkt_jax.reconstruction.step import batch_samples, Problem, TrainState
from kkt_jax.reconstruction.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Reconstruction:
  """A generator together with what it was trained from; made by `kkt_jax.reconstruct`.

  Attributes:
    trainer: what it is trained with.
    state: the trained parameters; ``state.params`` holds theta, eta and alpha.
    exact: for each classifier the certified training samples, once it is polished; empty before.
    table: what a network of continuous noise was fitted to, if it was.
  """

  trainer: Trainer
  state: TrainState
  exact: tuple[Exact, ...] = ()
  table: "Reconstruction | None" = None

  @property
  def examinations(self) -> tuple[Examination, ...]:
    """What each classifier's weights said."""
    return self.trainer.examinations

  @property
  def recipe(self) -> Recipe:
    """How it is trained; no part is None."""
    return self.trainer.recipe

  @property
  def problem(self) -> Problem:
    """What a training step is made of."""
    return self.trainer.problem

  @property
  def classifiers(self) -> list[Classifier]:
    """The classifiers, with the derivatives that the stationarity uses."""
    return self.trainer.classifiers

  @property
  def conditions(self) -> list[Conditions]:
    """The stationarity condition of each classifier, as its examination has it, whatever was trained."""
    return [examination.conditions for examination in self.examinations]

  @property
  def margins(self) -> np.ndarray:
    """e^-alpha, the learned margin of each classifier's training data [T], in logits."""
    return np.exp(-np.asarray(self.state.params["alpha"]))

  @property
  def certified_share(self) -> float:
    """The least share of a classifier's training samples that are certified, of the most that its subspace can hold."""
    pairs = zip(self.exact, self.examinations, strict=False)
    return min((len(exact.y) / max(examination.most_samples, 1) for exact, examination in pairs), default=0.0)

  @_checks.annotated
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

  @_checks.annotated
  def generate(self, noise: ArrayLike, y: ArrayLike, t: ArrayLike) -> jax.Array:
    """What the generator makes of given noise [S, D], labels [S] and classifier indices [S]; see `sample`."""
    labels, indices = _seen(y), _seen(t)
    knows = self._knows(labels)
    _checks.check_labels("t", indices, len(knows))
    _checks.check_shape("noise", noise, (len(knows), self.problem.generator.noise_dim), "[S, D]")
    fits = (knows & (indices[:, None] == np.arange(len(self.examinations))[None])).any(axis=1)
    known = _checks.concrete(fits.all())
    if known is False:
      raise ValueError("t must hold indices of classifiers that know the label at the same place of y.")
    x = self.trainer.generate(self.state, jnp.asarray(noise), _checks.integers(labels), _checks.integers(indices))
    return x if known else jnp.where(fits.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.nan)

  @_checks.annotated
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
    if knows.shape[1] == 1:  # nothing to draw, and nothing to compile
      return jnp.asarray(np.zeros(len(knows), np.int32))
    return jax.random.categorical(key, jnp.where(knows, 0.0, -jnp.inf), axis=1)

  def every_sample(self) -> tuple[jax.Array, np.ndarray]:
    """All samples that a finite generator can draw, of an endless one those of one training step, and their labels."""
    x, y = zip(*self.samples_of_each(), strict=True)
    return jnp.concatenate(x), np.concatenate(y)

  def samples_of_each(self) -> list[tuple[jax.Array, np.ndarray]]:
    """The same, apart for each classifier; those of a finite generator label by label, in the order of their codes."""
    codes = self.problem.generator.codes
    if not codes:
      return [(x, np.asarray(y)) for x, y in batch_samples(self.problem, self.state, self.classifiers)]
    pairs = zip(self.examinations, self.problem.classes, strict=True)
    labels = [np.asarray(examination.classifier.labels)[np.unique(classes)] for examination, classes in pairs]
    t = np.repeat(np.arange(len(labels)), [codes * len(known) for known in labels])
    y = np.repeat(np.concatenate(labels), codes)
    x = self.generate(jnp.tile(noise_of(codes), (len(y) // codes, 1)), y, t)
    return [(x[t == index], y[t == index]) for index in range(len(labels))]

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Writes the state and ``exact`` into a folder, under the step.

    Raises:
      CheckpointError: it cannot be written.
    """
    proofs = enumerate(exact._asdict() | {"criteria": dataclasses.astuple(exact.criteria)} for exact in self.exact)
    arrays = {f"{t}/{name}": np.asarray(value) for t, proof in proofs for name, value in proof.items()}
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

    Whether they are the same is decided by the classifiers' parameters, labels, input shape and range, and by the names
    and settings of the recipe's functions; what a function of your own computes is not compared.

    Args:
      folder: what `save` was given.
      classifiers: the same.
      recipe: the same; of a network of continuous noise what `kkt_jax.reconstruction.Recipe.joint` makes of the
        complete one.
      **settings: ``examinations``, ``microbatch_size`` and ``mesh`` of `kkt_jax.reconstruct`.

    Returns:
      The reconstruction, with ``exact``.

    Raises:
      CheckpointError: there is no state of these classifiers and this recipe in the folder.
      FileNotFoundError: there is none at all.
    """
    trainer = Trainer.of(classifiers, recipe, **settings)
    with Checkpointer(folder) as checkpointer:
      restored = checkpointer.restore(trainer.init(0))
      if restored is None:
        raise FileNotFoundError(f"folder must hold a saved reconstruction; {os.fspath(folder)} holds none.")
      beside = checkpointer.beside(restored[0])
    proofs: list[dict[str, Any]] = [{} for _ in trainer.examinations] if beside else []
    for name, array in beside.items():
      t, _, field = name.partition("/")
      proofs[int(t)][field] = array
    sizes = {len(proof.get("criteria", ())) for proof in proofs}
    if not all(set(proof) == set(Exact._fields) for proof in proofs) or sizes - {len(dataclasses.fields(Criteria))}:
      raise CheckpointError(f"what is certified in {os.fspath(folder)} was written by another version of kkt_jax.")
    certified = tuple(Exact(**{**proof, "criteria": Criteria(*proof["criteria"].tolist())}) for proof in proofs)
    trainer.check(restored[1])
    return cls(trainer, restored[1], certified)

  def _knows(self, y: Any) -> Any:
    """[S, T]: whether each classifier knows each label; a NumPy array unless labels are traced."""
    _checks.check_rank("y", y, 1, "[S]")
    _checks.check_labels("y", y, len(y))
    labels = [np.asarray(examination.classifier.labels, np.int32) for examination in self.examinations]
    xp: Any = jnp if isinstance(y, jax.core.Tracer) else np
    return xp.stack([(y[:, None] == known[None]).any(axis=1) for known in labels], axis=1)


def _seen(labels: ArrayLike) -> Any:
  """Integers as a NumPy array, which compiles nothing, unless they are traced."""
  return _checks.integers(labels) if isinstance(labels, jax.core.Tracer) else np.asarray(labels)
