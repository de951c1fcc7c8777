"""Does the glossary explain the words of the code, and no others?"""

import re

import pytest

from tests.documentation import DOCS, ROOT

SOURCES = (".py", ".cpp", ".h", ".inc", ".cu", ".cuh")

TERMS = [
    term.strip("` ")
    for row in re.findall(r"^\| (?!word|---)(.*?) \|", (DOCS / "glossary.md").read_text("utf-8"), re.MULTILINE)
    for term in row.split(",")
]


@pytest.fixture(scope="module")
def code() -> str:
    """All of the package's sources, comments and messages included, with line breaks as spaces."""
    files = sorted(path for path in (ROOT / "quantcache").rglob("*") if path.suffix in SOURCES)
    return " ".join(" ".join(path.read_text("utf-8") for path in files).split())


def test_a_term_is_explained_once() -> None:
    assert len(TERMS) > 20
    assert len(set(TERMS)) == len(TERMS)


@pytest.mark.parametrize("term", TERMS)
def test_a_term_of_the_glossary_is_in_the_code(term: str, code: str) -> None:
    assert re.search(rf"(?<![\w-]){re.escape(term)}(?![\w-])", code), f"no source of quantcache says {term}"
