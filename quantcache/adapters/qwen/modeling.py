"""The Qwen v1 decoder with the released parameter names, over transformers' Cache API.

One file for one model, as transformers has it.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, eager_attention_forward

from quantcache.adapters.qwen.batches import BatchMixin
from quantcache.adapters.qwen.caches import announce_prompt, cache_from_legacy, new_cache, remembered_prompt_len
from quantcache.adapters.qwen.chat import ChatMixin
from quantcache.adapters.qwen.configuration import QWenConfig
from quantcache.adapters.qwen.positions import apply_rotary, logn_factors, prompt_alphas, rotary_embedding
from quantcache.adapters.qwen.prompts import StopWordsLogitsProcessor
from quantcache.layers._host import CACHE_NAMES, cache_argument, cache_of, take_cache


class QWenAttention(nn.Module):
    """Attention with the fused ``c_attn``; keys are rotated before they are cached."""

    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.kv_channels
        self.is_causal, self.num_key_value_groups = True, 1  # for the host's attention functions
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        width = config.kv_channels * config.num_attention_heads
        self.c_attn = nn.Linear(config.hidden_size, 3 * width)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=not config.no_bias)

    def forward(
        self,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        logn: Tensor | None,
        attention_mask: Tensor | None,
        cache: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(batch, query_len, hidden_size) to the same; the weights where the attention function gives them."""
        batch, query_len, _ = hidden_states.shape
        fused = self.c_attn(hidden_states)
        if fused.shape[-1] % (3 * self.head_dim):
            raise ValueError(
                "QWenAttention.forward: the ranks of tensor parallelism must divide the "
                f"{self.config.num_attention_heads} attention heads, got {fused.shape[-1] / 3 / self.head_dim:.2f} "
                "heads on this one."
            )
        heads = (batch, query_len, -1, self.head_dim)
        query, key, value = (states.view(heads).transpose(1, 2) for states in fused.chunk(3, dim=-1))
        query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
        if logn is not None:
            query = query * logn.to(query.dtype)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        name = self.config._attn_implementation
        attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        kwargs |= {"dropout": self.config.attn_dropout_prob if self.training else 0.0, "scaling": self.scaling}
        output, weights = attention(self, query, key, value, attention_mask, **kwargs)
        return self.c_proj(output.reshape(batch, query_len, -1)), weights


class QWenMLP(nn.Module):
    """``c_proj(w1(x) * silu(w2(x)))``."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        width = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, width, bias=not config.no_bias)
        self.w2 = nn.Linear(config.hidden_size, width, bias=not config.no_bias)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=not config.no_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(batch, query_len, hidden_size) to the same."""
        projected: Tensor = self.c_proj(self.w1(hidden_states) * functional.silu(self.w2(hidden_states)))
        return projected


class QWenBlock(nn.Module):
    """A pre-norm decoder layer."""

    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = Qwen2RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QWenAttention(config, layer_idx)
        self.ln_2 = Qwen2RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """See ``QWenAttention.forward``."""
        attended, weights = self.attn(self.ln_1(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.ln_2(hidden_states)), weights


class QWenPreTrainedModel(PreTrainedModel):
    """What transformers must know of the family."""

    config: QWenConfig
    config_class = QWenConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "wte"
    _no_split_modules = ["QWenBlock"]  # noqa: RUF012
    _skip_keys_device_placement = [*CACHE_NAMES]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"attn\.masked_bias$",
        r"rotary_emb\.inv_freq$",
        r"\.h\.\d+\.(attn\.c_proj|mlp\.(w1|w2|c_proj))\.bias$",  # GPTQ files have zeros where there is no bias
    ]


