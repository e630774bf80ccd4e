"""An arm64 board without one: an unpacked arm64 Python and its wheels, run by qemu.

    python tests/emulated/arm64.py                   install and fetch what is missing
    python tests/emulated/arm64.py pbc targets       this checkout's pbc, there
    python tests/emulated/arm64.py python -c '…'     its Python
    python tests/emulated/arm64.py --engine tvm …    with what that engine needs, and no other

What is fetched stays in pbc's cache: the distribution's own arm64 packages, and aarch64 wheels from
the package index. Only the installation of qemu and sshd needs to be root.
"""

from __future__ import annotations

import argparse
import configparser
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from pbc.util.artifacts import default_folder

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = default_folder() / "emulated"  # read at import: tests give the product a cache of their own
CPU = "cortex-a72"
"""A Raspberry Pi 4's: what it does not have (dot products, half precision), qemu refuses."""

EXTRAS = {"onnxruntime": "device", "tvm": "device-tvm"}
"""What a device installs for an engine."""

_QEMU = "qemu-aarch64-static"
_SYSTEM = {_QEMU: "qemu-user-static", "sshd": "openssh-server"}
_PACKAGES = ("python3", "libstdc++6")
_TRIPLE = "aarch64-linux-gnu"
# The oldest C library that a wheel may be made for is the oldest that has arm64.
_OLDEST_GLIBC = 17
_CORES = 4
# qemu shows the processes of the board the files of the machine that it runs on, and onnxruntime
# does not survive an x86's /proc/cpuinfo. What is in the root hides them.
_CPUINFO = """\
processor\t: {core}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

"""
_MODEL = "Model\t\t: Raspberry Pi 4 Model B Rev 1.2\n"
# Not for the device: the compiler comes in the same wheel as the library that the device needs.
_TVM = "apache-tvm"
_TVM_RUNTIME = "tvm/lib/libtvm_runtime.so"


class Missing(Exception):
    """Something that has to be installed first; the message says what, and how."""


