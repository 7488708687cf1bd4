"""The report says what was measured, in Markdown and in one page of HTML that needs nothing else."""

import base64
import html.parser
import io
import math
import re

import matplotlib.image
import numpy as np
import pytest

from experiments.compare import metrics, report
from experiments.compare.metrics import Metric
from experiments.compare.report import Report, Row

_VOID = {"meta", "img", "link", "br"}
_METRICS = (
  Metric("accuracy", "Accuracy", "higher", 2, "Recognisable", "Share read as wanted."),
  Metric("distance", "Distance", "lower", 1, "Faithful", "How far from the data."),
  Metric("spread", "Spread", "", 3, "Diverse", "How diverse."),
)


def _report(rows, *, shown=_METRICS, headline=("accuracy", "distance", "spread")):
  return Report("digits", shown, rows, headline, "python -m this", 10, ["One failed."])


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
  metric = Metric("a", "p|q <b>", "", 1, "G", "Two\nlines *here*.")
  text = report.markdown(_report([], shown=[metric], headline=["a"]))
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
  image, plot = page.all("img")
  assert image["src"].startswith(prefix)
  assert base64.b64decode(image["src"].removeprefix(prefix)) == picture.read_bytes()
  assert (image["alt"], image["width"], image["height"]) == ("A: seed 0", "12", "4")
  assert plot["src"].startswith(prefix) and plot["alt"] == "B: loss by training step"
  rest = text.replace(image["src"], "").replace(plot["src"], "")
  assert not re.search(r"https?:|//|url\(|@import", rest)
  assert not page.all("script") + page.all("link")


def test_html_explains_every_metric_in_sight_and_labels_its_tables(full):
  page = _Page(report.html(full))
  for metric in full.metrics:
    assert page.text.count(metric.explanation) == 2  # the summary and the table of its group
  assert page.text.count("↓ lower is better") == 2
  assert len(page.all("caption")) == len(page.all("table")) == 5  # summary, three groups, settings
  assert all("scope" in attributes for attributes in page.all("th"))
  assert {body.get("class") for body in page.all("tbody")} == {"method", "baseline", "control", None}
  assert "nan" not in page.text
  assert "inf" not in page.text


def test_html_escapes_every_text(picture):
  evil = "<script>alert('\"&')</script>"
  metric = Metric("a", evil, "higher", 1, evil, evil)
  row = Row(evil, evil, evil, "method", {"a": [1.0]}, [(evil, picture)], [(evil, [0, 1], [1, 2])])
  text = report.html(Report(evil, [metric], [row], ["a"], evil, 1, [evil]))
  assert "<script" not in text
  page = _Page(text)
  assert page.all("img")[0]["alt"] == f"{evil}: {evil}"
  assert evil in page.text
  assert "<script" not in report.markdown(_report([row], shown=[metric], headline=["a"]))


def test_curves_are_drawn_if_any_loss_is_finite():
  row = lambda *losses: Row("a", "A", "", "method", {}, (), [("run 1", range(len(losses)), losses)])
  drawn = [row(*losses).plot for losses in ([1.0, 0.1, 0.01], [1.0, 0.0, -1.0], [2.0, math.nan, math.inf, 1.0], [3.0])]
  assert len(set(drawn)) == 4  # on a logarithmic axis, a linear one, with a gap, of a single step
  for png in drawn:
    assert matplotlib.image.imread(io.BytesIO(png)).shape[:2] == (300, 720)
  assert row(math.nan, math.inf).plot is None
  assert row().plot is None


def test_a_picture_that_is_no_png_is_named(full, picture):
  picture.write_bytes(b"GIF89a")
  with pytest.raises(ValueError, match="must be PNG"):
    report.html(full)


def test_the_page_repeats_itself(full):
  assert report.html(full) == report.html(full)


def test_p_values_are_never_zero_and_the_largest_counts():
  metric = Metric("hits_p_value", "p", "", 3, "G", "")
  cell = lambda *values: Row("a", "A", "", "method", {"hits_p_value": values}).cell(metric)
  assert cell(1e-9, 1e-12) == ("< 0.001", "")
  assert cell(1e-9, 0.25, math.nan) == ("0.250", "(2 of 3)")


def test_a_table_replaces_the_one_of_its_name_in_a_document(tmp_path):
  document = tmp_path / "results.md"
  report.insert(document, "mnist", "first")
  report.insert(document, "faces", "other\n")
  text = document.read_text().replace("<!-- end mnist -->\n", "<!-- end mnist -->\nSaid by hand.\n")
  document.write_text(f"# Results\n\n{text}")
  report.insert(document, "mnist", "second")
  assert document.read_text() == (
    "# Results\n\n<!-- begin mnist -->\nsecond\n<!-- end mnist -->\nSaid by hand.\n"
    "\n<!-- begin faces -->\nother\n<!-- end faces -->\n"
  )


@pytest.mark.parametrize("kind", ["images", "circle"])
def test_the_metrics_of_an_experiment_are_told_apart_and_its_headline_is_among_them(kind):
  table = metrics.table(kind)
  names = [metric.name for metric in table]
  assert len(set(names)) == len(names)
  assert set(metrics.HEADLINES[kind]) <= set(names)
  assert len({metric.title for metric in table}) == len(table)
  assert all(metric.better in ("higher", "lower", "") and metric.explanation.endswith(".") for metric in table)
