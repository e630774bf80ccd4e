"""Signatures: who may be trusted, what is refused, and that nothing of it is loaded before."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import tiny_onnx
from click.testing import CliRunner, Result

from pbc import bundle
from pbc.bundle import Bundle, signature, trust
from pbc.bundle.keys import generate, read_keys, sign
from pbc.bundle.sealing import add_signature
from pbc.bundle.signature import Signature
from pbc.cli import main
from pbc.errors import PbcError
from pbc.runtime import self_test
from pbc.runtime.output.personal import Personal
from pbc.runtime.runtime import Runtime

Cli = Callable[..., Result]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A folder of two pairs of keys, mine and other; nothing is configured yet."""
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
        generate(tmp_path / name / name)
    return tmp_path


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.delenv("PBC_UNSIGNED")

    def run(*words: object) -> Result:
        return CliRunner().invoke(main, [str(word) for word in words])

    return run


def signed(path: Path, key: Path, serial: int = 1) -> Bundle:
    opened = Bundle.open(path)
    add_signature(opened, sign(key, opened.digest, serial))
    return Bundle.open(path)


@pytest.mark.parametrize("as_folder", [False, True])
def test_who_signed(tmp_path: Path, keys: Path, as_folder: bool) -> None:
    made = tiny.write(tmp_path / "b", as_folder=as_folder)
    signed(made.path, keys / "mine" / "mine.key", 5)
    both = signed(made.path, keys / "other" / "other.key", 7)
    both.verify()
    assert both.digest == made.digest
    mine = read_keys(str(keys / "mine"))
    assert trust.verified(both, mine).serial == 5
    assert trust.verified(both, read_keys(f"{keys / 'mine'}:{keys / 'other'}")).key.name == "other"
    again = signed(made.path, keys / "mine" / "mine.key", 9)
    assert len(trust.signatures_of(again)) == 2
    assert trust.verified(again, mine).serial == 9


def test_a_signature_is_of_this_bundle_and_this_serial(tmp_path: Path, keys: Path) -> None:
    mine = read_keys(str(keys / "mine"))
    one = signed(tiny.write(tmp_path / "one").path, keys / "mine" / "mine.key")
    two = tiny.write(tmp_path / "two", batch=5)
    (made,) = trust.signatures_of(one)
    add_signature(two, made)
    with pytest.raises(PbcError, match=r"wrongly signed: .*'mine'"):
        trust.verified(Bundle.open(two.path), mine)
    add_signature(one, Signature(made.key, made.serial + 1, made.raw))
    with pytest.raises(PbcError, match="wrongly signed"):
        trust.verified(Bundle.open(one.path), mine)


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{}", b'{"format": 2, "signatures": []}', b"\xff" * 70_000,
     b'{"format": 1, "signatures": [{"key": "a", "serial": 1, "signature": "!"}]}',
     b'{"format": 1, "signatures": [{"key": "a", "serial": -1, "signature": "AA=="}]}',
     b'{"format": 1, "signatures": [{"key": "a", "serial": 1, "signature": "AA=="}]}'],
)  # fmt: skip
def test_a_broken_signature(tmp_path: Path, keys: Path, data: bytes) -> None:
    made = tiny.write(tmp_path / "b", as_folder=True)
    (made.path / signature.ENTRY).write_bytes(data)
    with pytest.raises(PbcError, match=r"signature\.json"):
        trust.verified(Bundle.open(made.path), read_keys(str(keys / "mine")))


def test_the_manifest_cannot_name_the_signature(tmp_path: Path) -> None:
    manifest, files = tiny.contents()
    with pytest.raises(PbcError, match=r"names signature\.json, which signs it"):
        bundle.write(tmp_path / "b", manifest, {**files, signature.ENTRY: b"{}"})