@dataclass(frozen=True)
class Board:
    """What can be run as a board that has one engine.

    root: an arm64 system as far as Python needs one. wheels: what is installed there.
    """

    root: Path
    wheels: Path
    qemu: str

    @property
    def tvm_runtime(self) -> Path:
        """Return the library that TVM's artifacts run on, where it is one of this board's."""
        return self.wheels / Path(_TVM_RUNTIME).name

    def command(self, arguments: Sequence[str], pbc: Path) -> tuple[list[str], dict[str, str]]:
        """Return the command and the environment of the board's Python; `pbc` is where pbc is."""
        libraries = [str(self.root / folder / _TRIPLE) for folder in ("lib", "usr/lib")]
        command = [self.qemu, "-L", str(self.root), "-cpu", CPU]
        command += ["-E", f"LD_LIBRARY_PATH={':'.join(libraries)}"]
        command += [str(self.root / "usr" / "bin" / "python3"), *arguments]
        environment = {
            "PBC_UNSIGNED": "1",
            "PATH": os.defpath,
            "LANG": "C.UTF-8",
            "PYTHONHOME": str(self.root / "usr"),
            "PYTHONPATH": f"{pbc}:{self.wheels}",
        }
        if self.tvm_runtime.exists():
            environment["PBC_TVM_RUNTIME"] = str(self.tvm_runtime)
        return command, environment

    def run(
        self, *arguments: object, pbc: Path, cwd: Path, fails: int = 0
    ) -> subprocess.CompletedProcess[str]:
        """Run the board's Python with pbc from a folder; its home and its cache are under `cwd`."""
        command, environment = self.command([str(argument) for argument in arguments], pbc)
        own = {"HOME": str(cwd), "PBC_CACHE": str(cwd / ".cache"), "COLUMNS": "200"}
        result = subprocess.run(
            command,
            cwd=cwd,
            env={**environment, **own},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == fails, f"{result.returncode}: {result.stderr}"
        return result


PBC = ("-c", "from pbc.cli import main; main()")
"""The arguments of Python that make it the `pbc` command."""


def install_system_packages() -> None:
    """Install qemu and sshd where they are missing and this process may; raises Missing."""
    missing = [package for program, package in _SYSTEM.items() if _program(program) is None]
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise Missing(f"{_words(missing)} missing: apt-get install {' '.join(missing)}, as root")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update"], ["install", "-y", "--no-install-recommends", *missing]):
        _call(["apt-get", "-q", *words], environment)


def board(engine: str, *, fetch: bool) -> Board:
    """Return the board with one engine; raises Missing where it is not there and may not be made.

    fetch: fetch what is not in the cache.
    """
    qemu = _program(_QEMU)
    if qemu is None:
        raise Missing(f"{_SYSTEM[_QEMU]} is not installed; make test-device installs it")
    recipe = _digest(_PACKAGES, _cpuinfo())
    root = _kept(CACHE / f"root-{recipe}", _unpack_root, fetch)
    python, glibc = json.loads((root / _FACTS).read_text())
    wanted = requirements(engine)
    wheels = _kept(
        CACHE / f"wheels-{engine}-{_digest(wanted, python, str(glibc))}",
        lambda folder: _unpack_wheels(folder, wanted, python, glibc),
        fetch,
    )
    return Board(root, wheels, qemu)


def requirements(engine: str) -> list[str]:
    """Return what pip installs on a device for one engine, as setup.cfg has it.

    The core's first. The library that TVM's artifacts run on is in one wheel with the compiler,
    which no device needs: it is named last, as `apache-tvm==…`, in the version that compiles here.
    """
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    if EXTRAS[engine] not in extras:
        raise Missing(f"pbc has no extra {EXTRAS[engine]}, which a device with {engine} needs")
    found = [*setup["options"]["install_requires"].split("\n"), *extras[EXTRAS[engine]].split("\n")]
    wanted = [line.strip() for line in found if line.strip() and not _is_tvm(line)]
    if engine == "tvm":
        try:
            wanted.append(f"{_TVM}=={metadata.version(_TVM)}")
        except metadata.PackageNotFoundError as error:
            raise Missing(f"{_TVM} is not installed here, so nothing compiles for it") from error
    return wanted


def _is_tvm(requirement: str) -> bool:
    return re.split(r"[^\w.-]", requirement.strip())[0] == _TVM


# ---- the arm64 system ----------------------------------------------------------------------

_FACTS = "facts.json"


def _unpack_root(folder: Path) -> None:
    """Unpack the distribution's arm64 Python, and give it the look of a board."""
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            raise Missing(f"{program} is missing: the arm64 Python is a Debian's or an Ubuntu's")
    with tempfile.TemporaryDirectory() as apt:
        packages = _download_packages(Path(apt))
        for package in packages:
            _call(["dpkg", "-x", str(package), str(folder)])
    cpus = folder / "sys" / "devices" / "system" / "cpu"
    cpus.mkdir(parents=True)
    for name in ("possible", "present"):
        (cpus / name).write_text(f"0-{_CORES - 1}\n")
    (folder / "proc").mkdir()
    (folder / "proc" / "cpuinfo").write_text(_cpuinfo())
    python = (folder / "usr" / "bin" / "python3").readlink().name.removeprefix("python")
    (glibc,) = {int(found[1]) for file in packages if (found := _LIBC.match(file.name))}
    (folder / _FACTS).write_text(json.dumps([python, glibc]))


_LIBC = re.compile(r"libc6_2\.(\d+)-")


def _download_packages(folder: Path) -> list[Path]:
    """Fetch the packages and all that they need, with a configuration of apt's own."""
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    (folder / "status").touch()
    configuration = {
        "APT::Architecture": "arm64",
        "Dir::State": f"{folder}/state",
        "Dir::State::status": f"{folder}/status",
        "Dir::Cache": f"{folder}/cache",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "true",
    }
    lines = [f'{key} "{value}";' for key, value in configuration.items()]
    (folder / "apt.conf").write_text("\n".join([*lines, 'APT::Architectures { "arm64"; };', ""]))
    environment = {**os.environ, "APT_CONFIG": str(folder / "apt.conf")}
    download = ["install", "-y", "--download-only", "--no-install-recommends", *_PACKAGES]
    for words in (["update"], download):
        _call(["apt-get", "-q", *words], environment)
    return sorted((folder / "cache" / "archives").glob("*.deb"))


def _cpuinfo() -> str:
    return "".join(_CPUINFO.format(core=core) for core in range(_CORES)) + _MODEL


# ---- the wheels ----------------------------------------------------------------------------


def _unpack_wheels(folder: Path, wanted: Sequence[str], python: str, glibc: int) -> None:
    """Install wheels for the board's Python and C library into a folder."""
    minors = range(glibc, _OLDEST_GLIBC - 1, -1)
    platforms = [*(f"manylinux_2_{minor}_aarch64" for minor in minors), "manylinux2014_aarch64"]
    board = ["--python-version", python, "--implementation", "cp", "--only-binary=:all:"]
    board += [word for platform in platforms for word in ("--platform", platform)]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    packages = [requirement for requirement in wanted if not _is_tvm(requirement)]
    _call([*pip, "install", *board, "--no-compile", "--target", str(folder), *packages])
    for tvm in filter(_is_tvm, wanted):
        with tempfile.TemporaryDirectory() as download:
            _call([*pip, "download", *board, "--no-deps", "--dest", download, tvm])
            (wheel,) = Path(download).glob("*.whl")
            with zipfile.ZipFile(wheel) as opened:
                library = folder / Path(_TVM_RUNTIME).name
                library.write_bytes(opened.read(_TVM_RUNTIME))


# ---- what is common ------------------------------------------------------------------------


def _kept(folder: Path, make: Callable[[Path], None], fetch: bool) -> Path:
    """Return a folder of the cache, made whole or not at all."""
    if folder.exists():
        return folder
    if not fetch:
        raise Missing(f"{folder} is not there; make test-device makes it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _tell(f"making {folder} …")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as new:
        make(Path(new) / folder.name)
        (Path(new) / folder.name).rename(folder)
    return folder


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def _call(command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Run a command; raises Missing with the end of what it said where it fails."""
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        said = "\n".join((result.stdout + result.stderr).strip().splitlines()[-5:])
        raise Missing(f"{' '.join(command[:4])} … failed:\n{said}")


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _words(names: Sequence[str]) -> str:
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'}"


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def main() -> int:
    """Do what the module's docstring says; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--engine", choices=EXTRAS, help="the one engine that is there")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="pbc … or python …")
    told = parser.parse_args()
    try:
        install_system_packages()
        if not told.command:
            for engine in [told.engine] if told.engine else EXTRAS:
                board(engine, fetch=True)
            return 0
        if told.command[0] not in ("pbc", "python"):
            parser.error(f"the command is {told.command[0]!r}; expected pbc or python")
        emulated = board(told.engine or "onnxruntime", fetch=True)
    except Missing as error:
        _tell(f"error: {error}")
        return 1
    arguments = [*(PBC if told.command[0] == "pbc" else ()), *told.command[1:]]
    command, environment = emulated.command(arguments, ROOT)
    shared = {name: os.environ[name] for name in ("HOME", "TERM", "COLUMNS") if name in os.environ}
    cache = {"PBC_CACHE": str(CACHE / "board-cache")}
    return subprocess.run(command, env={**shared, **environment, **cache}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
