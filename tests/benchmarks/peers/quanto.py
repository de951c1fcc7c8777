"""quanto's kernel for its cache, built without those of its layers."""

from pathlib import Path


def build_unpack() -> None:
    """Build the one CUDA kernel that quanto's cache calls, some 20 s; a later call finds it loaded.

    quanto itself would build its matrix products with it at the first read, for minutes.

    Raises:
        RuntimeError: it cannot be built.
    """
    from optimum.quanto.library.extensions import get_extension
    from torch.utils.cpp_extension import load_inline

    extension = get_extension("quanto_cuda")
    if extension._lib is None:
        extension._lib = load_inline(
            "quanto_unpack",
            cpp_sources="torch::Tensor unpack(torch::Tensor &t, int bits);",
            cuda_sources=Path(extension.sources[0]).with_name("unpack.cu").read_text(encoding="utf-8"),
            functions=["unpack"],
        )
