"""Sphinx's configuration; ``scripts/docs_site.py`` builds the site."""

project = "fgmp"
copyright = "the fgmp authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "fgmp"
html_show_sphinx = False
exclude_patterns = ["results"]
myst_heading_anchors = 4
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
# Tables of numbers are wide: the text may be, too.
html_css_files = ["site.css"]
html_static_path = ["_static"]
