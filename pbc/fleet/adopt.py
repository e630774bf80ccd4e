"""A fleet's θ as a personal model of this device."""

from __future__ import annotations

from pathlib import Path

from pbc.errors import PbcError
from pbc.fleet.state import FleetState
from pbc.runtime.output.folder import Output
from pbc.runtime.runtime import Runtime


def adopt(
    fleet: Path | str, out: Path | str, *, bundle: Path | None = None, overwrite: bool = False
) -> int:
    """Write the model into the folder `out`; return how many rounds it is from.

    bundle: where the fleet's folder has none. Raises PbcError for another than the fleet's.
    """
    state = FleetState.load(Path(fleet))
    runtime = Runtime.open(bundle or Output(Path(fleet)).bundle)
    if runtime.bundle.digest != state.facts["bundle"]:
        raise PbcError(f"{runtime.bundle.path} is not the bundle that the fleet in {fleet} trained")
    runtime.personalize(state.theta, state.facts["classes"], out, overwrite=overwrite)
    return state.round
