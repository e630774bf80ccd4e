"""Deploys to a real sshd on loopback, whose folder is the board."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import deploying
import pytest
import sshd
import tiny
from click.testing import CliRunner
from deploying import PYTHON, Device, quiet

from pbc import bundle as bundles
from pbc.bundle import Bundle
from pbc.cli import main
from pbc.deploy import board as script
from pbc.deploy import deployment
from pbc.deploy.connection import Destination
from pbc.deploy.deployment import DeployOptions
from pbc.deploy.payload import SCRIPT
from pbc.errors import PbcError, UsageError
from pbc.util import strict_json
from pbc.util.sizes import size_text

pytestmark = pytest.mark.skipif(None in (sshd.SSHD, sshd.SSH), reason=sshd.MISSING)

STEPS = ("compare", "slot", "signature", "self-test", "mark complete", "switch", "prune")


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    folder = tmp_path_factory.mktemp("board")
    wheels = deploying.wheels(tmp_path_factory.mktemp("wheels"))
    with sshd.board(folder) as board:
        device = Device(board, wheels, tmp_path_factory.mktemp("work"))
        said: list[str] = []
        first = device.bundle()
        result = device.deploy(first, said.append)
        assert result["changed"]
        assert result["previous"] is None
        assert result["self_test"]["passed"]
        steps = [line for line in said if line in (*STEPS, "packages")]
        assert steps == ["compare", "packages", *STEPS[1:]]
        assert device.active() == first.digest
        yield device


def copied(said: list[str]) -> list[str]:
    """The files that were sent."""
    return [line.split()[1] for line in said if line.startswith("copy ")]


def test_the_board_trains_with_what_was_brought(device: Device, tmp_path: Path) -> None:
    photos = tiny.photos(tmp_path / "photos")
    device.pbc("train", device.board.root / "bundle.pbc", photos, "-o", tmp_path / "mine",
               "--epochs", "2")  # fmt: skip
    evaluated = json.loads(device.pbc("eval", tmp_path / "mine", photos, "--json"))
    assert evaluated["count"] == 18


def test_one_version_after_the_other(device: Device) -> None:
    said: list[str] = []
    second, before = device.bundle(), device.active()
    slot = device.deploy(second, said.append)["slot"]
    assert copied(said) == ["bundle.pbc/manifest.json"]
    assert "packages" not in said
    text = json.dumps(second.manifest, indent=1, sort_keys=True, ensure_ascii=False)
    assert f"copied {len(text.encode()) + 1} bytes in 1 files" in said
    assert device.active() == second.digest
    status = device.status()
    assert status["current"]["bundle"] == second.digest
    assert status["previous"]["bundle"] == before
    assert (status["half_made"], status["half_copied"], status["running"]) == ([], [], False)

    again: list[str] = []
    result = device.deploy(second, again.append)
    assert (result["changed"], result["slot"]) == (False, slot)
    assert copied(again) == []
    assert "switch" not in again

    for expected in (before, second.digest):
        device.rollback()
        assert device.active() == expected

    third = device.deploy(device.bundle())["slot"]
    names = {path.name for path in (device.board.root / "slots").iterdir()}
    assert names == {slot, third}
    assert len(list((device.board.root / "packages").iterdir())) == 1
    stored = {path.name for path in (device.board.root / "store").iterdir()}
    assert before not in {json.loads(path.read_text())["bundle"] for path in markers(device)}
    assert stored == {
        file for path in markers(device) for file in json.loads(path.read_text())["files"]
    }


def markers(device: Device) -> list[Path]:
    return list((device.board.root / "slots").glob("*/complete.json"))


def test_a_version_that_still_runs_is_not_removed(device: Device) -> None:
    slot = device.deploy(device.bundle())["slot"]
    code = (
        "import fcntl, sys; lock = open(sys.argv[1]); fcntl.flock(lock, fcntl.LOCK_SH); "
        "print('held', flush=True); sys.stdin.read()"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", code, device.board.root / "slots" / slot / "in-use"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"held\n"
        for _ in range(2):
            device.deploy(device.bundle())
        assert (device.board.root / "slots" / slot).is_dir()
        running.communicate()
    device.deploy(device.bundle())
    assert not (device.board.root / "slots" / slot).exists()


# ---- what goes wrong -----------------------------------------------------------------------


def test_a_kill_at_any_step_leaves_one_that_works(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 of what runs on the board, as it is about to take a step; then the deploy again."""
    before, bundle = device.active(), device.bundle()
    pids = watched(monkeypatch)
    for step in STEPS:

        def kill(line: str, step: str = step) -> None:
            if line == step:
                os.kill(pids[-1], signal.SIGKILL)

        if step == "mark complete":  # made anew each time: without the marker it is not trusted
            assert device.status()["half_made"] == [f"slots/{slot_of(device)}"]
        with pytest.raises(PbcError, match=r"lost it"):
            device.deploy(bundle, kill)
        assert device.active() == (bundle.digest if step == "prune" else before)
    device.deploy(bundle)
    assert device.active() == bundle.digest
    status = device.status()
    assert (status["half_made"], status["half_copied"]) == ([], [])


