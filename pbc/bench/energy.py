"""Energy, where the machine has a meter for it; where it has none, that is said."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Protocol

_SAMPLE_SECONDS = 0.2
_TIMEOUT_SECONDS = 5


class EnergyMeter(Protocol):
    """Counter of joules since some moment."""

    name: str

    def joules(self) -> float:
        """Return the energy so far; only differences mean something."""


class NoMeter:
    """Absence of a meter, which counts nothing."""

    name = "no energy meter on this machine"

    def joules(self) -> float:
        return 0.0


@dataclass
class Counter:
    """One RAPL counter: microjoules that wrap around."""

    path: Path
    range_uj: int
    last_uj: int
    total_uj: int = 0

    def read(self) -> float:
        """Return the joules since the counter was made."""
        now = int(self.path.read_text())
        step = now - self.last_uj
        # It wraps after minutes to hours; being read every epoch, it wraps once at most.
        self.total_uj += step if step >= 0 else step + self.range_uj
        self.last_uj = now
        return self.total_uj / 1e6


class Rapl:
    """The processor's own counters (Intel and AMD), packages and their memory."""

    name = "RAPL"

    def __init__(self, counters: list[Counter]) -> None:
        self._counters = counters

    @classmethod
    def find(cls, root: Path) -> Rapl | None:
        """Look under /sys/class/powercap; None where it is missing or not readable.

        `intel-rapl-mmio:*` are the same packages, read another way.
        """
        counters = []
        for folder in sorted((root / "class/powercap").glob("intel-rapl:*")):
            try:
                name = (folder / "name").read_text().strip()
                # A package holds its cores and graphics; only the memory is not in it.
                if not name.startswith(("package", "dram")):
                    continue
                path = folder / "energy_uj"
                limit = int((folder / "max_energy_range_uj").read_text())
                counters.append(Counter(path, limit, int(path.read_text())))
            except (OSError, ValueError):
                continue  # since 2020 often readable by root only
        return cls(counters) if counters else None

    def joules(self) -> float:
        return sum(counter.read() for counter in self._counters)


class PowerMeter:
    """Integral of a power that can only be read at moments, in a thread of its own."""

    def __init__(self, name: str, watts: Callable[[], float]) -> None:
        self.name = name
        self._watts = watts
        self._joules = 0.0
        self._at = monotonic()
        self._lock = threading.Lock()
        threading.Thread(target=self._run, daemon=True, name="energy").start()

    def joules(self) -> float:
        self._add()
        return self._joules

    def _run(self) -> None:
        pause = threading.Event()
        while not pause.wait(_SAMPLE_SECONDS):
            self._add()

    def _add(self) -> None:
        try:
            watts = self._watts()
        except (OSError, ValueError, subprocess.SubprocessError):
            return  # the next look covers the time of this one
        with self._lock:
            now = monotonic()
            self._joules += watts * (now - self._at)
            self._at = now


def ina3221_watts(root: Path) -> Callable[[], float] | None:
    """Return the reader of a Jetson's power monitor: volts times amperes of the whole board.

    The rail of the board's input (VDD_IN, VIN_SYS_5V0, POM_5V_IN) covers all others; where no
    rail has such a name, all rails are added. None where there is no INA3221.
    """
    rails: list[tuple[str, Path, Path]] = []
    for hwmon in sorted((root / "bus/i2c/drivers").glob("ina3221*/*/hwmon/hwmon*")):
        for label in sorted(hwmon.glob("in*_label")):
            number = label.name[2:].partition("_")[0]
            volts, amperes = hwmon / f"in{number}_input", hwmon / f"curr{number}_input"
            if volts.exists() and amperes.exists():
                rails.append((label.read_text().strip(), volts, amperes))
    for device in sorted((root / "bus/i2c/drivers").glob("ina3221*/*/iio:device*")):  # JetPack 4
        for label in sorted(device.glob("rail_name_*")):
            number = label.name.rpartition("_")[2]
            volts = device / f"in_voltage{number}_input"
            amperes = device / f"in_current{number}_input"
            if volts.exists() and amperes.exists():
                rails.append((label.read_text().strip(), volts, amperes))
    if not rails:
        return None
    whole = [
        rail for rail in rails if rail[0].upper().endswith(("VDD_IN", "_5V_IN", "VIN_SYS_5V0"))
    ]

    def watts() -> float:
        return sum(
            float(volts.read_text()) * float(amperes.read_text()) / 1e6  # mV · mA
            for _, volts, amperes in whole or rails
        )

    return watts


def parse_nvidia_smi(text: str) -> float:
    """Sum the watts that nvidia-smi prints, a line per GPU; raises ValueError without a number."""
    watts = [float(line) for line in text.splitlines() if _is_number(line)]
    if not watts:
        raise ValueError(f"no power in {text!r}")
    return sum(watts)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def nvidia_watts() -> float:
    """Ask the driver for the power of all GPUs."""
    program = shutil.which("nvidia-smi")
    if program is None:
        raise OSError("no nvidia-smi")
    command = [program, "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_SECONDS
    )
    return parse_nvidia_smi(result.stdout)


def find_meter(root: Path = Path("/sys"), *, uses_gpu: bool = False) -> EnergyMeter:
    """Return the machine's meter: RAPL, a Jetson's INA3221, an NVIDIA GPU's, or none.

    uses_gpu: whether the training runs on a GPU; a GPU that idles says nothing about it.
    """
    rapl = Rapl.find(root)
    if rapl is not None:
        return rapl
    jetson = ina3221_watts(root)
    if jetson is not None:
        return PowerMeter("INA3221", jetson)
    if not uses_gpu:
        return NoMeter()
    try:
        nvidia_watts()
    except (OSError, ValueError, subprocess.SubprocessError):
        return NoMeter()
    return PowerMeter("NVML (GPUs only)", nvidia_watts)
