"""The python snippets of the documentation, and the small models that stand in for the ones they name.

Snippets run as they stand, in their order, page by page. A page runs in a folder that holds, for every model id that it
names, a folder of that name with a tiny random model of the architecture, which ``from_pretrained`` finds before it
asks a hub; nothing is patched. Names that a page takes for granted, ``model``, ``tokenizer`` and ``inputs``, are there.

Two comments before a snippet change this: ``<!-- not run: reason -->``, and ``<!-- snippet: NAME -->`` for one of
``PREPARATIONS``.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from quantcache import QuantizedInt8Cache
from quantcache.layers._host import CACHE_NAME, cache_argument
from tests.qwen_checkpoint import float_weights, gptq_weights, write_checkpoint

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"

RUN_ELSEWHERE = {
    "docs/moving-from-use-cache-quantization.md": "tests/test_qwen_released.py",
    "docs/getting-started.md": "tests/test_documentation.py",
    "docs/index.md": "tests/test_documentation.py",
    "docs/serving.md": "tests/test_serve.py",
}
"""Pages whose snippets another test runs, with more to it."""

_SNIPPET = re.compile(
    r"(?:<!-- (not run|snippet): ([^>]*?) -->\n)?^( *)```python\n(.*?)^ *```", re.MULTILINE | re.DOTALL
)
_MODEL_ID = re.compile(r"""from_pretrained\(\s*"([\w.-]+/[\w.-]+)""")

PROMPT_LEN = 150
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 4096}  # fmt: skip


@dataclass(frozen=True)
class Snippet:
    """One block of Python in a page.

    Attributes:
        code: what stands between the fences, without the indentation of a list.
        line: where it begins in its page, from 1.
        not_run: why it is not run, None if it is.
        preparation: the name of a preparation, None for none.
    """

    code: str
    line: int
    not_run: str | None
    preparation: str | None


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def snippets(page: Path) -> list[Snippet]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _SNIPPET.finditer(text):
        kind, words, indent, code = match.groups()
        code = re.sub(f"^{indent}", "", code, flags=re.MULTILINE)
        line = text[: match.start(4)].count("\n") + 1
        found.append(Snippet(code, line, words if kind == "not run" else None, words if kind == "snippet" else None))
    return found


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; a chat is its turns, one a line."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(["<s>", "</s>", *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<s>")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tokenizer


def make_model(kind: str = "llama") -> Any:
    """A tiny random model that generates 8 tokens if nothing else is said."""
    torch.manual_seed(0)
    ids = {"vocab_size": 258, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    if kind == "encoder-decoder":
        config = T5Config(
            vocab_size=258, d_model=64, d_kv=32, d_ff=96, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
        model: Any = T5ForConditionalGeneration(config)
    else:
        model = (
            Qwen2ForCausalLM(Qwen2Config(**SIZES, **ids))
            if kind == "qwen2"
            else LlamaForCausalLM(LlamaConfig(**SIZES, **ids))
        )
    model.generation_config.max_new_tokens = 8
    return model.eval()


def as_this_host_says(code: str) -> str:
    """``code`` of a page, whose ``cache=`` is transformers' name for the argument since 5.24, for the one installed."""
    return re.sub(r"\bcache=(?!=)", f"{CACHE_NAME}=", code)


def write_stand_in(model_id: str, folder: Path) -> None:
    """A tiny model of the architecture that a hub id stands for, loadable by every Auto class."""
    if re.fullmatch(r"Qwen/Qwen-.*", model_id):
        int4 = model_id.endswith("Int4")
        weights = float_weights()
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(folder, gptq_weights(weights)[0] if int4 else weights, gptq=int4)
        return
    make_model("qwen2" if "/Qwen" in model_id else "llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def write_stand_ins(page: Path, folder: Path) -> None:
    """Stand-ins for every model that the snippets of a page name."""
    for snippet in snippets(page):
        for model_id in _MODEL_ID.findall(snippet.code):
            if not (folder / model_id).exists():
                write_stand_in(model_id, folder / model_id)


def names() -> dict[str, Any]:
    """What every page may take for granted."""
    ids = torch.randint(2, 258, (1, PROMPT_LEN))
    return {
        "torch": torch,
        "QuantizedInt8Cache": QuantizedInt8Cache,
        "model": make_model(),
        "tokenizer": make_tokenizer(),
        "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "messages": [],
        "questions": ["Who are you?", "And then?"],
    }


def _encoder_decoder(known: dict[str, Any]) -> dict[str, Any]:
    return {"model": make_model("encoder-decoder")}


def _shared_prefix(known: dict[str, Any]) -> dict[str, Any]:
    prefix = torch.randint(2, 258, (1, PROMPT_LEN))
    longer = [torch.cat([prefix, torch.randint(2, 258, (1, 9))], dim=1) for _ in range(2)]
    return {
        "prefix_inputs": {"input_ids": prefix},
        "batches": [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in longer],
    }


def _filled_cache(known: dict[str, Any]) -> dict[str, Any]:
    cache = QuantizedInt8Cache(known["model"].config)
    known["model"].generate(**known["inputs"], **cache_argument(cache))
    return {"cache": cache}


def _requests(known: dict[str, Any]) -> dict[str, Any]:
    return {"requests": [known["inputs"], {name: kept[:, :70] for name, kept in known["inputs"].items()}]}


PREPARATIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "with an encoder-decoder model": _encoder_decoder,
    "with a shared prefix": _shared_prefix,
    "with a filled cache": _filled_cache,
    "with several requests": _requests,
}
"""Names that a snippet needs beyond those of ``names``."""