def test_every_use_refuses_what_no_key_signed(
    tmp_path: Path, keys: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.write(tmp_path / "b.pbc").path
    photos = tiny.photos(tmp_path / "photos", 2)
    words = ("train", path, photos, "-o", tmp_path / "out", "--epochs", 1, "--threads", 1)
    assert cli(*words, "--costs", tiny.costs(tmp_path / "c.json")).exit_code == 0
    monkeypatch.setenv("PBC_KEYS", str(keys / "mine"))
    out = tmp_path / "out"
    for command in (
        (*words, "--overwrite"), ("eval", out, photos), ("predict", out, photos / "red/000.png"),
        ("export", out, "-o", tmp_path / "m.safetensors"), ("pack", path, "-o", tmp_path / "p.tar"),
        ("deploy", path, "nobody@nowhere.invalid"),
    ):  # fmt: skip
        result = cli(*command)
        assert result.exit_code == 1, result.output
        assert "is not signed" in result.output
        assert len(result.output.splitlines()) == 1
    with pytest.raises(PbcError, match="is not signed"):
        Runtime.open(path)
    with pytest.raises(PbcError, match="is not signed"):
        Personal.open(out)
    assert self_test.main(str(path)) == 1
    inspected = cli("inspect", path)
    assert inspected.exit_code == 0
    assert "signed by" in inspected.output
    assert "nobody" in inspected.output


def test_a_signed_bundle_is_used(
    tmp_path: Path, keys: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.write(tmp_path / "b.pbc").path
    monkeypatch.setenv("PBC_KEYS", str(keys / "mine"))
    assert cli("sign", path, "--key", keys / "mine" / "mine.key", "--serial", 3).exit_code == 0
    assert "signed by mine" in cli("verify", path).output
    assert "mine (key" in cli("inspect", path).output
    Runtime.open(path)
    monkeypatch.setenv("PBC_KEYS", str(keys / "other"))
    result = cli("verify", path)
    assert result.exit_code == 1
    assert "none of your keys (other)" in result.output


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("", "no key is named"),
        ("/none.pub", "cannot read the key /none.pub"),
        ("{}/empty", "holds no *.pub file"),
        ("{}/mine/mine.key", "is no public key"),
        ("{}/mine/mine.pub:/none.pub", "cannot read the key /none.pub"),
    ],
)
def test_a_key_that_cannot_be_read_refuses_too(
    tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch, value: str, said: str
) -> None:
    (keys / "empty").mkdir()
    path = signed(tiny.write(tmp_path / "b.pbc").path, keys / "mine" / "mine.key").path
    monkeypatch.setenv("PBC_KEYS", value.format(keys))
    with pytest.raises(PbcError) as found:
        Runtime.open(path)
    assert said in str(found.value)


def coded(path: Path, library: bytes) -> Path:
    """Write a bundle whose graphs are in a library."""
    manifest, files = tiny_onnx.contents()
    manifest |= {"engine": "tvm", "calls": "calls.json", "weights": {}}
    manifest["graphs"] = dict.fromkeys(manifest["graphs"], "tvm/lib.so")
    return bundle.write(path, manifest, {**files, "calls.json": b"{}", "tvm/lib.so": library}).path


def test_code_runs_signed_or_when_asked_for(
    tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = coded(tmp_path / "b.pbc", b"\x7fELF")
    monkeypatch.delenv("PBC_UNSIGNED")
    with pytest.raises(PbcError, match="holds code for this machine, which nobody vouches for"):
        Runtime.open(path)
    monkeypatch.setenv("PBC_UNSIGNED", "1")
    Runtime.open(path)
    monkeypatch.setenv("PBC_KEYS", str(keys / "mine"))
    with pytest.raises(PbcError, match="is not signed"):
        Runtime.open(path)
    signed(path, keys / "mine" / "mine.key")
    Runtime.open(path)


def test_an_exchanged_library_is_not_even_unpacked(
    tmp_path: Path, keys: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PBC_CACHE", str(tmp_path / "cache"))
    photos = tiny.photos(tmp_path / "photos", 2)
    path = coded(tmp_path / "b.pbc", b"\x7fELF, the owner's")
    signed(path, keys / "mine" / "mine.key")
    (made,) = trust.signatures_of(Bundle.open(path))
    exchanged = coded(tmp_path / "exchanged.pbc", b"\x7fELF, an attacker's")
    words = ("train", exchanged, photos, "-o", tmp_path / "out")
    assert "holds code for this machine" in cli(*words).output
    monkeypatch.setenv("PBC_KEYS", str(keys / "mine"))
    for more in ((), ("--unsigned",)):
        assert "is not signed" in cli(*words, *more).output
    add_signature(Bundle.open(exchanged), made)
    for more in ((), ("--unsigned",)):
        assert "is wrongly signed" in cli(*words, *more).output
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "out").exists()
    monkeypatch.delenv("PBC_KEYS")
    # Asked for, it gets as far as the calls, which are none.
    assert "calls its graphs by format None" in cli(*words, "--unsigned").output


def test_a_key_is_the_owners_alone_and_never_overwritten(keys: Path) -> None:
    assert (keys / "mine" / "mine.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(PbcError, match="is there already"):
        generate(keys / "mine" / "mine")
    shutil.copy(keys / "mine" / "mine.pub", keys / "x.key")
    with pytest.raises(PbcError, match="no private key"):
        sign(keys / "x.key", "00" * 32, 1)
