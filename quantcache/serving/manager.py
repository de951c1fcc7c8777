"""transformers' manager of continuous batching, over a pool of int8 blocks."""

import gc
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Final

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from quantcache.backends import dispatch
from quantcache.backends.blocks import BlockLayout
from quantcache.quantization.errors import FallbackWarning
from quantcache.quantization.scheme import PAGE_SIZE
from quantcache.serving import _host, attention, refusals
from quantcache.serving.pool import Int8Allocator, MemoryHandler
from quantcache.serving.report import ServingReport
from quantcache.serving.stopping import StopStrings

TABLE_TOKENS: Final = 32768
"""Tokens of a request up to which it decodes by the block table; a table of 1,024 requests then has 2 MB. Longer ones
are read as batches with prompts are."""

_OF_REQUESTS: Final = ("max_length", "max_new_tokens", "num_return_sequences", "stop_strings", "cache_implementation")
"""What of a generation config a request brings along, or what is for another cache."""


class Int8BatchingManager(_host.Manager):
    """A ``ContinuousBatchingManager`` whose blocks are int8 pages. ``int8_batching`` makes it.

    ``add_request`` starts it where it is not running, and what ``generate_batch`` starts it also stops; blocks that are
    kept for prompts that begin alike outlive that. The methods that are not here are transformers'.

    Attributes:
        stop_strings: finds the strings that end answers; has the ``tokenizer`` for that.
    """

    def __init__(
        self,
        model: Any,
        generation_config: GenerationConfig,
        continuous_batching_config: ContinuousBatchingConfig,
        tokenizer: Any = None,
    ) -> None:
        refusals.check_model(model)
        refusals.check_config(continuous_batching_config, model.device)
        self.stop_strings = StopStrings(tokenizer)
        self._check_generation(generation_config)
        self._running = threading.RLock()
        self._call = threading.local()
        self._steps = {True: 0, False: 0}
        self._asked, self._own_config = deepcopy(continuous_batching_config), generation_config
        self._make(model, generation_config)

    # How it is made

    def _make(self, model: Any, generation_config: GenerationConfig) -> None:
        """Make every part, also the pool."""
        config = deepcopy(self._asked)
        config.max_blocks_per_request = None  # resolved here, of which transformers would warn
        super().__init__(model, generation_config, config)
        try:
            self._resolve()
            self.batch_processor = self._create_batch_processor()
        finally:
            self._restore_attention()
        reason = self._allocator().reason
        if model.device.type == "cuda" and reason is not None:
            warnings.warn(
                f"int8_batching: blocks are read and written in plain torch, which is slower, because {reason}.",
                FallbackWarning,
                stacklevel=2,
            )

    def _resolve(self) -> None:
        """Settle what transformers decides by the name of the attention function."""
        config, model, asked = self.continuous_batching_config, self.model, self._asked
        layout = self._layout()
        name, _ = dispatch.block_backend_for(model.device, layout)
        records = model.device.type == "cuda" and dispatch.BLOCK_BACKENDS[name].READS_LENGTHS
        wanted = asked.use_cuda_graph[1] if isinstance(asked.use_cuda_graph, tuple) else asked.use_cuda_graph
        # Graphs of a model that several GPUs share fail to be recorded: transformers' issue 48312.
        records = records and wanted is not False and self.distributed_helper.tp_size == 1
        config.use_cuda_graph = (False, records)
        if asked.use_async_batching is None:
            config.use_async_batching = records and config.cpu_offload_space == 0
        if asked.max_blocks_per_request is None:
            tokens = min(self.max_positions or TABLE_TOKENS, TABLE_TOKENS)
            config.max_blocks_per_request = layout.peak_blocks(tokens)
        elif asked.max_blocks_per_request:
            config.max_blocks_per_request = asked.max_blocks_per_request + 2 * layout.open_blocks

    def _layout(self) -> BlockLayout:
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return BlockLayout(heads, head_dim, head_dim, self.model.dtype)

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """Give the model the attention that reads blocks; ``stop`` gives it its own again."""
        attention.register()
        current = model.config._attn_implementation
        if current != attention.NAME:
            model.set_attn_implementation(attention.NAME)
            self._original_attn_impl = current

    def _restore_attention(self) -> None:
        if self._original_attn_impl is not None:
            self.model.set_attn_implementation(self._original_attn_impl)
            self._original_attn_impl = None

    def _create_batch_processor(self) -> Any:
        """What transformers makes, or the one there is, with int8 blocks in its cache."""
        # A pool that is made in inference mode could not be written outside of it.
        with torch.inference_mode(False), _host.making_caches_of(Int8Allocator, MemoryHandler):
            processor = super()._create_batch_processor()
        allocator = _host.allocator_of(processor)
        allocator.prompt_len = lambda request_id: _host.prompt_len(processor, request_id)
        _host.hand_stores_to_layers(processor.cache)
        _host.watch_new_tokens(processor, self.stop_strings.end)
        # A row of the table has room for the open page, too.
        width = processor.cache.max_blocks_per_request
        processor.cache.max_decode_fast_path_length = max(0, width - 2 * allocator.layout.open_blocks) * PAGE_SIZE
        return processor

    def adopt(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        workload_hints: Any = None,
    ) -> "Int8BatchingManager":
        """Take over what a call of ``generate_batch`` asks for; the model's ``init_continuous_batching`` meanwhile.

        Args:
            generation_config: how to sample, None for the manager's own. Another one than that of the call before makes
                the pool anew.
            continuous_batching_config: None, or what this manager was made with.
            workload_hints: not needed.

        Returns:
            The manager.

        Raises:
            ValueError: another config of the pool came.
            RuntimeError: another way to sample came while requests are running.
        """
        if continuous_batching_config is not None and not self._was_made_with(continuous_batching_config):
            raise ValueError(
                "int8_batching: continuous_batching_config must be given to int8_batching, got another one in a call. "
                "Leave the context and begin one with it."
            )
        with self._running:
            if not self.is_running():
                self._request_counter = 0  # generate() looks for its requests by their numbers
            self._adopt(self._own_config if generation_config is None else generation_config)
        return self

    @contextmanager
    def calling(
        self, generation_config: GenerationConfig | None, stop_strings: Any, tokenizer: Any
    ) -> Iterator[GenerationConfig]:
        """Within it, requests of this thread are of one call of ``generate_batch``.

        Args:
            generation_config: of the call, None for the manager's own.
            stop_strings: of the call, None for those of the config.
            tokenizer: of the model, None for the one that there is.

        Yields:
            The config, with the strings in it.
        """
        if tokenizer is not None:
            self.stop_strings.tokenizer = tokenizer
        config = deepcopy(self._own_config if generation_config is None else generation_config)
        if stop_strings is not None:
            config.stop_strings = stop_strings
        self._call.config = config
        try:
            yield config
        finally:
            del self._call.config

    def _check_generation(self, generation_config: GenerationConfig) -> None:
        refusals.check_generation(generation_config)
        self.stop_strings.asked(generation_config.stop_strings)

    def _adopt(self, generation_config: GenerationConfig) -> None:
        asked = with_end(generation_config)
        self._check_generation(asked)
        changed = _sampling(asked) != _sampling(self.generation_config)
        if self.is_running():
            if changed:
                raise RuntimeError(
                    "int8_batching: requests that run together must have one generation_config, got another one while "
                    "the manager runs. Stop it first, or use per_request_processors."
                )
            return
        if changed:
            self.batch_processor = None
            gc.collect()
            self._make(self.model, asked)
        self.generation_config = asked

    def _was_made_with(self, config: ContinuousBatchingConfig) -> bool:
        return bool(vars(config) == vars(self._asked))

    # How it runs

    def warmup(self) -> None:
        """Record the decoding steps, where they are recorded."""
        with self._running:
            self.switch_to_cb_friendly_attn(self.model)
            super().warmup()

    def start(self) -> None:
        """Start the loop that serves requests, unless it runs."""
        with self._running:
            if self._generation_thread is not None and not self._generation_thread.is_alive():
                self._generation_thread = None
            if not self.is_running():
                self.switch_to_cb_friendly_attn(self.model)
                super().start()

    def stop(
        self,
        block: bool = True,
        timeout: float | None = None,
        keep_for_next_session: bool = True,
        hard_stop: bool = False,
    ) -> None:
        """Stop the loop; the pool stays, and the next request starts it again.

        Args:
            block: whether to wait. It always is: the model gets its own attention back.
            timeout: seconds that requests which are still running have; None for as long as they take.
            keep_for_next_session: no matter.
            hard_stop: whether to end requests that are still running.
        """
        with self._running:
            if self._generation_thread is None:
                self._restore_attention()
                return
            try:
                super().stop(block=True, timeout=timeout, keep_for_next_session=True, hard_stop=hard_stop)
            finally:
                if self.is_running():
                    super().stop(block=True, keep_for_next_session=True, hard_stop=True)

    def destroy(self) -> None:
        """Stop the loop."""
        self.stop(hard_stop=True)

    def close(self, hard_stop: bool = False) -> None:
        """Stop the loop and give the memory of the pool back."""
        try:
            self.stop(hard_stop=hard_stop)
        finally:
            self.batch_processor = None
            self.distributed_helper.destroy_cpu_comm_group()
            gc.collect()

    def _generation_step(self) -> None:
        processor: Any = self.batch_processor
        allocator = self._allocator()
        if not _host.tokens_in_batch(processor):
            # A request of several answers waits before the last token of its prompt, and can be alone in a batch.
            allocator.forget_batch()
            return
        try:
            super()._generation_step()
        except (AttributeError, TypeError) as error:
            if any(self._steps.values()):
                raise
            raise NotImplementedError(
                f"int8_batching: the model must be one that transformers batches continuously, "
                f"{type(self.model).__name__} fails: {error}. Use generate() with a QuantizedInt8Cache."
            ) from error
        allocator.end_pass()
        self._steps[bool(processor.inputs_and_outputs.use_block_table)] += 1

    # Requests

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        *,
        stop_strings: str | list[str] | None = None,
        num_return_sequences: int | None = None,
        **logit_processor_kwargs: Any,
    ) -> str | None:
        """Queue a request, as transformers' manager does, and start the loop where it does not run.

        Args:
            input_ids: tokens of the prompt.
            request_id: its name, one that no other request has; None for a number.
            max_new_tokens: most tokens of the answer; None for what the generation config says, ``max_length`` of it
                included, and for what the model and the pool have room for where it says nothing.
            streaming: whether there is an output for each token.
            record_timestamps: whether to note when each token came.
            eos_token_id: tokens that end the answer; None for the generation config's.
            stop_strings: the answer ends with the token that completes one of them, as in ``generate``; None for the
                generation config's, an empty list for none.
            num_return_sequences: how many answers share the blocks of the prompt, None for what the generation config
                says. The further ones have outputs named ``f"{name}__child#0"`` and so on.
            logit_processor_kwargs: how to sample, with ``per_request_processors``.

        Returns:
            The name of the request.

        Raises:
            TypeError: the prompt is no list of tokens, a length no number; ``stop_strings`` are no strings.
            ValueError: a stop string is empty, or there is no tokenizer; the prompt is empty or has a token that the
                model does not know; the pool can never hold it and its answer, or the model has no positions for
                them; there is to be no answer; a request of
                this name is at work, or the name is one of a further answer. Nothing is queued. A request of
                ``add_requests`` and ``generate_batch`` whose prompt or name it is gets an output with this as its
                ``error`` instead, and the others go on.
        """
        is_one_of_many = getattr(self._call, "many", False)
        with self._running:
            if not is_one_of_many and not self.is_running():
                self._adopt(self._own_config)
        config: GenerationConfig = getattr(self._call, "config", self.generation_config)
        input_ids = refusals.tokens_of(input_ids)
        limit = self._limit_of(input_ids, config) if max_new_tokens is None else max_new_tokens
        answers = (config.num_return_sequences or 1) if num_return_sequences is None else num_return_sequences
        if strings := self.stop_strings.asked(config.stop_strings if stop_strings is None else stop_strings):
            logit_processor_kwargs[_host.STOP_STRINGS] = strings
        try:
            refusals.check_prompt(input_ids, limit, self.most_tokens, self._vocab_size)
            refusals.check_positions(self.model.config.get_text_config(), len(input_ids), limit)
            refusals.check_answers(answers)
            if request_id is not None:
                self._check_name(request_id, answers)
        except (TypeError, ValueError) as error:
            if not is_one_of_many or request_id is None:
                raise
            for name in _host.names_of_answers(request_id, answers):
                self.output_router.fail_and_deliver(_host.new_state(name, input_ids), error)
            return request_id
        with self._running:
            self.start()
            self.num_return_sequences = answers  # which transformers reads for each request
            added: str | None = super().add_request(
                input_ids=input_ids,
                request_id=request_id,
                max_new_tokens=limit,
                streaming=streaming,
                record_timestamps=record_timestamps,
                eos_token_id=eos_token_id,
                **logit_processor_kwargs,
            )
        return added

    def _check_name(self, request_id: str, answers: int) -> None:
        if _host.CHILD in request_id:
            raise ValueError(
                f"int8_batching: {_host.CHILD!r} must be in no name but those of further answers, got {request_id!r}."
            )
        for name in _host.names_of_answers(request_id, answers):
            if _host.has_request(self.batch_processor, name):
                raise ValueError(f"int8_batching: each request must have a name of its own, got {name!r} again.")

    def _limit_of(self, prompt: Sequence[int], config: GenerationConfig) -> int:
        """Most tokens of an answer whose request does not say: as ``generate`` has it, or what fits."""
        if config.max_new_tokens is not None:
            return int(config.max_new_tokens)
        if config.max_length is not None:
            return int(config.max_length) - len(prompt)
        room = self.most_tokens + 1
        return min(self.max_positions or room, room) - len(prompt)

    @property
    def _vocab_size(self) -> int:
        model: Any = self.model
        return int(model.get_input_embeddings().num_embeddings)

    def add_requests(self, inputs: list[list[int]], *args: Any, **kwargs: Any) -> list[str]:
        """Queue requests, as transformers' manager does; see ``add_request`` for what is different."""
        self._call.many = True
        try:
            added: list[str] = super().add_requests(inputs, *args, **kwargs)
            return added
        finally:
            self._call.many = False

    # What it says of itself

    @property
    def most_tokens(self) -> int:
        """Stored tokens of one request that the pool has room for: of a prompt and its answer, but for the last."""
        allocator = self._allocator()
        spare = allocator.num_blocks - 2 * allocator.layout.open_blocks
        return spare * PAGE_SIZE + PAGE_SIZE - 1 if spare >= 0 else 0

    @property
    def max_positions(self) -> int | None:
        """Tokens that the model was made for, None if its config does not say."""
        return refusals.max_positions(self.model.config.get_text_config())

    def _allocator(self) -> Int8Allocator:
        if self.batch_processor is None:
            raise RuntimeError("int8_batching: the manager must be open, it was closed at the end of its context.")
        allocator: Int8Allocator = _host.allocator_of(self.batch_processor)
        return allocator

    def report(self) -> ServingReport:
        """What the pool holds and what reads it, at this moment.

        Raises:
            RuntimeError: the manager is closed.
        """
        allocator = self._allocator()
        processor: Any = self.batch_processor
        layout, layers = allocator.layout, allocator.pages_per_block
        pool = processor.cache.pool
        free = pool.num_free_sectors * allocator.blocks_per_sector + pool.count_free_blocks(allocator.index)
        kept = len(allocator.ledger.cached_blocks)
        used = allocator.num_blocks - free - kept
        exact_block = 2 * layers * layout.num_kv_heads * PAGE_SIZE * layout.head_dim * layout.dtype.itemsize
        return ServingReport(
            blocks=allocator.num_blocks,
            blocks_used=used,
            blocks_kept=kept,
            block_nbytes=allocator.bytes_per_block,
            nbytes=processor.cache.cache_tensor.numel(),
            exact_nbytes=allocator.num_blocks * exact_block,
            tokens=allocator.num_blocks * PAGE_SIZE,
            tokens_free=(free + kept) * PAGE_SIZE,
            most_tokens=self.most_tokens,
            open_blocks=2 * layout.open_blocks,
            requests_running=len(processor.scheduler.active_requests),
            requests_waiting=len(processor.scheduler.waiting_requests) + self.input_queue.qsize(),
            dtype=str(layout.dtype).removeprefix("torch."),
            backend=allocator.backend,
            reason=allocator.reason,
            steps_decoding=self._steps[True],
            steps_mixed=self._steps[False],
            records=self.continuous_batching_config.cuda_graph_booleans[1],
        )


def with_end(config: GenerationConfig) -> GenerationConfig:
    """A copy of ``config``, in which no token that ends an answer is -1, as transformers' manager wants it.

    Raises:
        TypeError: it is no generation config.
    """
    if not isinstance(config, GenerationConfig):
        raise TypeError(f"int8_batching: generation_config must be a GenerationConfig, got {type(config).__name__}.")
    config = deepcopy(config)
    if config.eos_token_id is None:
        config.eos_token_id = -1
    return config


def _sampling(config: GenerationConfig) -> dict[str, Any]:
    """What of ``config`` the parts of a manager depend on."""
    return {name: value for name, value in config.to_dict().items() if name not in _OF_REQUESTS}
