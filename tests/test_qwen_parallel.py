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
from quantcache.adapters.qwen import QWenLMHeadModel, gptq
from tests.processes import launch
from tests.qwen_checkpoint import HIDDEN, VOCAB, float_weights, gptq_weights, write_checkpoint

PROGRAM = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from quantcache.adapters.qwen import gptq
from quantcache.layers._host import cache_of

out = sys.argv[1]
gptq.gptqmodel_is_there = lambda: False
ids = torch.tensor(json.load(open(f"{out}/ids.json")))
for name in ("float", "int4"):
    model = AutoModelForCausalLM.from_pretrained(
        f"{out}/{name}",
        distributed_config=DistributedConfig(tp_plan="auto"),
        dtype=torch.float32,
        use_cache_quantization=True,
    ).eval()
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    result = model.generate(ids, return_dict_in_generate=True, **options)
    heads = [layer.pages.key_tail.shape[1] for layer in cache_of(result).layers]
    pages = [layer.pages.num_pages for layer in cache_of(result).layers]
    cache_of(result).save(f"{out}/{name}.safetensors", model, result.sequences)
    again = type(cache_of(result)).load(f"{out}/{name}.safetensors", model)
    continued = model.generate(result.sequences, past_key_values=again, **{**options, "attention_mask": None})
    if name == "float" and not torch.__version__.startswith("2.11."):
        model.save_pretrained(f"{out}/saved")
    with open(f"{out}/{name}{torch.distributed.get_rank()}.json", "w") as file:
        found = {"tokens": result.sequences.tolist(), "heads": heads, "pages": pages, "on": continued.tolist()}
        json.dump(found, file)
torch.distributed.destroy_process_group()
"""


def test_two_ranks_share_the_heads_and_answer_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds one of two heads in its int8 cache; tokens are those of one process; saving writes whole tensors.

    Packed layers are not cut: each rank holds them and both heads, and answers the same.
    """
    packed, restored = gptq_weights(float_weights())
    write_checkpoint(tmp_path / "float", restored)
    write_checkpoint(tmp_path / "int4", packed, gptq=True)
    ids = torch.randint(0, VOCAB, (2, 150))
    (tmp_path / "ids.json").write_text(json.dumps(ids.tolist()))
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    launch(program, tmp_path)
    monkeypatch.setattr(gptq, "gptqmodel_is_there", lambda: False)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    for name, heads in (("float", 1), ("int4", 2)):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / name, dtype=torch.float32, use_cache_quantization=True
        ).eval()
        expected = model.generate(ids, **options).tolist()
        # The ranks' file has both heads, and one process goes on as they do.
        loaded = QuantizedInt8Cache.load(tmp_path / f"{name}.safetensors", model)
        assert loaded.layers[0].pages.key_tail.shape[1] == 2
        more = options | {"attention_mask": None}
        continued = model.generate(torch.tensor(expected), past_key_values=loaded, **more).tolist()
        for rank in range(2):
            seen = json.loads((tmp_path / f"{name}{rank}.json").read_text())
            assert seen["heads"] == [heads, heads]
            assert min(seen["pages"]) > 0
            assert seen["tokens"] == expected
            assert seen["on"] == continued
    if torch.__version__.startswith("2.11."):
        return  # its DTensor cannot gather a fused linear that is split by heads
    before, after = load_file(tmp_path / "float" / "model.safetensors"), load_file(tmp_path / "saved/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_ranks_that_would_cut_a_head_are_refused(tmp_path: Path) -> None:
    model: QWenLMHeadModel = AutoModelForCausalLM.from_pretrained(write_checkpoint(tmp_path / "checkpoint"))
    model.transformer.h[0].attn.c_attn = nn.Linear(HIDDEN, 3 * 24)
    with pytest.raises(ValueError, match=r"must divide the 2 attention heads, got 1\.50 heads on this one"):
        model(torch.zeros(1, 3, dtype=torch.long))
