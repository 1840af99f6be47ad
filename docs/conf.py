"""How `make docs` builds the site: from the pages beside this file and from the docstrings."""

import re
from typing import Any

import adatape_kernels

project = "adatape_kernels"
version = release = adatape_kernels.__version__
# Without a name and a year the footer would state a copyright that the licence words otherwise.
html_show_copyright = False

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3  # named as GitHub names them, so that one link works in both places

# In a docstring `name` is code, as it is in Markdown.
default_role = "code"
smartquotes_action = "D"  # dashes only: a quoted word is mostly a value to be typed
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
add_module_names = False
maximum_signature_line_length = 90

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"adatape_kernels {release}"
html_copy_source = False


def escape_lone_asterisks(app: Any, what: str, name: str, obj: Any, options: Any, lines: Any):
    """Keep the asterisk of a shape like (batch, *, dim), which would begin an emphasis."""
    lines[:] = [re.sub(r"(?<=[ (])\*(?=[,)])", r"\\*", line) for line in lines]


def setup(app: Any) -> None:
    """Connect the above to Sphinx."""
    app.connect("autodoc-process-docstring", escape_lone_asterisks)
