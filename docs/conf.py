"""How the documentation is built: ``sphinx-build -n -W -b html docs docs/_build/html``; no network is needed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import bnsurgery

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "bnsurgery"
author = "The bnsurgery authors"
copyright = author
version = release = bnsurgery.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]

myst_heading_anchors = 3

html_theme = "furo"
html_title = f"bnsurgery {release}"
html_show_sourcelink = False


add_module_names = False
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# What the examples in docstrings take for granted: the names of their own module.
doctest_global_setup = """
import torch
from bnsurgery import *
import bnsurgery.plots
globals().update({name: plot for name, plot in vars(bnsurgery.plots).items() if name.startswith("plot_")})

torch.set_num_threads(1)
"""

# No inventories are fetched, so names of other projects cannot be looked up. Names of our own still must be found.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|collections|matplotlib|os|pathlib|typing)\..+|Axes|Tensor|nn\.Module"),
    ("py:.*", r"(bool|dict|float|int|list|object|str|tuple|Any|None|Ellipsis)"),
    ("py:exc", r"(FileNotFoundError|ImportError|OSError|TypeError|ValueError|Exception|UserWarning)"),
    ("py:class", r"(Exception|ImportError|TypeError|UserWarning|ValueError|NamedTuple|Protocol)"),
]


def public_names(_app: Sphinx, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Names the types of attributes as users import them, and not by the private modules that define them."""
    lines[:] = [re.sub(r"\bbnsurgery\._\w+\.", "bnsurgery.", line) for line in lines]


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", public_names, priority=900)  # after napoleon
