"""Does a model that several processes share serve by transformers' own distributed batching, each rank its heads?"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.processes import ROOT, launch, skip_below_two_gpus
from tests.serving_parallel_program import NEW_TOKENS, answers

LENGTHS = (5, 64, 200)


def shared_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=1024, initializer_range=0.2, bos_token_id=0,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.filterwarnings("ignore::quantcache.FallbackWarning")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, skip_below_two_gpus])])
def test_two_processes_answer_as_one(device: str, tmp_path: Path) -> None:
    model = shared_model()
    model.save_pretrained(tmp_path / "model")
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, 258, (length,), generator=generator).tolist() for length in LENGTHS]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    launch(ROOT / "tests" / "serving_parallel_program.py", tmp_path, device=device)
    alone = answers(model.to(device), prompts)
    assert alone["errors"] == [None] * len(prompts)
    assert [len(tokens) for tokens in alone["tokens"]] == [NEW_TOKENS] * len(prompts)
    assert min(map(len, alone["stopped"])) < 40, "a stop string ends one of them"
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["errors"] == alone["errors"], rank
        assert found["tokens"] == alone["tokens"], rank
        assert found["stopped"] == alone["stopped"], rank
        assert 2 * found["report"]["block_nbytes"] == alone["report"]["block_nbytes"], "each rank has its heads"
        assert found["report"]["blocks_used"] == 0
        assert not found["report"]["records"]
