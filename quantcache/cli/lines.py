"""Lines that the user types: editing, history and several lines at once where there is a terminal."""

import contextlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Final

from quantcache.backends import artifacts

if TYPE_CHECKING:
    from rich.console import Console

HISTORY_LINES: Final = 1000
HISTORY_NAME: Final = "chat_history"
"""In the folder of downloads; readable by the user alone."""

QUOTES: Final = '"""'
"""Begin and end a text of several lines."""


class Lines:
    """What the user types, line by line.

    Args:
        notes: where the prompt goes unless a terminal is typed into.
        commands: what the tabulator completes.
    """

    def __init__(self, notes: "Console", commands: Sequence[str]) -> None:
        self.notes, self.commands = notes, commands
        self._readline = _readline() if sys.stdin.isatty() and sys.stdout.isatty() else None
        if self._readline is not None:
            self._readline.set_completer(self._completion)
            self._readline.set_completer_delims("")
            self._readline.parse_and_bind("tab: complete")
            self._readline.set_history_length(HISTORY_LINES)
            with contextlib.suppress(OSError):
                self._readline.read_history_file(_history())

    def read(self, prompt: str) -> str | None:
        """What is typed next, without blanks around it; None where the user leaves, by Ctrl-D or Ctrl-C."""
        try:
            text = self._line(prompt).strip()
            while text.endswith("\\"):
                text = text[:-1] + "\n" + self._line("...> ")
            if text.startswith(QUOTES):
                text = text.removeprefix(QUOTES)
                while not text.rstrip().endswith(QUOTES):
                    text += "\n" + self._line("...> ")
                text = text.rstrip().removesuffix(QUOTES)
        except (EOFError, KeyboardInterrupt):
            self.notes.print()  # the next note begins on a line of its own
            return None
        return text.strip()

    def _line(self, prompt: str) -> str:
        """One line.

        Raises:
            EOFError: there is none.
        """
        if self._readline is not None:
            return input(prompt)
        self.notes.print(prompt, end="")
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    def keep(self) -> None:
        """Write the history down, for the next chat."""
        if self._readline is None:
            return
        with contextlib.suppress(OSError):
            file = _history()
            os.makedirs(os.path.dirname(file), mode=0o700, exist_ok=True)
            os.close(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600))
            self._readline.write_history_file(file)

    def _completion(self, text: str, state: int) -> str | None:
        found = [f"{command} " for command in self.commands if text and command.startswith(text)]
        return found[state] if state < len(found) else None


def _readline() -> ModuleType | None:
    """The module that lets ``input`` edit its line, which Windows lacks."""
    try:
        import readline
    except ImportError:
        return None
    return readline


def _history() -> str:
    return str(artifacts.cache_folder() / HISTORY_NAME)
