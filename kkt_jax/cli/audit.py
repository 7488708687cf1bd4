"""What do my weights reveal? A generator from anybody's classifier, and an answer in plain words.

The owner names a Python function that describes the classifier (`kkt_jax.Subject`) and a file with its parameters. The
weights are examined: which conditions they obey, and how far they are from every point that obeys them. Then a
generator is trained so that its samples satisfy them, and ``report.html`` shows what was reconstructed. With
``--train_data`` and ``--held_out_data``, which the generator never sees, it says how much of the training data that is;
whether the weights obey the conditions with these data is measured first; if not, no generator is trained.
"""

from collections.abc import Mapping
import dataclasses
import functools
import hashlib
import importlib
import os
import pathlib
import re
import sys
from typing import Any, TYPE_CHECKING

from kkt_jax._errors import InputError
from kkt_jax.cli import flags, weights
from kkt_jax.cli.flags import flag, UsageError

if TYPE_CHECKING:
  import kkt_jax
  from kkt_jax.cli.workdir import Workdir

# What has no influence on the generator: a later run in the same folder can differ in it, and need not train again.
_AFTERWARDS = ("train_data", "held_out_data", "candidates", "force")
_DOORS = {"torch": "from_torch(module, input_shape=...)", "equinox": "from_equinox(module, input_shape=...)"}
_DOORS |= {"haiku": "from_haiku(transformed, params, input_shape=...)", "flax": "from_nnx(model, input_shape=...)"}
_FLAGS = {"train": "--train_data", "held_out": "--held_out_data", "candidates": "--candidates"}  # by argument
_FLAGS |= {"retained": "--train_data", "forgotten": "--forgotten"}


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the run; each is a flag of the same name."""

  classifier: str = flag(
    "",
    "module:function that returns the classifier: a kkt_jax.Subject or Classifier, a Keras model, or a scikit-learn"
    " estimator. The module lies in the current folder, or is installed.",
    group="The classifier",
  )
  checkpoint: str = flag(
    "", "Its parameters, if it has none yet: a .safetensors or flax .msgpack file, or an orbax folder."
  )
  initial_checkpoint: str = flag(
    "", "The parameters from which it was trained, if they are known: those of a public network that was fine-tuned."
  )
  train_data: str = flag(
    "",
    "The training data, to say how many were reconstructed: an .npz file with x and y, or a folder with a folder of"
    " images for each class, 0, 1, and so on.",
    group="For its owner",
  )
  held_out_data: str = flag("", "Non-members: other data of the same source, without which little can be said.")
  candidates: str = flag(
    "", "Samples whose membership is to be inferred. As --train_data, without labels; needs --held_out_data."
  )
  before: str = flag(
    "",
    "The parameters before samples were removed. Asked is then whether --forgotten is still in those of --checkpoint;"
    " --train_data are samples that stayed.",
    group="After unlearning",
  )
  forgotten: str = flag("", "The samples that were removed; as --train_data. Needs --before and --held_out_data.")
  form: str = flag(
    "auto",
    "Which conditions the weights obey; auto finds out.",
    choices=("auto", "weight_decay", "max_margin", "change"),
    group="The generator",
  )
  force: bool = flag(
    False,
    "Go on even if the classifier does not know its training data, cannot have started where it is said, or if its"
    " weights are too far from all conditions, or do not obey them with these data.",
  )
  codes: int = flag(0, "Samples of each class; 0 is what suits the classifier.", lower=0, upper=100_000)
  steps: int = flag(0, "Training steps; 0 is what suits the classifier.", lower=0)
  weights: str = flag("", "Other weights of terms of the loss: stationarity=0,total_variation=10.")
  seed: int = flag(0, "Seed of everything random.", lower=0, upper=2**32 - 1)  # all that JAX reads of it
  log_every: int = flag(50, "Steps between logged metrics.", lower=1, group="Output")
  save_every: int = flag(500, "Steps between checkpoints and pictures.", lower=1)


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Runs or resumes the audit; returns its metrics, with the verdict in words."""
  _check(config)
  import jax

  from kkt_jax import auditing
  from kkt_jax.checkpoint import fingerprint
  from kkt_jax.cli.progress import say_what_is_logged
  from kkt_jax.cli.workdir import Workdir

  try:
    jax.devices()
  except Exception as error:  # several kinds
    raise UsageError(f"JAX has no device to run on ({type(error).__name__}: {error}); see JAX_PLATFORMS.") from error
  say_what_is_logged()
  classifier = load(config.classifier, config.checkpoint, config.initial_checkpoint)
  if config.before:
    return _unlearning(config, classifier, workdir)
  paths = {"train": config.train_data, "held_out": config.held_out_data, "candidates": config.candidates}
  data = {
    name: auditing.read_samples(path, classifier, labelled=name != "candidates", name=_FLAGS[name])
    for name, path in paths.items()
    if path
  }
  params = fingerprint((classifier.params, classifier.initial_params))
  settings = dataclasses.asdict(config) | {"checkpoint_digest": params.hex()[:16]}

  @functools.cache  # what is refused leaves no folder
  def out() -> Workdir:
    return Workdir(workdir, {name: value for name, value in settings.items() if name not in _AFTERWARDS})

  audit_config = auditing.AuditConfig(
    form=None if config.form == "auto" else config.form,
    recipe=lambda examination: recipe_of(config, examination),
    force=config.force,
    train=lambda *arguments: _train(config, out(), *arguments),
  )
  try:
    report = auditing.audit(classifier, **data, config=audit_config, seed=config.seed)
  except UsageError:
    raise
  except InputError as error:
    raise UsageError(_with_flags(str(error), config)) from error
  given = {name: settings[name] for name in ("checkpoint", "train_data", "held_out_data") if settings[name]}
  made = {"Command": flags.command_line("kkt-audit", config, workdir)} | {
    f"SHA-256 of {name.replace('_', ' ')}": digest(pathlib.Path(path)) for name, path in given.items()
  }
  files = report.save(out().path, settings, made)
  results = report.to_dict() | {"final_losses": out().last_logged()}
  out().finish(results)
  return results | {"summary": str(report), "pictures": [name for name in files if name.endswith((".html", ".png"))]}


