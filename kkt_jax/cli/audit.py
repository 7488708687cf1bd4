"""What do my weights reveal? A generator from anybody's classifier, and an answer in plain words.

The owner names a Python function that describes the classifier (`kkt_jax.Subject`) and a file with its parameters. The
weights are examined: which conditions they obey, and how far they are from every point that obeys them. Then a
generator is trained so that what it generates obeys them, and ``report.html`` shows what came out. With
``--train_data`` and ``--held_out_data``, which the generator never sees, it says how much of the training data that is;
whether the weights obey the conditions with these data is measured first, for otherwise nothing is worth rebuilding.
"""

from collections.abc import Mapping
import dataclasses
import functools
import hashlib
import importlib
import pathlib
import sys
from typing import Any, TYPE_CHECKING

from experiments.attack import methods
from kkt_jax.cli import flags
from kkt_jax.cli.flags import flag, UsageError

if TYPE_CHECKING:
  import kkt_jax

# What has no influence on the generator: a later run in the same folder can differ in it, and need not train again.
_AFTERWARDS = ("train_data", "held_out_data", "candidates", "force")


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the run; each is a flag of the same name."""

  classifier: str = flag(
    "",
    "module:function that returns the kkt_jax.Subject. The module lies in the current folder, or is installed.",
    group="The classifier",
  )
  checkpoint: str = flag("", "Its parameters: a .safetensors or flax .msgpack file, or an orbax folder.")
  initial_checkpoint: str = flag(
    "", "The parameters from which it was trained, if they are known: those of a public network that was fine-tuned."
  )
  train_data: str = flag(
    "",
    "The training data, to say how much of them came out: an .npz file with x and y, or a folder with a folder of"
    " images for each class, 0, 1, and so on.",
    group="For its owner",
  )
  held_out_data: str = flag("", "Other data of the same kind, without which little can be said.")
  candidates: str = flag(
    "",
    "Samples to ask about, each: was it trained on? As --train_data, without labels; needs --held_out_data.",
  )
  form: str = flag(
    "auto",
    "Which conditions the weights obey; auto finds out.",
    choices=("auto", "weight_decay", "max_margin", "change"),
    group="The generator",
  )
  force: bool = flag(
    False,
    "Go on even if the classifier does not know its training data, or if its weights are too far from all conditions,"
    " or do not obey them with these data.",
  )
  codes: int = flag(0, "Samples of each class; 0 is what suits the classifier.", lower=0, upper=100_000)
  steps: int = flag(1500, "Training steps.", lower=1)
  weights: str = flag("", "Other weights of terms of the loss: stationarity=0,total_variation=10.")
  seed: int = flag(0, "Seed of everything random.", lower=0, upper=2**62)
  log_every: int = flag(50, "Steps between logged metrics.", lower=1, group="Output")
  save_every: int = flag(500, "Steps between checkpoints and pictures.", lower=1)


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Runs or resumes the audit; returns its metrics, with the verdict in words."""
  for name in ("classifier", "checkpoint"):
    if not getattr(config, name):
      raise UsageError(f"--{name} must be given; --help says what it is.")
  if config.candidates and not config.held_out_data:
    raise UsageError("--candidates needs --held_out_data: a score says nothing but beside those of untrained samples.")
  if config.form == "change" and not config.initial_checkpoint:
    raise UsageError("--form=change needs --initial_checkpoint.")
  methods.parse_weights(config.weights)
  import jax
  import numpy as np

  import kkt_jax
  from kkt_jax.audit import description, membership, report
  from kkt_jax.audit import files as data
  from kkt_jax.cli.progress import say
  from kkt_jax.cli.training import train_generator
  from kkt_jax.cli.workdir import Workdir

  try:
    jax.devices()
  except Exception as error:  # JAX raises several kinds
    raise UsageError(f"JAX has no device to run on ({type(error).__name__}: {error}); see JAX_PLATFORMS.") from error
  classifier = load(config.classifier, config.checkpoint, config.initial_checkpoint)
  alone = bool(config.candidates)
  train, held_out, remarks = data.read(config.train_data, config.held_out_data, classifier, alone=alone)
  asked = data.read_candidates(config.candidates, classifier) if alone else None
  fit = description.check(classifier, train, held_out)
  if fit is not None:
    say(str(fit))
    if fit.refusal and not config.force:
      raise UsageError(f"--classifier={config.classifier}: {fit.refusal}")
    remarks = [*fit.doubts, *remarks]
  for remark in remarks:
    say(remark)
  say("examining the weights")
  form = None if config.form == "auto" else config.form
  try:
    examination = kkt_jax.examine(classifier, form=form, seed=config.seed)
  except ValueError as error:
    raise UsageError(f"--classifier={config.classifier}: {error}") from error
  recipe = recipe_of(config, examination)
  say(str(examination))
  obeyed, residuals = examination.bound <= kkt_jax.analysis.examination.HOPELESS, None
  if obeyed and train is not None:
    residuals = description.residuals(examination, train, held_out)
  if residuals is not None:
    say(str(residuals))
    obeyed = not residuals.disobey
  content = b"".join(
    np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((classifier.params, classifier.initial_params))
  )
  settings = dataclasses.asdict(config) | {"checkpoint_digest": hashlib.sha256(content).hexdigest()[:16]}
  out = Workdir(workdir, {name: value for name, value in settings.items() if name not in _AFTERWARDS})
  train_from = functools.partial(
    train_generator, examinations=[examination], log_every=config.log_every, save_every=config.save_every
  )
  reconstruction, likeness = None, None
  if config.force or obeyed:
    draw = functools.partial(report.draw, out.path)
    reconstruction = train_from(out, recipe=recipe, seed=config.seed + 1, draw=draw)
    if train is not None and held_out is not None:
      say("for comparison, samples that the classifier merely takes for their class")
      beside = Workdir(out.path / "class_likeness", {})
      likeness = train_from(beside, recipe=class_likeness(recipe, reconstruction), seed=config.seed + 2)
  scored, told = None, None
  if held_out is not None:
    say("scoring single samples")
    scored = None if train is None else membership.score(examination, train, held_out)
    told = None if asked is None else membership.suspects(examination, asked, asked.names, held_out)
  return report.write(
    out,
    settings,
    examination,
    reconstruction,
    train,
    held_out,
    likeness=likeness,
    scored=scored,
    told=told,
    remarks=remarks,
    fit=fit,
    residuals=residuals,
    command=flags.command_line("python -m kkt_jax.cli.audit", config, workdir),
  )


