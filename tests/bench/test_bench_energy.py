"""Energy meters on made-up trees of /sys."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pbc.bench.energy import NoMeter, PowerMeter, Rapl, find_meter, ina3221_watts, parse_nvidia_smi


def write(path: Path, text: str | int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")
    return path


def rapl(root: Path, name: str, label: str, energy_uj: int) -> Path:
    folder = root / "class/powercap" / name
    write(folder / "name", label)
    write(folder / "max_energy_range_uj", 10_000_000)
    return write(folder / "energy_uj", energy_uj)


def test_rapl_adds_packages_and_memory_but_no_part_twice(tmp_path: Path) -> None:
    package = rapl(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    cores = rapl(tmp_path, "intel-rapl:0:0", "core", 500_000)
    rapl(tmp_path, "intel-rapl-mmio:0", "package-0", 7_000_000)
    memory = rapl(tmp_path, "intel-rapl:0:1", "dram", 0)
    meter = find_meter(tmp_path)
    assert meter.name == "RAPL"
    assert meter.joules() == 0
    write(package, 3_000_000)
    write(cores, 9_000_000)
    write(tmp_path / "class/powercap/intel-rapl-mmio:0/energy_uj", 9_000_000)
    write(memory, 250_000)
    assert meter.joules() == pytest.approx(2.25)


def test_rapl_wraps_around(tmp_path: Path) -> None:
    counter = rapl(tmp_path, "intel-rapl:0", "package-0", 9_500_000)
    meter = Rapl.find(tmp_path)
    assert meter is not None
    write(counter, 500_000)
    assert meter.joules() == pytest.approx(1.0)
    write(counter, 600_000)
    assert meter.joules() == pytest.approx(1.1)


def test_a_counter_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    write(tmp_path / "class/powercap/intel-rapl:0/name", "package-0")
    assert Rapl.find(tmp_path) is None


def jetson(root: Path, rails: dict[str, tuple[int, int]]) -> None:
    hwmon = root / "bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3"
    for number, (label, (millivolts, milliamperes)) in enumerate(rails.items(), 1):
        write(hwmon / f"in{number}_label", label)
        write(hwmon / f"in{number}_input", millivolts)
        write(hwmon / f"curr{number}_input", milliamperes)


def test_the_boards_input_covers_its_other_rails(tmp_path: Path) -> None:
    jetson(tmp_path, {"VDD_IN": (5000, 2000), "VDD_CPU_GPU_CV": (5000, 900)})
    watts = ina3221_watts(tmp_path)
    assert watts is not None
    assert watts() == pytest.approx(10.0)


def test_rails_add_up_where_none_is_the_input(tmp_path: Path) -> None:
    jetson(tmp_path, {"GPU": (19000, 100), "CPU": (19000, 200)})
    watts = ina3221_watts(tmp_path)
    assert watts is not None
    assert watts() == pytest.approx(5.7)


def test_an_older_jetson_has_iio_names(tmp_path: Path) -> None:
    device = tmp_path / "bus/i2c/drivers/ina3221x/0-0041/iio:device1"
    write(device / "rail_name_0", "VDD_IN")
    write(device / "in_voltage0_input", 19000)
    write(device / "in_current0_input", 300)
    watts = ina3221_watts(tmp_path)
    assert watts is not None
    assert watts() == pytest.approx(5.7)


def test_power_is_integrated(tmp_path: Path) -> None:
    jetson(tmp_path, {"VDD_IN": (5000, 2000)})
    meter = find_meter(tmp_path)
    assert isinstance(meter, PowerMeter)
    assert meter.name == "INA3221"
    before = meter.joules()
    start = time.monotonic()
    time.sleep(0.05)
    spent = meter.joules() - before
    assert spent == pytest.approx(10 * (time.monotonic() - start), rel=0.2)


def test_nvidia_smi_prints_a_line_per_gpu() -> None:
    assert parse_nvidia_smi("35.20\n40.80\n") == pytest.approx(76.0)
    assert parse_nvidia_smi("[N/A]\n12.5\n") == 12.5
    with pytest.raises(ValueError, match="no power"):
        parse_nvidia_smi("[N/A]\n")


def test_where_there_is_no_meter_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    meter = find_meter(tmp_path, uses_gpu=True)
    assert isinstance(meter, NoMeter)
    assert meter.name == "no energy meter on this machine"


def test_a_gpu_counts_only_where_the_training_runs_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = write(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\necho 50.0")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    assert isinstance(find_meter(tmp_path), NoMeter)
    assert find_meter(tmp_path, uses_gpu=True).name == "NVML (GPUs only)"
