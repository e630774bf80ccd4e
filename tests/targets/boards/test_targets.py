from __future__ import annotations

import functools
import os

import pytest

from pbc import plugins
from pbc.errors import PbcError, UsageError
from pbc.lower.engine_choice import choose_engine
from pbc.target import Target, load_target

ALIASES = {"arm-rasp4b64"}
NAMES = sorted(plugins.entries("pbc.targets").keys() - ALIASES)
BOARDS = [name for name in NAMES if name != "host"]


ARM_32 = ["arm-beagleai", "arm-pynq", "arm-rasp3b", "arm-rasp4b", "arm-stm32mp1"]
JETPACK_4 = ["cuda-sm_53", "cuda-sm_62", "jetson-nano", "jetson-tx1", "jetson-tx2"]


def test_the_boards_are_there() -> None:
    assert {
        "android-arm64",
        "generic-arm64",
        "generic-x86-64",
        "host",
        "jetson-agx-orin",
        "jetson-agx-xavier",
        "jetson-nano",
        "jetson-orin-nano",
        "jetson-orin-nx",
        "jetson-tx2",
        "jetson-xavier-nx",
        "raspberry-pi-3b",
        "raspberry-pi-4b",
        "raspberry-pi-5",
        "raspberry-pi-zero-2",
        *(f"cuda-sm_{sm}" for sm in (53, 62, 72, 75, 80, 86, 87, 89, 90)),
        *ARM_32,
        *JETPACK_4,
    } <= set(NAMES)


def test_every_board_of_tvm_s_list_is_one() -> None:
    tvm = pytest.importorskip("tvm")
    families = ("nvidia/jetson-", "raspberry-pi/", "arm/")
    listed = {tag for tag in tvm.target.list_tags() if tag.startswith(families)}
    assert len(listed) >= 20
    known = {load_target(name).tags.get("tvm") for name in NAMES} - {None}
    assert known == listed - {"arm/rasp4b64"}  # which is raspberry-pi/4b-aarch64
    assert load_target("arm-rasp4b64") is load_target("raspberry-pi-4b")


def test_tvm_agrees_about_the_gpus_and_takes_the_processors() -> None:
    tvm = pytest.importorskip("tvm")
    for target in map(load_target, BOARDS):
        known = tvm.target.Target(target.tags["tvm"]) if "tvm" in target.tags else None
        if known is not None and "sm" in target.tags:
            assert known.arch.rstrip("a") == f"sm_{target.tags['sm']}"
        if "cpu" in target.tags:
            assert target.tags["cpu"] in _processors(target.tags["triple"])


@functools.cache
def _processors(triple: str) -> set[str]:
    """What TVM's LLVM can compile for."""
    tvm = pytest.importorskip("tvm")
    listed = tvm.get_global_func("target.llvm_get_cpu_archlist")
    return {str(cpu) for cpu in listed(tvm.target.Target({"kind": "llvm", "mtriple": triple}))}


