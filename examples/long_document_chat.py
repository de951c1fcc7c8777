"""Ask several questions about one long document. It is read once; its cache is kept on disk for the next time.

    python examples/long_document_chat.py manual.txt "What is it about?" "How is it installed?"

The first run reads the document and writes ``manual.txt.safetensors``; later runs load that file, which takes a
fraction of the time. A document that was edited since, or another model, is read again. Every question starts from its
own fork of the document's cache, which shares the stored bytes, so that answers do not depend on each other.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from quantcache import CacheFileError, QuantizedInt8Cache


def load(file: Path, model: PreTrainedModel, document: torch.Tensor) -> QuantizedInt8Cache | None:
    """The cache of these tokens from an earlier run, None where the document has to be read (again)."""
    if not file.exists():
        return None
    try:
        cache = QuantizedInt8Cache.load(file, model=model)
    except CacheFileError as error:
        print(f"{file} is not used: {error}", file=sys.stderr)
        return None
    if cache.input_ids is None or not torch.equal(cache.input_ids, document.cpu()):
        print(f"{file} is of another text: the document is read again.", file=sys.stderr)
        return None
    return cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path)
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--model", default="Qwen/Qwen2.5-7B-Instruct", help="a hub id or a folder")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, device_map="auto")

    def encode(question: str) -> torch.Tensor:
        turn = {"role": "user", "content": f"{options.document.read_text(encoding='utf-8')}\n\n{question}"}
        text = tokenizer.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)

    # The tokens that all prompts begin with: the document and what the chat template puts before it.
    one, other = encode("A"), encode("B")
    shared = min(one.shape[1], other.shape[1])
    differs = (one[0, :shared] != other[0, :shared]).nonzero()
    document = one[:, : int(differs[0]) if len(differs) else shared]

    file = options.document.with_name(options.document.name + ".safetensors")
    start = time.perf_counter()
    cache = load(file, model, document)
    if cache is None:
        cache = QuantizedInt8Cache(model.config)
        with torch.no_grad():
            model(document, cache=cache, logits_to_keep=1)
        cache.save(file, model=model, input_ids=document)
    seconds = time.perf_counter() - start
    print(f"{cache.get_seq_length():,} tokens in {seconds:.1f} s, {cache.nbytes / 2**20:.1f} MiB in int8")

    for question in options.questions:
        prompt = encode(question)
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            cache=cache.fork(),
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
        )
        print(f"\n> {question}\n{tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
