"""Board side of a deploy: one file that travels alone and needs the standard library only.

`pbc deploy` sends this source through ssh and then speaks with it over the same pipe; a pack brings
it along. What it keeps in the folder of the deploy:

    store/<sha256>              every file by its content; .part while it is copied
    packages/<id>/              what the runtime needs installed, shared by the slots that need it
    slots/<id>/                 one deploy: bundle.pbc/, python/ (with pbc, and a path to packages),
                                lib/, run.py
    current -> slots/<id>       the slot in use: one rename switches, and nothing else does
    bin/pbc, bundle.pbc         stable names: the current slot's pbc, the current slot's bundle

A slot or a folder of packages is complete when its complete marker is there, which is written
last, after all of it is on the disk. What is cut off before the rename of `current` leaves the old
slot as it was.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

FORMAT = 1
# Checks that a user may overrule; without the others nothing would run.
CHECKS = ("memory", "disk", "jetpack", "cuda")
CONNECTION_ENDED = "the connection ended"

_COMPLETE_MARKER = "complete.json"
_CHUNK_BYTES = 1 << 20
_LOCK_SECONDS = 20.0
_SELF_TEST_SECONDS = 1800
# What the kernel and a GPU keep for themselves is missing from what the board says it has.
_MEMORY_SHARE = 0.75
_KEYS = "PBC_KEYS"
_ARCHS = {"amd64": "x86_64", "arm64": "aarch64"}

_RUN = '''\
"""Run the pbc of this slot; the lock tells a prune of old slots that it is in use."""
import fcntl
import os
import sys

slot = os.path.dirname(os.path.abspath(__file__))
in_use = open(os.path.join(slot, "in-use"))
fcntl.flock(in_use, fcntl.LOCK_SH)
for variable, path in {variables!r}.items():
    os.environ.setdefault(variable, os.path.join(slot, path))
os.environ.update({settings!r})
sys.argv[0] = "pbc"
from pbc.cli import main

main()
'''
_LAUNCHER = """\
#!/bin/sh
# Runs the pbc that is active now; it stays on its slot if another becomes active meanwhile.
slot=$(readlink {root}/current) || {{ echo "error: nothing is active in "{root} >&2; exit 1; }}
exec {root}/"$slot"/python/bin/python -I {root}/"$slot"/run.py "$@"
"""


class Refused(Exception):
    """Failure that the user can do something about, in one line."""


# ---- facts ---------------------------------------------------------------------------------


def parse_facts(text: str) -> dict[str, str]:
    """Read what probe.sh prints; lines of a login shell's own are no facts."""
    found = re.findall(r"^([a-z0-9_]+)=(.*)$", text, re.MULTILINE)
    return {name: value.strip() for name, value in found}


def refusals(facts: Mapping[str, str], needs: Mapping[str, Any]) -> dict[str, str]:
    """Compare a board with what a bundle needs: by check, one line with found and needed.

    needs: `arch`, `memory_bytes` (both may be None) and `requires` of the manifest, whose other
    names are packages that the deploy brings along; `python`, the one version that wheels are for.
    """
    requires: Mapping[str, str] = needs["requires"]
    found: dict[str, str] = {}
    if facts.get("system") != "Linux":
        found["system"] = f"it runs {facts.get('system', 'an unknown system')}; needed is Linux"
    python, version = facts.get("python"), facts.get("python_version", "")
    wanted = needs.get("python") or requires.get("python", ">=3.10")
    if not python:
        found["python"] = f"no Python was found; needed is {wanted} (--python names one)"
    elif not (meets(version, wanted) and meets(version, ">=3.10")):
        found["python"] = f"{python} is Python {version}; needed is {wanted} (--python names one)"
    elif facts.get("python_implementation") != "cpython" or facts.get("python_bits") != "64":
        found["python"] = (
            f"{python} is {facts.get('python_implementation')} of {facts.get('python_bits')} bits; "
            "needed is CPython of 64 bits"
        )
    machine = facts.get("machine", "unknown")
    arch = needs.get("arch")
    if arch not in (None, "any", _ARCHS.get(machine, machine)):
        found["arch"] = f"its architecture is {machine}; the bundle is for {arch}"
    libc, wanted_libc = facts.get("libc", ""), requires.get("libc", "glibc")
    if not (libc.startswith("glibc ") and wanted_libc.startswith("glibc")):
        found["libc"] = f"its C library is {libc or 'unknown'}; needed is {wanted_libc}"
    elif not meets(libc.partition(" ")[2], wanted_libc.replace("glibc", "")):
        found["libc"] = f"its C library is {libc}; needed is {wanted_libc}"
    memory, wanted_memory = int(facts.get("memory_kib", 0)) * 1024, needs.get("memory_bytes")
    if memory and wanted_memory and memory < _MEMORY_SHARE * wanted_memory:
        found["memory"] = f"it has {_size(memory)} of memory; the target has {_size(wanted_memory)}"
    for name in ("jetpack", "cuda"):
        if name in requires and not meets(facts.get(name, ""), requires[name]):
            found[name] = f"its {name} is {facts.get(name) or 'none'}; needed is {requires[name]}"
    return found


