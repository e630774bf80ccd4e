from __future__ import annotations

import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pbc.compiler import CompileOptions, start
from pbc.errors import PbcError, UsageError
from pbc.frontend import head, models
from pbc.frontend.torchvision_shim import import_torchvision
from pbc.testing import TARGET

WEIGHTS = "weights/mobilenet_v3_large.safetensors"
MODEL = "mobilenet_v3_large"


@pytest.fixture(scope="module")
def state(examples: Path) -> dict[str, Tensor]:
    return load_file(examples / WEIGHTS)


@pytest.fixture
def weights(tmp_path: Path, state: dict[str, Tensor]) -> Path:
    """A copy to spoil."""
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    return path


def one_line(error: pytest.ExceptionInfo[PbcError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["", "torchvision:"])
def test_an_unknown_model_gets_a_short_suggestion(kind: str) -> None:
    with pytest.raises(UsageError, match="model named 'resnet5'; did you mean 'resnet") as error:
        models.load(f"{kind}resnet5", "random")
    assert len(one_line(error)) < 400


def test_an_unknown_timm_model_gets_a_short_suggestion() -> None:
    with pytest.raises(UsageError, match="did you mean 'deit_tiny_patch16_224'") as error:
        models.load("timm:deit_tiny_patch16_22", "random")
    assert len(one_line(error)) < 400


def test_the_weights_file_decides_the_class_count(examples: Path, state: dict[str, Tensor]) -> None:
    source = models.load(MODEL, str(examples / WEIGHTS), (3, 64, 64))
    classifier = source.module.get_submodule("classifier.3")
    assert isinstance(classifier, nn.Linear)
    assert classifier.out_features == 200
    assert source.head.parameters == {"classifier.3.weight": 1280, "classifier.3.bias": 1280}
    assert source.weights == "mobilenet_v3_large.safetensors"
    assert source.weights_sha256 is not None
    assert source.input.shape == (3, 64, 64)
    # float16 is how they are stored, float32 how they compute.
    assert state["classifier.3.weight"].dtype == torch.float16
    assert {p.dtype for p in source.module.parameters()} == {torch.float32}
    assert torch.equal(classifier.weight, state["classifier.3.weight"].float())
    with torch.no_grad():
        assert source.module(torch.randn(1, 3, 64, 64)).shape == (1, 200)


def test_a_classifier_may_be_missing(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({k: v for k, v in state.items() if not k.startswith("classifier.3")}, path)
    source = models.load(MODEL, str(path), (3, 64, 64))
    assert source.module.get_parameter("classifier.3.weight").shape == (1000, 1280)


def test_wrong_weights_name_the_first_three(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    spoilt = dict(state)
    spoilt["features.0.0.weight"] = torch.zeros(8, 3, 3, 3)
    del spoilt["features.0.1.bias"]
    spoilt["features.1.block.0.0.weight"] = torch.zeros(2)
    spoilt["features.1.block.0.1.weight"] = torch.zeros(2)
    spoilt["surprise"] = torch.zeros(1)
    save_file(spoilt, path)
    with pytest.raises(PbcError, match="do not fit the model") as error:
        models.load(MODEL, str(path), (3, 64, 64))
    message = one_line(error)
    assert message.endswith(
        "features.0.0.weight is [8, 3, 3, 3] (expected [16, 3, 3, 3]); "
        "features.0.1.bias is missing (expected [16]); "
        "features.1.block.0.0.weight is [2] (expected [16, 1, 3, 3]), and 2 more"
    )


def test_weights_of_another_model(examples: Path) -> None:
    with pytest.raises(PbcError, match=r"do not fit the model: conv1.weight is missing") as error:
        models.load("resnet50", str(examples / WEIGHTS), (3, 64, 64))
    assert len(one_line(error)) < 500


def test_a_missing_file() -> None:
    with pytest.raises(
        PbcError, match=r"no weights file nowhere.safetensors; expected a .safetens"
    ):
        models.load(MODEL, "nowhere.safetensors")


@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_a_corrupt_file(weights: Path, kept: int) -> None:
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(PbcError, match="is not a readable safetensors file: ") as error:
        models.load(MODEL, str(weights))
    one_line(error)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(PbcError, match="is not a readable safetensors file"):
        models.load(MODEL, str(path))


@pytest.mark.parametrize("name", [MODEL, "timm:deit_tiny_patch16_224"])
def test_default_weights_offline(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", no_network)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", no_network)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", no_network)
    with pytest.raises(PbcError, match=r"could not be downloaded .*no network.*--weights") as error:
        models.load(name, "default", (3, 224, 224))
    assert "--weights random" in one_line(error)


def test_random_weights_follow_the_seed() -> None:
    name = "timm:deit_tiny_patch16_224"
    one, same, other = (models.load(name, "random", (3, 32, 32), seed) for seed in (0, 0, 1))
    weight = "blocks.0.attn.qkv.weight"
    assert torch.equal(one.module.get_parameter(weight), same.module.get_parameter(weight))
    assert not torch.equal(one.module.get_parameter(weight), other.module.get_parameter(weight))
    # The input size reached the positions: 4 patches and the class token.
    assert one.module.get_parameter("pos_embed").shape == (1, 5, 192)
    assert (one.weights, one.weights_sha256) == ("random", None)


@pytest.mark.parametrize("shape", [(3, 48, 32), (3, 224, 224)])
def test_the_input_size_reaches_a_vit(shape: tuple[int, int, int]) -> None:
    source = models.load("timm:deit_tiny_patch16_224", "random", shape)
    positions = shape[1] // 16 * (shape[2] // 16) + 1
    assert source.module.get_parameter("pos_embed").shape[1] == positions


def test_a_convolutional_timm_model_takes_any_size() -> None:
    source = models.load("timm:resnet10t", "random", (3, 48, 64))
    with torch.no_grad():
        assert source.module(torch.randn(1, 3, 48, 64)).shape == (1, 1000)


def test_a_size_that_does_not_divide_is_one_line() -> None:
    with pytest.raises(PbcError, match=r"vit_b_16 cannot be built .*\(3, 40, 40\): ") as error:
        models.load("vit_b_16", "random", (3, 40, 40))
    one_line(error)


def user_model(tmp_path: Path, source: str) -> str:
    path = tmp_path / "mine.py"
    path.write_text("from torch import nn\n" + source)
    return f"{path}:factory"


def test_a_user_s_file(examples: Path) -> None:
    source = models.load(f"{examples / 'custom_model.py'}:factory", "random", (3, 32, 32))
    assert type(source.module).__name__ == "SmallResNet"
    assert source.head.parameters == {"classifier.weight": 96, "classifier.bias": 96}
    assert source.input.shape == (3, 32, 32)


def test_a_user_s_file_takes_its_class_count_from_the_weights(
    examples: Path, tmp_path: Path
) -> None:
    name = f"{examples / 'custom_model.py'}:factory"
    module = models.load(name, "random", (3, 32, 32)).module
    state = module.state_dict()
    state["classifier.weight"] = torch.zeros(7, state["classifier.weight"].shape[1])
    state["classifier.bias"] = torch.zeros(7)
    save_file(state, tmp_path / "w.safetensors")
    loaded = models.load(name, str(tmp_path / "w.safetensors"), (3, 32, 32)).module
    assert loaded.get_parameter("classifier.weight").shape[0] == 7


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("def other(): ...", UsageError, "no function in .* named 'factory'"),
        ("def factori(): ...", UsageError, "named 'factory'; did you mean 'factori'"),
        ("1 / 0", PbcError, "mine.py failed to run: ZeroDivisionError: division by zero"),
        ("def factory(:", PbcError, "mine.py failed to run: SyntaxError"),
        ("import acme_nowhere", PbcError, "mine.py failed to run: ModuleNotFoundError"),
        ("def factory(): return 3", PbcError, "mine.py:factory returned int; expected a torch.nn"),
        ("def factory(): return 1 / 0", PbcError, "factory failed: ZeroDivisionError"),
        ("def factory(size): return nn.Linear(3, 3)", PbcError, "factory failed: TypeError"),
        ("def factory(): return nn.LSTM(32, 3)", PbcError, "factory does not run on inputs of sha"),
    ],
)
def test_a_user_s_file_that_is_broken(
    tmp_path: Path, source: str, error: type[PbcError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        models.load(user_model(tmp_path, source), "random", (3, 32, 32))
    one_line(caught)


def test_a_user_s_file_that_is_not_there_or_has_no_default_weights(
    examples: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        PbcError, match=r"no model file .*nowhere.py; expected path/to/file.py:fact"
    ):
        models.load(f"{tmp_path / 'nowhere.py'}:factory", "random")
    with pytest.raises(PbcError, match="has no zoo to take default weights from; name a file with"):
        models.load(f"{examples / 'custom_model.py'}:factory", "default")


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        ("return self.fc(x)", r"factory does not run on inputs of shape \[3, 16, 16\]: "),
        ("return x, x.relu()", r"no classifier .* \(it returns a tuple\), and puts"),
        ("raise KeyError", r"does not run on inputs of shape \[3, 16, 16\]: KeyError"),
        ("y", "does not run on inputs .*: name 'y' is not defined"),
    ],
)
def test_a_user_s_model_that_is_no_classifier(tmp_path: Path, forward: str, message: str) -> None:
    source = f"""
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, x):
        {forward}

factory = Net
"""
    options = CompileOptions(weights="random", target=TARGET, engine="pytorch", shape=(3, 16, 16))
    with pytest.raises(PbcError, match=message) as error:
        start(user_model(tmp_path, source), options)
    one_line(error)


COUNTED = """
import torch

class Net(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.head = nn.Sequential(nn.Linear(8, n), nn.BatchNorm1d(n))
        self.register_buffer("prior", torch.randn(n))

    def forward(self, x):
        return self.head(self.stem(x).mean((2, 3))) + self.prior

def factory(num_classes{default}):
    return Net(num_classes)
"""


@pytest.mark.parametrize("default", ["", "=10"])
def test_what_counts_its_classes_elsewhere_too_is_built_anew(tmp_path: Path, default: str) -> None:
    options = CompileOptions(
        weights="random", target=TARGET, engine="pytorch", shape=(3, 16, 16), classes=4
    )
    program = start(user_model(tmp_path, COUNTED.format(default=default)), options)
    assert program.network.head.fixed == 4
    assert program.network.reference.shape == (2, 4)
    note = "".join(note for note in program.notes if "factory was built anew for 4 classes" in note)
    assert "head.1.running_mean" in note
    assert "prior" in note


def test_weights_of_another_class_count_are_loaded_into_a_network_built_for_them(
    tmp_path: Path,
) -> None:
    name, path = user_model(tmp_path, COUNTED.format(default="=10")), tmp_path / "w.safetensors"
    source = models.load(name, "random", (3, 16, 16))
    assert source.build is not None
    module = source.build(7)
    save_file(module.state_dict(), path)
    loaded = models.load(name, str(path), (3, 16, 16), seed=1)
    for title, tensor in module.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[title], tensor)


