"""CUDA C to machine code through NVRTC, wherever its library is found.

NVRTC needs no GPU, so the compiler uses it for boards that are elsewhere; a board has its own as
part of CUDA, and uses it for kernels whose machine code its driver refuses. The C interface is
called directly: it has not changed since CUDA 7, and a board needs no Python package for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pbc.errors import PbcError
from pbc.util.extras import install

LIBRARY_VARIABLE = "PBC_NVRTC"
"""The environment variable that names the libnvrtc.so to use before any other."""

# As a wheel or a CUDA installation names it; in neither is there more than one.
_SONAMES = (
    "libnvrtc.so.13",
    "libnvrtc.so.12",
    "libnvrtc.so.11.2",
    "libnvrtc.so.10.2",
    "libnvrtc.so",
)
_WHEEL_LIBRARIES = ("cuda_nvrtc/lib", "cu*/lib")  # CUDA 12's, and since 13
_CUDA_FOLDERS = ("/usr/local/cuda/lib64", "/usr/local/cuda/targets/aarch64-linux/lib")
_HEADER_FOLDERS = ("/usr/local/cuda/include", "/usr/local/cuda/targets/aarch64-linux/include")
_FIRST_WITH_CUBINS = (11, 2)
_DIALECT = "--std=c++14"  # the newest that CUDA 10.2 has

_CSTDINT = """\
#pragma once
namespace cuda { namespace std {
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
} }
"""

_TYPE_TRAITS = """\
#pragma once
namespace cuda { namespace std {
template <bool V> struct bool_constant { static constexpr bool value = V; };
template <class A, class B> struct is_same : bool_constant<false> {};
template <class A> struct is_same<A, A> : bool_constant<true> {};
template <class A, class B> constexpr bool is_same_v = is_same<A, B>::value;
template <class T> struct remove_cv { typedef T type; };
template <class T> struct remove_cv<const T> { typedef T type; };
template <class T> struct remove_cv<volatile T> { typedef T type; };
template <class T> struct remove_cv<const volatile T> { typedef T type; };
template <class T> struct is_floating_point
    : bool_constant<is_same_v<typename remove_cv<T>::type, float> ||
                    is_same_v<typename remove_cv<T>::type, double>> {};
template <class T, class U = typename remove_cv<T>::type> struct is_integral
    : bool_constant<is_same_v<U, bool> || is_same_v<U, char> || is_same_v<U, signed char> ||
                    is_same_v<U, unsigned char> || is_same_v<U, short> ||
                    is_same_v<U, unsigned short> || is_same_v<U, int> ||
                    is_same_v<U, unsigned int> || is_same_v<U, long> ||
                    is_same_v<U, unsigned long> || is_same_v<U, long long> ||
                    is_same_v<U, unsigned long long>> {};
template <class T, bool = is_integral<T>::value || is_floating_point<T>::value>
struct is_signed : bool_constant<(T(-1) < T(0))> {};
template <class T> struct is_signed<T, false> : bool_constant<false> {};
template <class T, bool = is_integral<T>::value>
struct is_unsigned : bool_constant<!(T(-1) < T(0))> {};
template <class T> struct is_unsigned<T, false> : bool_constant<false> {};
template <bool C, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { typedef T type; };
template <bool C, class A, class B> struct conditional { typedef A type; };
template <class A, class B> struct conditional<false, A, B> { typedef B type; };
} }
"""

_MATH_CONSTANTS = """\
#pragma once
#define CUDART_INF_F __int_as_float(0x7f800000)
#define CUDART_NAN_F __int_as_float(0x7fffffff)
#define CUDART_INF __longlong_as_double(0x7ff0000000000000LL)
#define CUDART_NAN __longlong_as_double(0x7fffffffffffffffLL)
"""

# What TVM's kernels include under NVRTC. CUDA 10.2, which is all that some boards have, lacks
# the first two, and elsewhere they are in packages of their own.
_HEADERS = {
    "cuda/std/cstdint": _CSTDINT,
    "cuda/std/type_traits": _TYPE_TRAITS,
    "math_constants.h": _MATH_CONSTANTS,
}


@dataclass(frozen=True)
class Nvrtc:
    """One loaded NVRTC library."""

    library: ctypes.CDLL
    version: tuple[int, int]

    @classmethod
    def load(cls, sm: int) -> Nvrtc:
        """Load an NVRTC that knows this architecture: each CUDA drops old ones and adds new ones.

        It is the library that `PBC_NVRTC` names, a wheel's, or the one of the installed CUDA.
        """
        named = os.environ.get(LIBRARY_VARIABLE)
        known = {}
        for nvrtc in [cls._open(named)] if named else _installed(cls._open):
            architectures = nvrtc.architectures()
            if sm in architectures or not nvrtc.makes_cubins:
                return nvrtc
            known[nvrtc.words] = f"{nvrtc.words} knows {', '.join(map(str, architectures))}"
        if not known:
            raise PbcError(
                f"no NVRTC found to compile CUDA kernels with: {install('cuda')}, "
                f"or let {LIBRARY_VARIABLE} name a libnvrtc.so"
            )
        raise PbcError(
            f"no NVRTC found that compiles for sm_{sm}: {'; '.join(known.values())}; "
            f"let {LIBRARY_VARIABLE} name the libnvrtc.so of another CUDA"
        )

    @classmethod
    def _open(cls, path: str) -> Nvrtc:
        try:
            library = ctypes.CDLL(path)
            major, minor = ctypes.c_int(), ctypes.c_int()
            library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        except (OSError, AttributeError) as error:
            raise PbcError(f"cannot use {path} as NVRTC: {error}") from error
        return cls(library, (major.value, minor.value))

    @property
    def makes_cubins(self) -> bool:
        """Whether it ends in machine code; older ones end in PTX, which a driver compiles."""
        return self.version >= _FIRST_WITH_CUBINS

    @property
    def words(self) -> str:
        """The name of this library in messages."""
        return "NVRTC {}.{}".format(*self.version)

    def cubin(self, source: str, sm: int) -> bytes:
        """Compile to machine code for one architecture: 62 is a Jetson TX2."""
        if not self.makes_cubins:
            raise PbcError(
                f"{self.words} makes PTX only, and machine code needs 11.2 or newer: "
                f"{install('cuda')}, or let {LIBRARY_VARIABLE} name a newer libnvrtc.so"
            )
        return self._compile(source, f"sm_{sm}", "CUBIN")

    def loadable(self, source: str, sm: int) -> bytes:
        """Compile to what the driver of this same CUDA loads: machine code, or PTX before 11.2."""
        if self.makes_cubins:
            return self.cubin(source, sm)
        return self._compile(source, f"compute_{sm}", "PTX")

    def _compile(self, source: str, architecture: str, result: str) -> bytes:
        program = ctypes.c_void_p()
        names, texts = _HEADERS.keys(), _HEADERS.values()
        self._check(
            self.library.nvrtcCreateProgram(
                ctypes.byref(program),
                source.encode(),
                b"kernels.cu",
                len(_HEADERS),
                _strings(texts),
                _strings(names),
            ),
            architecture,
        )
        try:
            options = [f"--gpu-architecture={architecture}", _DIALECT, "-default-device", "-w"]
            options += [f"-I{folder}" for folder in _header_folders()]
            code = self.library.nvrtcCompileProgram(program, len(options), _strings(options))
            if code:
                raise PbcError(self._failure(code, architecture, self._log(program)))
            return self._bytes(program, result)
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))

    def _bytes(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), what)
        content = ctypes.create_string_buffer(size.value)
        self._check(getattr(self.library, f"nvrtcGet{what}")(program, content), what)
        return content.raw

    def _log(self, program: ctypes.c_void_p) -> str:
        return self._bytes(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")

    def _check(self, code: int, what: str) -> None:
        if code:
            raise PbcError(self._failure(code, what, ""))

    def _failure(self, code: int, what: str, log: str) -> str:
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p
        lines = [line.strip() for line in log.splitlines() if "error" in line]
        reason = lines[0] if lines else self.library.nvrtcGetErrorString(code).decode()
        text = f"{self.words} cannot compile the kernels for {what}: {reason}"
        if "cannot open source file" in reason:
            text += "; pip install nvidia-cuda-runtime-cu12 nvidia-cuda-cccl-cu12 for its headers"
        return text

    def architectures(self) -> list[int]:
        """Return the sm numbers that it compiles for; empty where it cannot say."""
        if not self.makes_cubins:
            return []
        count = ctypes.c_int()
        self._check(self.library.nvrtcGetNumSupportedArchs(ctypes.byref(count)), "its list")
        found = (ctypes.c_int * count.value)()
        self._check(self.library.nvrtcGetSupportedArchs(found), "its list")
        return list(found)


def _strings(texts: Iterable[str]) -> ctypes.Array[ctypes.c_char_p]:
    encoded = [text.encode() for text in texts]
    return (ctypes.c_char_p * len(encoded))(*encoded)


def _wheel_folders(name: str) -> Iterator[Path]:
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        yield from sorted(Path(root).glob(name))


def _installed(opened: Callable[[str], Nvrtc]) -> Iterator[Nvrtc]:
    folders = [str(folder) for pattern in _WHEEL_LIBRARIES for folder in _wheel_folders(pattern)]
    for folder in [*folders, "", *_CUDA_FOLDERS]:
        for name in _SONAMES:
            with contextlib.suppress(PbcError):
                yield opened(str(Path(folder) / name))


def _header_folders() -> list[str]:
    """Folders of headers for half precision, which float32 kernels do without."""
    wheels = [str(folder) for folder in _wheel_folders("cuda_*/include")]
    return wheels or [folder for folder in _HEADER_FOLDERS if Path(folder).is_dir()]
