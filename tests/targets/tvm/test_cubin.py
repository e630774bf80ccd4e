"""CUDA kernels become machine code without a GPU, and a build says whether they did."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pbc.errors import PbcError
from pbc.runtime.engines.tvm import cuda_kernels, nvrtc
from pbc.runtime.engines.tvm.cuda_kernels import Kernels, loadable, unpack
from pbc.runtime.engines.tvm.nvrtc import LIBRARY_VARIABLE, Nvrtc
from pbc.targets.tvm.cuda import cubin, cubin_elf

tvm = pytest.importorskip("tvm")
tvm_ffi = pytest.importorskip("tvm_ffi")
relax = pytest.importorskip("tvm.relax")
schedule_gpu = pytest.importorskip("pbc.targets.tvm.cuda.schedule").schedule_gpu

SOURCE = """\
#include <cuda/std/cstdint>
#include <cuda/std/type_traits>
#include <math_constants.h>
using cuda::std::int64_t;
namespace std { using cuda::std::is_same_v; using cuda::std::is_signed; using cuda::std::enable_if;
                using cuda::std::is_integral; using cuda::std::is_unsigned;
                using cuda::std::conditional; using cuda::std::is_floating_point; }
static_assert(sizeof(int64_t) == 8 && std::is_signed<int64_t>::value, "");
static_assert(std::is_same_v<int, int> && !std::is_same_v<int, long>, "");
static_assert(std::is_integral<const unsigned>::value && !std::is_integral<float>::value, "");
static_assert(std::is_unsigned<unsigned>::value && !std::is_unsigned<double>::value, "");
static_assert(std::is_same_v<std::conditional<false, int, char>::type, char>, "");
static_assert(std::is_floating_point<float>::value && std::is_signed<float>::value, "");
extern "C" __global__ void __launch_bounds__(64) scale(float* __restrict__ x, int64_t n) {
  __shared__ float held[64];
  held[threadIdx.x] = n ? x[threadIdx.x] : CUDART_INF_F;
  __syncthreads();
  x[threadIdx.x] = held[63 - threadIdx.x] * 0x1.8p+1f/*3.0*/;
}
"""
BIG = 'extern "C" __global__ void __launch_bounds__(2048) big(float* x) { x[threadIdx.x] = 1; }'


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return cubin.compile_kernels(SOURCE, 62)


def target(sm: int) -> Any:
    return tvm.target.Target(
        {"kind": "cuda", "arch": f"sm_{sm}", "max_threads_per_block": 1024},
        host={"kind": "llvm"},
    )


def product() -> Any:
    """A product with an open number of rows, and what follows it."""
    builder = relax.BlockBuilder()
    rows = tvm.tirx.Var("rows", "int64")
    x = relax.Var("x", relax.TensorType((rows, 32), "float32"))
    weight = relax.Var("weight", relax.TensorType((32, 48), "float32"))
    with builder.function("main", [x, weight]):
        with builder.dataflow():
            out = builder.emit_output(builder.emit(relax.op.nn.relu(relax.op.matmul(x, weight))))
        builder.emit_func_output(out)
    return builder.get()


def export(executable: Any, path: Path) -> Path:
    executable.export_library(str(path))
    return path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = cubin.build_cuda(product(), target(62), 62)
    return export(built, tmp_path_factory.mktemp("artifact") / "product.so")


@pytest.mark.parametrize("sm", [53, 62, 72, 87, 90, 100, 110])
def test_machine_code_says_which_gpu_it_is_for_and_what_it_takes(sm: int) -> None:
    made = cubin.compile_kernels(SOURCE, sm)
    assert cubin_elf.architecture(made.cubin) == sm
    (needed,) = cubin_elf.kernels(made.cubin).values()
    assert needed.threads == 64
    assert needed.shared_bytes - 256 in (0, 1024)  # from sm_90 on, the system's KiB counts
    assert 0 < needed.registers_per_thread <= 255


def test_a_kernel_that_no_block_holds_is_refused() -> None:
    with pytest.raises(PbcError, match="sm_62 holds big: 2048 threads of 1024"):
        cubin.compile_kernels(BIG, 62)


def test_limits_know_the_small_register_files_of_tegra() -> None:
    needed = cubin_elf.Resources(threads=1024, shared_bytes=0, registers_per_thread=64)
    assert cubin_elf.Limits.of(72).exceeded_by(needed) is None
    assert cubin_elf.Limits.of(62).exceeded_by(needed) == "65536 registers of 32768"
    needed = cubin_elf.Resources(threads=64, shared_bytes=50_000, registers_per_thread=16)
    assert cubin_elf.Limits.of(72).exceeded_by(needed) == "50000 bytes of shared memory of 49152"


def test_what_is_no_machine_code_of_a_gpu_is_refused() -> None:
    host = Path(os.path.realpath("/proc/self/exe")).read_bytes()[:4096]
    for content in (b"", b"// PTX", host):
        with pytest.raises(PbcError, match="no machine code of a GPU"):
            cubin_elf.architecture(content)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("__global__ void f(float* x) { x[0] = unknown; }", r'kernels.cu\(1\): .*"unknown"'),
        ("#include <absent.h>", "cannot open source file .absent.h.; pip install nvidia-cuda"),
    ],
)
def test_a_source_that_fails_is_one_line(source: str, words: str) -> None:
    with pytest.raises(PbcError, match=f"^NVRTC .* cannot compile .* sm_62: .*{words}.*$"):
        Nvrtc.load(62).cubin(source, 62)


def test_an_architecture_that_no_nvrtc_knows_is_refused_with_those_it_does() -> None:
    with pytest.raises(PbcError, match=r"compiles for sm_9999: NVRTC .* knows .*62"):
        cubin.compile_kernels(SOURCE, 9999)


def test_the_variable_decides_which_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIBRARY_VARIABLE, "/absent/libnvrtc.so")
    with pytest.raises(PbcError, match=r"cannot use /absent/libnvrtc\.so as NVRTC"):
        Nvrtc.load(62)


def test_without_any_nvrtc_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_SONAMES", ("libabsent.so",))
    with pytest.raises(PbcError, match=r"pip install '.*\[cuda\]'"):
        Nvrtc.load(62)


def test_a_pack_holds_both_forms(kernels: Kernels) -> None:
    text = kernels.pack()
    assert list(unpack(b"before" + text.encode() + b"\0after")) == [kernels]
    assert len(text) < len(kernels.cubin) + len(kernels.source)
    with pytest.raises(PbcError, match="load this library with the tvm engine"):
        Nvrtc.load(62).cubin(text, 62)


def test_a_damaged_pack_is_refused(kernels: Kernels) -> None:
    text = kernels.pack()
    for part in (2, 3):
        lines = text.split("\n")
        middle = len(lines[part]) // 2
        lines[part] = lines[part][:middle] + lines[part][middle + 4 :]
        with pytest.raises(PbcError, match="damaged"):
            list(unpack("\n".join(lines).encode()))
    with pytest.raises(PbcError, match="damaged"):
        list(unpack(replace(kernels, sm=72).pack().replace("sha256", "sha").encode()))


def test_the_kept_source_is_plain(kernels: Kernels) -> None:
    assert "0x1.8p" not in kernels.source
    assert "/*" not in kernels.source
    assert "3.00000000000000000e+00f" in kernels.source
    again = Nvrtc.load(62).cubin(kernels.source, 62)
    assert cubin_elf.kernels(again) == cubin_elf.kernels(kernels.cubin)


def test_a_build_for_cuda_holds_machine_code(artifact: Path) -> None:
    (found,) = cubin.require(artifact, 62)
    assert cubin_elf.architecture(found.cubin) == 62
    assert cubin_elf.kernels(found.cubin)
    with pytest.raises(PbcError, match=r"product\.so holds kernels for sm_62, not sm_72"):
        cubin.require(artifact, 72)


def test_a_build_that_only_embedded_source_is_not_called_compiled(tmp_path: Path) -> None:
    module, gpu = product(), target(62)
    with gpu:
        built = relax.build(module, gpu)
    path = export(built, tmp_path / "source.so")
    with pytest.raises(PbcError, match=r"source\.so holds CUDA source that was never compiled"):
        cubin.inspect(path)


def test_a_function_that_nobody_scheduled_is_refused() -> None:
    module = relax.transform.LegalizeOps()(product())
    with pytest.raises(PbcError, match=r"no installed schedule .* schedules matmul for a GPU"):
        cubin.require_scheduled(module)
    cubin.require_scheduled(schedule_gpu(module, target(62)))


def test_a_build_for_the_host_holds_no_kernels(tmp_path: Path) -> None:
    path = export(relax.build(product(), tvm.target.Target("llvm")), tmp_path / "host.so")
    assert cubin.inspect(path) == []
    with pytest.raises(PbcError, match=r"host\.so holds no CUDA kernels"):
        cubin.require(path, 62)


def test_a_build_that_fails_says_why_in_our_words_and_leaves_no_hook() -> None:
    variables = dict(os.environ)
    with pytest.raises(PbcError, match=r"^no NVRTC found that compiles for sm_9999"):
        cubin.build_cuda(product(), target(62), 9999)
    assert dict(os.environ) == variables
    assert tvm_ffi.get_global_func("tvm_callback_cuda_postproc", allow_missing=True) is None


def test_a_hook_of_others_is_put_back() -> None:
    name = "tvm_callback_cuda_postproc"
    tvm_ffi.register_global_func(name, lambda source, _target: source)
    try:
        with cubin.embedding(62):
            pass
        assert tvm_ffi.get_global_func(name)("text", None) == "text"
    finally:
        tvm_ffi.remove_global_func(name)


class Refusing:
    """A driver's answers, for the choice that follows from them."""

    def __init__(self, sm: int, word: str | None) -> None:
        self._sm, self._word = sm, word

    def sm(self) -> int:
        return self._sm

    def refusal(self, image: bytes) -> str | None:
        assert cubin_elf.architecture(image)
        return self._word


