"""Models: a name or a user's file becomes an eager module with its weights and input spec."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pbc.data import InputSpec
from pbc.errors import PbcError, UsageError, suggest
from pbc.frontend.torchvision_shim import import_torchvision

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RANDOM = "random"
DEFAULT = "default"


@dataclass(frozen=True)
class Source:
    """A model before strategies touch it.

    weights: what was asked for ("random", "default" or the file's name); weights_sha256 is of
    the file, None without one. classifier: the dotted name of its last linear layer.
    """

    name: str
    module: nn.Module
    input: InputSpec
    classifier: str
    weights: str
    weights_sha256: str | None


def load(
    name: str,
    weights: str = DEFAULT,
    shape: tuple[int, int, int] | None = None,
    seed: int = 0,
) -> Source:
    """Build the model called `name` and give it its weights.

    name: `resnet50` (torchvision), `torchvision:NAME`, `timm:NAME` or `path/file.py:factory`,
        where factory(num_classes=…) or factory() returns an nn.Module.
    weights: a safetensors file (its classifier decides the class count, float16 is converted to
        float32), "default" (the zoo's pretrained weights) or "random".
    shape: channels, height, width; None takes the model's own default.

    Raises UsageError for an unknown name, PbcError for weights that do not fit.
    """
    kind, _, rest = name.partition(":")
    state, digest = (None, None)
    if weights not in (RANDOM, DEFAULT):
        state, digest = _read_weights(Path(weights))
    torch.manual_seed(seed)
    try:
        if kind == "timm" and rest:
            module, spec = _timm(rest, weights == DEFAULT, shape, state)
        elif ".py" in name and ":" in name:
            path, _, factory = name.rpartition(":")
            module, spec = _user_file(Path(path), factory, weights == DEFAULT, shape, state)
        else:
            module, spec = _torchvision(
                rest if kind == "torchvision" else name, weights == DEFAULT, shape, state
            )
    except AssertionError as error:  # how the zoos refuse a size
        raise PbcError(f"{name} cannot be built for inputs of shape {shape}: {error}") from error
    classifier = last_linear(module, name)
    if state is not None:
        _apply_weights(module, state, classifier, weights)
    return Source(
        name=name,
        module=module.float().eval(),
        input=spec,
        classifier=classifier,
        weights=weights if state is None else Path(weights).name,
        weights_sha256=digest,
    )


def last_linear(module: nn.Module, name: str) -> str:
    """The dotted name of the model's last linear layer, its classifier."""
    linears: list[str] = [n for n, m in module.named_modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise PbcError(
            f"{name} has no linear layer to use as a classifier; pbc needs one as its head"
        )
    return linears[-1]


def _read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    if not path.is_file():
        raise PbcError(
            f"no weights file {path}; expected a .safetensors file, 'default' or 'random'"
        )
    try:
        state = load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise PbcError(f"{path} is not a readable safetensors file: {error}") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {name: t.float() if t.is_floating_point() else t for name, t in state.items()}, digest


def _apply_weights(module: nn.Module, state: dict[str, Tensor], classifier: str, path: str) -> None:
    """Load `state`; only the classifier may be missing or of another size."""
    expected = module.state_dict()
    head = {f"{classifier}.weight", f"{classifier}.bias"}
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    wrong = []
    for name, tensor in expected.items():
        if name in head or name.endswith("num_batches_tracked"):
            continue
        if name not in state:
            wrong.append(f"{name} is missing (expected {list(tensor.shape)})")
        elif state[name].shape != tensor.shape:
            wrong.append(f"{name} is {list(state[name].shape)} (expected {list(tensor.shape)})")
    wrong += [f"{name} is not in the model" for name in state if name not in expected]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise PbcError(f"the weights in {path} do not fit the model: {'; '.join(wrong[:3])}{more}")
    fitting = {k: v for k, v in state.items() if v.shape == expected[k].shape}
    module.load_state_dict(fitting, strict=False)


def _rebuild(
    build: Callable[..., nn.Module], state: dict[str, Tensor] | None, name: str
) -> nn.Module:
    """Build once to find the classifier, again when the weights file has another class count."""
    module = build()
    classifier = last_linear(module, name)
    weight = (state or {}).get(f"{classifier}.weight")
    if weight is None or len(weight) == module.get_submodule(classifier).out_features:
        return module
    count = len(weight)
    return build(num_classes=count)


def _torchvision(
    name: str, pretrained: bool, shape: tuple[int, int, int] | None, state: dict[str, Tensor] | None
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
    if chosen[1:] != (size, size) and "image_size" in inspect.signature(
        inspect.unwrap(models.get_model_builder(name))
    ).parameters | _vit_parameters(name):
        options["image_size"] = chosen[1]
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
        module = _rebuild(
            lambda **more: models.get_model(name, weights=None, **options, **more), state, name
        )
    return module, InputSpec(chosen, tuple(preset.mean), tuple(preset.std))


def _vit_parameters(name: str) -> dict[str, Any]:
    # torchvision's vit builders pass image_size on through **kwargs, where a signature hides it.
    return {"image_size": None} if name.startswith("vit_") else {}


def _timm(
    name: str, pretrained: bool, shape: tuple[int, int, int] | None, state: dict[str, Tensor] | None
) -> tuple[nn.Module, InputSpec]:
    import_torchvision()
    import timm

    if not timm.is_model(name):
        raise UsageError(suggest("timm model", name, timm.list_models()))
    options: dict[str, Any] = {}

    def build(**more: Any) -> nn.Module:
        return timm.create_model(name, pretrained=pretrained, **options, **more)

    config = timm.get_pretrained_cfg(name)
    own = config.to_dict() if config is not None else {}
    chosen = shape or tuple(own.get("input_size", (3, 224, 224)))
    if shape is not None and tuple(own.get("input_size", ())) != shape:
        options["img_size"] = shape[1:] if shape[1] != shape[2] else shape[1]
    try:
        module = _rebuild(build, state, name)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        options.clear()  # a convolutional model takes any size and has no such option
        module = _rebuild(build, state, name)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise _no_download(name, error) from error
    mean, std = own.get("mean", IMAGENET_MEAN), own.get("std", IMAGENET_STD)
    return module, InputSpec(chosen, tuple(mean), tuple(std))


def _user_file(
    path: Path,
    factory: str,
    pretrained: bool,
    shape: tuple[int, int, int] | None,
    state: dict[str, Tensor] | None,
) -> tuple[nn.Module, InputSpec]:
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
    try:
        spec.loader.exec_module(code)
    except Exception as error:
        raise PbcError(f"{path} failed to run: {_reason(error)}") from error
    build = getattr(code, factory, None)
    if not callable(build):
        functions = [n for n, v in vars(code).items() if callable(v) and not n.startswith("_")]
        raise UsageError(suggest(f"function in {path}", factory, functions))

    def made(**options: Any) -> nn.Module:
        try:
            module = build(**options)
        except Exception as error:
            raise PbcError(f"{path}:{factory} failed: {_reason(error)}") from error
        if not isinstance(module, nn.Module):
            raise PbcError(
                f"{path}:{factory} returned {type(module).__name__}; expected a torch.nn.Module"
            )
        return module

    takes_classes = "num_classes" in inspect.signature(build).parameters
    module = _rebuild(made, state, factory) if takes_classes else made()
    return module, InputSpec(shape or (3, 224, 224), IMAGENET_MEAN, IMAGENET_STD)


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
