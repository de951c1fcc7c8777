"""Qwen-1.8B, 7B, 14B and 72B of the first generation (``model_type`` "qwen") without remote code.

    import quantcache.adapters.qwen

Importing this package registers the config, model and tokenizer with transformers' Auto classes; from then on
``from_pretrained`` takes them instead of the checkpoint's own code, with or without ``trust_remote_code=True``.
``import quantcache`` alone registers nothing.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from quantcache.adapters.qwen import gptq, parallel
from quantcache.adapters.qwen.configuration import QWenConfig
from quantcache.adapters.qwen.memory import MemoryReport, memory_report
from quantcache.adapters.qwen.modeling import QWenLMHeadModel, QWenModel
from quantcache.adapters.qwen.prompts import StopWordsLogitsProcessor, decode_tokens, get_stop_words_ids, make_context
from quantcache.adapters.qwen.tokenization import QWenTokenizer
from quantcache.layers._host import register_tokenizer

__all__ = [
    "MemoryReport",
    "QWenConfig",
    "QWenLMHeadModel",
    "QWenModel",
    "QWenTokenizer",
    "StopWordsLogitsProcessor",
    "decode_tokens",
    "get_stop_words_ids",
    "make_context",
    "memory_report",
]

gptq.register()
parallel.register()
AutoConfig.register("qwen", QWenConfig, exist_ok=True)
AutoModel.register(QWenConfig, QWenModel, exist_ok=True)
AutoModelForCausalLM.register(QWenConfig, QWenLMHeadModel, exist_ok=True)
register_tokenizer(QWenTokenizer)
