"""What a manager says of its pool."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ServingReport:
    """What ``Int8BatchingManager.report()`` returns; ``str()`` of it is a few lines.

    Attributes:
        blocks: of 64 tokens, that requests can have.
        blocks_used: that requests at work have.
        blocks_kept: of requests that have ended, for prompts that begin alike; given away when they are needed.
        block_nbytes: bytes of a block, all layers.
        nbytes: bytes of the pool, two blocks or more that nobody gets included.
        exact_nbytes: bytes of as many blocks in the dtype of the model.
        tokens: that fit in the blocks, whole pages.
        tokens_free: that still fit, beyond what requests have; whole pages.
        most_tokens: stored tokens of one request, alone in the pool.
        open_blocks: blocks that the newest 1 to 63 tokens of a request take, which are exact.
        requests_running: requests that have blocks.
        requests_waiting: requests that have none yet.
        dtype: of the model, as "bfloat16".
        backend: what reads and writes the blocks.
        reason: why it is not the one for this device, None if it is.
        steps_decoding: forward passes with one new token for each request, by the block table.
        steps_mixed: those with prompts, or parts of prompts, among them.
        records: whether decoding steps are recorded and replayed as CUDA graphs.
    """

    blocks: int
    blocks_used: int
    blocks_kept: int
    block_nbytes: int
    nbytes: int
    exact_nbytes: int
    tokens: int
    tokens_free: int
    most_tokens: int
    open_blocks: int
    requests_running: int
    requests_waiting: int
    dtype: str
    backend: str
    reason: str | None
    steps_decoding: int
    steps_mixed: int
    records: bool

    def __str__(self) -> str:
        used = self.blocks_used / self.blocks if self.blocks else 0.0
        ratio = self.exact_nbytes / (self.blocks * self.block_nbytes) if self.blocks else 0.0
        why = "" if self.reason is None else f" ({self.reason})"
        replayed = ", replayed as CUDA graphs" if self.records else ""
        return "\n".join(
            [
                f"pool      {self.blocks} blocks of 64 tokens in int8, {self.nbytes / 2**20:,.1f} MiB; "
                f"{ratio:.2f} x the tokens of {self.dtype}",
                f"in use    {self.blocks_used} blocks ({used:.0%}) by {self.requests_running} requests, "
                f"{self.requests_waiting} waiting; {self.blocks_kept} kept for prompts that begin alike",
                f"room for  {self.tokens_free:,} of {self.tokens:,} tokens; one request at most {self.most_tokens:,}",
                f"attention reads int8 pages and up to 63 exact tokens a request, by {self.backend}{why}",
                f"passes    {self.steps_decoding:,} decoding{replayed}, {self.steps_mixed:,} with prompts",
            ]
        )
