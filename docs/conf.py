"""The site of the documentation: the repository's own Markdown files, and pages made of docstrings and help texts.

The source folder is the repository, so that a link means the same here and where the files are browsed. The order of
pages is that of the links of docs/README.md.
"""

from __future__ import annotations

import re
from typing import Any

import sphinx.application
from typer.main import get_command
from typer.testing import CliRunner

from fp8ckpt import __version__
from fp8ckpt.cli import app as command_line

project = "fp8ckpt"
version = release = __version__
author = "the founders of fp8ckpt"
root_doc = "docs/README"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "docs/**.md"]
exclude_patterns = [".*", "build", "docs/_site"]
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"fp8ckpt {__version__}"
html_show_copyright = False
html_extra_path = ["index.html"]  # leads from the top of the site to its first page

myst_heading_anchors = 4  # as where the files are browsed
nitpicky = True  # with -W, a name in a docstring that leads nowhere is an error
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
default_role = "any"
nitpick_ignore_regex = [
    ("any", r"fp8ckpt\.(numerics|serving|tensors)\..*"),  # where a rule is told; no interface
    ("any", r"ValueError|re\.search|NEW"),
    ("py:class", r".*"),  # types in signatures
]


def _order_pages(_: sphinx.application.Sphinx, page: str, text: list[str]) -> None:
    """The index's links are the table of contents, in their order."""
    if page == root_doc:
        linked = dict.fromkeys(re.findall(r"\]\(([^)#:]+)\.md\)", text[0]))
        text[0] += "\n```{toctree}\n:hidden:\n\n" + "\n".join(linked) + "\n```\n"


def _print_help(_: sphinx.application.Sphinx, page: str, text: list[str]) -> None:
    """The page of commands is their help."""
    if page == "docs/commands":
        for name in get_command(command_line).commands:  # type: ignore[attr-defined]  # a group
            said = CliRunner().invoke(command_line, [name, "--help"], prog_name="fp8ckpt", terminal_width=100).stdout
            text[0] += f"\n## {name}\n\n```text\n{said.strip()}\n```\n"


def setup(app: sphinx.application.Sphinx) -> dict[str, Any]:
    """Sphinx calls this."""
    app.connect("source-read", _order_pages)
    app.connect("source-read", _print_help)
    return {"parallel_read_safe": True}
