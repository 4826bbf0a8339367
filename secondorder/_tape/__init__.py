"""What a forward and backward pass leaves behind: per linear layer its input, what follows it, and the gradients there.

Beside the tape there is what LevenbergMarquardt reads in the graph of a loss, without a tape: `residuals`, `uses` of parameters,
`plans`, and the `jacobian` by them.
"""

from secondorder._tape.backward_roots import term_of_its_own, term_outside, upstream
from secondorder._tape.columns import Columns
from secondorder._tape.elementwise import AutogradMap, ElementwiseMap, KnownActivation, activation_function, derivatives
from secondorder._tape.forward_state import ForwardState
from secondorder._tape.graph import Marks, in_recomputation, is_reshaping, is_view_of
from secondorder._tape.layers import LayerRecord
from secondorder._tape.options import OutputHessianOf, TapeOptions
from secondorder._tape.records import (
    Counting,
    CriterionArguments,
    LayerCall,
    Link,
    LossCall,
    ModelCall,
    aligned,
    as_weighted,
    has_rows_apart,
    is_recorded,
)
from secondorder._tape.tape import Tape
from secondorder._tape.ways import is_affine, is_selecting, keeps_rows, logits_of, preactivation, taken_from

__all__ = [
    "AutogradMap", "Columns", "Counting", "CriterionArguments", "ElementwiseMap", "ForwardState", "KnownActivation",
    "LayerCall", "LayerRecord", "Link", "LossCall", "Marks", "ModelCall", "OutputHessianOf", "Tape", "TapeOptions",
    "activation_function", "aligned", "as_weighted", "derivatives", "has_rows_apart", "in_recomputation", "is_affine",
    "is_recorded", "is_reshaping", "is_selecting", "is_view_of", "keeps_rows", "logits_of", "preactivation", "taken_from",
    "term_of_its_own", "term_outside", "upstream",
]  # fmt: skip
