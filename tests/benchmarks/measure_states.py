"""How large the channels of a real model's keys and values are, and what that does to int8.

    PYTHONPATH=. python tests/benchmarks/measure_states.py [--out FILE]

A prompt of the Python language reference goes through SmolLM2-135M in float32; for every layer and head the largest
magnitude of each channel is taken over the tokens, and the error of rounding with one scale a token and head and with
one a channel and page is measured on the same states, in units of their RMS.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from quantcache.evaluation.models import load_model
from quantcache.layers._host import cache_argument
from quantcache.quantization.reference import quantize, unpack_metadata
from quantcache.quantization.scheme import PAGE_SIZE
from tests.benchmarks.report import versions, write

TOKENS = 1024


def rounded(states: Tensor, dim: int) -> Tensor:
    """What the format restores of ``states``, one scale along ``dim``."""
    qdata, metadata = quantize(states, dim)
    scale, zero_point = (x.unsqueeze(dim) for x in unpack_metadata(metadata))
    return scale * (qdata.float() - zero_point)


def errors(states: Tensor) -> dict[str, float]:
    """Relative RMS error of one head's states (tokens, head_dim): mean over channels of each channel's own."""
    pages = states.unflatten(0, (-1, PAGE_SIZE))

    def error(restored: Tensor) -> float:
        per_channel = (restored - states).square().mean(0).sqrt() / states.square().mean(0).sqrt()
        return float(f"{per_channel.mean():.4g}")

    return {"per_token": error(rounded(states, -1)), "per_channel": error(rounded(pages, 1).flatten(0, 1))}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/benchmarks/states.json")
    options = parser.parse_args()
    model, tokenizer, label = load_model(None, device="cpu", dtype=torch.float32)
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text[: 16 * TOKENS], return_tensors="pt").input_ids[:, :TOKENS]
    cache = DynamicCache(config=model.config)
    model(ids, **cache_argument(cache), logits_to_keep=1)
    heads: list[dict[str, Any]] = []
    for layer_idx, layer in enumerate(cache.layers):
        for kind, states in (("key", layer.keys[0]), ("value", layer.values[0])):
            for head, head_states in enumerate(states):
                largest = head_states.abs().amax(0)
                heads.append(
                    {
                        "layer": layer_idx,
                        "head": head,
                        "kind": kind,
                        "largest_over_median_channel": float(f"{largest.max() / largest.median():.4g}"),
                        "error": errors(head_states),
                    }
                )
    keys = [head for head in heads if head["kind"] == "key"]
    worst = max(keys, key=lambda head: head["largest_over_median_channel"])
    shown = {
        kind: [float(f"{x:.4g}") for x in states[0, worst["head"]].abs().amax(0)]
        for kind, states in (("key", cache.layers[worst["layer"]].keys), ("value", cache.layers[worst["layer"]].values))
    }
    report = {
        "command": "PYTHONPATH=. python tests/benchmarks/measure_states.py",
        "hardware": {"device": "cpu"},
        "versions": versions(),
        "model": label,
        "tokens": TOKENS,
        "shown": {"layer": worst["layer"], "head": worst["head"], "largest_of_channel": shown},
        "heads": heads,
    }
    write(report, Path(options.out))
    for kind in ("key", "value"):
        rows = [head for head in heads if head["kind"] == kind]
        for rule in ("per_token", "per_channel"):
            print(kind, rule, sum(row["error"][rule] for row in rows) / len(rows))
    print(worst)


if __name__ == "__main__":
    main()
