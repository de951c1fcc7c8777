"""Write the tables into the pages.

    python -m tools.pages [--check]

A table stands between ``<!-- table NAME -->`` and ``<!-- end of table -->`` in README.md or a page of docs/ and is
written anew from its measurement. ``--check`` writes nothing and fails if a page would change.
"""

import argparse
import re
import sys
from pathlib import Path

from tools.measurements import DOCS, ROOT, NotMeasuredError
from tools.tables import TABLES

_TABLE = re.compile(r"(<!-- table ([a-z0-9-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def pages() -> list[Path]:
    """The pages that may hold tables."""
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def filled(text: str, page: Path) -> str:
    """The page's text with its tables as the measurements are now.

    Raises:
        KeyError: a table that does not exist.
    """
    depth = len(page.relative_to(DOCS).parts) - 1 if page.is_relative_to(DOCS) else -1

    def fill(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise KeyError(f"{page.name}: a table must be one of {', '.join(TABLES)}, got {match[2]!r}.")
        try:
            written = TABLES[match[2]]()
        except NotMeasuredError as reason:
            written = str(reason)
        to_benchmarks = "docs/benchmarks/" if depth < 0 else "../" * depth + "benchmarks/"
        return f"{match[1]}\n{written.replace('](benchmarks/', f']({to_benchmarks}')}\n\n{match[3]}"

    return _TABLE.sub(fill, text)


def stale() -> dict[Path, str]:
    """Pages whose tables are not what the measurements say, and what they should be."""
    texts = {page: page.read_text(encoding="utf-8") for page in pages()}
    return {page: wanted for page, text in texts.items() if (wanted := filled(text, page)) != text}


def main() -> int:
    """Write or check; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    changed = stale()
    for page, wanted in changed.items():
        print(f"{page.relative_to(ROOT)}: {'is not up to date' if options.check else 'written'}")
        if not options.check:
            page.write_text(wanted, encoding="utf-8")
    return 1 if options.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
