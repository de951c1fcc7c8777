"""HumanEval: programs written greedily in left-padded batches, through every cache, and run."""

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from quantcache.evaluation.comparison import Candidate
from quantcache.evaluation.tasks.asking import Answer, Answers, Models, padding
from quantcache.evaluation.tasks.data import Program
from quantcache.evaluation.tasks.sandbox import passing
from quantcache.layers._host import cache_argument

NEW_TOKENS: Final = 320
"""Of a program, at most; the longest solution of the data set takes a good tokeniser 250."""

STOPS: Final = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n```", "\n@", "\nassert ")
"""Where a function has ended; https://arxiv.org/abs/2107.03374, section 2.2, and what chat models add."""

_TAIL: Final = 8
"""Tokens in which a stop that has just been written must lie."""


class Ended(StoppingCriteria):
    """Each row ends where its function has, behind ``prompt_len`` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_len: int) -> None:
        self.tokenizer, self.prompt_len = tokenizer, prompt_len
        self.ended: set[int] = set()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        """Which rows have ended, bool (batch,).

        Args:
            input_ids: int64 (batch, seq_len).
            scores: unused.
        """
        running = [row for row in range(len(input_ids)) if row not in self.ended]
        tails = input_ids[running, max(self.prompt_len, input_ids.shape[1] - _TAIL) :]
        for row, text in zip(running, self.tokenizer.batch_decode(tails), strict=True):
            if any(stop in text for stop in STOPS):
                self.ended.add(row)
        return torch.tensor([row in self.ended for row in range(len(input_ids))], device=input_ids.device)


@torch.no_grad()
def write(
    tokenizer: PreTrainedTokenizerBase,
    programs: Sequence[Program],
    models: Models,
    batch: int,
    new_tokens: int = NEW_TOKENS,
) -> Iterator[dict[str, Answers]]:
    """Have every cache write every program, run them, and yield the answers by the program's name, a batch at a time.

    Args:
        tokenizer: the models'.
        programs: to write.
        models: with which caches.
        batch: programs that are written at a time.
        new_tokens: of each, at most.
    """
    for start in range(0, len(programs), batch):
        group = programs[start : start + batch]
        written = {}
        for name, (model, candidate) in models.items():
            written[name] = _complete(tokenizer, group, model, candidate, new_tokens)
        # What two caches have written alike is run once, so that one verdict is one program's.
        tests = {
            (program.name, text): f"{_prompt(program)}{text}\n{program.test}\ncheck({program.entry_point})"
            for texts in written.values()
            for program, text in zip(group, texts, strict=True)
        }
        verdicts = dict(zip(tests, passing(tests.values()), strict=True))
        yield {
            program.name: {
                name: Answer(texts[row], verdicts[program.name, texts[row]]) for name, texts in written.items()
            }
            for row, program in enumerate(group)
        }


def until_stop(text: str) -> str:
    """A completion up to where its function has ended."""
    return text[: min((found for stop in STOPS if (found := text.find(stop)) >= 0), default=len(text))]


def _complete(
    tokenizer: PreTrainedTokenizerBase,
    group: Sequence[Program],
    model: PreTrainedModel,
    candidate: Candidate,
    new_tokens: int,
) -> list[str]:
    rows = [tokenizer(_prompt(program)).input_ids for program in group]
    longest = max(map(len, rows))
    ids = torch.tensor([[padding(tokenizer)] * (longest - len(row)) + row for row in rows], device=model.device)
    lengths = torch.tensor([len(row) for row in rows], device=model.device)
    mask = (torch.arange(longest, device=model.device) >= longest - lengths[:, None]).long()
    output = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=mask,
        **cache_argument(candidate.make_cache()),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=padding(tokenizer),
        stopping_criteria=[Ended(tokenizer, longest)],
    )
    return [until_stop(text) for text in tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)]


def _prompt(program: Program) -> str:
    """Without its last line break, which a tokeniser joins with the indentation that follows."""
    return program.prompt.rstrip()
