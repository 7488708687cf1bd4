"""Configuration of the documentation site, which `make docs` builds."""

import functools
import importlib
import inspect
import pathlib
import pkgutil
import re

from docutils import nodes
from jax.typing import ArrayLike
from sphinx.util.nodes import make_refnode
from sphinx.util.typing import stringify_annotation

import kkt_jax

project = html_title = "kkt_jax"
version = kkt_jax.__version__
copyright = "the authors of kkt_jax, Apache-2.0"  # noqa: A001
extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_nb"]
templates_path = ["_templates"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]

# Docstrings: `single backticks` are names to link to, and code where nothing has that name.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
add_module_names = False
toc_object_entries_show_parents = "hide"
maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_attr_annotations = False  # the signature has them
napoleon_custom_sections = ["Returns"]  # free text here: what stands before its first colon is no type
nitpicky = True
# Names of other projects, which need the network to be looked up, and a type variable.
nitpick_ignore_regex = [
  (r"py:.*", r"(jax|numpy|optax|flax|orbax|collections|os|pathlib)\..*|logging"),
  (r"py:class", r"kkt_jax\.(classifiers\.relaxation\.Result|cli\.flags\.ConfigT)"),
  (r"py:exc", "InputError"),  # a ValueError; its class is private
]

myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]
nb_execution_mode = "cache"
nb_execution_timeout = 600  # for a cell
nb_execution_raise_on_error = True

# The names by which these types are known, for those under which they are defined.
_TYPES = {
  stringify_annotation(ArrayLike, "smart"): "~jax.typing.ArrayLike",
  "jax.jaxlib._jax.Array": "jax.Array",
  "jax._src.mesh.Mesh": "jax.sharding.Mesh",
  "optax._src.base.": "optax.",
  "flax.linen.module.": "flax.linen.",
  "flax.nnx.module.": "flax.nnx.",
}


_MODULES = {
  module.name: importlib.import_module(module.name)
  for module in pkgutil.walk_packages(kkt_jax.__path__, "kkt_jax.")
  if not any(part.startswith("_") for part in module.name.split("."))
}
# The face of a package: what its `__all__` names, some of which is imported when it is first used.
_FACES = {
  name: {own: getattr(module, own) for own in getattr(module, "__all__", ())} for name, module in _MODULES.items()
}
for _name, _face in _FACES.items():
  vars(_MODULES[_name]).update(_face)


def _home(package: str, name: str, own) -> str:
  """The module that defines a name of a package's face; of data, which do not know theirs, the one that assigns it."""
  home = getattr(own, "__module__", None)
  if home in _MODULES:
    return home
  assigns = re.compile(rf"^{name}\b.* = ", re.MULTILINE)
  within = [module for module in _MODULES if module.startswith(f"{package}.")]
  return next((module for module in within if assigns.search(inspect.getsource(_MODULES[module]))), package)


# Names under which an object is known, for that under which it is described: by the face, and data by their module.
_DESCRIBED: dict[str, str] = {}
for _package, _face in _FACES.items():
  for _name, _own in _face.items():
    _names_of = f"{_home(_package, _name, _own)}.{_name}", f"{_package}.{_name}"
    _known, _described = _names_of if getattr(_own, "__name__", None) == _name else _names_of[::-1]
    if _known != _described:
      _DESCRIBED[_known] = _described
_DESCRIBED |= {
  f"kkt_jax.{name}": _DESCRIBED.get(f"{own.__module__}.{name}", f"{own.__module__}.{name}")
  for name, own in ((name, getattr(kkt_jax, name)) for name in kkt_jax.__all__)
  if not inspect.ismodule(own)
}

# autosummary writes a page for every module; those of modules that are gone stay behind.
for _page in (pathlib.Path(__file__).parent / "api").glob("kkt_jax*.rst"):
  if _page.stem not in _MODULES:
    _page.unlink()