class QWenModel(QWenPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        if config.seq_length is None:
            raise ValueError("QWenModel: config.seq_length must be the training length in tokens, got None.")
        self.seq_length: int = config.seq_length
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.drop = nn.Dropout(config.emb_dropout_prob)
        self.h = nn.ModuleList([QWenBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.ln_f = Qwen2RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: (batch, query_len), or ``inputs_embeds`` (batch, query_len, hidden_size).
            attention_mask: (batch, kv_len), 1 for real tokens; left padding is the convention.
            past_key_values: a Cache or a legacy tuple, which is converted; ``cache`` is the same argument.
            inputs_embeds: see ``input_ids``.
            use_cache: the config's by default.
            output_hidden_states: return every layer's input and the last output.
            output_attentions: return attention weights, where the attention function gives them.
            cache: see ``past_key_values``.
            kwargs: ``position_ids``, ``token_type_ids``, ``head_mask`` and the like are accepted and unused.

        Raises:
            ValueError: not exactly one of ``input_ids`` and ``inputs_embeds``; two different caches.
            TypeError: a cache under another name.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("QWenModel.forward: exactly one of input_ids and inputs_embeds must be given.")
        hidden_states = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        keep_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        cache = take_cache("QWenModel.forward", {**kwargs, "cache": cache, "past_key_values": past_key_values})
        if isinstance(cache, (tuple, list)):
            cache = cache_from_legacy(self.config, cache)
        if cache is None and use_cache:
            cache = new_cache(self.config)
        past_len = 0 if cache is None else int(cache.get_seq_length())
        kv_len = past_len + hidden_states.shape[1]
        prompt_len = remembered_prompt_len(cache, past_len, kv_len)
        device = hidden_states.device
        positions = torch.arange(past_len, kv_len, device=device)
        alphas = [1] if self.training else prompt_alphas(self.config, self.seq_length, attention_mask, prompt_len)
        rotary = rotary_embedding(positions, alphas, self.config)
        logn = None if self.training else logn_factors(self.config, self.seq_length, past_len, kv_len, device)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            position_ids=positions[None],
            **cache_argument(cache),
        )
        hidden_states = self.drop(hidden_states)
        states: list[Tensor] = [hidden_states]
        weights: list[Tensor | None] = []
        shared = {"rotary": rotary, "logn": logn, "attention_mask": mask, "cache": cache}
        for block in self.h:
            hidden_states, layer_weights = block(hidden_states, **shared)
            if keep_states:
                states.append(hidden_states)
            weights.append(layer_weights)
        hidden_states = self.ln_f(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            **cache_argument(cache if use_cache else None),
            hidden_states=(*states[:-1], hidden_states) if keep_states else None,
            attentions=tuple(weights) if output_attentions else None,  # type: ignore[arg-type]
        )


class QWenLMHeadModel(ChatMixin, BatchMixin, QWenPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Qwen v1 with its language-model head, ``generate``, ``chat`` and their relatives."""

    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # which the host reads off class names that end in it
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """``QWenModel.forward``, then logits (batch, query_len, vocab_size), and the loss where ``labels`` are given.

        Args:
            input_ids: see ``QWenModel.forward``, as for the other arguments not named here.
            attention_mask: see there.
            past_key_values: see there.
            labels: (batch, query_len), -100 where there is none.
            logits_to_keep: compute only the newest so many positions, or those of an index tensor; 0 computes all.
            return_dict: False returns a tuple of the outputs that there are.
            cache: see there.
            kwargs: see there.
        """
        outputs = self.transformer(input_ids, attention_mask, past_key_values, cache=cache, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **cache_argument(cache_of(outputs)),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return result.to_tuple() if return_dict is False else result

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *,
        stop_words_ids: Iterable[Iterable[int]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The host's ``generate``, with Qwen's stop words, the config's cache and legacy tuples converted.

        Args:
            inputs: (batch, prompt_len) token ids.
            generation_config: the model's by default.
            stop_words_ids: token sequences after which a row ends; by default the generation config's.
            kwargs: see ``GenerationMixin.generate``; the cache may come as ``cache`` or ``past_key_values``.

        Raises:
            ValueError: two different caches.
            RuntimeError: transformers did not hand the cache to the model.
        """
        config = generation_config or self.generation_config
        words = getattr(config, "stop_words_ids", None) if stop_words_ids is None else stop_words_ids
        if words:
            eos = kwargs.get("eos_token_id", config.eos_token_id)
            given = kwargs.pop("logits_processor", None) or []
            kwargs["logits_processor"] = LogitsProcessorList([*given, StopWordsLogitsProcessor(words, eos)])
        cache = take_cache("QWenLMHeadModel.generate", kwargs)
        implementation = kwargs.get("cache_implementation", config.cache_implementation)
        if isinstance(cache, (tuple, list)):
            cache = cache_from_legacy(self.config, cache)
        elif cache is None and kwargs.get("use_cache", True) and config.use_cache is not False:
            if implementation is None:
                cache = new_cache(self.config)
        prompt = inputs if inputs is not None else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        if cache is not None:
            kwargs |= cache_argument(cache)
        past_len = int(cache.get_seq_length()) if isinstance(cache, Cache) else None
        if past_len == 0 and prompt is not None:
            announce_prompt(cache, prompt.shape[1])
        output = super().generate(inputs, generation_config=generation_config, **kwargs)
        if past_len is not None and int(cache.get_seq_length()) == past_len:
            raise RuntimeError(
                "QWenLMHeadModel.generate: transformers must hand the model the cache that generate was given, got "
                f"{past_len} tokens in it before and after. transformers {transformers.__version__} may have changed "
                "how; `quantcache doctor` says what was tested."
            )
        return output
