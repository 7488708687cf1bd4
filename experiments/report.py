"""The result of a comparison as one self-contained HTML page and as a Markdown table. Presentation only."""

import base64
from collections.abc import Callable, Mapping, Sequence
import dataclasses
from html import escape
import itertools
import math
import pathlib
import statistics
import struct

_BETTER = {"higher": "↑ higher is better", "lower": "↓ lower is better", "": ""}
_KINDS = {
  "method": "Methods",
  "baseline": "Baselines",
  "ablation": "Ablations of this library's method",
  "control": "Controls, which do not compete",
}
_HOW_TO_READ = (
  "Each number is the mean over the runs ± the standard deviation between them; a run is one attacked classifier with"
  " one random seed. Bold is the best of the methods and baselines that have a number of every run. Controls do not"
  " compete: they show what a figure is worth. “(2 of 3)” means that only 2 of 3 runs gave a number, “-” that none did;"
  " an empty cell was not measured."
)
_COLOURS = ("#3b7dd8", "#dc4a26", "#1f9d3a", "#b04fc4", "#e08a00", "#0a9cc4", "#dd4477", "#7a9a00", "#9a7b5c")
_MAX_POINTS = 400  # of a drawn curve
_CSS = """
:root { --ink: #1c1e21; --soft: #5c636b; --line: #d5d9de; --page: #fff; --tint: #f2f4f6; --link: #1a5fb4 }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e4e6e9; --soft: #a2a9b1; --line: #3b4047;
  --page: #16181b; --tint: #22262b; --link: #84b6f4; color-scheme: dark } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 82rem; overflow-wrap: break-word;
  font: 1rem/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page) }
h1, h2, h3 { line-height: 1.25; margin: 2.2rem 0 .6rem }
h1 { margin-top: 1rem }
h2 { border-bottom: 1px solid var(--line); padding-bottom: .3rem }
p, li { max-width: 46rem }
a { color: var(--link) }
nav a { margin-right: 1.2rem }
small { font-size: .8rem; font-weight: normal; color: var(--soft) }
.scroll { overflow-x: auto; margin: .8rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
caption { text-align: left; color: var(--soft); font-size: .9rem; padding-bottom: .4rem }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--line); text-align: left; background: var(--page) }
thead th { vertical-align: top; border-bottom: 2px solid var(--soft); line-height: 1.35; font-size: .95rem }
thead small { display: block; min-width: 7rem; max-width: 15rem; margin-top: .2rem }
tbody th { font-weight: 500 }
th:first-child { position: sticky; left: 0; min-width: 8.5rem; max-width: 15rem }
th[scope=rowgroup] { max-width: none; padding-top: 1rem; font-size: .8rem; color: var(--soft) }
th[scope=rowgroup] span { position: sticky; left: .7rem }
.figures { overflow-wrap: normal }
.figures td { white-space: nowrap }
.settings td { overflow-wrap: anywhere }
.control th, .control td { background: var(--tint); color: var(--soft) }
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)) }
figure { margin: .8rem 0; min-width: 0 }
.pictures figure { margin: 0 }
.wide { grid-column: 1 / -1 }
figcaption { font-size: .9rem; color: var(--soft) }
img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line) }
.plot { display: block; width: 100%; min-width: 30rem; max-width: 46rem; font-size: 12px; fill: currentColor }
.plot path, .legend path { fill: none; stroke-width: 1.6; stroke-linecap: round; stroke-linejoin: round }
.plot .grid { stroke: var(--line); stroke-width: 1 }
.legend { list-style: none; margin: .2rem 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0 1.2rem }
.legend svg { width: 1.6rem; height: .6rem; margin-right: .4rem }
@media (max-width: 40rem) { th:first-child { min-width: 7rem; max-width: 8rem } th, td { padding: .35rem .5rem } }
@media print { nav { display: none } .scroll { overflow: visible } figure, table, tr { break-inside: avoid }
  h2, h3 { break-after: avoid } th, thead th, td { font-size: .65rem; padding: .3rem .4rem }
  th small, td small { font-size: .55rem; min-width: 4rem } th:first-child { position: static; min-width: 6rem } }
"""


