"""What the commands share at the terminal: the device, the model with its progress bar, answers as they come."""

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.utils import logging as transformers_logging

from quantcache import __version__
from quantcache.evaluation.models import load_model
from quantcache.layers.report import human_bytes as human_bytes  # for the commands


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
    spec: str | None, device: torch.device, console: Console, dtype: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """``load_model`` with a progress bar for the download, and without transformers' own messages.

    Args:
        spec: see ``load_model``.
        device: where to put the model.
        console: where the progress bar goes.
        dtype: torch's name of the model's dtype, None for its own.

    Raises:
        ModelError: the model cannot be had.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with download_progress(console) as on_progress:
        return load_model(spec, device, None if dtype is None else getattr(torch, dtype), on_progress=on_progress)


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
        progress.stop()


class RichStreamer(TextStreamer):
    """Streams text to the console."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.console = console

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece of the answer as soon as it is whole."""
        self.console.print(text, end="\n" if stream_end else "", markup=False, highlight=False, soft_wrap=True)


def machine(model: Any, label: str) -> dict[str, Any]:
    """What a figure depends on besides the cache."""
    device = model.device
    return {
        "model": label,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or str(device),
        "threads": torch.get_num_threads(),
        "versions": {
            "quantcache": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