def test_a_user_s_file_may_build_on_torchvision(tmp_path: Path) -> None:
    """In a process of its own, where nothing imported it before."""
    (tmp_path / "mine.py").write_text(
        "import timm\n"
        "import torchvision\n\n\n"
        "def factory():\n"
        "    return torchvision.models.resnet18(weights=None, num_classes=3)\n"
    )
    code = (
        "from pbc.frontend import models\n"
        f"source = models.load({str(tmp_path / 'mine.py')!r} + ':factory', 'random', (3, 32, 32))\n"
        "print(source.head.parameters)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "{'fc.weight': 512, 'fc.bias': 512}" in result.stdout, result.stderr


def test_weights_saved_from_a_wrapper_are_said(examples: Path, tmp_path: Path) -> None:
    name = f"{examples / 'custom_model.py'}:factory"
    module = models.load(name, "random", (3, 32, 32)).module
    path = tmp_path / "w.safetensors"
    save_file({f"state_dict.model.{n}": t.clone() for n, t in module.state_dict().items()}, path)
    source = models.load(name, str(path), (3, 32, 32), seed=1)
    assert source.notes == ("'state_dict.model.' was taken off the names in w.safetensors",)
    for parameter, value in module.named_parameters():
        assert torch.equal(source.module.get_parameter(parameter), value)


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("timm:deit_tiny_distilled_patch16_224", (3, 32, 48), {"head", "head_dist"}),
        ("timm:swin_tiny_patch4_window7_224", (3, 64, 96), {"head.fc"}),
        ("timm:dla34", (3, 64, 64), {"fc"}),
        ("timm:maxvit_rmlp_pico_rw_256", (3, 128, 128), {"head.fc"}),
        ("squeezenet1_1", (3, 64, 64), {"classifier.1"}),
    ],
)
def test_heads_of_library_networks(
    name: str, shape: tuple[int, int, int], parameters: set[str]
) -> None:
    source = models.load(name, "random", shape)
    assert {name.rpartition(".")[0] for name in source.head.parameters} == parameters
    head.resize(source.module, source.head, 3)
    with torch.no_grad():
        assert source.module(torch.randn(2, *shape)).shape == (2, 3)