@dataclasses.dataclass(frozen=True)
class Figure:
  """A figure of merit: a column.

  Attributes:
    name: its key in `Row.values`.
    title: what people call it.
    explanation: one sentence for someone who has not read the paper.
    better: "higher", "lower" or "" (neither).
    digits: decimals shown.
    group: heading of its table.
  """

  name: str
  title: str
  explanation: str
  better: str
  digits: int
  group: str

  def __post_init__(self) -> None:
    if self.better not in _BETTER:
      raise ValueError(f"better of figure {self.name!r} is {self.better!r}; it must be one of {list(_BETTER)}.")


@dataclasses.dataclass(frozen=True)
class Row:
  """What is compared.

  Attributes:
    name: unique.
    title: what people call it.
    explanation: what it is, in a sentence or two.
    kind: "method", "baseline" or "control".
    values: one number a run, by the name of the figure; a figure may be missing.
    pictures: captions and PNG files.
    curves: captions, steps and losses; one a run.
  """

  name: str
  title: str
  explanation: str
  kind: str
  values: Mapping[str, Sequence[float]]
  pictures: Sequence[tuple[str, pathlib.Path]] = ()
  curves: Sequence[tuple[str, Sequence[float], Sequence[float]]] = ()

  def __post_init__(self) -> None:
    if self.kind not in _KINDS:
      raise ValueError(f"kind of row {self.name!r} is {self.kind!r}; it must be one of {list(_KINDS)}.")

  @property
  def runs(self) -> int:
    """Number of runs: of the figure that has most."""
    return max((len(values) for values in self.values.values()), default=0)


@dataclasses.dataclass(frozen=True)
class Report:
  """All that is shown.

  Attributes:
    title: of the page.
    introduction: paragraphs.
    figures: all columns, in order.
    rows: shown as methods, then baselines, then controls.
    headline: names of the figures in the summary and in the Markdown.
    settings: by name.
    notes: what a reader should keep in mind.
  """

  title: str
  introduction: Sequence[str]
  figures: Sequence[Figure]
  rows: Sequence[Row]
  headline: Sequence[str]
  settings: Mapping[str, str]
  notes: Sequence[str]

  def __post_init__(self) -> None:
    figures, rows = [figure.name for figure in self.figures], [row.name for row in self.rows]
    for what, names in (("figures", figures), ("rows", rows)):
      if len(set(names)) < len(names):
        raise ValueError(f"{what} must have different names, got {names}.")
    unknown = {*self.headline, *(name for row in self.rows for name in row.values)} - set(figures)
    if unknown:
      raise ValueError(f"headline and values must name figures, got {sorted(unknown)}; the figures are {figures}.")


def markdown(report: Report) -> str:
  """The headline figures as a GitHub table with a legend.

  Args:
    report: what to show.

  Returns:
    Means ± sample standard deviations over runs, the best method or baseline of each figure in bold.

  >>> accuracy = Figure("accuracy", "Accuracy", "Share read as wanted.", "higher", 2, "Recognisable")
  >>> rows = [Row("a", "A", "", "method", {"accuracy": [0.8, 0.9]}), Row("b", "B", "", "baseline", {"accuracy": [0.5]})]
  >>> print(markdown(Report("Test", [], [accuracy], rows, ["accuracy"], {}, [])).partition("\\n\\n")[0])
  | | Runs | Accuracy ↑ |
  |---|---:|---:|
  | A | 2 | **0.85 ± 0.07** |
  | B (baseline) | 1 | 0.50 |
  """
  figures = _headline(report)
  titles = [f"{_plain(figure.title)} {_BETTER[figure.better][:1]}".rstrip() for figure in figures]
  lines = ["| | " + " | ".join(["Runs", *titles]) + " |", "|---|---:|" + "---:|" * len(figures)]
  for row in _ordered(report):
    cells = [_plain(row.title) + ("" if row.kind == "method" else f" ({row.kind})"), str(row.runs)]
    for figure in figures:
      text = " ".join(_cell(row, figure)).strip()
      cells.append(f"**{text}**" if row.name in _best(report.rows, figure) else text)
    lines.append("| " + " | ".join(cells) + " |")
  lines += ["", _HOW_TO_READ, ""]
  for figure in figures:
    direction = f" ({_BETTER[figure.better][2:]})" if figure.better else ""
    lines.append(f"- **{_plain(figure.title)}**{direction}: {_plain(figure.explanation)}")
  return "\n".join(lines) + "\n"


