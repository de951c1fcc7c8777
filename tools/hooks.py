"""mkdocs' hooks: figures drawn while the site is built, and pages that are made from files of the repository.

``<!-- figure NAME: what it shows -->`` in a page becomes the figure, in the colours of the page; where its measurement
is missing, the sentence that says so.
"""

import logging
import re
from functools import cache
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tools.figures import FIGURES, THEMES
from tools.measurements import DOCS, ROOT, NotMeasuredError

log = logging.getLogger("mkdocs.hooks.quantcache")

_FIGURE = re.compile(r"<!-- figure ([a-z0-9-]+): (.*?) -->", re.DOTALL)
_KINDS = ("added", "changed", "fixed", "removed")


@cache
def figures() -> tuple[dict[str, str], dict[str, str]]:
    """Every figure's SVG by file name, and the reasons for those that cannot be drawn."""
    drawn, missing = {}, {}
    for name, draw in FIGURES.items():
        try:
            for theme, colours in THEMES.items():
                drawn[f"figures/{name}-{theme}.svg"] = draw(colours)
        except NotMeasuredError as reason:
            missing[name] = str(reason)
            log.info("figure %s: %s", name, reason)
    return drawn, missing


def changelog() -> str:
    """The changelog: what has not been released yet, from the fragments."""
    parts = ["# Changelog", "## Unreleased"]
    for kind in _KINDS:
        fragments = sorted((ROOT / "changelog.d").glob(f"*.{kind}.md"))
        if fragments:
            items = (fragment.read_text(encoding="utf-8").strip().replace("\n", "\n  ") for fragment in fragments)
            parts += [f"### {kind.title()}", "\n".join(f"- {item}" for item in items)]
    return "\n\n".join(parts) + "\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is made: figures, the changelog and the page about contributing."""
    made: dict[str, str] = figures()[0] | {
        "changelog.md": changelog(),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
    }
    made |= {f"examples/{path.name}": path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.py")}
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put figures in their places, and lead links to the repository's examples to their copies in the site."""
    markdown = markdown.replace("](../examples/", "](examples/")
    up = "../" * (len(Path(page.file.src_uri).parts) - 1)

    def place(match: re.Match[str]) -> str:
        name, shows = match[1], " ".join(match[2].split())
        if name not in FIGURES:
            raise KeyError(f"{page.file.src_uri}: a figure must be one of {', '.join(FIGURES)}, got {name!r}.")
        if (reason := figures()[1].get(name)) is not None:
            return f"*{reason}*"
        return "\n".join(f"![{shows}]({up}figures/{name}-{theme}.svg#only-{theme})" for theme in THEMES)

    return _FIGURE.sub(place, markdown)


def on_serve(server: Any, config: MkDocsConfig, builder: Any) -> None:
    """Build anew when a measurement or a fragment changes."""
    for folder in (DOCS / "benchmarks", ROOT / "changelog.d", ROOT / "quantcache"):
        server.watch(str(folder))
