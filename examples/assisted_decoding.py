"""A small model drafts, a large one checks; rejected drafts are cropped from the int8 cache, which is then as before.

    python examples/assisted_decoding.py "Write a haiku about memory."

Without ``--assistant`` drafts are looked up in the prompt, which helps where answers repeat parts of it.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from quantcache import QuantizedInt8Cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--model", default="Qwen/Qwen2.5-7B-Instruct", help="a hub id or a folder")
    parser.add_argument(
        "--assistant", help="a smaller model with the same tokenizer, such as Qwen/Qwen2.5-0.5B-Instruct"
    )
    parser.add_argument("--max-new-tokens", type=int, default=200)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, device_map="auto")
    if options.assistant:
        drafts = {"assistant_model": AutoModelForCausalLM.from_pretrained(options.assistant, device_map="auto")}
    else:
        drafts = {"prompt_lookup_num_tokens": 10}

    turn = [{"role": "user", "content": options.prompt}]
    inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = inputs.to(model.device)
    cache = QuantizedInt8Cache(model.config)
    output = model.generate(**inputs, cache=cache, max_new_tokens=options.max_new_tokens, do_sample=False, **drafts)
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print(f"\n{cache}, read by {cache.report().backend}")


if __name__ == "__main__":
    main()