def html(report: Report) -> str:
  """The whole report as one page that needs no other file.

  Args:
    report: what to show.

  Returns:
    HTML5.

  Raises:
    OSError: a picture cannot be read.
    ValueError: a picture is not a PNG.
  """
  groups = dict.fromkeys(figure.group for figure in report.figures)
  tables = [
    _table(report, [f for f in report.figures if f.group == group], f"{group}: mean ± deviation over runs")
    for group in groups
  ]
  settings = "".join(
    f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>\n' for name, value in report.settings.items()
  )
  sections = {
    "Summary": f"<p>{_HOW_TO_READ}</p>\n"
    + _table(report, _headline(report), "The figures that say most: mean ± deviation over runs"),
    "All figures": "".join(f"<h3>{escape(g)}</h3>\n{table}" for g, table in zip(groups, tables, strict=True)),
    "What was compared": "".join(map(_row_section, _ordered(report))),
    "Settings": settings and _scrolling("How it was made", f"<tbody>\n{settings}</tbody>\n", "settings"),
    "Notes": report.notes and "<ul>\n" + "".join(f"<li>{escape(note)}</li>\n" for note in report.notes) + "</ul>\n",
  }
  shown = {name: body for name, body in sections.items() if body}
  links = "".join(f'<a href="#section-{i}">{name}</a>\n' for i, name in enumerate(shown))
  body = "".join(
    f'<section>\n<h2 id="section-{i}">{name}</h2>\n{text}</section>\n' for i, (name, text) in enumerate(shown.items())
  )
  introduction = "".join(f"<p>{escape(paragraph)}</p>\n" for paragraph in report.introduction)
  title = escape(report.title)
  return (
    f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
    f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_CSS}</style>\n</head>\n'
    f'<body>\n<header>\n<h1>{title}</h1>\n{introduction}<nav aria-label="Sections">\n{links}</nav>\n</header>\n'
    f"<main>\n{body}</main>\n</body>\n</html>\n"
  )


def write(report: Report, directory: pathlib.Path) -> None:
  """Writes ``report.html`` and ``report.md`` so that a kill leaves either the old file or the new one.

  Args:
    report: what to show.
    directory: made if there is none.

  Raises:
    OSError: a picture cannot be read, or the folder cannot be written.
    ValueError: a picture is not a PNG.
  """
  directory.mkdir(parents=True, exist_ok=True)
  for name, text in {"report.html": html(report), "report.md": markdown(report)}.items():
    scratch = directory / f"{name}.tmp"
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(directory / name)


def _headline(report: Report) -> list[Figure]:
  return [figure for name in report.headline for figure in report.figures if figure.name == name]


def _ordered(report: Report) -> list[Row]:
  return [row for kind in _KINDS for row in report.rows if row.kind == kind]


def _plain(text: str) -> str:
  """A text as Markdown that shows it as it is, on one line.

  >>> print(_plain("a|b *c* <i>"))
  a\\|b \\*c\\* &lt;i>
  """
  escaped = "".join(f"\\{c}" if c in "\\`*[]|" else c for c in " ".join(text.split()))
  return escaped.replace("&", "&amp;").replace("<", "&lt;")


def _cell(row: Row, figure: Figure) -> tuple[str, str]:
  """A mean, and the spread that follows it; numbers that are not finite are left out and said to be.

  >>> row = Row("a", "A", "", "method", {"x": [1.0, 3.0, math.nan], "y": [math.inf]})
  >>> [_cell(row, Figure(name, "", "", "", 1, "")) for name in ("x", "y", "z")]
  [('2.0', '± 1.4 (2 of 3)'), ('-', ''), ('', '')]
  """
  values = [float(value) for value in row.values.get(figure.name, ())]
  finite = [value for value in values if math.isfinite(value)]
  if not finite:
    return ("-" if values else ""), ""
  spread = [f"± {_number(statistics.stdev(finite), figure)}"] if len(finite) > 1 else []
  if len(finite) < row.runs:
    spread.append(f"({len(finite)} of {row.runs})")
  return _number(statistics.fmean(finite), figure), " ".join(spread)


