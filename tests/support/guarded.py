"""An interpreter in which heavy packages cannot be imported, and what it imported."""

from __future__ import annotations

import json
import subprocess
import sys

FORBIDDEN = {"onnx", "onnxruntime", "sympy", "timm", "torch", "torch_pruning", "torchvision", "tvm"}

# The core's own dependencies, and theirs.
ALLOWED = {"PIL", "click", "numpy", "rich", "safetensors"} | {"markdown_it", "mdurl", "pygments"}

SCRIPT = """
import importlib, importlib.abc, json, sys

forbidden, statement = set(json.loads(sys.argv[1])), sys.argv[2]

class Guard(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in forbidden:
            raise ImportError(f"{name} must not be imported here")

sys.meta_path.insert(0, Guard())
sys.argv = ["pbc", *sys.argv[3:]]
before = set(sys.modules)
try:
    exec(statement)
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""


def imported(statement: str, *args: str, forbidden: set[str] = FORBIDDEN) -> set[str]:
    """Run a statement in a fresh interpreter and return the top-level modules it imported."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(sorted(forbidden)), statement, *args],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    names: list[str] = json.loads(result.stdout.splitlines()[-1])
    return set(names)


def third_party(names: set[str]) -> set[str]:
    return {name for name in names if name not in sys.stdlib_module_names and name[0] != "_"}
