"""Tensor parallelism of Qwen v1 over two processes: whole heads on each rank, and the answers of one process."""

import json
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from quantcache import QuantizedInt8Cache
from quantcache.adapters.qwen import QWenLMHeadModel
from tests.processes import launch
from tests.qwen_checkpoint import HIDDEN, VOCAB, write_checkpoint

PROGRAM = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
import quantcache.adapters.qwen

folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(
    folder,
    distributed_config=DistributedConfig(tp_plan="auto"),
    dtype=torch.float32,
    use_cache_quantization=True,
).eval()
ids = torch.tensor(json.load(open(f"{out}/ids.json")))
options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
result = model.generate(ids, return_dict_in_generate=True, **options)
rank = torch.distributed.get_rank()
heads = [layer.pages.key_tail.shape[1] for layer in result.past_key_values.layers]
pages = [layer.pages.num_pages for layer in result.past_key_values.layers]
result.past_key_values.save(f"{out}/cache.safetensors", model, result.sequences)
again = type(result.past_key_values).load(f"{out}/cache.safetensors", model)
continued = model.generate(result.sequences, past_key_values=again, **{**options, "attention_mask": None})
model.save_pretrained(f"{out}/saved")
with open(f"{out}/rank{rank}.json", "w") as file:
    json.dump({"tokens": result.sequences.tolist(), "heads": heads, "pages": pages, "on": continued.tolist()}, file)
torch.distributed.destroy_process_group()
"""


def test_two_ranks_share_the_heads_and_answer_as_one(tmp_path: Path) -> None:
    """Each holds one of two heads in its int8 cache; tokens are those of one process; saving writes whole tensors."""
    folder = write_checkpoint(tmp_path / "checkpoint")
    ids = torch.randint(0, VOCAB, (2, 150))
    (tmp_path / "ids.json").write_text(json.dumps(ids.tolist()))
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    launch(program, folder, tmp_path)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_cache_quantization=True).eval()
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    expected = model.generate(ids, **options).tolist()
    for rank in ranks:
        assert rank["heads"] == [1, 1]
        assert min(rank["pages"]) > 0
        assert rank["tokens"] == expected
    # Their file has both heads, and one process goes on as they did.
    sequences = torch.tensor(expected)
    cache = QuantizedInt8Cache.load(tmp_path / "cache.safetensors", model)
    assert cache.layers[0].pages.key_tail.shape[1] == 2
    continued = model.generate(sequences, past_key_values=cache, **(options | {"attention_mask": None})).tolist()
    assert [rank["on"] for rank in ranks] == [continued, continued]
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_ranks_that_would_cut_a_head_are_refused(tmp_path: Path) -> None:
    model: QWenLMHeadModel = AutoModelForCausalLM.from_pretrained(write_checkpoint(tmp_path / "checkpoint"))
    model.transformer.h[0].attn.c_attn = nn.Linear(HIDDEN, 3 * 24)
    with pytest.raises(ValueError, match=r"must divide the 2 attention heads, got 1\.50 heads on this one"):
        model(torch.zeros(1, 3, dtype=torch.long))
