"""Answer many prompts in batches, a line of a file each, sorted so that little is padding.

python examples/batch_generation.py prompts.txt --batch-size 32
"""

import argparse
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from quantcache import QuantizedInt8Cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--model", default="Qwen/Qwen2.5-7B-Instruct", help="a hub id or a folder")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=100)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(options.model, device_map="auto")

    prompts = [line for line in options.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), options.batch_size):
        places = order[start : start + options.batch_size]
        # An instruct model answers a turn of a chat; without its template it would only continue the text.
        turns = [[{"role": "user", "content": prompts[place]}] for place in places]
        batch = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        cache = QuantizedInt8Cache(model.config)
        output = model.generate(**batch, cache=cache, max_new_tokens=options.max_new_tokens, do_sample=False)
        found = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for place, answer in zip(places, found, strict=True):
            answers[place] = answer
        print(f"{len(places)} prompts, cache of {cache.nbytes / 2**20:.1f} MiB", file=sys.stderr)
    for prompt, answer in zip(prompts, answers, strict=True):
        print(f"> {prompt}\n{answer.strip()}\n")


if __name__ == "__main__":
    main()
