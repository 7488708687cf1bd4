"""Pages need nothing else, escape every text, and name a picture that is none."""

import base64
import html.parser
import re

import matplotlib.image
import numpy as np
import pytest

from kkt_jax.auditing import pages

_VOID = {"meta", "img", "link", "br"}
_TEMPLATE = """{% extends "base.html.j2" %}
{% from "parts.html.j2" import picture, scrolling %}
{% block header %}<nav aria-label="Sections"><a href="#part">{{ text }}</a></nav>{% endblock %}
{% block main %}
<section><h2 id="part">{{ text }}</h2>
{{ picture(png, text, "A: " ~ text) }}
{% call scrolling(text, "settings") %}<tbody><tr><th scope="row">{{ text }}</th><td>1</td></tr></tbody>{% endcall %}
</section>
{% endblock %}
"""


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


@pytest.fixture
def picture(tmp_path):
  path = tmp_path / "picture.png"
  matplotlib.image.imsave(path, np.zeros((4, 12, 3)))
  return path


@pytest.fixture
def rendered(tmp_path, picture):
  template = tmp_path / "page.html.j2"
  template.write_text(_TEMPLATE)
  return lambda text="plain": pages.render(template, title=text, text=text, png=picture.read_bytes())


def test_a_page_is_balanced_its_headings_are_in_order_and_it_repeats_itself(rendered):
  text = rendered()
  page = _Page(text)
  levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
  assert levels == [1, 2]
  assert text.startswith("<!DOCTYPE html>")
  ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
  assert len(set(ids)) == len(ids)
  assert {link["href"] for link in page.all("a")} <= {f"#{name}" for name in ids}
  assert len(page.all("caption")) == len(page.all("table")) == 1
  assert rendered() == text


def test_a_page_needs_nothing_else(rendered, picture):
  text = rendered()
  page = _Page(text)
  (image,) = page.all("img")
  prefix = "data:image/png;base64,"
  assert image["src"].startswith(prefix)
  assert base64.b64decode(image["src"].removeprefix(prefix)) == picture.read_bytes()
  assert (image["alt"], image["width"], image["height"]) == ("A: plain", "12", "4")
  assert not re.search(r"https?:|//|url\(|@import", text.replace(image["src"], ""))
  assert not page.all("script") + page.all("link")


def test_every_text_is_escaped(rendered):
  evil = "<script>alert('\"&')</script>"
  text = rendered(evil)
  assert "<script" not in text
  page = _Page(text)
  assert page.all("img")[0]["alt"] == f"A: {evil}"
  assert evil in page.text


def test_a_picture_that_is_no_png_is_named(rendered, picture):
  picture.write_bytes(b"GIF89a")
  with pytest.raises(ValueError, match="must be PNG"):
    rendered()
