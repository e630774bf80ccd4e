"""The level-0 features of all photos in one table, for who learns from them again and again."""

from __future__ import annotations

import numpy as np

from pbc.bundle import Bundle
from pbc.data import Samples
from pbc.errors import PbcError
from pbc.runtime.engines import Executable
from pbc.runtime.engines.bounds import check_table, photos_at_once

_CALL = 32


def features_of(bundle: Bundle, executable: Executable, samples: Samples) -> dict[str, np.ndarray]:
    """Return the features of all samples, f32[n, …] each.

    Raises PbcError where they would take too much memory, and where they are not finite.
    """
    count = len(samples)
    check_table(bundle.manifest, count)
    step = min(_CALL, photos_at_once(bundle.manifest))
    parts = [
        executable.prefix(0, samples.images(np.arange(begin, min(begin + step, count))))
        for begin in range(0, count, step)
    ]
    table = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for name, values in table.items():
        if not np.isfinite(values).all():
            raise PbcError(
                f"{bundle.path}: the prefix of level 0 returns {name!r} that is not finite; "
                "nothing can be learnt from it"
            )
    return table