def meets(version: str, wanted: str) -> bool:
    """Return whether a version is what `>=2.28`, `>=2.9,<3` or `10.2` ask for; all parts must hold.

    A bare version stands for itself and what follows after a dot.
    """
    own = _numbers(version)
    for part in filter(None, (part.strip() for part in wanted.split(","))):
        operator, text = re.match(r"([<>=!]*)\s*(.*)", part).groups()  # type: ignore[union-attr]
        other = _numbers(text)
        width = max(len(own), len(other))
        a, b = (numbers + (0,) * (width - len(numbers)) for numbers in (own, other))
        holds = {
            "": own[: len(other)] == other,
            "==": own[: len(other)] == other,
            "!=": a != b,
            ">=": a >= b,
            "<=": a <= b,
            ">": a > b,
            "<": a < b,
        }
        if not own or not holds.get(operator, False):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


def _size(count: float) -> str:
    if count >= 2**20:
        return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
    return f"{count / 2**10:.0f} KiB"


# ---- where files come from -----------------------------------------------------------------


class Source(Protocol):
    """Origin of a deploy: it is told of each step, and has the files."""

    def step(self, name: str) -> None:
        """Announce the next step; raises Refused where the connection is gone."""

    def fetch(self, store: Store, missing: Sequence[Mapping[str, Any]]) -> None:
        """Put files into the store."""


class Link:
    """Far end of an ssh connection: JSON lines, and the bytes of files after their line.

    Each step waits to be told to go on, so that nothing goes on alone once the connection is cut.
    """

    def __init__(self, read: BinaryIO, write: BinaryIO) -> None:
        self._read, self._write = read, write

    def tell(self, **message: Any) -> None:
        self._write.write(json.dumps(message).encode() + b"\n")
        self._write.flush()

    def step(self, name: str) -> None:
        self.tell(step=name)
        self.line()

    def line(self) -> Any:
        line = self._read.readline()
        if not line.endswith(b"\n"):
            raise Refused(CONNECTION_ENDED)
        return json.loads(line)

    def fetch(self, store: Store, missing: Sequence[Mapping[str, Any]]) -> None:
        wanted = {file["sha256"]: file for file in missing}
        self.tell(missing=[store.progress(sha256) for sha256 in wanted])
        for _ in wanted:
            header = self.line()
            file = wanted[header["sha256"]]
            store.receive(self._read, file, header["offset"])


class Folder:
    """An unpacked archive: files lie beside, by their sha256."""

    def __init__(self, files: Path) -> None:
        self._files = files

    def step(self, name: str) -> None:
        sys.stdout.write(f"{name} …\n")
        sys.stdout.flush()

    def fetch(self, store: Store, missing: Sequence[Mapping[str, Any]]) -> None:
        for file in missing:
            path = self._files / file["sha256"]
            if not path.is_file():
                raise Refused(f"the archive lacks {file['path']}: unpack it again")
            with path.open("rb") as source:
                store.receive(source, file, 0)


