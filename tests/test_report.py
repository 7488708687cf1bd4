"""The report says what was measured, in Markdown and in one page of HTML that needs nothing else."""

import base64
import html.parser
import math
import re

import matplotlib.image
import numpy as np
import pytest

from experiments import report
from experiments.report import Figure, Report, Row

_VOID = {"meta", "img", "link", "br"}
_FIGURES = (
  Figure("accuracy", "Accuracy", "Share read as wanted.", "higher", 2, "Recognisable"),
  Figure("distance", "Distance", "How far from the data.", "lower", 1, "Faithful"),
  Figure("spread", "Spread", "How diverse.", "", 3, "Diverse"),
)


def _report(
  rows, *, title="Comparison", figures=_FIGURES, headline=("accuracy", "distance", "spread"), notes=("A note.",)
):
  return Report(title, ["What this is."], figures, rows, headline, {"Steps": "10"}, notes)


def _row(name, kind="method", **values):
  return Row(name, name.upper(), f"What {name} is.", kind, values)


def _cells(text, title):
  """The cells of the Markdown row with a title."""
  line = next(line for line in text.splitlines() if line.startswith(f"| {title} "))
  return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.fixture
def picture(tmp_path):
  path = tmp_path / "picture.png"
  matplotlib.image.imsave(path, np.zeros((4, 12, 3)))
  return path


@pytest.fixture
def full(picture):
  """A report with everything in it."""
  steps = [0, 10, 20, 30]
  rows = (
    Row("a", "A", "First.", "method", {"accuracy": [0.5, 0.7], "spread": [1, 1]}, [("seed 0", picture)]),
    Row(
      "b b", "B", "Second.", "baseline", {"accuracy": [0.4], "distance": [math.nan]}, (), [("r", steps, [4, 3, 2, 1])]
    ),
    Row("c", "C", "Third.", "control", {"accuracy": [0.9, 0.9], "distance": [math.inf, 1.0]}),
  )
  return _report(rows)