def class_likeness(recipe: "kkt_jax.Recipe", reconstruction: "kkt_jax.Reconstruction") -> "kkt_jax.Recipe":
  """As many free samples, trained only to be classified as wanted: what can be had without the theory."""
  import kkt_jax

  codes = reconstruction.every_sample()[1].size // reconstruction.classifiers[0].num_classes
  setting = methods.Setting(reconstruction.examinations, codes, num_samples=0)
  changed = methods.recipe_of(methods.IMAGES["ce"], recipe, setting)
  changed = changed.with_schedule(steps=min(changed.schedule.steps, recipe.schedule.steps))
  return dataclasses.replace(changed, generator=kkt_jax.generators.table(codes=codes, in_span=False))


def recipe_of(config: Config, examination: "kkt_jax.Examination") -> "kkt_jax.Recipe":
  """What suits the classifier, with what was asked for by hand."""
  import kkt_jax

  recipe = kkt_jax.reconstruction.recipes.default([examination]).with_schedule(steps=config.steps)
  if config.codes:
    recipe = dataclasses.replace(recipe, generator=kkt_jax.generators.table(codes=config.codes))
  return methods.with_weights(recipe, config.weights)


def load(name: str, checkpoint: str, initial: str = "") -> "kkt_jax.Classifier":
  """The subject that ``module:function`` returns, with the parameters of a file, and those it was trained from.

  Raises:
    UsageError: there is no such function, it fails or returns something else, or the file is none or does not fit.
  """
  import kkt_jax

  module, _, function = name.partition(":")
  if not all(part.isidentifier() for part in (*module.split("."), function)):
    raise UsageError(f"--classifier must be module:function, such as mine:classifier; got {name!r}.")
  if "" not in sys.path:
    sys.path.insert(0, "")  # the user's own modules lie where the user is
  try:
    subject = getattr(importlib.import_module(module), function)()
    like = subject.variables_like() if isinstance(subject, kkt_jax.Subject) else None
  except Exception as error:  # whatever somebody else's code may raise
    reason = (str(error).splitlines() or [""])[0]
    raise UsageError(f"--classifier={name} raised {type(error).__name__}: {reason}") from error
  if like is None:
    raise UsageError(f"--classifier={name} must return a kkt_jax.Subject; got {type(subject).__name__}.")
  variables = {}
  for flag_name, path in (("checkpoint", checkpoint), ("initial_checkpoint", initial)):
    try:
      variables[flag_name] = kkt_jax.read_weights(path, like) if path else None
    except kkt_jax.classifiers.WeightsError as error:
      raise UsageError(f"--{flag_name}: {error}") from error
  try:
    return subject.classifier(variables["checkpoint"], initial=variables["initial_checkpoint"])
  except ValueError as error:
    raise UsageError(f"--classifier={name} and --checkpoint do not make a classifier: {error}") from error


def main() -> None:
  """The program ``kkt-audit``."""
  flags.main(Config, run, jointly=True)


if __name__ == "__main__":
  main()