@pytest.mark.parametrize("name", NAMES)
def test_facts_make_sense(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    assert target.description
    assert target.family
    assert target.engine in target.engines
    assert set(target.engines) | set(target.refused) == {"pytorch", "onnxruntime", "tvm"}
    assert target.requires["python"] == ">=3.10"
    if target.memory_bytes is not None:
        assert target.memory_bytes >= 2**29
    assert all(isinstance(value, str) and value for value in target.tags.values())
    if name != "host":
        assert target.tags["triple"].startswith(f"{target.arch}-linux-")
    x86 = "x86" in name or name in [f"cuda-sm_{sm}" for sm in (75, 80, 86, 89, 90)]
    if name != "host":
        arch = "armv7l" if name in ARM_32 else "x86_64" if x86 else "aarch64"
        assert target.arch == arch


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_names_its_c_library(name: str) -> None:
    target = load_target(name)
    has, needs = target.tags["libc"], target.requires["libc"]
    if has == "bionic":
        assert needs == "bionic"
        assert set(target.needs) == {"onnxruntime", "pytorch", "tvm"}  # none has a wheel
        return
    minor, floor = (int(text.rpartition("2.")[2]) for text in (has, needs))
    assert (has, needs) == (f"glibc 2.{minor}", f"glibc>=2.{floor}")
    assert floor <= minor
    if minor < 28:  # no wheel of torch runs there, and of onnxruntime those before 1.29
        assert "glibc 2.28" in target.refused["pytorch"]
        assert target.needs["onnxruntime"]["onnxruntime"] == "<1.29"


@pytest.mark.parametrize(
    ("name", "sm", "cuda", "memory_gib"),
    [
        ("jetson-nano", "53", "10.2", 4),
        ("jetson-tx1", "53", "10.2", 4),
        ("jetson-tx2", "62", "10.2", 8),
        ("jetson-agx-xavier", "72", "11.4", 32),
        ("jetson-xavier-nx", "72", "11.4", 8),
        ("jetson-orin-nano", "87", "12.6", 8),
        ("jetson-orin-nx", "87", "12.6", 16),
        ("jetson-agx-orin", "87", "12.6", 32),
        ("jetson-agx-orin-64gb", "87", "12.6", 64),
        ("jetson-agx-thor", "110", "13.0", 128),
    ],
)
def test_jetsons(name: str, sm: str, cuda: str, memory_gib: int) -> None:
    target = load_target(name)
    assert (target.tags["sm"], target.tags["cuda"]) == (sm, cuda)
    assert target.memory_bytes == memory_gib * 2**30
    assert target.tags.get("tvm", f"nvidia/{name}").startswith(f"nvidia/{name}")
    wheel = float(cuda) >= 13
    needs = target.needs["tvm"]
    assert needs["cuda"] == f">={cuda}"
    assert ("built on the board" in needs.get("tvm runtime", "")) is not wheel


@pytest.mark.parametrize("name", JETPACK_4)
def test_an_impossible_pair_is_refused_with_what_to_do_instead(name: str) -> None:
    with pytest.raises(
        UsageError,
        match=rf"engine 'pytorch' does not run on {name}: torch>=2.9 has wheels for glibc 2.28 or "
        r"newer, and JetPack 4.6 has 2.27; take --engine tvm, or onnxruntime",
    ):
        choose_engine(load_target(name), "pytorch")


@pytest.mark.parametrize("name", ARM_32)
@pytest.mark.parametrize("engine", ["onnxruntime", "pytorch"])
def test_32_bit_boards_have_one_engine(name: str, engine: str) -> None:
    with pytest.raises(UsageError, match="no wheel for 32-bit Arm; take --engine tvm"):
        choose_engine(load_target(name), engine)


def test_a_refused_engine_is_no_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    tx2, pi = load_target("jetson-tx2"), load_target("arm-rasp3b")
    entries = plugins.entries
    without_tvm = {k: v for k, v in entries("pbc.lowerings").items() if k != "tvm"}
    monkeypatch.setattr(plugins, "entries", lambda group: without_tvm)
    with pytest.raises(PbcError, match="for here: tvm is not installed"):
        choose_engine(pi, None)
    engine, notes = choose_engine(tx2, None)
    assert engine == "onnxruntime"
    assert notes == (
        "jetson-tx2 prefers engine tvm, which is not installed: using onnxruntime",
    )  # fmt: skip


def test_what_a_bundle_requires_is_all_that_anybody_asks_for() -> None:
    tx2 = load_target("jetson-tx2")
    assert tx2.requirements("onnxruntime", {"onnxruntime": ">=1.20"}) == {
        "python": ">=3.10",
        "libc": "glibc>=2.27",
        "onnxruntime": ">=1.20,<1.29",
    }
    of_tvm = tx2.requirements("tvm", {"tvm": ">=0.27"})
    assert list(of_tvm) == ["python", "libc", "tvm", "cuda", "tvm runtime"]
    assert of_tvm["cuda"] == ">=10.2"
    assert "docs/cuda.md" in of_tvm["tvm runtime"]
    assert load_target("cuda-sm_90").requirements("tvm")["cuda"] == ">=13"
    assert load_target("generic-arm64").requirements("pytorch", {"python": ">=3.10"}) == {
        "python": ">=3.10",
        "libc": "glibc>=2.28",
    }


def test_the_host_is_read_from_this_machine() -> None:
    target = load_target("host")
    assert target.tags["cores"] == str(len(os.sched_getaffinity(0)))
    assert target.memory_bytes is not None
    assert target.engine == "onnxruntime"


def test_facts_are_read_only_and_go_into_the_manifest() -> None:
    target = load_target("jetson-tx2")
    with pytest.raises(TypeError):
        target.tags["sm"] = "99"  # type: ignore[index]
    facts = target.to_json()
    assert facts["name"] == "jetson-tx2"
    assert facts["tags"]["sm"] == "62"
    assert facts["engines"] == ["tvm", "onnxruntime"]
    assert facts["needs"]["onnxruntime"] == {"onnxruntime": "<1.29"}
    assert list(facts["refused"]) == ["pytorch"]
    with pytest.raises(TypeError):
        target.needs["onnxruntime"]["onnxruntime"] = "9"  # type: ignore[index]


def test_facts_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="engine 'tvm' not in"):
        Target("x", "", "any", "tvm", ("pytorch",))
    with pytest.raises(ValueError, match="memory_bytes is 0"):
        Target("x", "", "any", "pytorch", ("pytorch",), memory_bytes=0)
    with pytest.raises(ValueError, match="are allowed and refused"):
        Target("x", "", "any", "pytorch", ("pytorch",), refused={"pytorch": "no"})
    with pytest.raises(ValueError, match=r"needs of \['tvm'\], not in"):
        Target("x", "", "any", "pytorch", ("pytorch",), needs={"tvm": {"cuda": ">=13"}})
