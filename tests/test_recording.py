"""Is the recording of the demo what a terminal shows, with its waits cut short?"""

import re
from xml.etree import ElementTree

import pytest

recording = pytest.importorskip("tools.recording")

PIECES = [
    (0.5, "\x1b[1mA model\x1b[0m reads.\n"),
    (60.0, "int8     \x1b[34m████\x1b[0m 2 MiB\n"),
    (60.2, "a < b" + "x" * 64),
]


def shown(svg: str) -> list[tuple[str, float, str]]:
    """What each element shows, its second, its style."""
    found = []
    for element in ElementTree.fromstring(svg).iter():
        style = element.get("style") or ""
        if second := re.search(r"animation-delay:([\d.]+)s", style):
            found.append((element.text or "bar", float(second[1]), style))
    return found


def test_what_was_printed_appears_in_its_order_and_colours() -> None:
    words = shown(recording.drawn(PIECES))
    assert [text for text, _, _ in words[:6]] == ["$ make demo", "A model", " reads.", "int8     ", "bar", " 2 MiB"]
    assert "font-weight:bold" in words[1][2]
    assert "fill:#56b4e9" in words[4][2]
    assert [second for _, second, _ in words] == sorted(second for _, second, _ in words)


def test_a_wait_is_cut_short() -> None:
    seconds = {text: second for text, second, _ in shown(recording.drawn(PIECES))}
    assert seconds["int8     "] - seconds["A model"] == pytest.approx(recording.LONGEST_WAIT)


def test_a_line_breaks_where_the_terminal_ends() -> None:
    words = [text for text, _, _ in shown(recording.drawn(PIECES))]
    assert words[-2:] == ["a < b" + "x" * (recording.COLUMNS - 5), "x" * 5]


def test_the_recording_in_the_pages_is_a_picture() -> None:
    words = [text for text, _, _ in shown(recording.FILE.read_text(encoding="utf-8"))]
    assert words[0] == f"$ {recording.COMMAND}"
    assert "The same answer." in words
    assert "bar" in words
