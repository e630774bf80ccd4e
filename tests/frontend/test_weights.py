from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

from pbc.errors import PbcError
from pbc.frontend.weights import apply, named_as, read

NAMES = ("stem.weight", "fc.weight", "fc.bias", "norm.num_batches_tracked")
PATH = Path("w.safetensors")


def state(*prefixes: str, **more: str) -> dict[str, torch.Tensor]:
    names = [prefix + name for prefix in prefixes for name in NAMES]
    return {name: torch.zeros(1) for name in (*names, *more.values())}


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "backbone.", "state_dict.", "state_dict.model.module."],
)
def test_what_stands_in_front_of_all_names_is_taken_off(prefix: str) -> None:
    got, notes = named_as(NAMES, state(prefix), PATH)
    assert sorted(got) == sorted(NAMES)
    assert all("taken off" in note for note in notes)
    assert notes


def test_wrappers_inside_are_taken_off() -> None:
    got, notes = named_as(NAMES, {"stem.module.weight": torch.zeros(1), **state("")}, PATH)
    assert "stem.module.weight" in got  # two tensors would get one name: left for the check
    assert notes == ()
    for part in ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"):
        inside = {name.replace("stem.", f"stem.{part}."): t for name, t in state("").items()}
        got, notes = named_as(NAMES, inside, PATH)
        assert sorted(got) == sorted(NAMES)
        assert f"{part}." in notes[0]


def test_what_a_wrapper_adds_is_left_out() -> None:
    got, notes = named_as(NAMES, state("module.", a="n_averaged"), PATH)
    assert sorted(got) == sorted(NAMES)
    assert notes == (
        "wrappers' parts of the names in w.safetensors were taken off: module.; 1 tensor outside "
        "of them was left out: n_averaged",
    )


def test_what_is_beside_the_network_is_left_out_and_said() -> None:
    got, (note,) = named_as(NAMES, state("model.", a="epoch", b="optimizer.step"), PATH)
    assert sorted(got) == sorted(NAMES)
    assert note == (
        "'model.' was taken off the names in w.safetensors; "
        "2 tensors without it were left out, 'epoch' first"
    )


def test_names_that_fit_stay() -> None:
    for names in (NAMES, tuple("model." + name for name in NAMES)):
        given = {name: torch.zeros(1) for name in names}
        assert named_as(names, given, PATH) == (given, ())
    given = state("", a="surprise")
    assert named_as(NAMES, given, PATH) == (given, ())


def test_a_path_may_be_missing_in_front() -> None:
    got, (note,) = named_as([f"net.body.{name}" for name in NAMES], state(""), PATH)
    assert sorted(got) == sorted(f"net.body.{name}" for name in NAMES)
    assert note == "'net.body.' was put before the names in w.safetensors"


def test_two_networks_in_a_file_are_refused() -> None:
    with pytest.raises(PbcError, match=r"names under 'student\.' and 'teacher\.'; expected one"):
        named_as(NAMES, state("student.", "teacher."), PATH)


class Versioned(nn.Module):
    """Asks the state which version of the layer wrote it, as torchvision's MNASNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 3)

    def _load_from_state_dict(
        self, state: Any, prefix: str, metadata: dict[str, Any], *rest: Any
    ) -> None:
        if metadata.get("version") != self._version:
            raise ValueError("another version")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_layers_that_ask_for_their_version_get_it() -> None:
    module = Versioned()
    given = {"fc.weight": torch.ones(3, 2), "fc.bias": torch.ones(3)}
    apply(module, given, head=(), path="w.safetensors")
    assert module.fc.weight.eq(1).all()
    assert module.fc.bias.eq(1).all()


def test_a_shared_tensor_is_enough_under_one_of_its_names(tmp_path: Path) -> None:
    def made() -> nn.Module:
        block = nn.Linear(4, 4)
        return nn.Sequential(block, nn.ReLU(), block, nn.Linear(4, 3))

    module, other = made(), made()
    save_model(module, str(tmp_path / "w.safetensors"))
    given, _ = read(tmp_path / "w.safetensors")
    assert len(given) < len(module.state_dict())
    apply(other, given, head=(), path="w.safetensors")
    for name, tensor in module.state_dict().items():
        assert other.state_dict()[name].equal(tensor)


@pytest.mark.parametrize("kind", [torch.int8, torch.complex64])
def test_weights_that_are_no_floats_are_refused(kind: torch.dtype) -> None:
    module = nn.Linear(2, 3)
    given = {"weight": torch.ones(3, 2, dtype=kind), "bias": torch.ones(3, dtype=torch.float64)}
    wanted = rf"weight is {str(kind).removeprefix('torch.')} \(expected float32\)$"
    with pytest.raises(PbcError, match=wanted):
        apply(module, given, head=(), path="w.safetensors")


def test_a_pickle_is_told_by_its_first_bytes(tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save({}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(PbcError, match=r"pickle of torch\.save.* safetensors\.torch\.save_m"):
            read(tmp_path / "w.pt")
