"""Generate with the int8 cache on several GPUs, by layers or by heads.

    python examples/several_gpus.py [MODEL]                             # device_map: one process, layers spread
    torchrun --nproc-per-node 2 examples/several_gpus.py [MODEL] --tp   # tp_plan: one process per GPU, heads spread

MODEL is a folder or a hub id. The first needs accelerate, the second a number of processes that divides the KV heads;
both run on a CPU, too.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

from quantcache import QuantizedInt8Cache


def load(name: str, by_heads: bool) -> Any:
    if by_heads:
        return AutoModelForCausalLM.from_pretrained(name, distributed_config=DistributedConfig(tp_plan="auto"))
    return AutoModelForCausalLM.from_pretrained(name, device_map="auto")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="Qwen/Qwen2.5-7B-Instruct")
    parser.add_argument("--tp", action="store_true", help="spread the heads; run it under torchrun")
    parser.add_argument("--prompt", default="A cache holds the keys and values of every token, so that")
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--save", type=Path, help="write the cache to this file; any number of processes can load it")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = load(options.model, options.tp).eval()
    inputs = tokenizer(options.prompt, return_tensors="pt").to(model.device)
    # Nothing here depends on where the model is: the cache follows the keys and values that it is given.
    cache = QuantizedInt8Cache(model.config)
    output = model.generate(**inputs, cache=cache, max_new_tokens=options.new_tokens, do_sample=False)
    if options.save:
        cache.save(options.save, model, output)

    rank = torch.distributed.get_rank() if options.tp else 0
    if rank == 0:
        print(tokenizer.decode(output[0], skip_special_tokens=True))
    devices = sorted({str(layer.device) for layer in cache.layers})
    held = f"{cache.nbytes / 2**20:.1f} MiB of int8 cache on {', '.join(devices)}"
    print(f"rank {rank}: {held}, read by {cache.report().backend}")
    if options.tp:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
