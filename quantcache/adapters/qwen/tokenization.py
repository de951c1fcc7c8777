"""``QWenTokenizer``: a ``qwen.tiktoken`` file as a fast tokenizer."""

import base64
import copy
import json
import unicodedata
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (ENDOFTEXT, IM_START, IM_END, *(f"<|extra_{i}|>" for i in range(205)))

_LETTERS = bytes_to_unicode()
_BYTES = {letter: byte for byte, letter in _LETTERS.items()}


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


def build_tokenizer(ranks: dict[bytes, int], extra_ranks: dict[bytes, int] | None = None) -> Tokenizer:
    """A byte-level BPE over ``ranks``; text is normalised to NFC and digits stand alone.

    Special tokens follow the last of ``ranks``, 151643 and on in the released vocabulary.

    Args:
        ranks: token bytes and ids, from 0 without gaps.
        extra_ranks: more of them, after the special tokens; a token or an id that is taken already is passed over, as
            in the original.
    """
    special = {token: max(ranks.values()) + 1 + index for index, token in enumerate(SPECIAL_TOKENS)}
    taken = {*ranks.values(), *special.values()}
    ranks = dict(ranks)
    for token, rank in (extra_ranks or {}).items():
        if token not in ranks and rank not in taken:
            ranks[token] = rank
            taken.add(rank)
    ordered = sorted(ranks, key=ranks.__getitem__)
    merges = [pair for token in ordered if len(token) > 1 and (pair := _last_merge(token, ranks))]
    # The special tokens too: the ids of what is added later would have to follow without a gap.
    vocab = {_spelled(token): rank for token, rank in ranks.items()} | special
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[(_spelled(left), _spelled(right)) for left, right in merges]))
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    octets = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, octets])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def _spelled(token: bytes) -> str:
    return "".join(_LETTERS[byte] for byte in token)