class Store:
    """Files by their content. What is not the content that its name says is none."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, sha256: str) -> Path:
        return self.root / sha256

    def missing(self, files: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return those that are not here, each once; what was damaged since it came is not here."""
        found = {}
        for file in files:
            path = self.path(file["sha256"])
            if path.is_file() and sha256_of(path) != file["sha256"]:
                path.unlink()
            if not path.is_file():
                found[file["sha256"]] = file
        return list(found.values())

    def progress(self, sha256: str) -> dict[str, Any]:
        """Return how much of a file came before a connection was cut, and the hash of that."""
        part = self._part(sha256)
        if not part.is_file():
            return {"sha256": sha256, "offset": 0, "so_far": ""}
        return {"sha256": sha256, "offset": part.stat().st_size, "so_far": sha256_of(part)}

    def receive(self, source: BinaryIO, file: Mapping[str, Any], offset: int) -> None:
        """Append a file's bytes from `offset` on; it gets its name once its hash is right."""
        sha256, size = file["sha256"], file["size"]
        self.root.mkdir(parents=True, exist_ok=True)
        part = self._part(sha256)
        with part.open("ab") as target:
            target.truncate(offset)
            left = size - offset
            while left > 0:
                chunk = source.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise Refused(CONNECTION_ENDED)
                try:
                    target.write(chunk)
                    target.flush()
                except OSError:
                    # A full disk: what came is not worth the room.
                    part.unlink()
                    raise
                left -= len(chunk)
            os.fsync(target.fileno())
        if sha256_of(part) != sha256:
            part.unlink()
            raise Refused(f"{file['path']} arrived damaged: deploy again")
        part.replace(self.path(sha256))
        _sync_folder(self.root)

    def place(self, file: Mapping[str, Any], path: Path) -> None:
        """Give a file a name: a hard link costs no room, a copy works everywhere."""
        path.parent.mkdir(parents=True, exist_ok=True)
        source = self.path(file["sha256"])
        try:
            os.link(source, path)
        except OSError:
            shutil.copyfile(source, path)

    def _part(self, sha256: str) -> Path:
        return self.root / f"{sha256}.part"


# ---- slots ---------------------------------------------------------------------------------


