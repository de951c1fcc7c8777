"""What the commands share at the terminal: the device, the model with its progress bar, answers as they come."""

import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, TextStreamer
from transformers.utils import logging as transformers_logging

from quantcache import __version__
from quantcache.backends import processor
from quantcache.evaluation.models import load_model


def choose_device(name: str | None) -> torch.device:
    """The device called ``name``, or the best there is.

    Raises:
        ValueError: no such device here.
    """
    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"must be a device of this machine, got {name!r} ({reason})") from error
    return device


def open_model(
    spec: str | None, device: torch.device, console: Console, dtype: str | None = None, attention: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """``load_model`` with a progress bar for the download, and without transformers' own messages.

    Args:
        spec: see ``load_model``.
        device: where to put the model.
        console: where the progress bar goes.
        dtype: torch's name of the model's dtype. None for its own, or for float32 on a CPU that has no units for that,
            which is said.
        attention: transformers' ``attn_implementation``, None for its own choice.

    Raises:
        ModelError: the model cannot be had.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    wanted = None if dtype is None else getattr(torch, dtype)
    with download_progress(console) as on_progress:
        model, tokenizer, label = load_model(spec, device, wanted, on_progress, attention)
    own = str(model.dtype).removeprefix("torch.")
    if dtype is None and device.type == "cpu" and not processor.computes_in(own) and not _is_packed(model):
        model.float()
        console.print(
            f"in float32, since this processor has no units for {own} and takes many times as long there; "
            f"--dtype {own} keeps it",
            style="dim",
            soft_wrap=not console.is_terminal,
            highlight=False,
        )
    return model, tokenizer, label


def _is_packed(model: PreTrainedModel) -> bool:
    """Whether weights are in a format of fewer bits, which has a dtype of its own to compute in."""
    return getattr(model, "hf_quantizer", None) is not None


@contextmanager
def download_progress(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A progress bar that appears with the first byte, so that nothing flickers when the model is there already."""
    columns = (TextColumn("fetching the demo model"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console)

    def update(done: int, total: int) -> None:
        if not progress.tasks:
            progress.start()
            progress.add_task("", total=total)
        progress.update(progress.tasks[0].id, completed=done)

    try:
        yield update
    finally:
        if progress.tasks:  # else it would end a line that it never began
            progress.stop()


class AnswerStream(TextStreamer):
    """Streams one answer to the console, notes when its first token came, and knows when it is to end.

    Args:
        tokenizer: of the model.
        console: where it goes.
        stop: texts that end the answer; what begins with one is neither printed nor kept.

    Attributes:
        ids: tokens that came.
        text: what was printed.
        first_at: when the first token came, by ``time.perf_counter``; None before.
        was_interrupted: by Ctrl-C.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, console: Console, stop: Sequence[str] = ()) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.console, self.stop = console, [text for text in stop if text]
        self.ids: list[int] = []
        self.first_at: float | None = None
        self.text, self.was_interrupted = "", False
        self._held, self._is_cut = "", False

    def put(self, value: Tensor) -> None:
        """Take the prompt, and then a token at a time."""
        if not self.next_tokens_are_prompt:
            self.ids += value.flatten().tolist()
            self.first_at = self.first_at or time.perf_counter()
        super().put(value)  # type: ignore[no-untyped-call]

    def criterion(self) -> StoppingCriteria:
        """What ``generate`` asks after each token whether to stop."""
        return _Ends(self)

    @property
    def is_at_end(self) -> bool:
        """Whether the answer is to end: it was interrupted, or one of ``stop`` has come."""
        if self.was_interrupted or not self.stop:
            return self.was_interrupted
        # The newest token ends in the last few characters, and is part of what has come of a stop text.
        newest = self._decoded(self.ids[-max(map(len, self.stop)) - 1 :])
        return any(text in newest for text in self.stop)

    def kept_ids(self) -> list[int]:
        """The tokens of the answer without those that end it."""
        kept = len(self.ids)
        while self.stop and kept and any(text in self._decoded(self.ids[:kept]) for text in self.stop):
            kept -= 1
        return self.ids[:kept]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece of the answer as soon as it is whole and cannot be the beginning of a stop text."""
        self._held += "" if self._is_cut else text
        found = [place for stop in self.stop if (place := self._held.find(stop)) >= 0]
        begun = 0
        if found:
            self._held, self._is_cut = self._held[: min(found)], True
        elif not stream_end:
            starts = (stop[:length] for stop in self.stop for length in range(1, len(stop)))
            begun = max((len(start) for start in starts if self._held.endswith(start)), default=0)
        shown = self._held[: len(self._held) - begun]
        self._held = self._held[len(shown) :]
        self.text += shown
        end = "\n" if stream_end and not self.text.endswith("\n") else ""
        self.console.print(shown, end=end, markup=False, highlight=False, soft_wrap=True)

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


class _Ends(StoppingCriteria):
    """Whether a stream is at its end, as ``generate`` asks."""

    def __init__(self, stream: AnswerStream) -> None:
        self.stream = stream

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.stream.is_at_end, dtype=torch.bool, device=input_ids.device)


@contextmanager
def ending_on_interrupt(stream: AnswerStream) -> Iterator[None]:
    """Within, Ctrl-C ends the answer after the token at work; a second one raises ``KeyboardInterrupt`` at once."""

    def end(number: int, frame: FrameType | None) -> None:
        if stream.was_interrupted:
            raise KeyboardInterrupt
        stream.was_interrupted = True

    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def peak_nbytes(device: torch.device) -> int | None:
    """The most memory that this process had at a time, of the GPU if that is where the model is; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine(model: Any, label: str) -> dict[str, Any]:
    """What a figure depends on besides the cache."""
    device = model.device
    return {
        "model": label,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor.name(),
        "threads": torch.get_num_threads(),
        "versions": {
            "quantcache": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
