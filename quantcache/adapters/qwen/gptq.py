"""GPTQ checkpoints (Chat-Int4, Chat-Int8) in plain torch, for where gptqmodel is not installed.

In those files the five linears of every layer are packed integers with a scale and a zero point for each group of
inputs; embedding, norms and head stay float16. With gptqmodel and optimum importable transformers loads them with
those; otherwise ``adopt`` hands them to the quantizer registered here.
"""

import importlib.util
import warnings
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantcache.layers._host import register_quantizer

METHOD: Final = "quantcache_gptq"
"""Name under which transformers knows the quantizer of this file; saved configs say "gptq"."""

SUPPORTED_BITS: Final = (4, 8)
BLOCK_ELEMENTS: Final = 1 << 25
"""Weights restored at a time, so that a layer's restored copy never exceeds about 160 MB."""


def gptqmodel_is_there() -> bool:
    """Whether transformers' own GPTQ path can run: it needs gptqmodel and optimum, and both to be importable.

    Importing them takes seconds; they are only asked for when a GPTQ checkpoint is loaded, which needs them then.
    """
    if any(importlib.util.find_spec(name) is None for name in ("gptqmodel", "optimum")):
        return False
    try:
        importlib.import_module("optimum.gptq")
    except Exception as error:  # a package of theirs that is missing, or a torch they do not know
        warnings.warn(
            f"adapters.qwen: gptqmodel is installed but cannot be imported ({type(error).__name__}: {error}), so that "
            "GPTQ layers run in plain torch, which is slower.",
            stacklevel=2,
        )
        return False
    return True


