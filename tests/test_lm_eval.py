"""Do the harness's scores come through the cache? Skips where lm-eval is not installed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.test_cli import folder as folder

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own


def lm(folder: Path, **options: Any) -> Any:
    from quantcache.adapters.lm_eval import QuantcacheLM

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token = "!"
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    return QuantcacheLM(model, tokenizer=tokenizer, device="cpu", max_length=1024, **options)


def requests(count: int = 3) -> list[tuple[tuple[str, str], list[int], list[int]]]:
    generator = torch.Generator().manual_seed(1)
    question = torch.randint(0, 256, (300,), generator=generator).tolist()
    answers = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in (1, 40, 7)[:count]]
    return [(("q", str(place)), question, answer) for place, answer in enumerate(answers)]


def by_hand(model: LlamaForCausalLM, question: list[int], answer: list[int]) -> float:
    ids = torch.tensor([question + answer])
    with torch.no_grad():
        log_probs = model(ids).logits[0, len(question) - 1 : -1].log_softmax(-1)
    return float(log_probs.gather(-1, ids[0, len(question) :, None]).sum())


@pytest.mark.parametrize("chunk_len", [1, 16])
def test_scores_of_the_exact_cache_are_those_of_one_pass(folder: Path, chunk_len: int) -> None:
    tested = lm(folder, cache="exact", chunk_len=chunk_len)
    for (score, _), (_, question, answer) in zip(tested._loglikelihood_tokens(requests()), requests(), strict=True):
        assert score == pytest.approx(by_hand(tested.model, question, answer), rel=1e-4)


def test_scores_of_the_int8_cache_are_read_from_it(folder: Path) -> None:
    exact, int8 = lm(folder, cache="exact"), lm(folder)
    differences = [
        abs(a[0] - b[0]) for a, b in zip(*(x._loglikelihood_tokens(requests()) for x in (exact, int8)), strict=True)
    ]
    assert all(0 < difference < 0.05 for difference in differences), "zero would mean that nothing was read"

    class Broken(DynamicCache):
        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object) -> Any:
            key, value = super().update(key_states, value_states, *args, **kwargs)
            return (key, value) if key.shape[2] == key_states.shape[2] else (key, value * 0)

    int8.make_cache = Broken
    broken, right = (x._loglikelihood_tokens(requests(1))[0][0] for x in (int8, exact))
    assert abs(broken - right) > 3 * differences[0]


def test_the_order_and_the_greedy_answer_are_kept(folder: Path) -> None:
    tested = lm(folder)
    question = requests(1)[0][1]
    with torch.no_grad():
        best = int(tested.model(torch.tensor([question])).logits[0, -1].argmax())
    scored = tested._loglikelihood_tokens([(("q", "a"), question, [best]), (("q", "b"), question, [(best + 1) % 256])])
    assert [greedy for _, greedy in scored] == [True, False]
    assert scored[0][0] > scored[1][0]


def test_a_task_runs_through_the_harness(folder: Path, tmp_path: Path) -> None:
    """A task of our own, so that no network is needed: a multiple choice and a generation."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = [{"question": "abc " * 60 + str(i), "choices": [" x", " yy"], "answer": i % 2} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'data.jsonl'}\ntest_split: test\n"
    )
    (tmp_path / "choice.yaml").write_text(
        f"task: tiny_choice\n{data}output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: answer\nmetric_list:\n  - metric: acc\n"
    )
    (tmp_path / "text.yaml").write_text(
        f"task: tiny_text\n{data}output_type: generate_until\ndoc_to_text: '{{{{question}}}}'\ndoc_to_target: 'x'\n"
        "generation_kwargs:\n  until: ['zzzz']\n  max_gen_toks: 8\nmetric_list:\n  - metric: exact_match\n"
    )
    found = lm_eval.simple_evaluate(
        model=lm(folder),
        tasks=["tiny_choice", "tiny_text"],
        task_manager=TaskManager(include_path=str(tmp_path)),
        bootstrap_iters=0,
    )
    assert 0 <= found["results"]["tiny_choice"]["acc,none"] <= 1
    assert found["results"]["tiny_text"]["exact_match,none"] == 0


@pytest.mark.parametrize(
    ("options", "message"), [({"cache": "int3"}, "cache must be one of int8, exact"), ({"chunk_len": 0}, "at least 1")]
)
def test_bad_arguments_are_named(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^QuantcacheLM: .*{message}"):
        lm(folder, **options)
