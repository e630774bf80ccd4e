from __future__ import annotations

import os

import pytest

from pbc import registry
from pbc.target import Target, load_target

NAMES = sorted(registry.entries("pbc.targets"))
BOARDS = [name for name in NAMES if name != "host"]


def test_the_boards_are_there() -> None:
    assert NAMES == [
        "android-arm64",
        "generic-arm64",
        "generic-x86-64",
        "host",
        "jetson-agx-orin",
        "jetson-agx-xavier",
        "jetson-nano",
        "jetson-orin-nano",
        "jetson-tx2",
        "raspberry-pi-4b",
        "raspberry-pi-5",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_facts_make_sense(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    assert target.description
    assert target.engine in target.engines
    assert "pytorch" in target.engines  # what the compiler can always fall back to
    assert set(target.engines) <= {"pytorch", "onnxruntime", "tvm"}
    assert target.requires["python"] == ">=3.10"
    if target.memory_bytes is not None:
        assert target.memory_bytes >= 2**29
    assert all(isinstance(value, str) and value for value in target.tags.values())
    if name != "host":
        assert target.arch == ("x86_64" if "x86" in name else "aarch64")


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_names_its_c_library(name: str) -> None:
    target = load_target(name)
    has, needs = target.tags["libc"], target.requires["libc"]
    if has == "bionic":
        assert needs == "bionic"
        return
    minor, floor = (int(text.rpartition("2.")[2]) for text in (has, needs))
    assert (has, needs) == (f"glibc 2.{minor}", f"glibc>=2.{floor}")
    assert floor <= minor
    if minor < 28:  # no wheel of torch or onnxruntime runs there
        assert "onnxruntime" not in target.engines
        assert "no wheel" in target.tags["torch"]


@pytest.mark.parametrize(
    ("name", "sm", "cuda", "memory_gib"),
    [
        ("jetson-nano", "53", "10.2", 4),
        ("jetson-tx2", "62", "10.2", 8),
        ("jetson-agx-xavier", "72", "11.4", 32),
        ("jetson-orin-nano", "87", "12.6", 8),
        ("jetson-agx-orin", "87", "12.6", 32),
    ],
)
def test_jetsons(name: str, sm: str, cuda: str, memory_gib: int) -> None:
    target = load_target(name)
    assert (target.tags["sm"], target.tags["cuda"]) == (sm, cuda)
    assert target.memory_bytes == memory_gib * 2**30
    assert target.tags["tvm"].startswith(f"nvidia/{name}")


def test_the_host_is_read_from_this_machine() -> None:
    target = load_target("host")
    assert target.tags["cores"] == str(len(os.sched_getaffinity(0)))
    assert target.memory_bytes is not None
    assert target.engine == "pytorch"


def test_facts_are_read_only_and_go_into_the_manifest() -> None:
    target = load_target("jetson-tx2")
    with pytest.raises(TypeError):
        target.tags["sm"] = "99"  # type: ignore[index]
    facts = target.to_json()
    assert facts["name"] == "jetson-tx2"
    assert facts["tags"]["sm"] == "62"
    assert facts["engines"] == ["tvm", "pytorch"]


def test_facts_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="engine 'tvm' not in"):
        Target("x", "", "any", "tvm", ("pytorch",))
    with pytest.raises(ValueError, match="memory_bytes is 0"):
        Target("x", "", "any", "pytorch", ("pytorch",), memory_bytes=0)
