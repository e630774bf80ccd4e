"""Weights: a safetensors file is read, its names are brought to the model's, and loaded."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pbc.errors import PbcError

State = Mapping[str, Tensor]

# What DataParallel, torch.compile, FSDP and activation checkpoints put into the names of what they
# wrap, at any depth.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_DEPTH = 3
# How a zip file of torch.save begins, and a pickle of its own.
_PICKLES = (b"PK", b"\x80\x02")


def read(path: Path) -> tuple[State, str]:
    """Return a file's tensors, float16 as float32, and its SHA-256; raises PbcError."""
    if not path.is_file():
        raise PbcError(
            f"no weights file {path}; expected a .safetensors file, 'default' or 'random'"
        )
    try:
        state = load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise PbcError(f"{path} is not a readable safetensors file: {_why(path, error)}") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {name: t.float() if t.is_floating_point() else t for name, t in state.items()}, digest


def _why(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(2)
    if start not in _PICKLES:
        return str(error)
    return (
        "it looks like a pickle of torch.save, which may run any code when it is read; convert it "
        'where you trust it, by safetensors.torch.save_model(model, "w.safetensors")'
    )


def named_as(expected: Collection[str], state: State, path: Path) -> tuple[State, tuple[str, ...]]:
    """Return the tensors under the model's names, and a note where the file's own are others.

    Taken off is what wrappers and checkpoints put in front: `module.`, `_orig_mod.`, `model.`,
    `state_dict.model.` and whatever else stands before names that the model has; put in front is
    the path at which the model holds a network that the file names from its own root. Raises
    PbcError where two parts of the file fit equally well.
    """
    wanted = frozenset(name for name in expected if _counts(name))
    state, unwrapped = _without_wrappers(wanted, state)
    notes = []
    if unwrapped:
        notes.append(f"wrappers' parts of the names in {path.name} were taken off: {unwrapped}")
    matches = Counter({"": sum(name in wanted for name in state)})
    for name in state:
        for prefix in _prefixes(name):
            matches[prefix] += name.removeprefix(prefix) in wanted
    most = max(matches.values())
    best = [prefix for prefix, count in matches.items() if count == most and most]
    if most > matches[""]:
        if len(best) > 1:
            shown = " and ".join(map(repr, sorted(best)[:3]))
            raise PbcError(
                f"{path} holds tensors for the model's names under {shown}; expected one network"
            )
        prefix = best[0]
        rest = sorted(name for name in state if not name.startswith(prefix))
        state = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        left = f"; {len(rest)} tensors without it were left out, {rest[0]!r} first" if rest else ""
        notes.append(f"{prefix!r} was taken off the names in {path.name}{left}")
    elif not most:
        inner = Counter(p for name in wanted for p in _prefixes(name) if name[len(p) :] in state)
        if inner:
            prefix = max(inner, key=lambda p: (inner[p], -len(p)))
            state = {prefix + name: tensor for name, tensor in state.items()}
            notes.append(f"{prefix!r} was put before the names in {path.name}")
    return state, tuple(notes)


def apply(module: nn.Module, state: State, head: Collection[str], path: str) -> None:
    """Load the tensors; only those of the head may be missing or of another size.

    Of a tensor that the model has under several names one is enough, as save_model writes it.
    Integers where the model has floats are quantized weights without their scale, and refused.
    Raises PbcError with the first three that do not fit.
    """
    expected = module.state_dict()
    state = _under_all_names(expected, {n: t for n, t in state.items() if _counts(n)})
    wrong = []
    for name, tensor in expected.items():
        if name in head or not _counts(name):
            continue
        if name not in state:
            wrong.append(f"{name} is missing (expected {list(tensor.shape)})")
        elif state[name].shape != tensor.shape:
            wrong.append(f"{name} is {list(state[name].shape)} (expected {list(tensor.shape)})")
        elif tensor.is_floating_point() and not state[name].is_floating_point():
            found, wanted = (str(t.dtype).removeprefix("torch.") for t in (state[name], tensor))
            wrong.append(f"{name} is {found} (expected {wanted})")
    wrong += [f"{name} is not in the model" for name in state if name not in expected]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise PbcError(f"the weights in {path} do not fit the model: {'; '.join(wrong[:3])}{more}")
    # Into the module's own: that has the versions of its layers, which a file of tensors lacks.
    expected.update({k: v for k, v in state.items() if v.shape == expected[k].shape})
    module.load_state_dict(expected)


def _under_all_names(expected: State, state: State) -> State:
    """Add tensors under the other names by which a model knows them."""
    places = {name: (t.data_ptr(), t.shape, t.stride()) for name, t in expected.items()}
    known = {places[name]: tensor for name, tensor in state.items() if name in places}
    return {n: known[place] for n, place in places.items() if place in known} | dict(state)


def _counts(name: str) -> bool:
    """Whether a tensor matters: frozen statistics count no batches."""
    return not name.endswith("num_batches_tracked")


def _without_wrappers(wanted: frozenset[str], state: State) -> tuple[State, str]:
    """Take wrappers' parts out of names that the model does not have; what was done, in words.

    Where everything of the model is inside the wrapper, what is outside is the wrapper's own, such
    as how many models an AveragedModel has averaged.
    """
    renamed: dict[str, Tensor] = {}
    parts: set[str] = set()
    inside = wanted.isdisjoint(state)
    for name, tensor in state.items():
        words = name.split(".")
        short = ".".join(word for word in words if word not in _WRAPPERS)
        if name in wanted or short == name:
            renamed[name] = tensor
        else:
            renamed[short] = tensor
            parts |= _WRAPPERS & set(words)
    better = sum(name in wanted for name in renamed) >= sum(name in wanted for name in state)
    if not parts or not better or len(renamed) < len(state):
        return state, ""
    said = ", ".join(sorted(f"{part}." for part in parts))
    outside = sorted(name for name in renamed if name in state)
    if outside and inside and not wanted.isdisjoint(renamed):
        renamed = {name: t for name, t in renamed.items() if name not in state}
        were = (
            "1 tensor outside of them was" if len(outside) == 1 else f"{len(outside)} outside were"
        )
        said += f"; {were} left out: {outside[0]}"
    return renamed, said


def _prefixes(name: str) -> list[str]:
    """The leading paths of a name, with their dot."""
    words = name.split(".")
    return [".".join(words[:count]) + "." for count in range(1, min(_DEPTH + 1, len(words)))]
