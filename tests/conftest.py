"""What every test may use."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Threads that find the cores busy only wait for each other; set before torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Names of a hub are refused at once, and not after many tries to reach it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Libraries of the TVM engine that tests make themselves are run.
os.environ.setdefault("PBC_UNSIGNED", "1")
# torch.compile would start a pool of processes for a handful of kernels; each loads torch first.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# Captures make many objects that stay; looking for rubbish among them each time takes longer than
# what the rubbish would.
gc.set_threshold(200_000, 20, 50)

pytest_plugins = ["skips"]

# Flower, which these run, needs Python 3.11.
_WITH_FLOWER = ("apps", "loopback", "masked", "simulate")
collect_ignore = [f"fleet/test_{name}.py" for name in _WITH_FLOWER if sys.version_info < (3, 11)]

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder that holds pbc/, passes/, targets/ and examples/."""
    return ROOT


@pytest.fixture(scope="session")
def examples(root: Path) -> Path:
    """The weights and photos that come with the sources."""
    return root / "examples"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what engines derive from bundles out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PBC_CACHE", str(tmp_path_factory.mktemp("cache")))
        # Workers of xdist are given the terminal's width, and tables would follow it.
        patch.delenv("COLUMNS", raising=False)
        yield


@pytest.fixture
def install_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a distribution with entry points and one module on sys.path, as pip would."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(site)

    def install(
        distribution: str, entry_points: str, source: str, module: str = "acme_plugin"
    ) -> None:
        info = site / f"{distribution}-1.2.3.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2.3\n"
        )
        (info / "entry_points.txt").write_text(entry_points)
        (site / f"{module}.py").write_text(source)
        monkeypatch.delitem(sys.modules, module, raising=False)

    return install
