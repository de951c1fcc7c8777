"""Int4 weights and an int8 cache: Qwen-7B-Chat-Int4 without remote code, compiler or gptqmodel.

python examples/int4_weights.py "What is a KV cache?"
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from quantcache import QuantizedInt8Cache
from quantcache.adapters.qwen import memory_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--model", default="Qwen/Qwen-7B-Chat-Int4", help="a hub id or a folder")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, device_map="auto", use_cache_quantization=True).eval()
    history = None
    for question in options.questions:
        response, history = model.chat(tokenizer, question, history=history)
        print(f"> {question}\n{response}\n")

    inputs = tokenizer(" ".join(options.questions), return_tensors="pt").to(model.device)
    cache = QuantizedInt8Cache(model.config)
    model.generate(**inputs, cache=cache, max_new_tokens=20)
    print(memory_report(model, cache))


if __name__ == "__main__":
    main()
