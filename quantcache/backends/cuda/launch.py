"""What every CUDA kernel here needs: the device, a build for it, and a launch with one packed structure."""

import ctypes
import functools
import logging
import struct
import threading
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from quantcache.backends import prebuilt
from quantcache.backends.cuda import nvrtc

logger = logging.getLogger("quantcache")

DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Element types that the kernels take, and their numbers in the sources."""

MASK_DTYPES: Final = {**DTYPES, torch.bool: 3}
"""Element types of masks likewise."""


NO_BLOCK_TABLE: Final = (0,) * 6
"""A block table of a call that reads none."""

MAX_GRID: Final = 65535
"""CTAs that a grid takes in its second axis and in its third; in the first 2**31 - 1, which no call here reaches."""


def folded(count: int) -> tuple[int, int]:
    """Second and third axis of a grid for ``count`` CTAs, and a few more, which must find out that they are."""
    layers = -(-count // MAX_GRID)
    return -(-count // layers), layers


class Kernel(NamedTuple):
    """A kernel ready to be launched on one device."""

    function: Any
    threads: int
    shared_bytes: int


class Gpu(NamedTuple):
    """What is asked of a GPU once."""

    arch: str
    processors: int
    shared_per_processor: int
    shared_per_block: int
    driver: int = 13000

    @property
    def begins_early(self) -> bool:
        """Whether a kernel can begin while the one before it runs, in a graph as well.

        From compute capability 9.0 on, and with a driver of CUDA 12.3: an older one refuses to record such a launch.
        """
        return int(self.arch.removeprefix("sm_")) >= 90 and self.driver >= 12030


@functools.cache
def gpu(index: int) -> Gpu:
    """The GPU ``index``."""
    from cuda.bindings import driver

    properties = torch.cuda.get_device_properties(index)
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    return Gpu(
        f"sm_{properties.major}{properties.minor}",
        properties.multi_processor_count,
        properties.shared_memory_per_multiprocessor,
        _check(driver.cuDeviceGetAttribute(attribute, index)),
        _check(driver.cuDriverGetVersion()),
    )


def readable(states: Tensor) -> tuple[Tensor, int, int, int, int]:
    """``states``, copied if the kernels could not read four elements at once; its address and strides but the last."""
    batch, heads, tokens, last = states.stride()
    address = states.data_ptr()
    if last != 1 or (batch | heads | tokens) & 3 or address & 15:
        states = states.clone(memory_format=torch.contiguous_format)
        batch, heads, tokens, _ = states.stride()
        address = states.data_ptr()
    return states, address, batch, heads, tokens


def load_kernel(
    source: str, macros: nvrtc.Macros, name: str, index: int, threads: int, shared_bytes: int, arch: str | None = None
) -> Kernel:
    """The kernel ``name`` of a source for the GPU ``index``, built if need be, for its ``arch`` if None."""
    from cuda.bindings import driver

    function = _check(driver.cuLibraryGetKernel(_library(source, macros, arch or gpu(index).arch), name.encode()))
    if shared_bytes:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuKernelSetAttribute(attribute, shared_bytes, function, index))
    return Kernel(driver.CUfunction(int(function)), threads, shared_bytes)


@functools.cache
def reads_wheel() -> bool:
    """Whether the driver loads the wheel's kernels: one of an older CUDA than the NVRTC that built them may not.

    What NVRTC builds here it does load, since both are those that torch runs with.
    """
    built_by = prebuilt.index().nvrtc
    if not built_by:
        return False
    try:
        from cuda.bindings import driver
    except ImportError:
        return False
    version: int = _check(driver.cuDriverGetVersion())
    return version // 1000 >= int(built_by.partition(".")[0])


@functools.cache
def _library(source: str, macros: nvrtc.Macros, arch: str) -> Any:
    """The kernels of a source, for every device of ``arch``: the wheel's, or built."""
    from cuda.bindings import driver

    def load(code: bytes) -> tuple[Any, ...]:
        loaded: tuple[Any, ...] = driver.cuLibraryLoadData(code, None, None, 0, None, None, 0)
        return loaded

    built = nvrtc.prebuilt_cubin(source, macros, arch) if reads_wheel() else None
    if built is not None:
        status, library = load(built)
        if not int(status):
            return library
        logger.warning("quantcache: %s of the wheel is not used: the driver returned %r.", source, status)
    return _check(load(nvrtc.cubin(source, macros, arch)))


MAX_ARGUMENTS: Final = 4096
"""Bytes that every GPU takes with a launch."""


class _Launches(threading.local):
    """Memory for the arguments of a launch, one for each thread; the driver copies them before it returns."""

    def __init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(MAX_ARGUMENTS)
        self.pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self.buffer))
        self.address = ctypes.addressof(self.pointers)

    @functools.cached_property
    def launch(self) -> Any:
        """The driver's function."""
        return _driver_in_context().cuLaunchKernel

    @functools.cached_property
    def early(self) -> Any:
        """What ``launch`` needs for a kernel that begins while the one before it runs."""
        driver = _driver_in_context()
        attribute, config = driver.CUlaunchAttribute(), driver.CUlaunchConfig()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
        config.blockDimY = config.blockDimZ = 1
        return driver.cuLaunchKernelEx, config, driver.CUstream


def _driver_in_context() -> Any:
    """The driver's module, once this thread has a context: in a new one torch may not have asked for any yet."""
    from cuda.bindings import driver

    if not int(_check(driver.cuCtxGetCurrent())):
        device = _check(driver.cuDeviceGet(torch._C._cuda_getDevice()))
        _check(driver.cuCtxSetCurrent(_check(driver.cuDevicePrimaryCtxRetain(device))))
    return driver


_launches: Final = _Launches()


current_stream: Final[Callable[[int], int]] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)
"""The current stream of a device; torch's own generated code asks for it so, in a tenth of the public call's time."""


def launch(
    kernel: Kernel,
    grid: tuple[int, int, int],
    index: int,
    form: struct.Struct,
    *values: Any,
    begins_early: bool = False,
) -> None:
    """Queue ``kernel`` with the structure of ``values`` on the current stream of device ``index``.

    Args:
        kernel: what is launched.
        grid: its CTAs.
        index: of the device.
        form: of the structure.
        values: in it.
        begins_early: whether it may begin while the kernel queued before it runs, where that one lets it; what it reads
            of that one it then has to wait for itself.
    """
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            launch(kernel, grid, index, form, *values, begins_early=begins_early)
        return
    launches = _launches
    form.pack_into(launches.buffer, 0, *values)
    x, y, z = grid
    if begins_early:
        launch_ex, config, stream = launches.early
        config.gridDimX, config.gridDimY, config.gridDimZ, config.blockDimX = x, y, z, kernel.threads
        config.sharedMemBytes, config.hStream = kernel.shared_bytes, stream(current_stream(index))
        _check(launch_ex(config, kernel.function, launches.address, 0))
        return
    (status,) = launches.launch(
        kernel.function, x, y, z, kernel.threads, 1, 1, kernel.shared_bytes, current_stream(index), launches.address, 0
    )
    if status:
        _check((status,))


def _check(result: tuple[Any, ...]) -> Any:
    """What a call of the driver returned besides its status."""
    if int(result[0]):
        raise RuntimeError(f"quantcache: the CUDA driver returned {result[0]!r}.")
    return result[1] if len(result) > 1 else None
