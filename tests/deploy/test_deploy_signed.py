"""Boards that have keys: what they refuse, before anything of a bundle comes there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import deploying
import pytest
import wheelhouse

from pbc.bundle import Bundle
from pbc.bundle.keys import generate, sign
from pbc.bundle.sealing import add_signature
from pbc.deploy import board
from pbc.deploy.pack import PackOptions, pack
from pbc.errors import PbcError

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
LIBC = os.confstr("CS_GNU_LIBC_VERSION").split()[1]  # type: ignore[union-attr]


class Boards:
    """Packs of signed bundles, and boards with keys of their own."""

    def __init__(self, work: Path) -> None:
        self.work = work
        wanted = (*deploying.RUNTIME, "cryptography", "cffi", "pycparser")
        self.wheels = wheelhouse.fill(work / "wheels", wanted)
        for name in ("mine", "other"):
            (work / name).mkdir()
            generate(work / name / name)

    def packed(self, serial: int, signer: str = "mine", *, allow_older: bool = False) -> Path:
        """Return an unpacked archive of a bundle that a key signed under a serial."""
        name = f"{signer}-{serial}-{allow_older}"
        bundle = deploying.write(self.work / f"{name}.pbc", serial)
        key = self.work / signer / f"{signer}.key"
        add_signature(bundle, sign(key, bundle.digest, serial))
        options = PackOptions(
            python=VERSION, libc=LIBC, wheels=self.wheels, trust=(str(self.work / signer),),
            allow_older=allow_older,
        )  # fmt: skip
        pack(bundle.path, self.work / f"{name}.tar", options)
        folder = self.work / name
        folder.mkdir()
        subprocess.run(["tar", "-xf", self.work / f"{name}.tar", "-C", folder], check=True)
        return folder

    def activate(self, archive: Path, root: Path) -> str:
        """Activate on a board that trusts `mine`; return the line of the error, or ""."""
        result = subprocess.run(
            ["sh", archive / "activate.sh", root],
            env={"PATH": "/usr/bin:/bin", "PYTHON": deploying.PYTHON, "HOME": str(self.work),
                 "PBC_KEYS": str(self.work / "mine")},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (result.returncode == 0) == (result.stderr == "")
        return result.stderr.strip()


@pytest.fixture(scope="module")
def boards(tmp_path_factory: pytest.TempPathFactory) -> Boards:
    return Boards(tmp_path_factory.mktemp("boards"))


def active(root: Path) -> str:
    return Bundle.open(root / "bundle.pbc").digest


def test_an_older_bundle_is_activated_when_asked_for_alone(
    boards: Boards, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = boards.work / "board"
    assert boards.activate(boards.packed(5), root) == ""
    newest = active(root)
    assert boards.activate(boards.packed(3), root) == (
        "error: the bundle is older than the active one: its serial is 3, the active one's is 5 "
        "(--allow-older activates it all the same)"
    )
    assert active(root) == newest
    assert board.DeploymentRoot(root).status()["half_made"] == []
    assert boards.activate(boards.packed(3, allow_older=True), root) == ""
    older = active(root)
    assert older != newest
    # Back, and back again: no serial stops that.
    monkeypatch.setenv("PBC_KEYS", str(boards.work / "mine"))
    for expected in (newest, older):
        board.DeploymentRoot(root).rollback(board.Folder(root))
        assert active(root) == expected
    monkeypatch.setenv("PBC_KEYS", str(boards.work / "other"))
    with pytest.raises(board.Refused, match="none of your keys"):
        board.DeploymentRoot(root).rollback(board.Folder(root))


def test_nothing_of_a_bundle_comes_before_its_signature(boards: Boards) -> None:
    root, archive = boards.work / "another", boards.packed(7, "other")
    assert "is signed by" in boards.activate(archive, root)
    plan = json.loads((archive / "plan.json").read_text())
    stored = {path.name for path in (root / "store").iterdir()}
    came = {file["path"] for file in plan["slot"] if file["sha256"] in stored}
    bundle = {path for path in came if path.startswith("bundle.pbc/")}
    assert bundle == {"bundle.pbc/manifest.json", "bundle.pbc/signature.json"}
    assert not (root / "current").exists()
    assert list((root / "slots").iterdir()) == []


def test_a_pack_of_what_no_key_signed(boards: Boards) -> None:
    bundle = deploying.write(boards.work / "unsigned.pbc", 9)
    options = PackOptions(
        python=VERSION, libc=LIBC, wheels=boards.wheels, trust=(str(boards.work / "mine"),)
    )
    with pytest.raises(PbcError, match="is not signed"):
        pack(bundle.path, boards.work / "unsigned.tar", options)