def adopt(quantization_config: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's ``quantization_config``, directed to this file where it is GPTQ and gptqmodel is not there.

    Raises:
        NotImplementedError: bits or a packing that only gptqmodel reads.
    """
    if quantization_config.get("quant_method") != "gptq" or gptqmodel_is_there():
        return quantization_config
    GPTQFallbackConfig(**quantization_config)  # refuses here what it cannot load, before any weight is read
    return {**quantization_config, "quant_method": METHOD}


class GPTQFallbackConfig(QuantizationConfigMixin):
    """``quantization_config`` of a GPTQ checkpoint, every other key of it kept as it came.

    Args:
        bits: 4 or 8.
        group_size: inputs that share a scale; -1 for all of them.
        checkpoint_format: "gptq", whose zero points are stored minus one, or "gptq_v2", whose are not.
        kwargs: the file's other keys.

    Raises:
        NotImplementedError: other bits, or another format.
    """

    def __init__(
        self, bits: int = 4, group_size: int = 128, checkpoint_format: str | None = None, **kwargs: Any
    ) -> None:
        checkpoint_format = checkpoint_format or kwargs.get("format") or "gptq"
        if bits not in SUPPORTED_BITS or checkpoint_format not in ("gptq", "gptq_v2"):
            raise NotImplementedError(
                f"adapters.qwen: without gptqmodel a GPTQ checkpoint must have {' or '.join(map(str, SUPPORTED_BITS))} "
                f'bits in the format "gptq" or "gptq_v2", got {bits} bits in {checkpoint_format!r}. '
                "Install gptqmodel and optimum."
            )
        self.bits, self.group_size, self.checkpoint_format = bits, group_size, checkpoint_format
        vars(self).update(kwargs)
        self.quant_method = METHOD  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """As the file had it, so that a saved checkpoint is a GPTQ checkpoint to everyone."""
        return {**vars(self), "quant_method": "gptq"}


class GPTQLinear(nn.Module):
    """A linear layer over packed integers: ``weight[i, o] = scales[g, o] * (q[i, o] - zero[g, o])``, g the group of i.

    Buffers have the files' names and layout: ``qweight`` int32 (in_features * bits / 32, out_features), lowest bits
    first; ``qzeros`` int32 (groups, out_features * bits / 32); ``scales`` float16 (groups, out_features); ``g_idx``
    int32 (in_features,); ``bias`` float16 (out_features,), zeros where the float model has none, as in the files.

    Args:
        in_features: a multiple of 32 / bits.
        out_features: a multiple of 32 / bits.
        config: bits, group size and format.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bias: Tensor

    def __init__(self, in_features: int, out_features: int, config: GPTQFallbackConfig) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, config.bits
        self.group_size = in_features if config.group_size == -1 else config.group_size
        self.zero_shift = 1 if config.checkpoint_format == "gptq" else 0
        groups, word = -(-in_features // self.group_size), 32 // config.bits
        self.register_buffer("qweight", torch.zeros(in_features // word, out_features, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(groups, out_features // word, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=torch.float16))
        self.register_buffer("g_idx", torch.arange(in_features, dtype=torch.int32) // self.group_size)
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float16))
        # What the first call with some weights finds out; the zero point is one number in the symmetric files.
        self._zero_point: int | None = None
        self._in_order: bool | None = None

    def _load_from_state_dict(self, *args: Any) -> None:
        """See ``nn.Module``; other weights are looked at again."""
        super()._load_from_state_dict(*args)
        self._zero_point = self._in_order = None

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}"

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features) in the dtype of ``hidden_states``."""
        # Whole words of zero points, hence multiples of 8 columns.
        columns = max(8, BLOCK_ELEMENTS // self.in_features // 8 * 8)
        starts, dtype = range(0, self.out_features, columns), hidden_states.dtype
        blocks = [hidden_states @ self.restore(at, min(at + columns, self.out_features), dtype) for at in starts]
        output = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)
        return output + self.bias.to(output.dtype)

    def restore(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Columns ``start`` to ``stop`` of the weight, (in_features, stop - start); both are multiples of 8.

        Half-width dtypes are computed in the scales' float16, in which the integers are exact, and rounded once.
        """
        compute = dtype if dtype.itemsize > 2 else self.scales.dtype
        if self._in_order is None:
            self._look_at_the_layout()
        scales = self.scales[:, start:stop].to(compute)
        zeros = self._zeros(start, stop).to(compute) if self._zero_point is None else self._zero_point
        # (words, columns, codes in a word) to (words, codes, columns), which is the order of the inputs.
        codes = self._unpacked(self.qweight[:, start:stop]).transpose(1, 2)
        codes = codes.to(compute, memory_format=torch.contiguous_format).flatten(0, 1)
        if self._in_order:
            grouped = codes.view(-1, self.group_size, stop - start)
            grouped.sub_(zeros if isinstance(zeros, int) else zeros[:, None]).mul_(scales[:, None])
        else:
            group = self.g_idx.long()
            codes.sub_(zeros if isinstance(zeros, int) else zeros[group]).mul_(scales[group])
        return codes.to(dtype)

    def _look_at_the_layout(self) -> None:
        zeros = self._zeros(0, self.out_features)
        first = int(zeros[0, 0])
        self._zero_point = first if bool((zeros == first).all()) else None
        expected = torch.arange(self.in_features, device=self.g_idx.device) // self.group_size
        self._in_order = self.in_features % self.group_size == 0 and torch.equal(self.g_idx.long(), expected)

    def _zeros(self, start: int, stop: int) -> Tensor:
        """(groups, stop - start), int16."""
        word = 32 // self.bits
        return self._unpacked(self.qzeros[:, start // word : stop // word]).flatten(1).to(torch.int16) + self.zero_shift

    def _unpacked(self, words: Tensor) -> Tensor:
        """The codes of int32 ``words`` (rows, columns), uint8 (rows, columns, 32 / bits), lowest bits first."""
        octets = words.contiguous().view(torch.uint8).view(*words.shape, 4)
        return octets if self.bits == 8 else torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)


class GPTQFallbackQuantizer(HfQuantizer):
    """Puts ``GPTQLinear`` in place of the layers' linears before the weights are read."""

    requires_calibration = True
    quantization_config: GPTQFallbackConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and ".h." in f".{name}":
                with torch.device("meta"):
                    packed = GPTQLinear(module.in_features, module.out_features, self.quantization_config)
                model.set_submodule(name, packed.requires_grad_(False))
        # No style of the host cuts packed words, so each rank of a tensor-parallel group holds the layers whole.
        plan = dict(model.tp_plan)  # type: ignore[arg-type]
        model.tp_plan = {name: style for name, style in plan.items() if ".h." not in name}  # type: ignore[assignment]

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Buffers are saved under the files' names."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The packed weights have no gradient."""
        return False


def register() -> None:
    """Make the quantizer known to transformers; done when the package is imported, harmless when repeated."""
    register_quantizer(METHOD, GPTQFallbackConfig, GPTQFallbackQuantizer)