def _check(config: Config) -> None:
  """Raises UsageError for settings that do not go together."""
  if not config.classifier:
    raise UsageError("--classifier must be given; --help says what it is.")
  if config.candidates and not config.held_out_data:
    raise UsageError("--candidates needs --held_out_data: a score says nothing but beside those of untrained samples.")
  if bool(config.before) != bool(config.forgotten) or (config.forgotten and not config.held_out_data):
    raise UsageError("--before, --forgotten and --held_out_data must be given together.")
  if config.form == "change" and not config.initial_checkpoint:
    raise UsageError("--form=change needs --initial_checkpoint.")
  weights.parse_weights(config.weights)


def _train(
  config: Config, out: "Workdir", name: str, examination: "kkt_jax.Examination", recipe: "kkt_jax.Recipe", seed: int
) -> "kkt_jax.Reconstruction":
  """Trains a generator, or what it is compared with in a folder of its own, and draws images of the former."""
  from kkt_jax.auditing.report import rows_of_classes
  from kkt_jax.auditing.run import generated
  from kkt_jax.cli.training import train_generator
  from kkt_jax.cli.workdir import Workdir

  beside = name != "generator"

  def draw(reconstruction: "kkt_jax.Reconstruction") -> None:
    path = out.path / f"samples_{int(reconstruction.state.step):06d}.png"
    path.write_bytes(rows_of_classes(generated(reconstruction), examination.classifier.labels))

  return train_generator(
    Workdir(out.path / name, {}) if beside else out,
    [examination],
    recipe,
    seed=seed,
    log_every=config.log_every,
    save_every=config.save_every,
    draw=None if beside or len(examination.classifier.input_shape) != 3 else draw,
  )


def _unlearning(config: Config, after: "kkt_jax.Classifier", workdir: pathlib.Path) -> Mapping[str, Any]:
  """Audits the removal of samples: are they still in the weights, and does the change reveal them?"""
  from kkt_jax import auditing
  from kkt_jax.cli.workdir import Workdir

  before = load(config.classifier, config.before)
  paths = {"forgotten": config.forgotten, "held_out": config.held_out_data, "retained": config.train_data}
  data: dict[str, Any] = {
    name: auditing.read_samples(path, before, name=_FLAGS[name]) for name, path in paths.items() if path
  }
  try:
    report = auditing.audit_unlearning(before, after, **data)
  except InputError as error:
    raise UsageError(_with_flags(str(error), config)) from error
  out = Workdir(workdir, dataclasses.asdict(config))
  report.save(out.path)
  out.finish(report.to_dict())
  return report.to_dict() | {"summary": str(report)}


