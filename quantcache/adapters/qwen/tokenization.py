"""``QWenTokenizer``: a ``qwen.tiktoken`` file as a fast tokenizer."""

import base64
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (ENDOFTEXT, IM_START, IM_END, *(f"<|extra_{i}|>" for i in range(205)))


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """Token bytes and ranks of a tiktoken file, lines of "base64 rank".

    Raises:
        ValueError: a line has another form.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(
                f'read_ranks: each line must be "base64 rank", got {line[:40]!r} in line {number}.'
            ) from None
    return ranks


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts whose merge makes ``token``, found by merging its bytes with the lower ranks only."""
    parts = [token[i : i + 1] for i in range(len(token))]
    limit = ranks[token]
    while len(parts) > 2:
        rank, at = min((ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1))
        if rank >= limit:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def build_tokenizer(ranks: dict[bytes, int]) -> Tokenizer:
    """A byte-level BPE over ``ranks``; text is normalised to NFC and digits stand alone."""
    letters = bytes_to_unicode()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    ordered = sorted(ranks, key=ranks.__getitem__)
    merges = [pair for token in ordered if len(token) > 1 and (pair := _last_merge(token, ranks))]
    model = BPE(
        vocab={spelled(token): rank for token, rank in ranks.items()},
        merges=[(spelled(left), spelled(right)) for left, right in merges],
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # They follow the last rank of the vocabulary at hand, 151643 and on in the released one.
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


class QWenTokenizer(PreTrainedTokenizerFast):
    """Qwen v1's tokenizer, read from ``qwen.tiktoken`` or from the ``tokenizer.json`` that ``save_pretrained`` writes.

    Tokens are byte-level strings, where the original had ``bytes``; ids and texts are the same.

    Raises:
        ValueError: neither file is there.
    """

    vocab_files_names = {"vocab_file": "qwen.tiktoken", "tokenizer_file": "tokenizer.json"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str | None = None, tokenizer_file: str | None = None, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)
        if tokenizer_file is None and kwargs.get("tokenizer_object") is None:
            if vocab_file is None:
                raise ValueError("QWenTokenizer: vocab_file must be the path of a qwen.tiktoken file, got None.")
            kwargs["tokenizer_object"] = build_tokenizer(read_ranks(vocab_file))
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(tokenizer_file=tokenizer_file, **kwargs)  # type: ignore[no-untyped-call]

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: Any = False, **kwargs: Any) -> dict[str, Any]:
        """The arguments as they are: the host would take the vocabulary out of the files and drop their paths."""
        return kwargs

    @property
    def eod_id(self) -> int:
        """Id of ``<|endoftext|>``."""
        return self._id(ENDOFTEXT)

    @property
    def im_start_id(self) -> int:
        """Id of ``<|im_start|>``."""
        return self._id(IM_START)

    @property
    def im_end_id(self) -> int:
        """Id of ``<|im_end|>``."""
        return self._id(IM_END)

    @property
    def special_tokens(self) -> dict[str, int]:
        """Special tokens and their ids."""
        return {token: self._id(token) for token in SPECIAL_TOKENS}

    def _id(self, token: str) -> int:
        found = self.backend_tokenizer.token_to_id(token)
        assert found is not None
        return int(found)
