"""What a deploy and a pack leave, here and on the board: nothing but what they are asked for."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import deploying
import pytest
import sshd
import traced

pytestmark = pytest.mark.skipif(None in (sshd.SSHD, sshd.SSH), reason=sshd.MISSING)

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True)
class Place:
    """A machine's folders: a home that has to stay empty, and those that may be written to."""

    folder: Path

    @property
    def allowed(self) -> tuple[Path | str, ...]:
        return (*(self.folder / name for name in ("tmp", "cache", "work")), "/dev/")

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": "/usr/bin:/bin", "HOME": str(self.folder / "home"),
            "TMPDIR": str(self.folder / "tmp"), "PBC_CACHE": str(self.folder / "cache"),
            "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip

    def pbc(self, *words: object) -> traced.Trace:
        """Run a command to its end."""
        given = [str(word) for word in words]
        program = f"import sys; from pbc.cli import main; main.main({given!r}, 'pbc')"
        return self.run(sys.executable, "-c", program)

    def run(self, *words: str) -> traced.Trace:
        result, trace = traced.run(
            words,
            self.folder / "calls",
            cwd=self.folder / "work",
            environment=self.environment,
        )
        assert result.returncode == 0, result.stderr
        return trace

    def expect_clean(self) -> None:
        """Look for what should not be there."""
        for name in ("home", "tmp"):
            assert not list((self.folder / name).iterdir())


def place(folder: Path) -> Place:
    for name in ("home", "tmp", "cache", "work"):
        (folder / name).mkdir(parents=True)
    return Place(folder)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Place:
    found = place(tmp_path_factory.mktemp("here"))
    deploying.write(found.folder / "work" / "net.pbc")
    deploying.wheels(found.folder / "wheels")
    return found


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return place(tmp_path_factory.mktemp("there"))


def test_a_deploy(here: Place, there: Place) -> None:
    log = there.folder / "calls"
    settings = {k: v for k, v in there.environment.items() if k != "PATH"}
    with sshd.board(there.folder / "work", under=traced.command(log), settings=settings) as board:
        words = ("--wheels", here.folder / "wheels", "--ssh-option", shlex.join(board.options),
                 "--python", deploying.PYTHON)  # fmt: skip
        for command in (
            ("net.pbc", board.destination),
            ("--status", board.destination),
        ):
            trace = here.pbc("deploy", *command, *words)
            assert trace.reached()
            assert not trace.reached(but_by=["ssh", "pip"])
            assert not trace.made_outside(*here.allowed)
            here.expect_clean()
    trace = traced.read(log)
    assert any(board.root.as_posix() in path for _, path in trace.made)
    assert trace.reached()
    assert not trace.reached(but_by=["sshd", "pip"])
    assert not trace.made_outside(*there.allowed, but_by=["sshd"])
    there.expect_clean()


def test_a_pack_and_its_activation(here: Place, there: Place) -> None:
    libc = str(os.confstr("CS_GNU_LIBC_VERSION")).split()[1]
    trace = here.pbc("pack", "net.pbc", "-o", "net.tar", "--wheels", here.folder / "wheels",
                     "--python-version", VERSION, "--libc", libc)  # fmt: skip
    assert not trace.reached(but_by=["pip"])
    assert not trace.made_outside(*here.allowed)
    here.expect_clean()
    archive, work = here.folder / "work" / "net.tar", there.folder / "work"
    subprocess.run(["tar", "-xf", archive, "-C", work], check=True)
    trace = there.run("sh", str(work / "activate.sh"), str(work / "root"))
    assert not trace.reached(but_by=["pip"])
    assert not trace.made_outside(*there.allowed)
    there.expect_clean()