def _number(value: float, figure: Figure) -> str:
  return f"{value:z,.{figure.digits}f}"


def _best(rows: Sequence[Row], figure: Figure) -> set[str]:
  """Names of the best methods and baselines, ties as shown included; none where fewer than two can be compared."""
  means = {}
  for row in rows:
    values = row.values.get(figure.name, ())
    if row.kind != "control" and len(values) and all(map(math.isfinite, values)):
      means[row.name] = statistics.fmean(values)
  if not figure.better or len(means) < 2:
    return set()
  best = max(means.values()) if figure.better == "higher" else min(means.values())
  return {name for name, mean in means.items() if _number(mean, figure) == _number(best, figure)}


def _table(report: Report, figures: Sequence[Figure], caption: str) -> str:
  """A table of the rows that have any of the figures, one part for each kind."""
  head = "".join(
    f'<th scope="col">{escape(f.title)}<small>{_BETTER[f.better]}</small><small>{escape(f.explanation)}</small></th>\n'
    for f in figures
  )
  parts = f'<thead>\n<tr>\n<th scope="col">Name</th>\n<th scope="col">Runs</th>\n{head}</tr>\n</thead>\n'
  best = [_best(report.rows, figure) for figure in figures]
  measured = [row for row in _ordered(report) if any(_cell(row, figure)[0] for figure in figures)]
  for kind, rows in itertools.groupby(measured, key=lambda row: row.kind):
    heading = f'<tr><th scope="rowgroup" colspan="{len(figures) + 2}"><span>{_KINDS[kind]}</span></th></tr>\n'
    lines = "".join(_table_row(row, figures, best) for row in rows)
    parts += f'<tbody class="{kind}">\n{heading}{lines}</tbody>\n'
  return _scrolling(caption, parts, "figures")


def _table_row(row: Row, figures: Sequence[Figure], best: Sequence[set[str]]) -> str:
  cells = ""
  for figure, names in zip(figures, best, strict=True):
    mean, spread = _cell(row, figure)
    mean = f"<strong>{mean}</strong>" if row.name in names else mean
    cells += f"<td>{mean} <small>{spread}</small></td>" if spread else f"<td>{mean}</td>"
  title = f'<a href="#{_anchor(row)}">{escape(row.title)}</a>'
  return f'<tr><th scope="row">{title}</th><td>{row.runs}</td>{cells}</tr>\n'


def _anchor(row: Row) -> str:
  return escape("row-" + "-".join(row.name.split()))


def _scrolling(caption: str, parts: str, name: str) -> str:
  caption = escape(caption)
  return (
    f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">\n<table class="{name}">\n'
    f"<caption>{caption}</caption>\n{parts}</table>\n</div>\n"
  )


def _row_section(row: Row) -> str:
  """What a row is, its pictures and its curves."""
  pictures = "".join(_picture(caption, path, row.title) for caption, path in row.pictures)
  grid = f'<div class="pictures">\n{pictures}</div>\n' if pictures else ""
  heading = f'<h3 id="{_anchor(row)}">{escape(row.title)} <small>{row.kind}</small></h3>\n'
  return f"<section>\n{heading}<p>{escape(row.explanation)}</p>\n{grid}{_plot(row)}</section>\n"


def _picture(caption: str, path: pathlib.Path, title: str) -> str:
  content = path.read_bytes()
  if not content.startswith(b"\x89PNG\r\n\x1a\n"):
    raise ValueError(f"pictures must be PNG files, got {path}.")
  width, height = struct.unpack(">II", content[16:24])
  return (
    f'<figure class="{"wide" if width > 1.6 * height else "narrow"}">\n'
    f'<img src="data:image/png;base64,{base64.b64encode(content).decode()}" alt="{escape(f"{title}: {caption}")}"'
    f' width="{width}" height="{height}" loading="lazy">\n<figcaption>{escape(caption)}</figcaption>\n</figure>\n'
  )


