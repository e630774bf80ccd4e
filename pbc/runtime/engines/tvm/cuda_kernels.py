"""The CUDA kernels inside an artifact: machine code for one GPU, and the source behind it.

TVM leaves one text per CUDA module in the libraries it exports, and hands it to a function of our
choice when a runtime loads the library. The compiler puts both forms of the kernels into that
text; here a board takes the machine code, or where its driver refuses that, compiles the source
with its own NVRTC. As text the pack is also C that says what to do to whoever compiles it.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from pbc.errors import PbcError
from pbc.runtime.engines.tvm.nvrtc import Nvrtc

COMPILE_CALLBACK = "tvm_callback_cuda_compile"
"""The global function that a TVM runtime asks for the machine code of a CUDA module's text."""

_ELSEWHERE = "run it where such a GPU is, or compile for this machine (pbc targets)"
_WARNING = '#error "packed kernels: load this library with the tvm engine of pbc"\n'
_PACK = re.compile(rb"//pbc-cuda-kernels (\{[^\n]*\})\n//([A-Za-z0-9+/=]*)\n//([A-Za-z0-9+/=]*)\n")

# The driver's attributes and the one flag that are read here, as cuda.h numbers them.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


@dataclass(frozen=True)
class Kernels:
    """The kernels of one CUDA module, compiled for `sm`."""

    sm: int
    cubin: bytes
    source: str

    def pack(self) -> str:
        """Return both forms as one text for an artifact."""
        facts = {"sm": self.sm, "sha256": _digest(self.cubin, self.source.encode())}
        forms = (
            base64.b64encode(zlib.compress(form, 9)).decode()
            for form in (self.cubin, self.source.encode())
        )
        return (
            _WARNING
            + f"//pbc-cuda-kernels {json.dumps(facts)}\n"
            + "".join(f"//{form}\n" for form in forms)
        )


def unpack(content: bytes) -> Iterator[Kernels]:
    """Return the packed kernels found anywhere in these bytes: a text, or a whole library."""
    for match in _PACK.finditer(content):
        try:
            facts = json.loads(match[1])
            cubin, source = (zlib.decompress(base64.b64decode(match[form])) for form in (2, 3))
            intact = facts["sha256"] == _digest(cubin, source)
        except (ValueError, KeyError, zlib.error):
            intact = False
        if not intact:
            raise PbcError("the CUDA kernels of this artifact are damaged; copy it here again")
        yield Kernels(facts["sm"], cubin, source.decode())


def _digest(cubin: bytes, source: bytes) -> str:
    return hashlib.sha256(hashlib.sha256(cubin).digest() + source).hexdigest()


class Driver(Protocol):
    """The questions to a GPU's driver before kernels are given to it."""

    def sm(self) -> int:
        """The architecture of the GPU: 62 is a Jetson TX2."""

    def refusal(self, image: bytes) -> str | None:
        """The driver's word for why it cannot load this machine code; None where it can."""


class CudaDriver:
    """The driver of this machine's first GPU, asked through its C interface."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise PbcError(
                f"this machine has no driver of NVIDIA's ({error}); {_ELSEWHERE}"
            ) from error
        self._device = ctypes.c_int()
        for name, *arguments in (("cuInit", 0), ("cuDeviceGet", ctypes.byref(self._device), 0)):
            code = getattr(self._library, name)(*arguments)
            if code:
                raise PbcError(f"the driver finds none ({self._name(code)}); {_ELSEWHERE}")

    def sm(self) -> int:
        """Return the architecture of the GPU."""
        parts = []
        for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
            value = ctypes.c_int()
            self._library.cuDeviceGetAttribute(ctypes.byref(value), attribute, self._device)
            parts.append(value.value)
        return parts[0] * 10 + parts[1]

    def refusal(self, image: bytes) -> str | None:
        """Load the image for a moment, in the context that the TVM runtime will use too."""
        context, module = ctypes.c_void_p(), ctypes.c_void_p()
        code = self._library.cuDevicePrimaryCtxRetain(ctypes.byref(context), self._device)
        if code:
            raise PbcError(f"the CUDA driver fails: {self._name(code)} from its context")
        self._library.cuCtxPushCurrent_v2(context)
        try:
            code = self._library.cuModuleLoadData(ctypes.byref(module), image)
            if not code:
                self._library.cuModuleUnload(module)
        finally:
            self._library.cuCtxPopCurrent_v2(ctypes.byref(context))
            self._library.cuDevicePrimaryCtxRelease(self._device)
        return self._name(code) if code else None

    def _name(self, code: int) -> str:
        text = ctypes.c_char_p()
        self._library.cuGetErrorName(code, ctypes.byref(text))
        return (text.value or b"").decode() or f"error {code}"


def loadable(text: str, driver: Driver) -> bytes:
    """Return what the driver loads of a CUDA module's text.

    Machine code where the driver takes it. Otherwise the source compiled here, which takes
    seconds, and an NVRTC of the CUDA that the driver belongs to.
    """
    packed = next(unpack(text.encode()), None)
    if packed is None:
        raise PbcError("this library holds CUDA kernels that were never compiled; compile it again")
    refusal = driver.refusal(packed.cubin)
    if refusal is None:
        return packed.cubin
    try:
        return Nvrtc.load(driver.sm()).loadable(packed.source, driver.sm())
    except PbcError as error:
        raise PbcError(
            f"this GPU, sm_{driver.sm()}, refuses the kernels compiled for sm_{packed.sm} "
            f"({refusal}), and their source cannot be compiled here: {error}"
        ) from error


def runs_on(own: int, built: int) -> bool:
    """Whether a GPU runs machine code of an architecture: its own, or an older one of its kind."""
    return own // 10 == built // 10 and own >= built


def install(driver: Driver) -> None:
    """Have every CUDA module that a TVM runtime loads from now on ask `loadable`."""
    import tvm_ffi

    def kernels(text: str) -> bytes:
        return loadable(text, driver)

    tvm_ffi.register_global_func(COMPILE_CALLBACK, kernels, override=True)
