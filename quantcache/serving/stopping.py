"""Strings that end an answer, looked for in its tokens."""

from collections.abc import Iterable, Sequence
from typing import Any

from quantcache.serving import _host, refusals


class StopStrings:
    """Finds the token that completes a string in the answer to a request.

    The rule is that of ``generate(stop_strings=...)``: a string counts once its last character came with the newest
    token, whatever that token has behind it.

    Attributes:
        tokenizer: of the model, None while nobody gave it.
        in_prompt: whether a string may begin in the prompt and end in the answer, as in ``generate``.
    """

    def __init__(self, tokenizer: Any = None) -> None:
        self.tokenizer, self.in_prompt = tokenizer, True
        self._known: tuple[Any, dict[int, bytes]] = None, {}

    def asked(self, strings: Any) -> tuple[str, ...]:
        """The strings of a request, a call or a config, checked; see ``refusals.check_stop_strings``."""
        found = refusals.check_stop_strings(strings, self.tokenizer)
        if found:
            self.texts()
        return found

    def end(self, state: Any, token: int) -> bool:
        """Whether a new token completes a string of its request."""
        strings = state.logit_processor_kwargs[_host.STOP_STRINGS]
        return self.are_completed(strings, token, _host.tokens_before(state, self.in_prompt))

    def are_completed(self, strings: Sequence[str], token: int, before: Iterable[int]) -> bool:
        """Whether one of ``strings`` ends in a token.

        Args:
            strings: that are looked for.
            token: the newest token.
            before: the tokens before it, the newest first; no more are taken than matter.
        """
        wanted, texts = [string.encode() for string in strings], self.texts()
        text = last = texts.get(token, b"")
        enough = len(last) + max(map(len, wanted)) - 1
        for earlier in before:
            piece = texts.get(earlier)
            if len(text) >= enough or piece is None:  # a token that the tokenizer does not know belongs to no string
                break
            text = piece + text
        behind = len(text) - len(last)
        return any(text.find(string, max(0, behind - len(string) + 1)) >= 0 for string in wanted)

    def texts(self) -> dict[int, bytes]:
        """The text of each token, in UTF-8; what takes a second for a large vocabulary, the first time."""
        if self._known[0] is not self.tokenizer:
            self._known = self.tokenizer, _host.text_of_tokens(self.tokenizer)
        return self._known[1]


class Cut:
    """Text of an answer up to the first stop string; what may be the beginning of one waits for what follows."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._waiting = ""
        self.is_done = False

    def feed(self, text: str) -> str:
        """What can be shown now that ``text`` came: nothing once a string was found, which ``is_done`` says."""
        if self.is_done:
            return ""
        text, self._waiting = self._waiting + text, ""
        found = [at for string in self._strings if (at := text.find(string)) >= 0]
        if found:
            self.is_done = True
            return text[: min(found)]
        begins = next((at for at in range(len(text)) if any(s.startswith(text[at:]) for s in self._strings)), len(text))
        text, self._waiting = text[:begins], text[begins:]
        return text

    def end(self) -> str:
        """What waited, at the end of the text."""
        text, self._waiting = self._waiting, ""
        return text


def cut(text: str, strings: Sequence[str]) -> str:
    """``text`` up to the first of ``strings``."""
    whole = Cut(strings)
    return whole.feed(text) + whole.end()
