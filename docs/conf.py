"""The documentation as a site: ``make docs``."""

from __future__ import annotations

from importlib.metadata import version as installed_version

project = "KalmaGrove"
author = "The KalmaGrove authors"
copyright = "The KalmaGrove authors, Apache-2.0"
version = release = installed_version("kalmagrove")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
# The tests run the notebooks; the site shows what they left.
nb_execution_mode = "off"
# What a page rests on is no page of its own.
exclude_patterns = ["_build", "results/laptop"]

myst_heading_anchors = 4
myst_enable_extensions = ["attrs_inline"]

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Docstrings name code in double backticks; single ones name things of the package.
default_role = "code"

html_theme = "furo"
html_title = "KalmaGrove"
html_theme_options = {"navigation_with_keys": True}
