"""Mend torch's gradient of a group norm whose scale alone trains: in channels_last it may crash.

Up to torch 2.13, the kernel for tensors in channels_last writes to the gradient of the features
also where nobody asks for one, which ends the process, of users' own modules as of pbc's graphs.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

_OPERATOR = "native_group_norm_backward"


@cache
def mend_group_norm() -> torch.library.Library | None:
    """Have such features laid out plainly, in this process; None where torch cannot be told."""
    if not hasattr(torch.library, "get_kernel"):  # new in torch 2.9
        return None
    kernel = torch.library.get_kernel(f"aten::{_OPERATOR}", "CPU")

    def backward(keys: Any, slope: Tensor, features: Tensor, *rest: Any) -> Any:
        *_, (of_features, _, _) = rest
        if not of_features:
            slope, features = slope.contiguous(), features.contiguous()
        return kernel.call_boxed(keys, slope, features, *rest)

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is a kernel already
        library.impl(_OPERATOR, backward, "CPU", with_keyset=True, allow_override=True)
    return library