class _Page(html.parser.HTMLParser):
  """Checks that tags are balanced, and keeps the tags with their attributes and the visible text."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.text = [], [], ""
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in _VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if "style" not in self.open:
      self.text += data

  def all(self, tag):
    return [attributes for name, attributes in self.tags if name == tag]


def test_mean_and_sample_deviation_over_runs():
  # 1, 2, 6: mean 3; squared deviations 4 + 1 + 9 = 14, halved 7, root 2.65
  text = report.markdown(_report([_row("a", distance=[1.0, 2.0, 6.0])]))
  assert _cells(text, "A") == ["3", "", "3.0 ± 2.6", ""]


def test_one_run_has_no_deviation():
  assert _cells(report.markdown(_report([_row("a", accuracy=[0.25])])), "A") == ["1", "0.25", "", ""]


def test_runs_without_a_finite_number_are_left_out_and_said():
  rows = [_row("a", accuracy=[0.5, math.nan, 0.7], distance=[math.inf] * 3), _row("b", accuracy=[0.1], distance=[2.0])]
  text = report.markdown(_report(rows))
  assert _cells(text, "A") == ["3", "0.60 ± 0.14 (2 of 3)", "-", ""]  # root of (0.1^2 + 0.1^2) / 1 is 0.14


def test_best_is_bold_whether_higher_or_lower_is_better_and_controls_never():
  rows = [
    _row("a", accuracy=[0.8], distance=[4.0], spread=[1.0]),
    _row("b", "baseline", accuracy=[0.7], distance=[3.0], spread=[2.0]),
    _row("c", "control", accuracy=[1.0], distance=[0.0], spread=[3.0]),
  ]
  text = report.markdown(_report(rows))
  assert _cells(text, "A") == ["1", "**0.80**", "4.0", "1.000"]
  assert _cells(text, "B") == ["1", "0.70", "**3.0**", "2.000"]
  assert _cells(text, "C") == ["1", "1.00", "0.0", "3.000"]
  page = report.html(_report(rows))
  assert set(re.findall("<strong>(.*?)</strong>", page)) == {"0.80", "3.0"}


def test_ties_as_shown_are_all_bold_and_a_mean_of_some_runs_never_is():
  rows = [_row("a", accuracy=[0.801]), _row("b", accuracy=[0.799]), _row("c", accuracy=[0.9, math.nan])]
  text = report.markdown(_report(rows))
  assert [_cells(text, title)[1] for title in "ABC"] == ["**0.80**", "**0.80**", "0.90 (1 of 2)"]


def test_nothing_is_bold_without_a_rival():
  assert "**0.50**" not in report.markdown(_report([_row("a", accuracy=[0.5]), _row("c", "control", accuracy=[0.4])]))


def test_markdown_has_rows_by_kind_and_a_legend():
  rows = [_row("c", "control"), _row("b", "baseline"), _row("a")]
  lines = report.markdown(_report(rows)).splitlines()
  assert lines[0] == "| | Runs | Accuracy ↑ | Distance ↓ | Spread |"
  assert [line[2] for line in lines[2:5]] == ["A", "B", "C"]
  assert "- **Distance** (lower is better): How far from the data." in lines
  assert "- **Spread**: How diverse." in lines


def test_markdown_shows_special_characters_as_they_are():
  figure = Figure("a", "p|q <b>", "Two\nlines *here*.", "", 1, "G")
  text = report.markdown(_report([], figures=[figure], headline=["a"]))
  assert text.splitlines()[0] == "| | Runs | p\\|q &lt;b> |"
  assert "Two lines \\*here\\*." in text


def test_html_is_balanced_and_its_headings_are_in_order(full):
  text = report.html(full)
  page = _Page(text)
  levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
  assert levels[0] == 1
  assert levels.count(1) == 1
  assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
  assert text.startswith("<!DOCTYPE html>")
  ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
  assert len(set(ids)) == len(ids)
  assert {link["href"] for link in page.all("a")} == {f"#{name}" for name in ids}


def test_html_needs_nothing_else(full, picture):
  text = report.html(full)
  page = _Page(text)
  prefix = "data:image/png;base64,"
  (image,) = page.all("img")
  assert image["src"].startswith(prefix)
  assert base64.b64decode(image["src"].removeprefix(prefix)) == picture.read_bytes()
  assert (image["alt"], image["width"], image["height"]) == ("A: seed 0", "12", "4")
  assert not re.search(r"https?:|//|url\(|@import", text.replace(image["src"], ""))
  assert not page.all("script") + page.all("link")


def test_html_explains_every_figure_in_sight_and_labels_its_tables(full):
  page = _Page(report.html(full))
  for figure in full.figures:
    assert page.text.count(figure.explanation) == 2  # the summary and the table of its group
  assert page.text.count("↓ lower is better") == 2
  assert len(page.all("caption")) == len(page.all("table")) == 5  # summary, three groups, settings
  assert all("scope" in attributes for attributes in page.all("th"))
  assert {body.get("class") for body in page.all("tbody")} == {"method", "baseline", "control", None}
  assert "nan" not in page.text
  assert "inf" not in page.text


def test_html_escapes_every_text(picture):
  evil = "<script>alert('\"&')</script>"
  figure = Figure("a", evil, evil, "higher", 1, evil)
  row = Row(evil, evil, evil, "method", {"a": [1.0]}, [(evil, picture)], [(evil, [0, 1], [1, 2])])
  text = report.html(Report(evil, [evil], [figure], [row], ["a"], {evil: evil}, [evil]))
  assert "<script" not in text
  page = _Page(text)
  assert page.all("img")[0]["alt"] == f"{evil}: {evil}"
  assert evil in page.text
  assert "<script" not in report.markdown(_report([row], figures=[figure], headline=["a"]))


def test_curves_are_logarithmic_where_all_losses_are_positive():
  def page(losses):
    return report.html(_report([Row("a", "A", "", "method", {}, (), [("run 1", range(len(losses)), losses)])]))

  assert "loss (logarithmic)" in page([1.0, 0.1, 0.01])
  # from 1 at the top (12) to 0.01 at the bottom (270): 0.1 lies in the middle
  assert "M60.0 12.0L380.0 141.0L700.0 270.0" in page([1.0, 0.1, 0.01])
  assert "loss (logarithmic)" not in page([1.0, 0.0, -1.0])
  assert "M60.0 12.0L380.0 141.0L700.0 270.0" in page([1.0, 0.0, -1.0])
  assert "run 1" in page([1.0, 0.0])


def test_curves_break_where_the_loss_is_not_finite_and_need_no_range():
  row = Row("a", "A", "", "method", {}, (), [("r", [0, 1, 2, 3, 4], [2.0, 2.0, math.nan, 2.0, 2.0])])
  path = "M60.0 141.0L220.0 141.0M540.0 141.0L700.0 141.0"  # a flat curve is in the middle
  assert path in report.html(_report([row]))
  assert "<svg" not in report.html(_report([Row("a", "A", "", "method", {}, (), [("r", [0], [math.nan])])]))


def test_long_curves_are_thinned_and_keep_their_end():
  losses = np.linspace(2, 1, 10_001)
  text = report.html(_report([Row("a", "A", "", "method", {}, (), [("r", np.arange(10_001), losses)])]))
  (path,) = (d for d in re.findall(' d="(M.*?)"', text) if d.count("L") > 1)
  assert path.count("L") < 500
  assert path.endswith("L700.0 270.0")


def test_write_leaves_two_files_and_repeats_itself(full, tmp_path):
  folder = tmp_path / "new" / "folder"
  report.write(full, folder)
  first = {path.name: path.read_bytes() for path in folder.iterdir()}
  report.write(full, folder)
  assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
  assert set(first) == {"report.html", "report.md"}
  assert first["report.md"].decode() == report.markdown(full)


def test_a_failed_write_leaves_the_old_report(full, tmp_path, picture):
  report.write(full, tmp_path / "out")
  before = (tmp_path / "out" / "report.html").read_bytes()
  picture.write_bytes(b"GIF89a")
  with pytest.raises(ValueError, match="must be PNG"):
    report.write(full, tmp_path / "out")
  assert (tmp_path / "out" / "report.html").read_bytes() == before


@pytest.mark.parametrize(
  "make, match",
  [
    (lambda: Figure("a", "", "", "more", 1, ""), "better of figure 'a'"),
    (lambda: Row("a", "", "", "rival", {}), "kind of row 'a'"),
    (lambda: _report([_row("a"), _row("a")]), "rows must have different names"),
    (lambda: _report([_row("a", speed=[1.0])]), "speed"),
    (lambda: _report([], headline=["speed"]), "speed"),
  ],
)
def test_mistakes_are_named(make, match):
  with pytest.raises(ValueError, match=match):
    make()
