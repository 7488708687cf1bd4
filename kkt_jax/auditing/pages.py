"""Self-contained HTML pages from Jinja2 templates, with ``base.html.j2`` and ``parts.html.j2`` of this folder."""

import base64
import pathlib
import struct
from typing import Any

import jinja2

_HERE = pathlib.Path(__file__).parent


def render(template: pathlib.Path, **values: Any) -> str:
  """Renders a template. What it shows is escaped, and a value that it misses is an error.

  Args:
    template: its file; it can extend ``base.html.j2`` (blocks ``style``, ``header`` and ``main``, variable ``title``),
      and use ``embed`` and what is in ``parts.html.j2``.
    **values: its variables.

  Returns:
    HTML.

  Raises:
    ValueError: a picture is not a PNG.
  """
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader([template.parent, _HERE]),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.globals["embed"] = embed
  return environment.get_template(template.name).render(values)


def embed(png: bytes) -> dict[str, Any]:
  """The content of a PNG file as ``uri`` (base64), ``width`` and ``height``."""
  if not png.startswith(b"\x89PNG\r\n\x1a\n"):
    raise ValueError(f"pictures must be PNG files; got {png[:20]!r}.")
  width, height = struct.unpack(">II", png[16:24])
  return {"uri": f"data:image/png;base64,{base64.b64encode(png).decode()}", "width": width, "height": height}