class DeploymentRoot:
    """Folder of all deploys on this board, with the slots and what they share."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = Store(root / "store")
        self.slots = root / "slots"
        self.packages = root / "packages"
        self._lock: BinaryIO | None = None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder; what a killed deploy started may hold it a little longer."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "lock").open("ab") as lock:
            deadline = time.monotonic() + _LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise Refused(f"another deploy to {self.root} is running") from None
                    time.sleep(0.2)
            self._lock = lock
            yield
            self._lock = None

    def current(self) -> Path | None:
        """Return the active slot."""
        try:
            slot = self.root / (self.root / "current").readlink()
        except OSError:
            return None
        return slot if _is_complete(slot) else None

    def previous(self, slot: Path | None) -> Path | None:
        """Return the slot that was active before this one, if it is still here."""
        if slot is None:
            return None
        try:
            before = self.slots / (slot / "previous").read_text().strip()
        except OSError:
            return None
        return before if _is_complete(before) else None

    def install(self, plan: Mapping[str, Any], source: Source) -> dict[str, Any]:
        """Make a plan's slot and, once it has passed its self-test, the active one."""
        if plan["format"] != FORMAT:
            raise Refused(f"this is a deploy of format {plan['format']}; expected {FORMAT}")
        files = [*plan["slot"], *plan["wheels"]]
        packages = self.packages / _name([plan["wheels"], sys.executable, sys.version])
        slot = self.slots / _name([plan["slot"], plan["variables"], packages.name])
        first = [*plan["wheels"], *filter(_vouches, plan["slot"])]
        with self.locked():
            source.step("compare")
            self._refuse_small_disk(plan, self.store.missing(files), packages)
            source.fetch(self.store, self.store.missing(first))
            if not _is_complete(packages):
                source.step("packages")
                self._install(packages, plan)
            active = self.current()
            if not _is_complete(slot):
                source.step("slot")
                self._make_slot(slot, packages, plan, first)
            try:
                # Nothing else of a bundle comes here before somebody vouches for it.
                source.step("signature")
                signed = self._run_in(slot, "the signature", ["--signature"])
                # Verified on the board where it has keys, else as whoever deployed read it.
                serial = signed.get("serial", plan["about"].get("serial"))
                if not plan.get("allow_older"):
                    _refuse_older(serial, active)
                source.fetch(self.store, self.store.missing(files))
                self._place(slot, plan["slot"])
                source.step("self-test")
                outcome = self._self_test(slot)
            except (Refused, OSError, subprocess.TimeoutExpired):
                if slot != active:
                    _remove(slot)  # the next deploy makes it anew
                raise
            if not _is_complete(slot):
                source.step("mark complete")
                stored = [file["sha256"] for file in files]
                about = {**plan["about"], "serial": serial}
                _mark_complete(slot, {**about, "packages": packages.name, "files": stored})
            if active != slot:
                source.step("switch")
                self._activate(slot, active)
            source.step("prune")
            self._prune()
        return {
            "slot": slot.name,
            "changed": active != slot,
            "previous": active.name if active not in (None, slot) else None,
            "self_test": outcome,
        }

    def rollback(self, source: Source) -> dict[str, Any]:
        """Make the previous slot active again, if it still passes its self-test."""
        if not self.root.is_dir():
            raise Refused(f"nothing was deployed to {self.root}")
        with self.locked():
            active = self.current()
            before = self.previous(active)
            if before is None:
                raise Refused(f"{self.root} has no previous version to go back to")
            source.step("self-test")
            outcome = self._self_test(before)
            source.step("switch")
            self._activate(before, active)
        assert active is not None
        return {"slot": before.name, "previous": active.name, "self_test": outcome}

    def status(self) -> dict[str, Any]:
        """Return what is active, what was before, and what was left half-made."""
        active = self.current()
        before = self.previous(active)
        half = [
            entry.relative_to(self.root).as_posix()
            for folder in (self.slots, self.packages)
            for entry in _entries(folder)
            if not _is_complete(entry)
        ]
        parts = [
            {"file": part.name, "bytes": part.stat().st_size}
            for part in _entries(self.store.root)
            if part.suffix == ".part"
        ]
        return {
            "folder": str(self.root),
            "current": active and _summary(active),
            "previous": before and _summary(before),
            "half_made": half,
            "half_copied": parts,
            "running": self._is_locked(),
        }

    def _is_locked(self) -> bool:
        try:
            with (self.root / "lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def _refuse_small_disk(
        self, plan: Mapping[str, Any], missing: Sequence[Mapping[str, Any]], packages: Path
    ) -> None:
        needed = sum(
            file["size"] - self.store.progress(file["sha256"])["offset"] for file in missing
        )
        if not _is_complete(packages):
            needed += plan["installed_bytes"]
        free = shutil.disk_usage(self.root).free
        if needed > free and "disk" not in plan["ignore"]:
            raise Refused(
                f"{self.root} has {_size(free)} of disk left; the deploy needs {_size(needed)}"
            )

    def _install(self, folder: Path, plan: Mapping[str, Any]) -> None:
        """Install the wheels; the board's own pip, index and settings have no part in it.

        Bytecode is left to the first import: for all modules it takes a small board minutes.
        """
        _remove(folder)
        wheels = folder / "wheels"
        for file in plan["wheels"]:
            self.store.place(file, wheels / file["path"])
        (pip,) = wheels.glob("pip-*.whl")
        # /tmp may be a small memory disk, and what a killed pip leaves there stays.
        unpacking = folder / "unpacking"
        unpacking.mkdir()
        self._call(
            "pip",
            [
                sys.executable, "-I", str(pip / "pip"), "install", "--isolated", "--no-index",
                "--find-links", str(wheels), "--target", str(folder / "site"), "--no-compile",
                "--no-cache-dir", "--no-input", "--disable-pip-version-check", "--quiet",
                *plan["install"],
            ],
            {"TMPDIR": str(unpacking)},
        )  # fmt: skip
        _remove(wheels)
        _remove(unpacking)
        _mark_complete(folder, {})

    def _make_slot(
        self,
        slot: Path,
        packages: Path,
        plan: Mapping[str, Any],
        files: Sequence[Mapping[str, Any]],
    ) -> None:
        """Make all of a slot but what belongs to its bundle and vouches for nothing."""
        _remove(slot)
        self._place(slot, [file for file in plan["slot"] if file in files])
        # Debian keeps what venv needs to install a pip in a package of its own.
        own = slot / "python"
        self._call("venv", [sys.executable, "-I", "-m", "venv", "--without-pip", str(own)])
        (site,) = own.glob("lib/python3*/site-packages")
        shutil.unpack_archive(slot / plan["own"], site, "zip")
        (site / "packages.pth").write_text(f"{packages / 'site'}\n")
        (slot / "in-use").write_bytes(b"")
        (slot / "run.py").write_text(
            _RUN.format(variables=dict(plan["variables"]), settings=dict(plan.get("settings", {})))
        )
        (slot / "variables.json").write_text(json.dumps(plan["variables"]))
        (slot / "settings.json").write_text(json.dumps(plan.get("settings", {})))

    def _place(self, slot: Path, files: Sequence[Mapping[str, Any]]) -> None:
        for file in files:
            if not (slot / file["path"]).exists():
                self.store.place(file, slot / file["path"])

    def _self_test(self, slot: Path) -> dict[str, Any]:
        return self._run_in(slot, "the self-test", [])

    def _run_in(self, slot: Path, what: str, words: Sequence[str]) -> dict[str, Any]:
        """Let the pbc of a slot look at its bundle; return what it prints."""
        variables = json.loads((slot / "variables.json").read_text())
        settings = slot / "settings.json"  # a slot of an older pbc has none
        own = json.loads(settings.read_text()) if settings.exists() else {}
        printed = self._call(
            what,
            [
                str(slot / "python" / "bin" / "python"), "-I", "-m",
                "pbc.runtime.self_test", *words, str(slot / "bundle.pbc"),
            ],
            {
                # Keys that the board has of its own are not replaced by those that come along.
                name: os.environ.get(name, str(slot / path)) if name == _KEYS else str(slot / path)
                for name, path in variables.items()
            }
            | own,
        )  # fmt: skip
        outcome: dict[str, Any] = json.loads(printed.splitlines()[-1])
        return outcome

    def _call(self, what: str, words: list[str], variables: Mapping[str, str] = {}) -> str:
        """Run a program to its end and return what it printed; `what` names it in messages.

        It inherits the lock: if this process is killed, no other deploy starts before it ends.
        """
        assert self._lock is not None
        own = {n: v for n, v in os.environ.items() if not n.startswith(("PIP_", "PYTHON"))}
        result = subprocess.run(
            words,
            env={**own, "PIP_CONFIG_FILE": os.devnull, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            pass_fds=[self._lock.fileno()],
            timeout=_SELF_TEST_SECONDS,
            check=False,
        )
        if result.returncode == 0:
            return result.stdout
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.lower().startswith("error:")]
        if result.returncode < 0:
            name = signal.Signals(-result.returncode).name
            why = "; the kernel does so when memory is short" if name == "SIGKILL" else ""
            raise Refused(f"{what} was ended by {name}{why}")
        last = (errors or lines or [f"{what} ended with {result.returncode}"])[-1]
        raise Refused(re.sub("(?i)^error: ?", "", last.strip()))

    def _activate(self, slot: Path, active: Path | None) -> None:
        """Switch: the rename of `current` is the one moment in which anything changes."""
        if active is not None:
            _write(slot / "previous", active.name)
        root = shlex.quote(str(self.root))
        _write(self.root / "bin" / "pbc", _LAUNCHER.format(root=root), mode=0o755)
        _link(self.root / "bundle.pbc", Path("current", "bundle.pbc"))
        os.sync()
        _link(self.root / "current", Path("slots", slot.name))

    def _prune(self) -> None:
        """Remove what neither the active slot nor the one before needs, nor a running pbc."""
        active = self.current()
        kept = [slot for slot in (active, self.previous(active)) if slot is not None]
        for slot in _entries(self.slots):
            if slot not in kept:
                if _is_in_use(slot):
                    kept.append(slot)
                else:
                    _remove(slot)
        needed = {_described(slot)["packages"] for slot in kept}
        for packages in _entries(self.packages):
            if packages.name not in needed:
                _remove(packages)
        files = {sha256 for slot in kept for sha256 in _described(slot)["files"]}
        for file in _entries(self.store.root):
            if file.name not in files:
                file.unlink()