def _plot(row: Row) -> str:
  """The loss curves of all runs as inline SVG; nothing where there is no finite loss."""
  curves = [[(float(step), float(loss)) for step, loss in zip(*c, strict=True)] for _, *c in row.curves]
  points = [point for curve in curves for point in curve if all(map(math.isfinite, point))]
  if not points:
    return ""
  log = all(loss > 0 for _, loss in points)
  x, x_ticks = _axis([step for step, _ in points], 60, 700)
  y, y_ticks = _axis([loss for _, loss in points], 270, 12, log=log)
  marks = legend = ""
  for tick in y_ticks:
    marks += f'<path class="grid" d="M60 {y(tick):.1f}H700"/>'
    marks += f'<text x="52" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>\n'
  for tick in x_ticks:
    marks += f'<path class="grid" d="M{x(tick):.1f} 270v5"/>'
    marks += f'<text x="{x(tick):.1f}" y="290" text-anchor="middle">{tick:g}</text>\n'
  for (caption, *_), curve, colour in zip(row.curves, curves, itertools.cycle(_COLOURS), strict=False):
    marks += f'<path stroke="{colour}" d="{_line(curve, x, y)}"/>\n'
    sample = f'<svg viewBox="0 0 26 10" aria-hidden="true"><path stroke="{colour}" d="M1 5H25"/></svg>'
    legend += f"<li>{sample}{escape(caption)}</li>\n"
  return (
    '<figure>\n<div class="scroll" role="region" tabindex="0" aria-label="Loss curves">\n<svg class="plot"'
    f' viewBox="0 0 720 315" role="img" aria-label="{escape(row.title)}: loss by training step, a line a run">\n{marks}'
    '<text x="380" y="310" text-anchor="middle">training step</text>\n'
    f'<text transform="translate(13 141) rotate(-90)" text-anchor="middle">loss{" (logarithmic)" if log else ""}</text>'
    f'\n</svg>\n</div>\n<figcaption>Loss while training\n<ul class="legend">\n{legend}</ul>\n</figcaption>\n</figure>\n'
  )


def _axis(
  values: Sequence[float], start: float, end: float, *, log: bool = False
) -> tuple[Callable[[float], float], list[float]]:
  """Where numbers lie on the page, the least at ``start`` and the greatest at ``end``, and round numbers to mark.

  >>> place, ticks = _axis([0.003, 3], 0, 300, log=True)
  >>> round(place(0.03)), ticks
  (100, [0.01, 0.1, 1.0])
  """
  low, high = min(values), max(values)
  scale = math.log10 if log else float
  if scale(low) == scale(high):  # a flat curve, or one point
    margin = max(abs(low), 1) / 2
    low, high = (low / 2, high * 2) if log else (low - margin, high + margin)
  first, last = scale(low), scale(high)
  marks = [10.0**power for power in _ticks(first, last) if power.is_integer()] if log else []
  return (
    lambda value: start + (end - start) * (scale(value) - first) / (last - first),
    marks if len(marks) > 1 else _ticks(low, high),
  )


def _ticks(low: float, high: float) -> list[float]:
  """At most seven round numbers.

  >>> _ticks(0, 1000)
  [0.0, 200.0, 400.0, 600.0, 800.0, 1000.0]
  """
  power = 10.0 ** math.floor(math.log10((high - low) / 6))
  step = power * next(factor for factor in (1, 2, 5, 10) if high - low <= 6 * factor * power)
  return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _line(curve: Sequence[tuple[float, float]], x: Callable[[float], float], y: Callable[[float], float]) -> str:
  """A curve as an SVG path, thinned to what the eye can see, broken where the loss is not finite."""
  path, pen = "", "M"
  for step, loss in [*curve[: -1 : 1 + len(curve) // _MAX_POINTS], *curve[-1:]]:
    finite = math.isfinite(step) and math.isfinite(loss)
    path += f"{pen}{x(step):.1f} {y(loss):.1f}" if finite else ""
    pen = "L" if finite else "M"
  return path
