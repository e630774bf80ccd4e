"""Recipes go round, and a shell completes what is installed."""

from __future__ import annotations

import json
from pathlib import Path

import click.testing
import pytest
from click.shell_completion import ShellComplete

from pbc.cli import main


def run(*args: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(main, list(args))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examples: Path) -> str:
    monkeypatch.chdir(tmp_path)
    return f"{examples / 'custom_model.py'}:factory"


def test_a_recipe_is_what_the_options_say_and_is_written_as_it_was_read(here: str) -> None:
    recipe = (
        f'model = "{here}"\nweights = "random"\nlevels = 1\nmin-cost = 0.5\nengine = "pytorch"\n'
        'input = "3x32x32"\nwithout = ["align"]\n'
    )
    Path("r.toml").write_text(recipe.replace("levels = 1", "levels = 7"))
    result = run("compile", "--recipe", "r.toml", "--levels", "1",
                 "--dry-run", "--json", "--save-recipe", "again.toml")  # fmt: skip
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["engine"] == "pytorch"
    assert len(plan["levels"]) == 2  # the command line goes before the file
    assert "align" not in plan["passes"]
    assert Path("again.toml").read_text() == recipe


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("levls = 1", 2, "r.toml: no option named 'levls'; did you mean 'levels'?"),
        ("levels = 'x'", 2, "'x' is not a valid integer"),
        ("levels = [1]", 2, "r.toml: levels is [1]; expected one value"),
        ("levels", 1, "r.toml is no TOML: "),
        (None, 1, "cannot read r.toml: No such file or directory"),
    ],
)
def test_a_recipe_that_cannot_be_meant(
    here: str, text: str | None, code: int, message: str
) -> None:
    if text is not None:
        Path("r.toml").write_text(text)
    result = run("compile", here, "--recipe", "r.toml", "--dry-run")
    assert result.exit_code == code
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "incomplete", "wanted"),
    [
        ([], "tar", {"targets"}),
        (["compile", "x", "--target"], "raspberry-pi-5", {"raspberry-pi-5"}),
        (["compile", "x", "--strategy"], "lin", {"linear-probe"}),
        (["compile", "x", "--engine"], "onnx", {"onnxruntime"}),
        (["train", "x", "y", "--optimizer"], "adam", {"adam", "adamw"}),
        (["targets"], "jetson-na", {"jetson-nano"}),
        (["compile"], "resnet5", {"resnet50"}),
        (["compile"], "timm:deit_tiny_patch16", {"deit_tiny_patch16_224"}),
    ],
)
def test_completion(words: list[str], incomplete: str, wanted: set[str]) -> None:
    found = ShellComplete(main, {}, "pbc", "_PBC_COMPLETE").get_completions(words, incomplete)
    assert wanted <= {item.value for item in found}
    assert all(item.value.startswith(incomplete.rpartition(":")[2]) for item in found)
