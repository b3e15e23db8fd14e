"""Settings of the documentation, which `make docs` builds into docs/_build/html. Nothing is loaded from the network."""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))

import generate

import far_env

project = "far-env"
author = "the far-env authors"
copyright = "the far-env authors"
version = release = far_env.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build", "generated", "examples"]
templates_path: list[str] = []
html_theme = "furo"
html_title = "far-env"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sphinx = False
html_show_sourcelink = False
html_copy_source = False
pygments_style = "default"

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"

default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
add_module_names = False
toc_object_entries = False

MARKDOWN_DOCSTRINGS = ("FrameRetentionEnv", "FrameRetentionVectorEnv")
"""Classes whose docstrings are Markdown, as Gymnasium's are, and are included in the page on environments."""


def _shorten(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    if what == "class" and name.rpartition(".")[2] in MARKDOWN_DOCSTRINGS:
        lines[:] = [lines[0], "", "The page on environments describes spaces, rewards and arguments.", ""]


def setup(app: Sphinx) -> None:
    """Write the generated parts before Sphinx reads the pages."""
    app.connect("builder-inited", lambda app: generate.write_all(Path(app.srcdir) / "generated"))
    app.connect("autodoc-process-docstring", _shorten)
