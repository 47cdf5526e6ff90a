"""Sphinx: `make docs`. Nothing is fetched, and everything that does not resolve is an error."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import _generate
from docutils import nodes
from sphinx.application import Sphinx

import bigkernel

project = "bigkernel"
author = "The bigkernel authors"
copyright = "the bigkernel authors. Apache License 2.0"
version = release = bigkernel.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_generated"]
nitpicky = True
# Only our own names are on this site; those of torch and transformers have no page here.
nitpick_ignore_regex = [("py:.*", r"(?!bigkernel).*")]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist"]

smartquotes = False  # options begin with two hyphens
default_role = "code"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say shapes and dtypes, which say more
autodoc_inherit_docstrings = False
python_maximum_signature_line_length = 60
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "bigkernel"
html_static_path = ["_static"]
html_css_files = ["figures.css"]
html_show_sphinx = False
html_copy_source = False
templates_path: list[str] = []
pygments_style = "default"
pygments_dark_style = "monokai"

_generate.main()


def inline_figures(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Puts SVG into the page itself, where it follows the theme that the reader chose."""
    for image in list(doctree.findall(nodes.image)):
        path = HERE / image["uri"]
        if path.suffix == ".svg":
            image.replace_self(nodes.raw("", path.read_text(encoding="utf-8"), format="html"))


def setup(app: Sphinx) -> None:
    app.connect("doctree-resolved", inline_figures)
