"""What the platform is fast at: the compute dtype and, on a CPU, compiler flags and the allocator.

XLA's CPU backend is several times slower than oneDNN at training, and emulates bfloat16, unless told
to call oneDNN. An XLA that does not know a flag aborts the process, so flags are set by version.
"""

import ctypes
import glob
import importlib.metadata
import importlib.util
import logging
import os
import pathlib
import platform

import jax

_LOG = logging.getLogger(__name__)

_ONEDNN_FLAGS = {
    "--xla_cpu_experimental_onednn_custom_call": "true",
    "--xla_cpu_experimental_ynn_fusion_type": "",
}
_FIRST_ONEDNN_JAXLIB = (0, 11)

# What accelerators look like to Linux: TPUs of either driver, NVIDIA and AMD GPUs.
_ACCELERATOR_DEVICES = ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia*", "/dev/kfd")

# Of malloc.h: parameter, value. No block outside the heap, nothing given back.
_MALLOC_SETTINGS = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1)}


def _jaxlib_version() -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2])


def has_library_flags() -> bool:
    """Returns whether this XLA lets one say what library multiplies matrices on a CPU."""
    return _jaxlib_version() >= _FIRST_ONEDNN_JAXLIB


def _has_amx() -> bool:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    return cpuinfo.is_file() and " amx_bf16" in cpuinfo.read_text()


def _is_onednn_on() -> bool:
    return "onednn_custom_call=true" in os.environ.get("XLA_FLAGS", "")


def set_flags() -> None:
    """Adds the CPU compiler flags to XLA_FLAGS; call it before JAX first touches a device.

    Flags that the user has set stay as they are. On a machine with an accelerator they do no harm:
    they concern the CPU backend alone.
    """
    if not has_library_flags():
        return
    given = os.environ.get("XLA_FLAGS", "")
    missing = [f"{name}={value}" for name, value in _ONEDNN_FLAGS.items() if name not in given]
    os.environ["XLA_FLAGS"] = " ".join(filter(None, [given, *missing]))


def _may_have_accelerator() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms != "cpu"
    return any(glob.glob(pattern) for pattern in _ACCELERATOR_DEVICES)


def skip_absent_tpu() -> bool:
    """Keeps JAX from looking for TPUs where libtpu is installed but no accelerator is.

    libtpu is there to compile for TPUs (`aot`); as a backend it would complain at length before JAX
    settles for the CPU. Call it before JAX touches a device; returns whether it did something.
    """
    is_chosen = bool(jax.config.jax_platforms)
    has_libtpu = importlib.util.find_spec("libtpu") is not None
    if is_chosen or not has_libtpu or _may_have_accelerator():
        return False
    jax.config.update("jax_platforms", "cpu")
    return True


def keep_freed_memory() -> bool:
    """Makes a process on a CPU keep the memory that its steps free; returns whether it does.

    There each step's temporary buffers are malloc's, and glibc gives large ones back to the system
    when the step ends: the next one pays for every page anew. Only the
    main thread's heap can keep them, so programs are run by the thread that calls them: call this
    before JAX touches a device. Where there may be an accelerator nothing is changed, nor where the
    C library is not glibc.
    """
    if _may_have_accelerator() or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    refused = [name for name, setting in _MALLOC_SETTINGS.items() if not libc.mallopt(*setting)]
    if refused:
        _LOG.warning("malloc refuses %s; steps may be slower", ", ".join(refused))
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return not refused


def compute_dtype() -> str:
    """Returns bfloat16 on accelerators and on CPUs with matrix units in reach, else float32."""
    if jax.default_backend() == "cpu" and not (_is_onednn_on() and _has_amx()):
        return "float32"
    return "bfloat16"


def is_scan_fast() -> bool:
    """Returns whether layers are better scanned than unrolled.

    A scan compiles in a time that does not grow with depth and costs an accelerator nothing. On a
    CPU it takes each layer's weights out of the stack by copying, and its gradients back: a small
    model trains at 0.6 of the speed.
    """
    return jax.default_backend() != "cpu"


def describe() -> str:
    """Returns one line on the devices, for the log."""
    devices = jax.devices()
    flags = os.environ.get("XLA_FLAGS", "")
    is_cpu = jax.default_backend() == "cpu"
    keeps = is_cpu and not jax.config.read("jax_cpu_enable_async_dispatch")
    return (
        f"{len(devices)} x {devices[0].device_kind} on {jax.process_count()} host(s),"
        f" compute in {compute_dtype()} unless set"
        + (", freed memory is kept, programs run on the calling thread" if keeps else "")
        + (f", XLA_FLAGS: {flags}" if flags else "")
    )


def enable_compilation_cache(path: str) -> None:
    """Keeps compiled programs under `path` (empty: not at all), for the next start.

    Programs with oneDNN calls cannot be serialised (jaxlib 0.12 runs out of memory trying), so a CPU
    that uses them compiles at each start.
    """
    is_onednn_cpu = jax.default_backend() == "cpu" and _is_onednn_on()
    if path and not is_onednn_cpu:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(path).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