def test_a_library_s_backbone_gets_a_head() -> None:
    source = models.load("timm:vit_small_patch14_dinov2", "random", (3, 28, 28))
    assert source.head.parameters == {"added_head.weight": 384, "added_head.bias": 384}
    assert "no classifier (its get_classifier() has none): a linear head" in source.notes[0]


# ---- how photos get to the input's size ----------------------------------------------------


@pytest.mark.parametrize("size", [(640, 480), (333, 500), (231, 229), (50, 90)])
def test_photos_are_resized_and_cropped_as_the_zoo_does(size: tuple[int, int]) -> None:
    """Beside torchvision's own transform, on a photo without a file's losses."""
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    photo = noise.resize(size, Image.Resampling.BICUBIC)
    source = models.load("resnet18", "random")
    assert source.input.words() == "resized to 256 (bilinear), centre 224x224 kept"
    preset = import_torchvision().models.get_model_weights("resnet18").DEFAULT.transforms()
    wanted = preset(photo).permute(1, 2, 0).numpy()
    found = source.input.normalise(np.asarray(source.input.fit(photo))[None])[0]
    # The last row and column differ where torchvision rounds a crop's edge to another pixel.
    assert np.abs(found.transpose(1, 2, 0) - wanted).max() < 0.02


def test_timms_own_way_is_taken_and_squash_is_an_option() -> None:
    source = models.load("timm:deit_tiny_patch16_224", "random")
    assert source.input.words() == "resized to 248 (bicubic), centre 224x224 kept"
    source = models.load("timm:deit_tiny_patch16_224", "random", resize="squash")
    assert source.input.words() == "squashed to 224x224 (bicubic)"
    with pytest.raises(UsageError, match="no resize named 'squish'; did you mean 'squash'"):
        CompileOptions(resize="squish")


def test_a_model_of_timm_in_a_folder_as_on_the_hub(tmp_path: Path) -> None:
    import_torchvision()
    import timm
    from timm.models import save_for_hf

    net = timm.create_model("mobilenetv3_small_050", num_classes=7)
    save_for_hf(net, str(tmp_path / "net"), model_config={"crop_pct": 0.9})
    source = models.load(f"local-dir:{tmp_path / 'net'}", shape=(3, 64, 64))
    name = source.head.parameters
    assert len(source.module.get_parameter(next(iter(name)))) == 7
    assert torch.equal(
        source.module.get_parameter("conv_stem.weight"), net.get_parameter("conv_stem.weight")
    )
    with pytest.raises(PbcError, match="hf-hub:nobody/nothing cannot be read: "):
        models.load("hf-hub:nobody/nothing")
