"""What a bundle says of the machine that compiled it, and what stays there."""

from __future__ import annotations

import hashlib
from pathlib import Path

import bench_net
import pytest

from pbc.frontend.origin import Origin, nameless, search_path, weights_named


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["compile", "resnet50"], ["compile", "resnet50"]),
        (["compile", "hf-hub:owner/net"], ["compile", "hf-hub:owner/net"]),
        (["compile", "/home/anna/nets/mine.py:factory"], ["compile", "mine.py:factory"]),
        (["--weights", "../anna/w.safetensors"], ["--weights", "w.safetensors"]),
        (["--weights=/home/anna/w.safetensors"], ["--weights=w.safetensors"]),
        (["--data", "anna at the sea", "--levels", "2"], ["--data", "DATA", "--levels", "2"]),
        (["--data=~anna/sea"], ["--data=DATA"]),
        (["--calibration", "/photos/anna.zip"], ["--calibration", "IMAGES"]),
        (["--dump-ir", "/home/anna/ir", "-o", "out/of/net.pbc"],
         ["--dump-ir", "DIR", "-o", "net.pbc"]),
        (["--bundle", "a=/home/anna/a.pbc"], ["--bundle", "a=a.pbc"]),
        (["--blocks", "layers.*"], ["--blocks", "layers.*"]),
    ],
)  # fmt: skip
def test_a_command_is_told_without_folders(words: list[str], told: list[str]) -> None:
    assert nameless(words) == told


def test_a_bundle_holds_no_folder_of_the_machine_that_compiled_it(tmp_path: Path) -> None:
    secret = tmp_path / "anna-private"
    bundle = bench_net.compiled(secret / "net")
    assert "anna-private" not in bundle.manifest["model"]
    for file in bundle.manifest["files"]:
        assert b"anna-private" not in bytes(bundle.read(file)), file
    assert b"anna-private" not in bundle.path.read_bytes()
    origin = Origin.load(bundle.path, bundle.digest)
    assert origin.model.startswith(str(secret.resolve()))
    beside = bundle.path.with_name(f".{bundle.path.name}.origin.json")
    assert beside.stat().st_mode & 0o777 == 0o600


def test_an_origin_is_of_one_bundle(tmp_path: Path) -> None:
    path, weights = tmp_path / "m.pbc", tmp_path / "w.safetensors"
    weights.write_bytes(b"w")
    Origin.of("digest", "net.py:factory", str(weights)).save(path)
    assert Origin.load(path, "digest").weights == str(weights.resolve())
    assert Origin.load(path, "digest").model.endswith("net.py:factory")
    assert Origin.load(path, "another") == Origin("another")
    Origin.of("digest", "resnet50", "random").save(path)
    assert Origin.load(path, "digest") == Origin("digest")
    assert not (tmp_path / ".m.pbc.origin.json").exists()


def test_weights_are_found_by_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, content in (("a", b"other"), ("b", b"right")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "w.safetensors").write_bytes(content)
    renamed = tmp_path / "b" / "renamed.safetensors"
    renamed.write_bytes(b"right")
    monkeypatch.setenv("PBC_WEIGHTS", f"{tmp_path / 'a'}:{tmp_path / 'b'}")
    digest = hashlib.sha256(b"right").hexdigest()
    found = list(weights_named("w.safetensors", digest, search_path()))
    assert found == [tmp_path / "b" / "w.safetensors", renamed]
    assert list(weights_named("w.safetensors", "0" * 64, [renamed, tmp_path / "none"])) == []