class QWenTokenizer(PreTrainedTokenizerFast):
    """Qwen v1's tokenizer, read from ``qwen.tiktoken`` or from the ``tokenizer.json`` that ``save_pretrained`` writes.

    Tokens are byte-level strings, where the original had ``bytes``; ids and texts are the same. Encoding takes the
    original's ``allowed_special`` and ``disallowed_special``, decoding its ``errors``. Text is brought into NFC first,
    and offsets count in that.

    Args:
        vocab_file: a ``qwen.tiktoken`` file.
        tokenizer_file: a ``tokenizer.json``, instead.
        errors: what decoding does with bytes that are no text, as for ``bytes.decode``.
        extra_vocab_file: more tokens in the form of ``vocab_file``, see ``build_tokenizer``.
        kwargs: see ``PreTrainedTokenizerFast``.

    Raises:
        ValueError: neither file is there, or a special token is named that the vocabulary does not have.
    """

    vocab_files_names = {"vocab_file": "qwen.tiktoken", "tokenizer_file": "tokenizer.json"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str | None = None,
        tokenizer_file: str | None = None,
        errors: str = "replace",
        extra_vocab_file: str | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("auto_map", None)
        if tokenizer_file is None and kwargs.get("tokenizer_object") is None:
            if vocab_file is None:
                raise ValueError("QWenTokenizer: vocab_file must be the path of a qwen.tiktoken file, got None.")
            extra = read_ranks(extra_vocab_file) if extra_vocab_file is not None else None
            kwargs["tokenizer_object"] = build_tokenizer(read_ranks(vocab_file), extra)
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        self.errors, self.vocab_file = errors, vocab_file
        self._restricted: dict[frozenset[str], Tokenizer] = {}
        super().__init__(tokenizer_file=tokenizer_file, errors=errors, **kwargs)  # type: ignore[no-untyped-call]

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

    @property
    def mergeable_ranks(self) -> dict[bytes, int]:
        """Token bytes and their ids, without the special tokens, in the order of the ids."""
        special = set(SPECIAL_TOKENS)
        vocabulary = sorted(self.get_vocab().items(), key=lambda item: item[1])
        return {_unspelled(token): rank for token, rank in vocabulary if token not in special}

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write ``qwen.tiktoken`` as the original does, tokens of an extra vocabulary included."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        path = Path(save_directory) / f"{prefix}{self.vocab_files_names['vocab_file']}"
        lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in self.mergeable_ranks.items()]
        path.write_bytes(b"".join(lines))
        return (str(path),)

    def _save_pretrained(
        self,
        save_directory: Any,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        """Both forms: ``tokenizer.json``, which loads faster, and ``qwen.tiktoken`` for other readers of Qwen v1."""
        saved = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        return *saved, *self.save_vocabulary(save_directory, filename_prefix)

    def _encode_plus(
        self,
        text: Any,
        text_pair: Any = None,
        *args: Any,
        allowed_special: Literal["all"] | Collection[str] | None = None,
        disallowed_special: Literal["all"] | Collection[str] = (),
        **kwargs: Any,
    ) -> Any:
        """The host's, which every way to encode calls, with the original's two arguments.

        ``allowed_special`` are special tokens that are taken as such where a text contains them; the others are plain
        text. "all", the default, takes all, an empty set none. ``disallowed_special`` are those that a text must not
        contain; "all" is all but the allowed ones.

        Raises:
            ValueError: a text contains a disallowed special token, or one is named that does not exist.
        """
        known = frozenset(SPECIAL_TOKENS)
        allowed = known if allowed_special in (None, "all") else frozenset(allowed_special or ())
        disallowed = known - allowed if disallowed_special == "all" else frozenset(disallowed_special)
        unknown = sorted((allowed | disallowed) - known)
        if unknown:
            raise ValueError(f"QWenTokenizer: only special tokens of the vocabulary can be named, got {unknown}.")
        # As the original, with Python's Unicode tables; the backend's know fewer combining marks.
        text, text_pair = _normalized(text), _normalized(text_pair)
        if disallowed:
            _refuse(disallowed, (text, text_pair))
        reader = self
        if allowed_special is not None and allowed != known:
            kwargs["split_special_tokens"] = True
            if allowed:
                reader = copy.copy(self)
                reader._tokenizer = self._restricted_to(allowed)
        return super(QWenTokenizer, reader)._encode_plus(text, text_pair, *args, **kwargs)

    def _restricted_to(self, allowed: frozenset[str]) -> Tokenizer:
        """A backend that finds only ``allowed`` while it splits special tokens; made once for each set."""
        if allowed not in self._restricted:
            description = json.loads(self.backend_tokenizer.to_str())
            for token in description["added_tokens"]:
                # What is not marked as special is found in any case.
                token["special"] = token["content"] not in allowed
            self._restricted[allowed] = Tokenizer.from_str(json.dumps(description))
        return self._restricted[allowed]

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        errors: str | None = None,
        **kwargs: Any,
    ) -> str:
        """The host's, with the original's ``errors``; ids that no token has are passed over."""
        errors = errors or self.errors
        if errors == "replace":
            return str(super()._decode(token_ids, skip_special_tokens, clean_up_tokenization_spaces, **kwargs))
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        tokens: Iterable[str | None] = (self.backend_tokenizer.id_to_token(index) for index in ids)
        special = set(SPECIAL_TOKENS) if skip_special_tokens else set[str]()
        return b"".join(_unspelled(t) for t in tokens if t is not None and t not in special).decode(errors=errors)

    def _add_tokens(self, new_tokens: list[str | AddedToken], special_tokens: bool = False) -> int:  # type: ignore[override]
        """The host's, for tokens that the vocabulary has, which may get a role such as padding; others are refused."""
        for token in map(str, new_tokens):
            if self.backend_tokenizer.token_to_id(token) is None:
                raise ValueError(
                    f"QWenTokenizer: tokens cannot be added, got {token!r}. "
                    "Use one of <|extra_0|> to <|extra_204|>, or extra_vocab_file."
                )
        return int(super()._add_tokens(new_tokens, special_tokens))

    def _id(self, token: str) -> int:
        found = self.backend_tokenizer.token_to_id(token)
        assert found is not None
        return int(found)


def _unspelled(token: str) -> bytes:
    return bytes(_BYTES[letter] for letter in token)


def _normalized(texts: Any) -> Any:
    """Nested ``texts`` with every string in NFC."""
    if isinstance(texts, (list, tuple)):
        return type(texts)(map(_normalized, texts))
    return unicodedata.normalize("NFC", texts) if isinstance(texts, str) else texts


def _refuse(disallowed: frozenset[str], texts: Any) -> None:
    """Raise if any string in nested ``texts`` contains a disallowed special token."""
    if isinstance(texts, (list, tuple)):
        for text in texts:
            _refuse(disallowed, text)
    elif isinstance(texts, str):
        found = sorted(token for token in disallowed if token in texts)
        if found:
            raise ValueError(
                f"QWenTokenizer: the text must not contain disallowed special tokens, got {', '.join(found)}. "
                "Name them in allowed_special, or leave disallowed_special out to take them as plain text."
            )
