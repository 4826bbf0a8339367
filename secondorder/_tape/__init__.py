"""What a forward and backward pass leaves behind: per linear layer its input, what follows it, and the gradients there."""

from secondorder._tape.columns import Columns
from secondorder._tape.elementwise import AutogradMap, ElementwiseMap, KnownActivation, derivatives
from secondorder._tape.graph import refuse_reentrant_checkpoint
from secondorder._tape.layers import LayerRecord
from secondorder._tape.records import LayerCall, Link, LossCall, ModelCall
from secondorder._tape.tape import Tape

__all__ = [
    "AutogradMap", "Columns", "ElementwiseMap", "KnownActivation", "LayerCall", "LayerRecord", "Link", "LossCall", "ModelCall",
    "Tape", "derivatives", "refuse_reentrant_checkpoint",
]  # fmt: skip
