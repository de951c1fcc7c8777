"""Record `quantcache demo` in a terminal as an animated SVG, docs/recordings/demo.svg.

    python -m tools.recording

What is printed appears when it was printed; longer waits are cut short. The animation is CSS, so that an image on a
page plays it; where nothing is animated, or the reader prefers that, the last frame stands there.
"""

import codecs
import html
import os
import re
import subprocess
import sys
import time
from itertools import groupby
from typing import Final

from rich.console import Console
from rich.style import Style
from rich.text import Text

from tools.measurements import DOCS

COMMAND: Final = "make demo"
FILE: Final = DOCS / "recordings" / "demo.svg"

COLUMNS: Final = 64
"""As many as are legible on a phone."""

LONGEST_WAIT: Final = 1.5
"""Seconds after which a wait is cut."""

CELL, LINE, FONT, MARGIN = 8.4, 19, 14, 8
"""Pixels: a character's width, a line's height, the font's size, the margin."""

BACKGROUND, INK = "#1e2129", "#d8dee9"
COLOURS: Final = {3: "#e69f00", 4: "#56b4e9"}
"""Of the terminal's yellow and blue."""

_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def record() -> list[tuple[float, str]]:
    """Run the demo; what it prints, colours as escapes, each piece with its second."""
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "FORCE_COLOR": "1", "TTY_INTERACTIVE": "0"}
    start_it = [sys.executable, "-u", "-c", "from quantcache.cli.main import app; app()", "demo"]
    start, pieces, decoder = time.perf_counter(), [], codecs.getincrementaldecoder("utf-8")()
    with subprocess.Popen(
        start_it, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, bufsize=0
    ) as process:
        assert process.stdout is not None
        while piece := process.stdout.read(4096):
            pieces.append((time.perf_counter() - start, decoder.decode(piece)))
    if process.returncode:
        raise RuntimeError(f"record: the demo must run, got exit code {process.returncode}.")
    return pieces


def played(pieces: list[tuple[float, str]]) -> list[float]:
    """When each character appears, waits cut short and escapes left out."""
    times, now, before = [], 1.0, 0.0
    text = "".join(piece for _, piece in pieces)
    ends, total = [], 0
    for second, piece in pieces:
        total += len(piece)
        ends.append((total, second))
    visible = [True] * len(text)
    for match in _ESCAPE.finditer(text):
        visible[match.start() : match.end()] = [False] * len(match[0])
    place = 0
    for end, second in ends:
        now += min(second - before, LONGEST_WAIT)
        before = second
        times += [round(now, 1)] * sum(visible[place:end])  # pieces of one moment appear as one
        place = end
    return times


def drawn(pieces: list[tuple[float, str]]) -> str:
    """The SVG."""
    times = played(pieces)
    text = Text.from_ansi("".join(piece for _, piece in pieces))
    console, rows, column = Console(), [[(character, Style(bold=True), 0.0) for character in f"$ {COMMAND}"]], 0
    rows.append([])
    for place, character in enumerate(text.plain):
        if character == "\n" or column == COLUMNS:
            rows.append([])
            column = 0
        if character != "\n":
            rows[-1].append((character, text.get_style_at_offset(console, place), times[place]))
            column += 1
    while not rows[-1]:
        rows.pop()
    body = []
    for line, row in enumerate(rows):
        at = 0
        for (style, second), run in groupby(row, key=lambda cell: (cell[1], cell[2])):
            words = "".join(character for character, _, _ in run)
            if words.strip():
                body.append(_run(words, style, second, MARGIN + at * CELL, MARGIN + line * LINE))
            at += len(words)
    width, height = round(2 * MARGIN + COLUMNS * CELL), 2 * MARGIN + len(rows) * LINE
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">
<title>{COMMAND}</title>
<style>
text {{ font: {FONT}px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; white-space: pre; }}
.a {{ fill: {INK}; animation: appear 1ms linear backwards; }}
@keyframes appear {{ from {{ opacity: 0; }} }}
@media (prefers-reduced-motion: reduce) {{ .a {{ animation: none; }} }}
</style>
<rect width="100%" height="100%" rx="6" fill="{BACKGROUND}"/>
{chr(10).join(body)}
</svg>
"""


def _run(words: str, style: Style, second: float, left: float, top: float) -> str:
    """Characters of one style that appear together; blocks are drawn as a rectangle, without seams."""
    colour = COLOURS.get(style.color.number or 0, INK) if style.color else INK
    looks = {
        "animation-delay": f"{second:.2f}s",
        "fill": "" if colour == INK else colour,
        "fill-opacity": "0.6" if style.dim else "",
        "font-weight": "bold" if style.bold else "",
        "font-style": "italic" if style.italic else "",
    }
    shown = f'class="a" style="{";".join(f"{name}:{value}" for name, value in looks.items() if value)}"'
    width = len(words) * CELL
    if set(words) == {"█"}:
        return f'<rect x="{left:.1f}" y="{top + 3:.1f}" width="{width:.1f}" height="13" {shown}/>'
    place = f'x="{left:.1f}" y="{top + FONT:.1f}" textLength="{width:.1f}" lengthAdjust="spacingAndGlyphs"'
    return f"<text {place} {shown}>{html.escape(words)}</text>"


def main() -> None:
    """Record and write."""
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(drawn(record()), encoding="utf-8")


if __name__ == "__main__":
    main()
