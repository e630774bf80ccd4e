"""Models: a name or a user's file becomes an eager module with its weights and input spec."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pbc.data import InputSpec
from pbc.data.spec import INTERPOLATIONS
from pbc.errors import PbcError, UsageError, reason_of, suggest
from pbc.frontend import head
from pbc.frontend.head_by_gradients import head_by_gradients
from pbc.frontend.torchvision_shim import import_torchvision, shim_imports
from pbc.frontend.trace import Trace, trace
from pbc.frontend.unwrap import Key, flatten, is_lazy, outputs, take, unwrapped
from pbc.frontend.weights import State, apply, named_as, read
from pbc.ir.program import Head

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RANDOM = "random"
# Names whose architecture and weights timm reads from a model's own configuration.
_TIMM_SCHEMES = ("hf-hub", "hf_hub", "local-dir")
DEFAULT = "default"


@dataclass(frozen=True)
class Source:
    """A model before strategies touch it.

    weights: what was asked for ("random", "default" or the file's name); weights_sha256 is of
    the file, None without one. head: its classifier. notes: what was done to it on the way.
    build: makes the network for another number of classes, where its file's function takes one.
    """

    name: str
    module: nn.Module
    input: InputSpec
    head: Head
    weights: str
    weights_sha256: str | None
    notes: tuple[str, ...] = ()
    build: Callable[[int], nn.Module] | None = None


def load(
    name: str,
    weights: str = DEFAULT,
    shape: tuple[int, int, int] | None = None,
    seed: int = 0,
    resize: str | None = None,
) -> Source:
    """Build the model called `name` and give it its weights.

    name: `resnet50` (torchvision), `torchvision:NAME`, `timm:NAME`, `hf-hub:OWNER/NAME` or
        `local-dir:FOLDER` (what timm's push_to_hf_hub and save_for_hf wrote), or
        `path/file.py:factory`, where factory(num_classes=…) or factory() returns an nn.Module.
    weights: a safetensors file (its classifier decides the class count, float16 is converted to
        float32), "default" (the zoo's pretrained weights) or "random".
    shape: channels, height, width; None takes the model's own default.
    resize: how photos get to that size, "crop" or "squash"; None is the zoo's own way, and to
        squash for a file of the user's. See pbc.data.InputSpec.

    Raises UsageError for an unknown name, PbcError for weights that do not fit and for a model that
    does not run on inputs of the shape.
    """
    kind, _, rest = name.partition(":")
    state, digest = (None, None)
    if weights not in (RANDOM, DEFAULT):
        state, digest = read(Path(weights))
    torch.manual_seed(seed)
    build = None
    try:
        if kind in _TIMM_SCHEMES and rest:
            module, spec = _timm(name, weights == DEFAULT, shape)
        elif kind == "timm" and rest:
            module, spec = _timm(rest, weights == DEFAULT, shape)
        elif is_program(name):
            path, _, factory = name.rpartition(":")
            function = _function(Path(path), factory, weights == DEFAULT)
            counted = inspect.signature(function).parameters.get("num_classes")
            required = counted is not None and counted.default is inspect.Parameter.empty
            classes = head.OPEN_CLASSES if required else None
            module = _made(function, f"{path}:{factory}", classes)
            spec = _spec(shape or (3, 224, 224), IMAGENET_MEAN, IMAGENET_STD)
            if counted is not None:
                build = partial(_made, function, f"{path}:{factory}")
        else:
            module, spec = _torchvision(
                rest if kind == "torchvision" else name, weights == DEFAULT, shape
            )
    except (AssertionError, ValueError) as error:  # how the zoos refuse a size
        raise PbcError(
            f"{name} cannot be built for inputs of shape {shape}: {_reason(error)}"
        ) from error
    if resize is not None:
        spec = replace(spec, resize=resize)
    source = given(module, name, spec, None if state is None else (Path(weights), state), build)
    if state is None:
        return replace(source, weights=weights)
    return replace(source, weights=Path(weights).name, weights_sha256=digest)


def is_program(name: str) -> bool:
    """Return whether a name is of a program that is run to make the model: `file.py:factory`."""
    return ".py" in name and ":" in name and name.partition(":")[0] not in (*_TIMM_SCHEMES, "timm")


def given(
    module: nn.Module,
    name: str,
    spec: InputSpec,
    weights: tuple[Path, State] | None = None,
    build: Callable[[int], nn.Module] | None = None,
) -> Source:
    """Take what is wrapped around a network off, load its weights, and find or add its head.

    weights: a file and its tensors; None keeps the module's own. build: makes the network for
    another number of classes. Changes the module in place.
    """
    module, notes = unwrapped(module, name)
    module = module.float().eval()
    example = torch.zeros(2, *spec.shape)
    if is_lazy(module):
        with torch.no_grad():
            run(lambda: module(example), name, spec.shape)
    run_of = run(lambda: trace(module, example), name, spec.shape)
    if not isinstance(run_of.output, Tensor):
        run_of, taken = _of_one_tensor(module, run_of, example)
        notes += taken
    found: head.Found | head.Missing = head.Missing(_NO_HEAD)
    if not _has_no_classifier(module):
        if run_of.result is not None and len(run_of.result.shape) > 2:
            run_of = _flattened(module, run_of, example)
        found = _found(module, run_of, example)
    if weights is not None:
        try:
            notes += _weighted(module, found, *weights)
        except PbcError:
            count = None if isinstance(found, head.Missing) else _count(module, found, weights)
            if build is None or count is None:
                raise
            # More than the head may count classes.
            return replace(given(build(count), name, spec, weights), build=build)
    if isinstance(found, head.Missing):
        classifier, note = head.add(module, example, run_of, found.reason)
        notes += (note,)
    else:
        classifier = found.head
        notes += found.notes
    return Source(name, module, spec, classifier, "given", None, notes, build)


def _count(module: nn.Module, found: head.Found, weights: tuple[Path, State]) -> int | None:
    """How many classes the head of a file has, where that is another number than the network's."""
    state, _ = named_as(module.state_dict(), weights[1], weights[0])
    counts = {len(state[name]) for name in found.head.parameters if name in state}
    return counts.pop() if len(counts) == 1 and counts != {found.classes} else None


_NO_HEAD = "its get_classifier() has none"


def _found(module: nn.Module, run_of: Trace, example: Tensor) -> head.Found | head.Missing:
    found = head.find(run_of)
    if isinstance(found, head.Missing) and not found.features:
        return head_by_gradients(module, example) or found
    return found


def _flattened(module: nn.Module, run_of: Trace, example: Tensor) -> Trace:
    """Let a network that puts out scores [batch, classes, 1, 1] put out [batch, classes]."""
    if isinstance(head.find(run_of), head.Missing):
        return run_of
    flatten(module)
    return trace(module, example)


def _of_one_tensor(
    module: nn.Module, run_of: Trace, example: Tensor
) -> tuple[Trace, tuple[str, ...]]:
    """Let a network that returns a structure return its class scores, or its only tensor.

    Returns its run with that, and a note; as it was, where there are several tensors and none has a
    head. Raises PbcError where several have.
    """
    tensors = outputs(run_of.output)
    runs: dict[Key, Trace] = {}
    for key in tensors:
        hook = take(module, key)
        again = trace(module, example)
        if len(tensors) == 1 or isinstance(_found(module, again, example), head.Found):
            runs[key] = again
        hook.remove()
    if len(runs) > 1:
        raise PbcError(
            f"{type(module).__name__} returns class scores {len(runs)} times "
            f"({', '.join(map(repr, runs))}); return those to train on, alone or as `logits`"
        )
    for key, found in runs.items():
        take(module, key)
        if len(tensors) > 1:
            others = ", ".join(repr(other) for other in tensors if other != key)
            note = f"of what the model returns, {key!r} has the class scores; not used: {others}"
            return found, (note,)
        return found, ()
    return run_of, ()


def _has_no_classifier(module: nn.Module) -> bool:
    """Whether a timm model was made without its classifier: whatever ends it is no head."""
    getter = getattr(module, "get_classifier", None)
    return callable(getter) and isinstance(getter(), nn.Identity)


def _weighted(
    module: nn.Module, found: head.Found | head.Missing, path: Path, state: State
) -> tuple[str, ...]:
    """Load a file's tensors, which decide the class count of the head; notes."""
    state, notes = named_as(module.state_dict(), state, path)
    if isinstance(found, head.Missing):
        apply(module, state, (), str(path))
        return notes
    counts = (len(state[name]) for name in found.head.parameters if name in state)
    count = next(counts, found.classes)
    if count != found.classes:
        head.resize(module, found.head, count)
    apply(module, state, found.head.parameters, str(path))
    return notes


T = TypeVar("T")


def run(call: Callable[[], T], name: str, shape: tuple[int, int, int]) -> T:
    """Run a model; whatever it raises becomes a PbcError, for it is the model that failed."""
    try:
        return call()
    except PbcError:
        raise
    except Exception as error:
        raise PbcError(
            f"{name} does not run on inputs of shape {list(shape)}: {reason_of(error)}"
        ) from error


def _torchvision(
    name: str, pretrained: bool, shape: tuple[int, int, int] | None
) -> tuple[nn.Module, InputSpec]:
    models = import_torchvision().models
    known = models.list_models(module=models)
    if name not in known:
        raise UsageError(
            suggest("torchvision model", name, known)
            + "; also timm:NAME and path/to/file.py:factory"
        )
    default = models.get_model_weights(name).DEFAULT
    preset = default.transforms()
    size = preset.crop_size[0]
    chosen = shape or (3, size, size)
    options: dict[str, Any] = {}
    if chosen[1:] != (size, size):
        options = _size_options(name, chosen)
    if pretrained:
        try:
            module = models.get_model(name, weights=default, **options)
        except ValueError as error:  # the builder's own options are those of the weights
            raise PbcError(
                f"the default weights of {name} are for {size}x{size} inputs, not "
                f"{chosen[1]}x{chosen[2]}: leave out --input, or name a file with --weights"
            ) from error
        except (OSError, RuntimeError) as error:
            raise _no_download(name, error) from error
    else:
        module = models.get_model(name, weights=None, **options)
    resize = preset.resize_size[0]
    # Those of a few weights shrink nothing but the shorter side, to less than the crop.
    crop_pct = min(size / resize, 1.0)
    spec = _spec(chosen, preset.mean, preset.std)
    interpolation = preset.interpolation.value
    return module, replace(spec, resize="crop", crop_pct=crop_pct, interpolation=interpolation)


def _size_options(name: str, shape: tuple[int, int, int]) -> dict[str, Any]:
    """What torchvision's builders need to know of a size.

    They pass it on through **kwargs, where a signature hides it; others take any size.
    """
    if name.startswith("vit_"):
        return {"image_size": shape[1]}
    return {"input_size": shape[1:]} if name.startswith("maxvit_") else {}


def _timm(
    name: str, pretrained: bool, shape: tuple[int, int, int] | None
) -> tuple[nn.Module, InputSpec]:
    import_torchvision()
    import timm

    own = _timm_config(timm, name)
    default = tuple(own.get("input_size", (3, 224, 224)))
    chosen = shape or default
    channels = {} if chosen[0] == default[0] else {"in_chans": chosen[0]}

    def build(**options: Any) -> nn.Module:
        return timm.create_model(name, pretrained=pretrained, **channels, **options)

    try:
        module = build() if chosen[1:] == default[1:] else _sized(build, chosen)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise _no_download(name, error) from error
    mean, std = own.get("mean", IMAGENET_MEAN), own.get("std", IMAGENET_STD)
    return module, _timm_resized(_spec(chosen, mean, std), own)


def _timm_config(timm: Any, name: str) -> dict[str, Any]:
    """The configuration of a model by its name in timm, or in a model's own folder or hub."""
    by_place = name.partition(":")[0] in _TIMM_SCHEMES
    if not by_place and not timm.is_model(name):
        raise UsageError(suggest("timm model", name, timm.list_models()))
    if not by_place:
        config = timm.get_pretrained_cfg(name)
        return {} if config is None else dict(config.to_dict())
    try:
        return dict(timm.create_model(name, pretrained=False).pretrained_cfg)
    except Exception as error:  # the hub's client raises errors of several libraries
        raise PbcError(f"{name} cannot be read: {reason_of(error)}") from error


def _timm_resized(spec: InputSpec, config: Mapping[str, Any]) -> InputSpec:
    """Take a model's way to its input size; a border, which pbc has not, becomes a crop."""
    interpolation = config.get("interpolation", "bicubic")
    if interpolation not in INTERPOLATIONS:
        interpolation = "bicubic"
    if config.get("crop_mode") == "squash":
        return replace(spec, interpolation=interpolation)
    crop_pct = min(float(config.get("crop_pct") or 0.875), 1.0)
    return replace(spec, resize="crop", crop_pct=crop_pct, interpolation=interpolation)


def _sized(build: Callable[..., nn.Module], shape: tuple[int, int, int]) -> nn.Module:
    """Build a timm model for a size, which those that take any size have no option for."""
    size = shape[1] if shape[1] == shape[2] else shape[1:]
    try:
        return build(img_size=size)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return build()


def _spec(shape: tuple[int, int, int], mean: Sequence[float], std: Sequence[float]) -> InputSpec:
    """The input of a model; one of other than three channels takes the mean of the channels'."""
    if shape[0] != len(mean):
        mean = (sum(mean) / len(mean),) * shape[0]
        std = (sum(std) / len(std),) * shape[0]
    return InputSpec(shape, tuple(mean), tuple(std))


def _function(path: Path, factory: str, pretrained: bool) -> Callable[..., Any]:
    """Run a user's file and return its function of this name."""
    if not path.is_file():
        raise PbcError(f"no model file {path}; expected path/to/file.py:factory")
    if pretrained:
        raise PbcError(
            f"{path} has no zoo to take default weights from; "
            "name a file with --weights, or use --weights random"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    # As `python path/to/file.py` would: dataclasses look their module up, siblings can be imported.
    sys.modules.setdefault(path.stem, code)
    if str(path.parent.resolve()) not in sys.path:
        sys.path.insert(0, str(path.parent.resolve()))
    shim_imports()  # the file may build on torchvision or timm
    try:
        spec.loader.exec_module(code)
    except Exception as error:
        raise PbcError(f"{path} failed to run: {_reason(error)}") from error
    build = getattr(code, factory, None)
    if not callable(build):
        functions = [n for n, v in vars(code).items() if callable(v) and not n.startswith("_")]
        raise UsageError(suggest(f"function in {path}", factory, functions))
    function: Callable[..., Any] = build
    return function


def _made(function: Callable[..., Any], name: str, classes: int | None) -> nn.Module:
    """Call a user's function for its module, of so many classes; None leaves that to it."""
    try:
        module = function() if classes is None else function(num_classes=classes)
    except Exception as error:
        raise PbcError(f"{name} failed: {_reason(error)}") from error
    if not isinstance(module, nn.Module):
        raise PbcError(f"{name} returned {type(module).__name__}; expected a torch.nn.Module")
    return module


def rebuilt(source: Source, classes: int) -> Source | None:
    """Make a network anew for another number of classes, with the tensors that have its sizes.

    None where its file's function takes no number of classes, or it does not run with this one.
    """
    if source.build is None:
        return None
    try:
        fresh = given(source.build(classes), source.name, source.input)
    except PbcError:
        return None
    known, sizes = source.module.state_dict(), fresh.module.state_dict()
    kept = {n: t for n, t in known.items() if n in sizes and t.shape == sizes[n].shape}
    new = [name for name in sizes if name not in kept]
    counts = {len(fresh.module.get_parameter(name)) for name in fresh.head.parameters}
    if counts != {classes} or fresh.head.parameters != source.head.parameters:
        return None
    fresh.module.load_state_dict(kept, strict=False)
    note = f"{source.name} was built anew for {classes} classes: {', '.join(new)} "
    return replace(
        source,
        module=fresh.module,
        notes=(*source.notes, note + ("is new" if len(new) == 1 else "are new")),
    )


def _reason(error: BaseException) -> str:
    """What went wrong in code that is not ours, in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _no_download(name: str, error: BaseException) -> PbcError:
    reason = str(error).strip().splitlines()
    return PbcError(
        f"the default weights of {name} could not be downloaded "
        f"({reason[0] if reason else type(error).__name__}); "
        "name a file with --weights FILE.safetensors, or use --weights random"
    )
