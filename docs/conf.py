"""How Sphinx builds the site: `make docs`."""

import importlib
import pkgutil
import re
from importlib.metadata import version as version_of
from pathlib import Path

DOCS = Path(__file__).parent

project = "moesaic"
author = "The moesaic authors"
copyright = author
release = version = version_of("moesaic").partition("+")[0]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

# Markdown as forges show it: headings have the same anchors, and one link works in both places.
myst_heading_anchors = 4
myst_enable_extensions = ["deflist", "attrs_inline"]
# Notebooks are kept without results; each build runs them, and an error in a cell is an error of the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 60

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autoclass_content = "class"
add_module_names = False
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
# Types of torch and of the standard library have no page here.
nitpick_ignore_regex = [("py:.*", r"(?!moesaic).*")]

html_theme = "furo"
html_title = f"moesaic {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True


def public_names() -> dict[str, list[str]]:
    """The names of each module in `api.md`, without those of which it says "see" another module."""
    _, *sections = re.split(r"^## `([\w.]+)`$", (DOCS / "api.md").read_text(), flags=re.MULTILINE)
    rows = {
        module: re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.MULTILINE)
        for module, section in zip(sections[::2], sections[1::2], strict=True)
    }
    return {module: [name for name, what in found if not what.startswith("see `")] for module, found in rows.items()}


def write_reference(app) -> None:
    """One page a module, of docstrings. `api.md` is the only list of names; a test holds it against the package."""
    folder = DOCS / "reference"
    folder.mkdir(exist_ok=True)
    for module, names in public_names().items():
        page = f"# `{module}`\n\n" + (
            f"```{{eval-rst}}\n.. automodule:: {module}\n   :members: {', '.join(names)}\n```\n"
            if can_be_imported(module)
            else "This module needs packages that were not there when the site was built.\n"
        )
        file = folder / f"{module}.md"
        if not file.exists() or file.read_text() != page:
            file.write_text(page)


def can_be_imported(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def find_by_last_name(app, env, node, contnode):
    """A docstring may name a thing by any module that has it. What has no page is code, as long as it exists."""
    if node.get("refdomain") != "py":
        return None
    domain = env.get_domain("py")
    name = node["reftarget"].rpartition(".")[2]
    modules = public_names()
    found = [full for full in domain.objects if (at := full.rpartition("."))[2] == name and at[0] in modules]
    if len(found) == 1:
        return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], found[0], node, contnode)
    return contnode if exists(node["reftarget"]) else None


def exists(target: str) -> bool:
    try:
        pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError):
        return False
    return True


def says_nothing(app, what, name, obj, skip, options) -> bool | None:
    """The fields of a NamedTuple are told in the docstring of their class."""
    return True if (obj.__doc__ or "").startswith("Alias for field number") else None


def setup(app) -> None:
    app.connect("autodoc-skip-member", says_nothing)
    app.connect("builder-inited", write_reference)
    app.connect("missing-reference", find_by_last_name)