def _with_flags(text: str, config: Config) -> str:
  """An error message about arguments, with the flags of the command line in their place."""
  forced = " --force goes on nevertheless."
  if text.startswith("the classifier"):
    return f"--classifier={config.classifier}: {text}{forced}"
  if text.startswith("classifier"):  # which cannot be examined
    return f"--classifier={config.classifier}: {text}"
  if text.startswith("initial_params"):
    return f"--initial_checkpoint={config.initial_checkpoint}: {text}{forced}"
  return re.sub(r"\b(train|held_out|candidates|retained|forgotten)\b", lambda match: _FLAGS[match[1]], text)


def recipe_of(config: Config, examination: "kkt_jax.Examination") -> "kkt_jax.Recipe":
  """The default recipe of the classifier, with the settings that were given by hand."""
  import kkt_jax

  recipe = kkt_jax.reconstruction.recipes.default([examination])
  if config.steps:
    recipe = recipe.with_schedule(steps=config.steps)
  if config.codes:
    recipe = dataclasses.replace(recipe, generator=kkt_jax.generators.table(codes=config.codes))
  return weights.with_weights(recipe, config.weights)


def digest(path: pathlib.Path) -> str:
  """SHA-256 of a file; of a folder that of the names and the digests of its files, in their order."""
  if path.is_file():
    with path.open("rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  inside = sorted(inner for inner in path.rglob("*") if inner.is_file())
  lines = (f"{digest(inner)}  {inner.relative_to(path).as_posix()}\n" for inner in inside)
  return hashlib.sha256("".join(lines).encode()).hexdigest()


def load(name: str, checkpoint: str, initial: str = "") -> "kkt_jax.Classifier":
  """The classifier that ``module:function`` returns, with the parameters of a file, and those it was trained from.

  Raises:
    UsageError: there is no such function, it fails or returns something else, or the file is none or does not fit.
  """
  import kkt_jax

  module, _, function = name.partition(":")
  if not all(part.isidentifier() for part in (*module.split("."), function)):
    raise UsageError(f"--classifier must be module:function, such as mine:classifier; got {name!r}.")
  if "" not in sys.path:
    sys.path.insert(0, "")  # the user's own modules lie where the user is
  os.environ.setdefault("KERAS_BACKEND", "jax")
  try:
    model = _described(getattr(importlib.import_module(module), function)())
    like = model.variables_like() if isinstance(model, kkt_jax.Subject) else model.params
  except UsageError as error:
    raise UsageError(f"--classifier={name} {error}") from error
  except Exception as error:  # whatever somebody else's code may raise
    reason = (str(error).splitlines() or [""])[0]
    raise UsageError(f"--classifier={name} raised {type(error).__name__}: {reason}") from error
  if isinstance(model, kkt_jax.Subject) and not checkpoint:
    raise UsageError(f"--checkpoint must be given, for --classifier={name} has no parameters; --help says what it is.")
  if not isinstance(model, kkt_jax.Subject) and model.statistics is not None and checkpoint:
    raise UsageError(
      f"--checkpoint must not be given, for --classifier={name} has parameters, and running statistics that fit them."
    )
  variables = {}
  for flag_name, path in (("checkpoint", checkpoint), ("initial_checkpoint", initial)):
    try:
      variables[flag_name] = kkt_jax.read_weights(path, like) if path else None
    except kkt_jax.classifiers.WeightsError as error:
      raise UsageError(f"--{flag_name}: {error}") from error
  try:
    if isinstance(model, kkt_jax.Subject):
      return model.classifier(variables["checkpoint"], initial=variables["initial_checkpoint"])
    return model.with_params(variables["checkpoint"], initial_params=variables["initial_checkpoint"])
  except ValueError as error:
    raise UsageError(f"--classifier={name} and --checkpoint do not make a classifier: {error}") from error


def _described(model: Any) -> "kkt_jax.Subject | kkt_jax.Classifier":
  """A `Subject` or `Classifier`, made from a model if that knows the shape of its inputs.

  Raises:
    UsageError: it is something else.
  """
  import kkt_jax

  if isinstance(model, kkt_jax.Subject | kkt_jax.Classifier):
    return model
  packages = {kind.__module__.partition(".")[0] for kind in type(model).__mro__}
  if "keras" in packages:
    return kkt_jax.from_keras(model)
  if "sklearn" in packages:
    return kkt_jax.from_sklearn(model)
  needs = "a kkt_jax.Subject or Classifier, a Keras model or a scikit-learn estimator"
  if doors := [door for package, door in _DOORS.items() if package in packages]:
    needs = f"kkt_jax.{doors[0]}, which says what its inputs are"
  raise UsageError(f"must return {needs}; got {type(model).__name__}.")


def main() -> None:
  """The program ``kkt-audit``."""
  flags.main(Config, run, jointly=True)


if __name__ == "__main__":
  main()
