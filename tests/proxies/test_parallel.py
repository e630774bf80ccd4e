"""Alignment by several processes, as torchrun starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from pbc.proxies import parallel

ALIGN = """
import hashlib, json, sys, time
from dataclasses import replace
from pathlib import Path
import networks
from pbc.proxies import parallel
from pbc.passes.align import Align
from pbc.ir.graph import get_tensor, tensor_names
from pbc.testing import with_request

with parallel.group():
    program = networks.pruned(networks.ConvNet, levels=1)
    data = networks.calibration(Path(sys.argv[1]), program.network.input)
    program = with_request(replace(program, calibration=data), work=Path(sys.argv[2]))
    aligned = Align(align_steps=30)(program)
    graph = aligned.levels[1].prefix
    digest = hashlib.sha256()
    for name in tensor_names(graph):
        digest.update(get_tensor(graph, name).detach().numpy().tobytes())
    told = {"rank": parallel.rank(), "size": parallel.size(), "weights": digest.hexdigest(),
            "fidelity": aligned.levels[1].fidelity,
            "measured": parallel.once(lambda: time.perf_counter())}
    print("TOLD " + json.dumps(told), flush=True)
"""


def aligned_by(processes: int, photos: Path, work: Path) -> list[dict[str, Any]]:
    work.mkdir()
    started = [sys.executable]
    if processes > 1:
        started += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    script = work.parent / "align.py"
    script.write_text(ALIGN)
    paths = os.pathsep.join([str(Path(tiny.__file__).parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [*started, str(script), str(photos), str(work)],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    # Processes write at the same time: two may end up in one line.
    told = run.stdout.split("TOLD ")[1:]
    return [json.JSONDecoder().raw_decode(text)[0] for text in told]


def test_two_processes_align_to_the_same_weights(tmp_path: Path) -> None:
    photos = tiny.photos(tmp_path / "photos", 60)
    (alone,) = aligned_by(1, photos, tmp_path / "one")
    both = aligned_by(2, photos, tmp_path / "two")
    assert sorted(told["rank"] for told in both) == [0, 1]
    assert {told["size"] for told in both} == {2}
    assert len({told["weights"] for told in both}) == 1
    assert len({told["measured"] for told in both}) == 1
    assert both[0]["weights"] != alone["weights"]  # other batches, so not by chance
    assert both[0]["fidelity"] == pytest.approx(alone["fidelity"], abs=0.1)
    # Only the first process writes what lets the work resume.
    assert len(list((tmp_path / "two").iterdir())) == 1


def test_one_process_needs_no_group() -> None:
    with parallel.group():
        assert (parallel.rank(), parallel.size()) == (0, 1)
        assert parallel.once(lambda: 3) == 3
        parallel.wait()