def test_machine_code_that_the_driver_takes_is_used_as_it_is(kernels: Kernels) -> None:
    assert loadable(kernels.pack(), Refusing(62, None)) == kernels.cubin


def test_what_the_driver_refuses_is_compiled_from_the_kept_source(kernels: Kernels) -> None:
    made = loadable(kernels.pack(), Refusing(72, "CUDA_ERROR_NO_BINARY_FOR_GPU"))
    assert cubin_elf.architecture(made) == 72
    assert cubin_elf.kernels(made).keys() == cubin_elf.kernels(kernels.cubin).keys()


def test_where_neither_form_works_both_reasons_are_named(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvrtc, "_SONAMES", ("libabsent.so",))
    words = r"sm_72, refuses the kernels compiled for sm_62 \(CUDA_ERROR_X\), and .*no NVRTC"
    with pytest.raises(PbcError, match=words):
        loadable(kernels.pack(), Refusing(72, "CUDA_ERROR_X"))


def test_a_text_of_source_alone_is_refused() -> None:
    with pytest.raises(PbcError, match="never compiled"):
        loadable(SOURCE, Refusing(87, None))


def test_an_nvrtc_before_cubins_makes_ptx(kernels: Kernels) -> None:
    old = replace(Nvrtc.load(62), version=(10, 2))
    text = old.loadable(kernels.source, 62)
    assert text.startswith(b"//")
    assert text.endswith(b"\0")
    assert b".target sm_62" in text
    with pytest.raises(PbcError, match=r"NVRTC 10\.2 makes PTX only"):
        old.cubin(kernels.source, 62)


def test_without_a_driver_one_line_says_what_the_bundle_needs() -> None:
    try:
        driver = cuda_kernels.CudaDriver()
    except PbcError as error:
        assert "run it where such a GPU is" in str(error)  # noqa: PT017
    else:  # a machine with a GPU: its own driver loads what was compiled for it
        made = cubin.compile_kernels(SOURCE, driver.sm())
        assert loadable(made.pack(), driver) == made.cubin
