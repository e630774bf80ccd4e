"""Have TVM's CUDA modules hold machine code, built where there is no GPU.

Left alone, TVM puts CUDA source into the library it exports and compiles it when a board loads it,
so that a build proves nothing about the kernels, and the board needs a compiler. Here the source
goes through NVRTC while TVM builds; what the exported library then holds are the kernels of
`pbc.runtime.engines.tvm.cuda_kernels`: machine code first, the source as the fallback.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tvm
import tvm_ffi
from tvm import relax

from pbc.errors import PbcError
from pbc.runtime.engines.tvm.cuda_kernels import Kernels, unpack
from pbc.runtime.engines.tvm.nvrtc import Nvrtc
from pbc.targets.tvm.cuda import cubin_elf
from pbc.targets.tvm.schedule_attributes import functions, is_scheduled

_POSTPROCESS_CALLBACK = "tvm_callback_cuda_postproc"
_KEEP_TEXT_VARIABLE = "TVM_COMPILE_FORCE_FALLBACK"

_HEX_FLOAT = re.compile(r"0x[0-9a-f.]+p[+-]?\d+")
_COMMENT = re.compile(r"/\*.*?\*/")
_KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\(')
_SOURCE_ALONE = b'extern "C" __global__ void'


def compile_kernels(source: str, sm: int) -> Kernels:
    """Compile a CUDA module's source for one architecture, and check what came out.

    Every kernel of the source must be there, for this architecture, within its limits for a block.
    """
    plain = _plain(source)
    made = Kernels(sm, Nvrtc.load(sm).cubin(plain, sm), plain)
    _check(made, "NVRTC's result")
    return made


def gpu_target(sm: int, host: tvm.target.Target) -> tvm.target.Target:
    """Return TVM's description of a GPU of this architecture, beside this host's CPU.

    Fails early where no NVRTC compiles for it. The limits are what every such GPU has.
    """
    Nvrtc.load(sm)
    limits = cubin_elf.Limits.of(sm)
    return tvm.target.Target(
        {
            "kind": "cuda",
            "arch": f"sm_{sm}",
            "max_threads_per_block": limits.threads,
            "max_shared_memory_per_block": 48 * 1024,
            "thread_warp_size": 32,
        },
        host=host,
    )


def require_scheduled(module: tvm.IRModule) -> None:
    """Refuse a module with a function that has no schedule for a GPU.

    TVM would build it for the host, which cannot read the GPU's memory.
    """
    left = sorted(name for name, found in functions(module).items() if not is_scheduled(found))
    if left:
        raise PbcError(
            f"no installed schedule of the group pbc.tvm_schedules schedules {left[0]} for a GPU"
        )


@contextmanager
def embedding(sm: int) -> Iterator[None]:
    """Have what TVM builds for `cuda` inside the block hold kernels for this architecture.

    The hook is TVM's own, and one for the whole process: no two threads may build at once.
    """
    failures: list[PbcError] = []

    def pack(source: str, _target: object) -> str:
        try:
            return compile_kernels(source, sm).pack()
        except PbcError as error:  # TVM would wrap it in its own kind, with its own stack
            failures.append(error)
            raise

    hook = tvm_ffi.get_global_func(_POSTPROCESS_CALLBACK, allow_missing=True)
    tvm_ffi.register_global_func(_POSTPROCESS_CALLBACK, pack, override=True)
    try:
        with source_kept():
            yield
    except Exception:
        if failures:
            raise failures[0] from None
        raise
    finally:
        tvm_ffi.remove_global_func(_POSTPROCESS_CALLBACK)
        if hook is not None:
            tvm_ffi.register_global_func(_POSTPROCESS_CALLBACK, hook)


@contextmanager
def source_kept() -> Iterator[None]:
    """Have TVM compile no CUDA source by itself, not even where a GPU is at hand to do it for."""
    before = os.environ.get(_KEEP_TEXT_VARIABLE)
    os.environ[_KEEP_TEXT_VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_KEEP_TEXT_VARIABLE]
        else:
            os.environ[_KEEP_TEXT_VARIABLE] = before


def build_cuda(
    module: tvm.IRModule,
    target: tvm.target.Target,
    sm: int,
    relax_pipeline: tvm.transform.Pass | str = "default",
) -> tvm.runtime.Executable:
    """Build a relax module for the GPU, as `relax.build` does, with its kernels compiled.

    `target` is of the kind `cuda` with its host; the module's functions are scheduled already, or
    the pipeline does it. Once the result is exported, `require` says whether it may be called
    compiled.
    """
    with embedding(sm):
        return relax.build(module, target, relax_pipeline=relax_pipeline)


def inspect(artifact: Path) -> list[Kernels]:
    """Return the compiled kernels that an exported library holds; empty for one without any.

    A library that holds CUDA source alone is refused: nothing has ever compiled it.
    """
    content = artifact.read_bytes()
    if _SOURCE_ALONE in content:
        raise PbcError(
            f"{artifact.name} holds CUDA source that was never compiled; "
            f"build it with pbc.targets.tvm.cuda.cubin.build_cuda"
        )
    found = list(unpack(content))
    for kernels in found:
        _check(kernels, artifact.name)
    return found


def require(artifact: Path, sm: int) -> list[Kernels]:
    """Return an exported library's kernels, of which there must be some, all for this `sm`."""
    found = inspect(artifact)
    if not found:
        raise PbcError(f"{artifact.name} holds no CUDA kernels")
    for kernels in found:
        if kernels.sm != sm:
            raise PbcError(f"{artifact.name} holds kernels for sm_{kernels.sm}, not sm_{sm}")
    return found


def _plain(source: str) -> str:
    """Write the source in the C++14 that the compilers of old boards read.

    Hexadecimal floats are C++17. The comments repeat their values.
    """
    decimal = _HEX_FLOAT.sub(lambda match: f"{float.fromhex(match[0]):.17e}", source)
    return _COMMENT.sub("", decimal)


def _check(kernels: Kernels, origin: str) -> None:
    architecture = cubin_elf.architecture(kernels.cubin)
    if architecture != kernels.sm:
        raise PbcError(f"{origin} is machine code for sm_{architecture}, not sm_{kernels.sm}")
    resources = cubin_elf.kernels(kernels.cubin)
    missing = sorted(set(_KERNEL.findall(kernels.source)) - resources.keys())
    if missing:
        raise PbcError(f"{origin} lacks the kernel {missing[0]}")
    limits = cubin_elf.Limits.of(kernels.sm)
    for name, needed in resources.items():
        excess = limits.exceeded_by(needed)
        if excess:
            raise PbcError(f"{origin}: no block of sm_{kernels.sm} holds {name}: {excess}")
