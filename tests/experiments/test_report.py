"""The report says what was measured, in Markdown."""

import math

import pytest

from experiments.compare import report
from experiments.compare.report import markdown, Metric, Row

_METRICS = (
  Metric("accuracy", "Accuracy", "higher", 2, "Recognisable", "Share read as wanted."),
  Metric("distance", "Distance", "lower", 1, "Faithful", "How far from the data."),
  Metric("spread", "Spread", "", 3, "Diverse", "How diverse."),
)


def _row(name, kind="method", **values):
  return Row(name, name.upper(), kind, values)


def _cells(text, title):
  """The cells of the Markdown row with a title."""
  line = next(line for line in text.splitlines() if line.startswith(f"| {title} "))
  return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_mean_and_sample_deviation_over_runs():
  # 1, 2, 6: mean 3; squared deviations 4 + 1 + 9 = 14, halved 7, root 2.65
  text = markdown([_row("a", distance=[1.0, 2.0, 6.0])], _METRICS)
  assert _cells(text, "A") == ["3", "", "3.0 ± 2.6", ""]


def test_one_run_has_no_deviation():
  assert _cells(markdown([_row("a", accuracy=[0.25])], _METRICS), "A") == ["1", "0.25", "", ""]


def test_runs_without_a_finite_number_are_left_out_and_said():
  rows = [_row("a", accuracy=[0.5, math.nan, 0.7], distance=[math.inf] * 3), _row("b", accuracy=[0.1], distance=[2.0])]
  text = markdown(rows, _METRICS)
  assert _cells(text, "A") == ["3", "0.60 ± 0.14 (2 of 3)", "-", ""]  # root of (0.1^2 + 0.1^2) / 1 is 0.14


def test_best_is_bold_whether_higher_or_lower_is_better_and_controls_never():
  rows = [
    _row("a", accuracy=[0.8], distance=[4.0], spread=[1.0]),
    _row("b", "baseline", accuracy=[0.7], distance=[3.0], spread=[2.0]),
    _row("c", "control", accuracy=[1.0], distance=[0.0], spread=[3.0]),
  ]
  text = markdown(rows, _METRICS)
  assert _cells(text, "A") == ["1", "**0.80**", "4.0", "1.000"]
  assert _cells(text, "B") == ["1", "0.70", "**3.0**", "2.000"]
  assert _cells(text, "C") == ["1", "1.00", "0.0", "3.000"]
  assert text.count("**") == 4 + 2 * len(_METRICS)  # around two numbers, and the names in the legend


def test_ties_as_shown_are_all_bold_and_a_mean_of_some_runs_never_is():
  rows = [_row("a", accuracy=[0.801]), _row("b", accuracy=[0.799]), _row("c", accuracy=[0.9, math.nan])]
  text = markdown(rows, _METRICS)
  assert [_cells(text, title)[1] for title in "ABC"] == ["**0.80**", "**0.80**", "0.90 (1 of 2)"]


def test_nothing_is_bold_without_a_rival():
  assert "**0.50**" not in markdown([_row("a", accuracy=[0.5]), _row("c", "control", accuracy=[0.4])], _METRICS)


def test_markdown_has_rows_by_kind_and_a_legend():
  rows = [_row("c", "control"), _row("b", "baseline"), _row("a")]
  lines = markdown(rows, _METRICS).splitlines()
  assert lines[0] == "| | Runs | Accuracy ↑ | Distance ↓ | Spread |"
  assert [line[2] for line in lines[2:5]] == ["A", "B", "C"]
  assert "- **Distance** (lower is better): How far from the data." in lines
  assert "- **Spread**: How diverse." in lines


def test_markdown_shows_special_characters_as_they_are():
  metric = Metric("a", "p|q <b>", "", 1, "G", "Two\nlines *here*.")
  text = markdown([], [metric])
  assert text.splitlines()[0] == "| | Runs | p\\|q &lt;b> |"
  assert "Two lines \\*here\\*." in text


def test_p_values_are_never_zero_and_the_largest_counts():
  metric = Metric("hits_p_value", "p", "", 3, "G", "")
  cell = lambda *values: Row("a", "A", "method", {"hits_p_value": values}).cell(metric)
  assert cell(1e-9, 1e-12) == "< 0.001"
  assert cell(1e-9, 0.25, math.nan) == "0.250 (2 of 3)"


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
  table = report.metrics(kind)
  names = [metric.name for metric in table]
  assert len(set(names)) == len(names)
  assert set(report.HEADLINES[kind]) <= set(names)
  assert len({metric.title for metric in table}) == len(table)
  assert all(metric.better in ("higher", "lower", "") and metric.explanation.endswith(".") for metric in table)
