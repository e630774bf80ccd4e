"""Collect wheels for a board that is not this machine, and keep them for the next one like it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pbc.errors import PbcError
from pbc.util.artifacts import Artifacts, default_folder

# pip evaluates markers for the machine that it runs on, whatever --platform says; a dependency for
# another Python or architecture would be missing on the board, or too much.
_PIP = """
import json, sys
from pip._vendor.packaging import markers
board, own = json.loads(sys.argv.pop(1)), markers.default_environment
markers.default_environment = lambda: {**own(), **board}
from pip._internal.cli.main import main
sys.exit(main())
"""
_OLDEST_GLIBC = 17
_LEGACY = {17: ("manylinux2014",), 12: ("manylinux2010",), 5: ("manylinux1",)}
_OLDEST = {"x86_64": 5}
# Bytecode that pip writes, and the environment itself.
_INSTALLED_SHARE, _ENVIRONMENT_BYTES = 1.3, 16 * 2**20


@dataclass(frozen=True)
class BoardPython:
    """Python of a board, by which wheels are chosen: its version and abi, architecture, glibc."""

    version: str
    abi: str
    arch: str
    glibc: tuple[int, int]

    @property
    def platforms(self) -> list[str]:
        """Return the tags of wheels that run there, the newest first."""
        tags = []
        for minor in range(self.glibc[1], _OLDEST.get(self.arch, _OLDEST_GLIBC) - 1, -1):
            tags.append(f"manylinux_2_{minor}_{self.arch}")
            tags += [f"{old}_{self.arch}" for old in _LEGACY.get(minor, ())]
        return [*tags, f"linux_{self.arch}"]

    @property
    def markers(self) -> dict[str, str]:
        return {
            "implementation_name": "cpython",
            "os_name": "posix",
            "platform_machine": self.arch,
            "platform_python_implementation": "CPython",
            "platform_system": "Linux",
            "python_full_version": f"{self.version}.0",
            "python_version": self.version,
            "sys_platform": "linux",
        }

    def __str__(self) -> str:
        return f"Python {self.version} on {self.arch} with glibc {'.'.join(map(str, self.glibc))}"


def collect(
    requirements: Sequence[str],
    python: BoardPython,
    *,
    wheels: Path | None = None,
    offline: bool = False,
    dependencies: bool = True,
) -> list[Path]:
    """Return the wheels that the requirements and all that they require come down to.

    wheels: a folder to take them from, and nowhere else; without it they come from pip's index.
    What was collected is kept, and collected again only where what is asked for changes; offline
    it has to be there. With dependencies, pip is among them: it installs them.
    """
    wanted = ["pip", *requirements] if dependencies else ["--no-deps", *requirements]
    if wheels is not None and not wheels.is_dir():
        raise PbcError(f"no folder of wheels at {wheels}")

    def make(folder: Path) -> None:
        if wheels is not None:
            _download(wanted, python, folder, ["--no-index", "--find-links", str(wheels)])
        elif offline:
            raise PbcError(
                f"no wheels for {python} were collected here yet: leave --offline out once, "
                "or name a folder that has them with --wheels"
            )
        else:
            _download(wanted, python, folder, [])

    facts = [wanted, python.platforms, python.version, python.abi, _listing(wheels)]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    try:
        folder = Artifacts(default_folder() / "wheels").get(key, make)
    except OSError as error:
        raise PbcError(f"cannot keep wheels in $PBC_CACHE: {error.strerror or error}") from error
    return sorted(folder.glob("*.whl"))


def _listing(folder: Path | None) -> list[list[str | int]] | None:
    if folder is None:
        return None
    files = sorted(folder.glob("*.whl"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def installed_bytes(wheels: Sequence[Path]) -> int:
    """Estimate the bytes that an environment with these wheels takes on a disk."""
    total = 0
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            total += sum(entry.file_size for entry in archive.infolist())
    return int(total * _INSTALLED_SHARE) + _ENVIRONMENT_BYTES


def _download(
    requirements: Sequence[str], python: BoardPython, folder: Path, options: Sequence[str]
) -> None:
    platforms = [word for tag in python.platforms for word in ("--platform", tag)]
    result = subprocess.run(
        [
            sys.executable, "-c", _PIP, json.dumps(python.markers), "download",
            "--disable-pip-version-check", "--no-input", "--quiet", "--only-binary", ":all:",
            "--dest", str(folder), *platforms, "--implementation", "cp",
            "--python-version", python.version, "--abi", python.abi, *options, *requirements,
        ],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    if result.returncode != 0:
        raise PbcError(f"cannot collect wheels for {python}: {_reason(result.stderr)}")


def _reason(stderr: str) -> str:
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR:")]
    lines = errors or [line for line in stderr.splitlines() if line.strip()] or ["pip failed"]
    if "No module named pip" in lines[-1]:
        return "pip is not installed here"
    # The first names what was looked for and what there is.
    return lines[0].removeprefix("ERROR:").strip()


def board_python(facts: Mapping[str, str]) -> BoardPython:
    """Read the Python of a board from its facts."""
    machine = facts["machine"]
    major, minor = facts["libc"].partition(" ")[2].split(".")[:2]
    return BoardPython(
        version=facts["python_version"],
        abi=f"cp{facts['python_abi']}",
        arch={"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine),
        glibc=(int(major), int(minor)),
    )
