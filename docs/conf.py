"""The site, see `make docs`. Its source directory is the root of the checkout, so links lead where they do there."""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))           # docstrings are read from the sources; nothing compiled is needed for it

project = "llm_datadist"
author = copyright = "the llm_datadist authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc"]

root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "docs/**/*.md"]
exclude_patterns = [".*", "build", "include", "llm_datadist*", "tests", "tools", "**/__pycache__"]

# What stands beside docs/index.md in the navigation. A page that is in no list fails the build.
CONTENTS = {
    "Start": ["../README", "tutorial/index", "concepts", "migration", "glossary"],
    "Use": ["howto", "tuning", "options", "errors", "threads", "engines", "ascend", "performance", "compatibility"],
    "Reference": ["reference/index"],
    "Inside": ["architecture", "protocol", "../CONTRIBUTING", "../SECURITY", "../CHANGELOG"],
    "中文": ["zh/quickstart", "zh/migration"],
}
# Pages of features that a checkout may have or not.
CONTENTS["Use"] += [page for page in ("observability", "reliability") if (ROOT / f"docs/{page}.md").exists()]

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "llm_datadist"
html_show_sourcelink = False
html_copy_source = False

# numpydoc renders types of parameters as prose, which is what they are here; signatures keep the names alone.
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "inherited-members": "int, BaseException, OSError, ABC"}
default_role = "literal"
nitpicky = True

TOCTREE = "\n```{{toctree}}\n:caption: {caption}\n:hidden:\n\n{pages}\n```\n"


def add_navigation(app, docname, source):
    """Append the table of contents to the first page; readers of the file alone have its table."""
    if docname == root_doc:
        source[0] += "".join(TOCTREE.format(caption=caption, pages="\n".join(pages))
                             for caption, pages in CONTENTS.items())


def lead_to_the_first_page(app, failure):
    """Write index.html at the root of the site."""
    if failure is None and app.builder.name == "html":
        target = f"{root_doc}.html"
        (Path(app.outdir) / "index.html").write_text(
            f'<!doctype html><meta http-equiv="refresh" content="0; url={target}"><a href="{target}">{project}</a>\n',
            encoding="utf-8")


def setup(app):
    """Connect the above."""
    app.connect("source-read", add_navigation)
    app.connect("build-finished", lead_to_the_first_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
