"""Sphinx configuration: `make docs` builds docs/_build/html."""

project = "longctx"
author = "the longctx authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 2
autodoc_typehints = "none"  # the annotations are shape strings, which Sphinx cannot link
autodoc_member_order = "bysource"
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {"description": "Long-context attention in JAX and Pallas"}
