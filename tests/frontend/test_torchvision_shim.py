from __future__ import annotations

import subprocess
import sys

import pytest

from pbc.frontend import torchvision_shim

# A torchvision whose operators did not load: its import works once their schemas are there.
FAKE = """
import torch
torch.library.register_fake("torchvision::nms")(lambda dets, scores, iou_threshold: dets)
"""


def test_torchvision_imports_and_its_models_work() -> None:
    torchvision = torchvision_shim.import_torchvision()
    assert torchvision is sys.modules["torchvision"]
    assert torchvision_shim.import_torchvision() is torchvision
    from torchvision.models import get_model

    assert get_model("resnet18", weights=None).fc.out_features == 1000


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (FAKE, "imported"),
        ("raise RuntimeError('another reason')", "RuntimeError: another reason"),
        ("raise ImportError('no library')", "ImportError: no library"),
    ],
)
def test_only_missing_operators_are_made_up(
    tmp_path_factory: pytest.TempPathFactory, source: str, expected: str
) -> None:
    site = tmp_path_factory.mktemp("site")
    (site / "torchvision.py").write_text(source)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "from pbc.frontend.torchvision_shim import import_torchvision\n"
        "import_torchvision(); print('imported')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert expected in result.stdout + result.stderr
