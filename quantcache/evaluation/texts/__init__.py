"""Texts to measure on: real prose and real code, as they come with the package."""

from importlib.resources import files
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_CODE: Final = ("quantization", "layers", "store")
"""Rooms whose sources are the text "code"."""


def read_text(name: str) -> str:
    """A text by name, or a file.

    Args:
        name: "prose" (Jane Austen, 1817), "code" (quantcache's own source), or a path to a UTF-8 file.

    Raises:
        ValueError: neither, or not UTF-8.
        OSError: the file cannot be read.
    """
    package = files("quantcache")
    if name == "prose":
        return (package / "evaluation" / "texts" / "persuasion.txt").read_text("utf-8")
    if name == "code":
        sources = (file for room in _CODE for file in sorted((package / room).iterdir(), key=lambda file: file.name))
        return "\n\n".join(file.read_text("utf-8") for file in sources if file.name.endswith(".py"))
    if not Path(name).is_file():
        raise ValueError(f"read_text: the text must be 'prose', 'code' or a file, got {name!r}.")
    try:
        return Path(name).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"read_text: {name} must be UTF-8, got: {error}.") from error


def read_dataset(spec: str, characters: int) -> str:
    """The beginning of a column of a dataset on the hub, rows joined by blank lines.

    Args:
        spec: ``owner/name:column``, or ``owner/name/config:column``, with ``@split`` appended for another split than
            test.
        characters: enough of it.

    Raises:
        ValueError: the form is another, or there is no such dataset or column.
        ImportError: the package ``datasets`` is missing.
    """
    import datasets

    place, _, split = spec.partition("@")
    path, _, column = place.rpartition(":")
    name = path.split("/")
    if not path or not column or len(name) > 3:
        raise ValueError(f"read_dataset: must be owner/name[/config]:column[@split], got {spec!r}.")
    config = name[2] if len(name) == 3 else None
    try:
        rows = datasets.load_dataset("/".join(name[:2]), config, split=split or "test", streaming=True)
        pieces, length = [], 0
        for row in rows:
            if column not in row:
                raise ValueError(f"read_dataset: the column must be one of {', '.join(row)}, got {column!r}.")
            pieces.append(str(row[column]))
            length += len(pieces[-1])
            if length >= characters:
                break
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(f"read_dataset: {spec!r} must be a dataset that can be read, got: {error}.") from error
    return "\n\n".join(pieces)


def token_rows(tokenizer: PreTrainedTokenizerBase, texts: list[str], rows: int, tokens: int) -> Tensor:
    """(rows, tokens) ids, taken from the texts in turn, each from its beginning on without overlap.

    Raises:
        ValueError: the texts are too short.
    """
    made = []
    for place, text in enumerate(texts):
        wanted = len(range(place, rows, len(texts)))
        # No tokeniser makes less than a token of 40 characters of text; reading on would only take time.
        ids = tokenizer(text[: 40 * tokens * wanted], return_tensors="pt", verbose=False).input_ids[0]
        if len(ids) < wanted * tokens:
            raise ValueError(
                f"token_rows: text {place + 1} must have {wanted * tokens} tokens, got {len(ids)}. "
                "Use a longer text, fewer rows or shorter ones."
            )
        made.append(ids[: wanted * tokens].view(wanted, tokens))
    return torch.stack([made[row % len(texts)][row // len(texts)] for row in range(rows)])
