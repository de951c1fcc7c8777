"""mkdocs' hooks: figures in the colours of the page, pages made from files of the repository, the link to it.

A figure stands in a page as GitHub shows it, by the reader's preference; in the site one can switch between light and
dark, so it becomes an image of each, of which the theme shows one.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tools.figures import THEMES
from tools.measurements import DOCS, ROOT
from tools.pages import FIGURE

_TABLE = re.compile(r"<!-- table [a-z0-9-]+ -->\n(.*?)<!-- end of table -->", re.DOTALL)
_SHORT_NAME = 20
"""Characters of a row's name that stay in one line on any page."""

_KINDS = ("added", "changed", "fixed", "removed")


def changelog() -> str:
    """The changelog: what has not been released yet, from the fragments."""
    parts = ["# Changelog", "## Unreleased"]
    for kind in _KINDS:
        fragments = sorted((ROOT / "changelog.d").glob(f"*.{kind}.md"))
        if fragments:
            items = (fragment.read_text(encoding="utf-8").strip().replace("\n", "\n  ") for fragment in fragments)
            parts += [f"### {kind.title()}", "\n".join(f"- {item}" for item in items)]
    return "\n\n".join(parts) + "\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Link to the repository that the clone comes from, where it is one on the web."""
    command = ["git", "-C", str(ROOT), "remote", "get-url", "origin"]
    try:
        origin = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        origin = ""
    address = re.sub(r"^git@([^:]+):", r"https://\1/", origin).removesuffix(".git")
    if not config.repo_url and address.startswith("https://") and "@" not in address:
        config.repo_url, config.repo_name = address, "/".join(address.split("/")[-2:])
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is made: the changelog, the pages about contributing and the licence, and the examples."""
    made = {
        "changelog.md": changelog(),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        "licence.md": f"# Licence\n\n```text\n{(ROOT / 'LICENSE').read_text(encoding='utf-8').strip()}\n```\n",
    }
    made |= {f"examples/{path.name}": path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.*")}
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put figures in their places, and lead links to the repository's examples to their copies in the site."""
    markdown = markdown.replace("](../examples/", "](examples/")
    up = "../" * (len(Path(page.file.src_uri).parts) - 1)

    def place(match: re.Match[str]) -> str:
        name, shows = match[2], " ".join(match[3].split())
        if not (DOCS / "figures" / f"{name}-light.svg").exists():
            return ""
        return "\n".join(f"![{shows}]({up}figures/{name}-{theme}.svg#only-{theme})" for theme in THEMES)

    is_wide = page.file.src_uri.startswith("benchmarks/")

    def show(match: re.Match[str]) -> str:
        names = [line.split("|")[1].strip() for line in match[1].splitlines() if line.startswith("|")]
        kept = " names" if is_wide or max(map(len, names), default=0) <= _SHORT_NAME else ""
        return f'<div class="measured{kept}" markdown>\n{match[1]}\n</div>'

    markdown = _TABLE.sub(show, markdown)
    return FIGURE.sub(place, markdown)


def on_serve(server: Any, config: MkDocsConfig, builder: Any) -> None:
    """Build anew when a measurement or a fragment changes."""
    for folder in (DOCS / "benchmarks", ROOT / "changelog.d", ROOT / "quantcache"):
        server.watch(str(folder))