autosummary_context = {
  # Names of a package's face with what they are, and names of a module that the face of its package describes.
  "faces": {
    package: [
      (name, "class" if inspect.isclass(own) else "function")
      for name, own in face.items()
      if getattr(own, "__name__", None) == name
    ]
    for package, face in _FACES.items()
  },
  "elsewhere": {
    module: [
      known.rpartition(".")[2]
      for known, described in _DESCRIBED.items()
      if known.rpartition(".")[0] == module and module.startswith(f"{described.rpartition('.')[0]}.")
    ]
    for module in _MODULES
  },
}


def _known_types(app, what, name, obj, options, signature, returned):
  """Types by their known names; a default that is a function by its name, or as three dots if it has none."""
  for defined, known in _TYPES.items():
    signature, returned = (text and text.replace(defined, known) for text in (signature, returned))
  if signature:
    signature = re.sub(r"<function (\w+)>", r"\1", signature)
    signature = re.sub(r"<function (\w+\.)+<\w+>(\.\w+)?>|<factory>", "...", signature)
  return signature, returned


def _plain_text(app, what, name, obj, options, lines):
  """What napoleon must not read: a type before a colon in a property's docstring, emphasis in [M, *input_shape]."""
  if what == "property":
    lines.insert(0, "\\ ")
  lines[:] = [re.sub(r"([\[(, ])\*(\w+[\])])", r"\1\\*\2", line) for line in lines]


def _skip_fields(app, what, name, obj, skip, options):
  """Fields of a class are described by its docstring, functions that are their defaults elsewhere."""
  default = what == "class" and inspect.isfunction(obj) and obj.__name__ != name
  return True if default or (getattr(obj, "__doc__", None) or "").startswith("Alias for field") else None


@functools.lru_cache(maxsize=1)
def _names(env):
  """Every name of everything that has a description, with its entry."""
  objects = env.domains.python_domain.objects
  others = {
    known + full.removeprefix(described): entry
    for known, described in _DESCRIBED.items()
    for full, entry in objects.items()
    if full == described or full.startswith(f"{described}.")
  }
  return objects | others


def _find(env, name, *, anything):
  """The one object that a name means: in full, without the package, or without the module.

  Unless it may be anything, a single word is a function or a class: `loss` and `multipliers` are mostly other things.
  """
  names = _names(env)
  anything = anything or "." in name
  name = name.removeprefix("kkt_jax.")
  if anything and f"kkt_jax.{name}" in names:
    return f"kkt_jax.{name}", names[f"kkt_jax.{name}"]
  named = {(entry.docname, entry.node_id): (full, entry) for full, entry in names.items() if full.endswith(f".{name}")}
  by_itself = {place: own for place, own in named.items() if own[1].objtype in ("function", "class")}
  found = named if anything and len(named) == 1 else by_itself
  return next(iter(found.values())) if len(found) == 1 else None


def _reference(app, docname, node, name, *, anything):
  found = _find(app.env, name, anything=anything)
  if found is None:
    return None
  full, entry = found
  return make_refnode(app.builder, docname, entry.docname, entry.node_id, node, full)


def _resolve_short_name(app, env, node, contnode):
  """A name in a docstring: one of its own module, or one that `_find` finds."""
  refer = functools.partial(_reference, app, node["refdoc"], contnode, anything=True)
  return refer(f"{node.get('py:module')}.{node['reftarget']}") or refer(node["reftarget"])


def _link_code(app, doctree, docname):
  """Links `code` on pages to what it names."""
  for node in list(doctree.findall(nodes.literal)):
    name = re.sub(r"\(.*", "", node.astext())
    if re.fullmatch(r"[\w.]+", name) and not isinstance(node.parent, nodes.reference):
      reference = _reference(app, docname, node.deepcopy(), name, anything=False)
      if reference is not None:
        node.replace_self(reference)


def _link_notes(app, docname, source):
  """The notes lie outside of this folder; their page is `lab/notes`."""
  source[0] = source[0].replace("](../../BUILD_NOTES.md", "](notes.md")


def setup(app):
  """Called by Sphinx."""
  app.connect("autodoc-process-signature", _known_types)
  app.connect("autodoc-process-docstring", _plain_text, priority=400)  # before napoleon
  app.connect("autodoc-skip-member", _skip_fields)
  app.connect("source-read", _link_notes)
  app.connect("missing-reference", _resolve_short_name)
  app.connect("doctree-resolved", _link_code)
