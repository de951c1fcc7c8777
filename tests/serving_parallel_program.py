"""What each rank does in ``test_serving_parallel.py``: ``torchrun tests/serving_parallel_program.py FOLDER``.

FOLDER has a checkpoint in ``model`` and prompts in ``prompts.json``. Every rank loads its part, answers all prompts
over int8 blocks, and writes what it saw to ``rank{rank}.json``.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig
from transformers.distributed import DistributedConfig

from quantcache import serving
from tests.documentation import make_tokenizer

NEW_TOKENS = 12
STOPS = list("aeiost")


def answers(model: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """What one process does, too: tokens of each prompt, what the pool was, and why a request failed."""
    config = ContinuousBatchingConfig(page_size=64, num_blocks=40, max_batch_tokens=128)
    with serving.int8_batching(model, config) as manager:
        outputs = model.generate_batch(prompts, max_new_tokens=NEW_TOKENS)
        stopped = model.generate_batch(prompts, max_new_tokens=40, stop_strings=STOPS, tokenizer=make_tokenizer())
        return {
            "tokens": [list(output.generated_tokens) for output in outputs.values()],
            "stopped": [list(output.generated_tokens) for output in stopped.values()],
            "errors": [output.error for output in outputs.values()],
            "report": asdict(manager.report()),
        }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    shared = DistributedConfig(tp_size=2, tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=shared).eval()
    found = answers(model, json.loads((folder / "prompts.json").read_text()))
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
