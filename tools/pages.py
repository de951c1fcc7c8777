"""Write the figures into docs/figures, and tables and figures into the pages.

    python -m tools.pages [--check]

A table stands between ``<!-- table NAME -->`` and ``<!-- end of table -->`` in README.md or a page of docs/ and is
written anew from its measurement; a figure between ``<!-- figure NAME: what it shows -->`` and
``<!-- end of figure -->``, as the two files, for light and for dark, that GitHub and the site choose from. Where the
measurement is missing a table says so, and a figure is left out. ``--check`` writes nothing and fails if a file would
change.
"""

import argparse
import contextlib
import re
import sys
from functools import cache
from pathlib import Path

from tools.figures import FIGURES, THEMES
from tools.measurements import DOCS, ROOT, NotMeasuredError
from tools.tables import TABLES

_TABLE = re.compile(r"(<!-- table ([a-z0-9-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

FIGURE = re.compile(r"(<!-- figure ([a-z0-9-]+): (.*?) -->\n).*?(<!-- end of figure -->)", re.DOTALL)


@cache
def figures() -> dict[Path, str]:
    """Every figure that can be drawn from the measurements there are, in both themes."""
    made: dict[Path, str] = {}
    for name, draw in FIGURES.items():
        with contextlib.suppress(NotMeasuredError):
            made |= {DOCS / "figures" / f"{name}-{theme}.svg": draw(colours) for theme, colours in THEMES.items()}
    return made


def pages() -> list[Path]:
    """The pages that may hold tables."""
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def filled(text: str, page: Path) -> str:
    """The page's text with its tables and figures as the measurements are now.

    Raises:
        KeyError: a table or a figure that does not exist.
    """
    to_docs = "../" * (len(page.relative_to(DOCS).parts) - 1) if page.is_relative_to(DOCS) else "docs/"

    def fill(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise KeyError(f"{page.name}: a table must be one of {', '.join(TABLES)}, got {match[2]!r}.")
        try:
            written = TABLES[match[2]]()
        except NotMeasuredError as reason:
            written = str(reason)
        return f"{match[1]}\n{written.replace('](benchmarks/', f']({to_docs}benchmarks/')}\n\n{match[3]}"

    def show(match: re.Match[str]) -> str:
        name, shows = match[2], " ".join(match[3].split())
        if name not in FIGURES:
            raise KeyError(f"{page.name}: a figure must be one of {', '.join(FIGURES)}, got {name!r}.")
        if DOCS / "figures" / f"{name}-light.svg" not in figures():
            return f"{match[1]}{match[4]}"
        light, dark = (f"{to_docs}figures/{name}-{theme}.svg" for theme in THEMES)
        source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        picture = f'<picture>\n{source}\n<img alt="{shows}" src="{light}">\n</picture>'
        return f"{match[1]}\n{picture}\n\n{match[4]}"

    return FIGURE.sub(show, _TABLE.sub(fill, text))


def stale() -> dict[Path, str]:
    """Pages and figures that are not what the measurements say, and what they should be; "" for a figure to remove."""
    texts = {page: page.read_text(encoding="utf-8") for page in pages()}
    wanted = {page: filled(text, page) for page, text in texts.items()} | figures()
    texts |= {file: file.read_text(encoding="utf-8") for file in (DOCS / "figures").glob("*.svg")}
    return {file: wanted.get(file, "") for file in texts | wanted if texts.get(file) != wanted.get(file)}


def main() -> int:
    """Write or check; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    changed = stale()
    for page, wanted in changed.items():
        print(f"{page.relative_to(ROOT)}: {'is not up to date' if options.check else 'written'}")
        if options.check:
            continue
        page.parent.mkdir(exist_ok=True)
        if wanted:
            page.write_text(wanted, encoding="utf-8")
        else:
            page.unlink()
    return 1 if options.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
