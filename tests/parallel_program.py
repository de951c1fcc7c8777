"""What each rank does in ``test_parallel.py``: ``torchrun tests/parallel_program.py FOLDER MODEL...``.

FOLDER has the prompts in ``ids.pt`` and a checkpoint for each MODEL. Every rank loads its part, generates, saves and
loads caches, and writes what it saw to ``rank{rank}.pt``; files of caches lie beside.
"""

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, CompileConfig, StaticCache, set_seed
from transformers.distributed import DistributedConfig

from quantcache import QuantizedInt8Cache
from quantcache.files import fingerprint
from quantcache.layers._host import cache_argument
from quantcache.layers.parallel import ranks_of
from tests.file_cases import stored_tensors

NEW_TOKENS = 24


def generated(model: Any, ids: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
    """What one process does, too."""
    ids = ids.to(model.device)
    mask = torch.ones_like(ids)
    if len(ids) > 1:
        mask[0, :5] = 0  # padding on the left
    defaults = {"attention_mask": mask, "do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None}
    return model.generate(ids, **cache_argument(cache), **(defaults | options)).cpu()


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "lookup": {"prompt_lookup_num_tokens": 4},
    "sampling": {"do_sample": True, "top_k": 20},
    "static": {"disable_compile": True},
    "static compiled": {"compile_config": CompileConfig(backend="aot_eager", mode=None)},
    "exact static compiled": {"compile_config": CompileConfig(backend="aot_eager", mode=None)},
}
"""Ways to generate: the last shows how far transformers itself goes."""


def runs(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Tokens in every mode, by name."""
    capacity = ids.shape[1] + NEW_TOKENS
    made: dict[str, Any] = {}
    for mode, options in MODES.items():
        if "compiled" in mode:
            torch._dynamo.reset()
            options["compile_config"]._compile_all_devices = True
        cache: Any = QuantizedInt8Cache(model.config, max_cache_len=capacity if "static" in mode else None)
        if "exact" in mode:
            cache = StaticCache(config=model.config, max_cache_len=capacity)
        set_seed(3)
        # Looking up drafts in the prompt is for one sequence.
        made[mode] = generated(model, ids[1:] if mode == "lookup" else ids, cache, **options)
    return made


def stored_on_host(cache: QuantizedInt8Cache) -> dict[str, Tensor]:
    """What is stored, comparable among processes and devices."""
    return {name: tensor.cpu() for name, tensor in stored_tensors(cache).items()}


def described(cache: QuantizedInt8Cache) -> dict[str, Any]:
    report = cache.report()
    return {
        "nbytes": cache.nbytes,
        "rows": [(row.storage, row.seq_len, row.nbytes, row.kernel) for row in report.layers],
        "stored": {name: tensor.clone() for name, tensor in stored_on_host(cache).items()},
    }


def failures(model: Any, cache: QuantizedInt8Cache, folder: Path, rank: int) -> dict[str, str]:
    """What is refused, and that the group is still in step afterwards."""
    seen = {}
    shorter = copy.deepcopy(cache)
    if rank == 1:
        shorter.crop(-1)
    attempts = {
        "no folder": lambda: cache.save(folder / "missing" / "file", model),
        "no model": lambda: cache.save(folder / "file"),
        "other tokens": lambda: shorter.save(folder / "file", model),
        "one empty": lambda: (cache if rank == 0 else QuantizedInt8Cache()).save(folder / "file", model),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except Exception as error:
            seen[name] = f"{type(error).__name__}: {error}"
    return seen


def main() -> None:
    folder = Path(sys.argv[1])
    ids = torch.load(folder / "ids.pt")
    found: dict[str, Any] = {}
    for name in sys.argv[2:]:
        model = AutoModelForCausalLM.from_pretrained(
            folder / name, distributed_config=DistributedConfig(tp_plan="auto"), dtype=torch.float32
        ).eval()
        ranks = ranks_of(model)
        assert ranks is not None
        found[name] = {"runs": runs(model, ids)}
        cache = QuantizedInt8Cache()
        sequences = generated(model, ids, cache)
        found[name]["cache"] = described(cache)
        cache.save(folder / f"{name}.two.safetensors", model, sequences, digest_weights=True)
        found[name]["digest"] = fingerprint.weights_digest(model)
        loaded = QuantizedInt8Cache.load(folder / f"{name}.two.safetensors", model)
        found[name]["loaded"] = described(loaded)
        found[name]["continued"] = generated(model, sequences, loaded)
        for mmap in (False, True):
            part = QuantizedInt8Cache.load(folder / f"{name}.one.safetensors", model, max_tokens=140, mmap=mmap)
            found[name][f"of one, mmap={mmap}"] = described(part)
        static = QuantizedInt8Cache(model.config, max_cache_len=ids.shape[1] + NEW_TOKENS)
        generated(model, ids, static, disable_compile=True)
        static.save(folder / f"{name}.static.safetensors", model)
        found[name]["static"] = described(static)
        found[name]["failures"] = failures(model, cache, folder, ranks.rank)
        found[name]["continued of one"] = generated(
            model, sequences, QuantizedInt8Cache.load(folder / f"{name}.one.safetensors", model)
        )
    torch.save(found, folder / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    with torch.no_grad():
        main()