def slot_of(device: Device) -> str:
    """The one slot that has no complete marker."""
    (slot,) = unsealed(device.board.root / "slots")
    return slot.name


def unsealed(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not (path / "complete.json").exists()]


def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The process numbers that the board's script tells at its start."""
    pids: list[int] = []
    loads = strict_json.loads

    def listening(line: bytes | str) -> Any:
        message = loads(line)
        if isinstance(message, dict) and "process" in message:
            pids.append(message["process"])
        return message

    monkeypatch.setattr("pbc.deploy.deployment.strict_json.loads", listening)
    return pids


VICTIMS = (("board",), ("tool",), ("tool", "board"))


def test_a_kill_in_the_middle_of_pip_or_venv_leaves_one_that_works(
    device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """kill -9 of the script, of what it runs, or of both, with half of the files there."""
    before, bundle = device.active(), device.bundle()
    wheels = with_another_wheel(device, tmp_path / "wheels")
    pids = watched(monkeypatch)
    stages = (("pip", "packages", "packages"), ("venv", "slot", "slots"))
    for (tool, step, folder), victims in itertools.product(stages, VICTIMS):
        place = device.board.root / folder
        facts = (pids, place, tool, victims)

        def kill(line: str, step: str = step, facts: tuple[Any, ...] = facts) -> None:
            if line == step:
                threading.Thread(target=kill_in_the_middle, args=facts).start()

        words = "lost it" if "board" in victims else f"{tool} was ended by SIGKILL; the kernel"
        with pytest.raises(PbcError, match=words):
            device.deploy(bundle, kill, wheels=wheels)
        while device.status()["running"]:  # a pip without a parent goes on to its end
            time.sleep(0.1)
        assert device.active() == before
        (half,) = unsealed(place)
        assert device.status()["half_made"] == [f"{folder}/{half.name}"]
    device.deploy(bundle, wheels=wheels)
    assert device.active() == bundle.digest
    assert device.status()["half_made"] == []
    for packages in (device.board.root / "packages").iterdir():
        assert {path.name for path in packages.iterdir()} == {"site", "complete.json"}
    device.rollback()
    assert device.active() == before


def with_another_wheel(device: Device, folder: Path) -> Path:
    """The wheels of the device, one of them of another build: all have to be installed again."""
    assert device.options.wheels is not None
    shutil.copytree(device.options.wheels, folder)
    (wheel,) = folder.glob("click-*.whl")
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.comment = os.urandom(8).hex().encode()
    return folder


def kill_in_the_middle(
    pids: Sequence[int], place: Path, tool: str, victims: tuple[str, ...]
) -> None:
    """Kill once the board runs the tool and that has written a little; `place` is where."""
    board = pids[-1]
    running: list[int] = []
    while not running:
        running = [pid for pid in children(board) if tool in arguments(pid)]
    os.kill(running[0], signal.SIGSTOP)
    written = {"pip": "unpacking/**/*.py", "venv": "python/*"}[tool]
    while not any(file for half in unsealed(place) for file in half.glob(written)):
        os.kill(running[0], signal.SIGCONT)
        time.sleep(0.002)
        os.kill(running[0], signal.SIGSTOP)
    processes = {"tool": running[0], "board": board}
    for victim in reversed(victims):  # the board is not to hear of the tool's end
        os.kill(processes[victim], signal.SIGKILL)
    if "tool" not in victims:
        os.kill(running[0], signal.SIGCONT)


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            parent = stat.read_text().rpartition(")")[2].split()[1]
            found += [int(stat.parent.name)] * (int(parent) == pid)
    return found


def arguments(pid: int) -> list[str]:
    """What a process was started with, by the last parts of paths."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    return [word.rpartition("/")[2] for word in words]


def test_a_cut_connection_goes_on_where_it_was(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ssh is killed in the middle of a file, which the board has stopped to read by then."""
    before, bundle = device.active(), large(device, 8_000_000)
    pids = watched(monkeypatch)

    def cut() -> None:
        subprocess.run(["pkill", "-KILL", "-P", str(os.getpid()), "-x", "ssh"], check=True)
        os.kill(pids[0], signal.SIGCONT)

    def stop(line: str) -> None:
        if line.startswith("copy bundle.pbc/large.bin"):
            os.kill(pids[0], signal.SIGSTOP)
            threading.Timer(0.5, cut).start()

    with pytest.raises(PbcError, match="lost it: the connection was cut"):
        device.deploy(bundle, stop)
    assert device.active() == before
    while device.status()["running"]:
        time.sleep(0.1)
    (part,) = device.status()["half_copied"]
    assert 0 < part["bytes"] < 8_000_000
    said: list[str] = []
    device.deploy(bundle, said.append)
    left = size_text(8_000_000 - part["bytes"])
    assert f"copy bundle.pbc/large.bin ({left})" in said
    assert device.active() == bundle.digest


def large(device: Device, size: int) -> Bundle:
    base = device.bundle()
    files = {name: base.read(name) for name in base.manifest["files"]}
    files["large.bin"] = os.urandom(size)
    return bundles.write(base.path, base.manifest, files)


def test_what_came_before_a_cut_is_verified(device: Device) -> None:
    bundle = large(device, 3_000_000)
    part = device.board.root / "store" / f"{bundle.sha256('large.bin')}.part"
    part.write_bytes(bytes(2_000_000))
    said: list[str] = []
    device.deploy(bundle, said.append)
    assert "copy bundle.pbc/large.bin (3.0 MB)" in said
    assert device.active() == bundle.digest


def test_a_file_that_was_damaged_on_the_board_comes_again(device: Device) -> None:
    bundle = device.bundle()
    device.deploy(bundle)
    name = tiny_weights(bundle)
    stored = device.board.root / "store" / bundle.sha256(name)
    stored.unlink()
    stored.write_bytes(b"damaged")
    said: list[str] = []
    device.deploy(device.bundle(), said.append)
    assert f"bundle.pbc/{name}" in copied(said)


def tiny_weights(bundle: Bundle) -> str:
    names: list[str] = list(bundle.manifest["files"])
    return next(name for name in names if name.endswith("level-0.safetensors"))


def test_a_full_disk_is_told_and_changes_nothing(device: Device, tmp_path: Path) -> None:
    """The board's Python may write no file larger than half a megabyte: the write itself fails."""
    before = device.active()
    limited = tmp_path / "python"
    limited.write_text(f'#!/bin/sh\nulimit -f 1000\nexec "{PYTHON}" "$@"\n')
    limited.chmod(0o755)
    with pytest.raises(PbcError, match=r"cannot write to /.*: File too large"):
        device.deploy(large(device, 2_000_000), python=str(limited))
    assert device.active() == before
    assert device.status()["half_copied"] == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a small disk")
def test_a_small_disk_is_refused_before_anything_is_copied(device: Device) -> None:
    small = device.board.home / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        destination = f"{device.board.destination}/../small/pbc"
        with pytest.raises(
            PbcError, match=r"has 4.0 MiB of disk left; the deploy needs [0-9.]+ MiB"
        ):
            deployment.deploy(device.bundle().path, destination, device.options, quiet)
        assert not list(small.rglob("*.part"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_wrong_host_key_is_refused(device: Device, tmp_path: Path) -> None:
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    public = other.with_suffix(".pub").read_text()
    known = tmp_path / "known_hosts"
    known.write_text(f"[127.0.0.1]:{device.board.port} {public}")
    options = ("-F", "none", f"-oUserKnownHostsFile={known}", *device.board.options)
    with pytest.raises(PbcError, match="Host key verification failed") as told:
        device.deploy(device.bundle(), ssh_options=options)
    assert "\n" not in str(told.value)
    assert "not the one that ~/.ssh/known_hosts has" in str(told.value)


def test_a_board_of_another_architecture_is_refused(device: Device) -> None:
    before = sorted(path.name for path in (device.board.root / "store").iterdir())
    bundle = device.bundle(target={"name": "raspberry-pi-5", "arch": "aarch64"})
    with pytest.raises(PbcError, match=r"its architecture is .*; the bundle is for aarch64"):
        device.deploy(bundle)
    assert sorted(path.name for path in (device.board.root / "store").iterdir()) == before


def test_each_check_is_a_line(device: Device) -> None:
    bundle = device.bundle(
        target={"name": "huge", "arch": "any", "memory_bytes": 2**50},
        requires={"python": ">=3.99", "libc": "glibc>=2.99", "onnxruntime": ">=1.20"},
    )
    with pytest.raises(PbcError) as told:
        device.deploy(bundle)
    python, libc, memory = str(told.value).splitlines()
    assert "is Python 3." in python
    assert "needed is >=3.99" in python
    assert "its C library is glibc 2." in libc
    assert memory.endswith("of memory; the target has 1048576.0 GiB")


def test_a_bundle_that_computes_other_numbers_is_not_activated(device: Device) -> None:
    before = device.active()
    wrong = device.bundle()
    expected = json.loads(json.dumps(wrong.manifest["self_test"]))
    expected["levels"]["2"]["after"][1] += 1
    bundle = device.bundle(self_test=expected)
    with pytest.raises(PbcError, match=r"computes other numbers here than it must: level 2 by"):
        device.deploy(bundle)
    assert device.active() == before
    assert device.status()["half_made"] == []


def test_two_deploys_at_once_are_one_too_many(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = b"_LOCK_SECONDS = 20.0"
    assert patient in SCRIPT
    hasty = SCRIPT.replace(patient, b"_LOCK_SECONDS = 0.30")
    refusals: list[str] = []

    def second(line: str) -> None:
        if line == "slot":
            monkeypatch.setattr("pbc.deploy.deployment.SCRIPT", hasty)
            assert device.status()["running"]
            with pytest.raises(PbcError, match=r"another deploy to .* is running") as told:
                device.deploy(device.bundle())
            refusals.append(str(told.value))

    bundle = device.bundle()
    device.deploy(bundle, second)
    assert len(refusals) == 1
    assert device.active() == bundle.digest


# ---- the command ---------------------------------------------------------------------------


def test_the_command(device: Device) -> None:
    words = [
        "--python", PYTHON, "--wheels", str(device.options.wheels),
        *(word for option in device.board.options for word in ("--ssh-option", option)),
    ]  # fmt: skip
    bundle = device.bundle()
    destination = device.board.destination
    result = CliRunner().invoke(main, ["deploy", str(bundle.path), destination, *words])
    assert result.exit_code == 0, result.output
    assert "self-test\n" in result.output
    result = CliRunner().invoke(main, ["deploy", "--status", destination, *words])
    assert f"bundle {bundle.digest[:12]}" in result.output
    result = CliRunner().invoke(main, ["deploy", "--rollback", destination, *words, "--json"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(main, ["deploy", "--status", destination, "--json", *words])
    assert json.loads(result.output)["previous"]["bundle"] == bundle.digest


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["deploy", "x.pbc"], "expected BUNDLE USER@HOST"),
        (["deploy", "--status"], "expected USER@HOST"),
        (["deploy", "--status", "--rollback", "pi@board"], "give one"),
        (["deploy", "--status", "pi@board", "--ignore", "mem"], "did you mean 'memory'"),
        (["deploy", "--status", "pi@board:a b:\n"], "is not USER@HOST"),
    ],
)
def test_wrong_usage(words: list[str], error: str) -> None:
    with pytest.raises(UsageError, match=error):
        main(words, standalone_mode=False)


@pytest.mark.parametrize(
    ("text", "host", "folder"),
    [
        ("board", "board", "pbc"),
        ("pi@board", "pi@board", "pbc"),
        ("pi@board:/opt/pbc/", "pi@board", "/opt/pbc"),
        ("pi@board:~/apps/pbc", "pi@board", "apps/pbc"),
        ("pi@[fe80::1]:x", "pi@[fe80::1]", "x"),
    ],
)
def test_destinations(text: str, host: str, folder: str) -> None:
    assert Destination.parse(text) == Destination(host, folder)


@pytest.mark.parametrize("text", ["-oProxyCommand=x", "pi@board:~", "pi@board:/", "a b", ""])
def test_what_is_no_destination(text: str) -> None:
    with pytest.raises(UsageError):
        Destination.parse(text)


def test_no_board() -> None:
    options = DeployOptions(ssh_options=("-F", "none", "-p", "1"))
    with pytest.raises(PbcError, match=r"ssh cannot reach 127.0.0.1, or lost it: .*refused"):
        deployment.status("127.0.0.1", options)


@pytest.mark.parametrize(
    ("version", "wanted", "holds"),
    [
        ("2.36", ">=2.28", True),
        ("2.9", ">=2.28", False),
        ("3.10", ">=3.10", True),
        ("10.2.300", "10.2", True),
        ("10.20", "10.2", False),
        ("2.13", ">=2.9,<2.14", True),
        ("2.14", ">=2.9,<2.14", False),
        ("3.11", "3.11", True),
        ("", ">=1", False),
    ],
)
def test_versions(version: str, wanted: str, holds: bool) -> None:
    assert script.meets(version, wanted) is holds
