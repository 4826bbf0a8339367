"""KFLR: KFRA with the exact expected Gauss-Newton blocks (Botev et al., 2017)."""

from typing import Any

from secondorder.optim.kfra import KFRA


class KFLR(KFRA):
    """`KFRA` with the curvature of Eq. 23 to 25, for K backward passes through the net for K outputs.

    Args:
        *args: see `KFRA`.
        **kwargs: see `KFRA`; `curvature` is "kflr" unless given.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"curvature": "kflr", **kwargs})