def _vouches(file: Mapping[str, Any]) -> bool:
    """Return whether a file of a slot is needed to tell who signed the bundle."""
    folder, _, name = file["path"].partition("/")
    return folder != "bundle.pbc" or name in ("manifest.json", "signature.json")


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _is_in_use(slot: Path) -> bool:
    try:
        with (slot / "in-use").open("rb") as in_use:
            fcntl.flock(in_use, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _is_complete(folder: Path) -> bool:
    return (folder / _COMPLETE_MARKER).is_file()


def _mark_complete(folder: Path, about: Mapping[str, Any]) -> None:
    os.sync()
    _write(folder / _COMPLETE_MARKER, json.dumps(about))


def _described(slot: Path) -> dict[str, Any]:
    try:
        about = json.loads((slot / _COMPLETE_MARKER).read_text())
    except (OSError, ValueError):
        about = {"files": [], "packages": ""}
    return {"slot": slot.name, **about}


def _refuse_older(serial: int | None, active: Path | None) -> None:
    """Refuse a bundle that was signed before the active one."""
    newest = None if active is None else _described(active).get("serial")
    if newest is not None and (serial is None or serial < newest):
        was = "none" if serial is None else serial
        raise Refused(
            f"the bundle is older than the active one: its serial is {was}, the active one's is "
            f"{newest} (--allow-older activates it all the same)"
        )


def _summary(slot: Path) -> dict[str, Any]:
    return {name: value for name, value in _described(slot).items() if name != "files"}


def _remove(folder: Path) -> None:
    """Remove a slot or packages: without its complete marker first, it is none from then on."""
    if folder.exists():
        (folder / _COMPLETE_MARKER).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    """Replace a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())
    new.replace(path)
    _sync_folder(path.parent)


def _link(path: Path, target: Path) -> None:
    """Replace a symbolic link in one step."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _name(content: Any) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---- entry ---------------------------------------------------------------------------------


def _one_line(error: Exception, root: Path) -> str:
    if isinstance(error, OSError):
        return f"cannot write to {root}: {error.strerror or error}"
    return str(error)


def serve(read: BinaryIO, write: BinaryIO) -> int:
    """Do what the first line asks for; the last line that is told has the result or the error."""
    link = Link(read, write)
    request = link.line()
    root = Path(request["root"]).expanduser().absolute()
    deployment = DeploymentRoot(root)
    link.tell(process=os.getpid())
    try:
        if request["command"] == "install":
            result = deployment.install(request["plan"], link)
        elif request["command"] == "rollback":
            result = deployment.rollback(link)
        else:
            result = deployment.status()
        link.tell(result=result)
    except BrokenPipeError:
        return 1
    except (Refused, OSError, subprocess.TimeoutExpired) as error:
        link.tell(error=_one_line(error, root))
        return 1
    return 0


def activate(archive: Path, root: Path) -> int:
    """Install an unpacked archive into `root`; facts come by stdin, as probe.sh prints them."""
    plan = json.loads((archive / "plan.json").read_text())
    found = refusals(parse_facts(sys.stdin.read()), plan["needs"])
    for line in found.values():
        sys.stderr.write(f"error: {line}\n")
    if found:
        return 1
    try:
        result = DeploymentRoot(root.absolute()).install(plan, Folder(archive / "files"))
    except (Refused, OSError, subprocess.TimeoutExpired) as error:
        sys.stderr.write(f"error: {_one_line(error, root)}\n")
        return 1
    sys.stdout.write(f"active: {result['slot']}; run {root.absolute()}/bin/pbc\n")
    return 0


if __name__ == "__main__":
    if len(sys.argv) == 3:
        sys.exit(activate(Path(sys.argv[1]), Path(sys.argv[2])))
    sys.exit(serve(sys.stdin.buffer, sys.stdout.buffer))
