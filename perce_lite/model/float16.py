"""Numbers beyond 65,504, where float16 ends: which models have them, and what to say of it."""

import torch

_OVERFLOWING = ("gemma3", "gemma3_text")
"""Model types whose activations are known to pass 65,504."""

_MEND = "Set dtype: float32, or take another model, or a GPU that computes in bf16 (RTX 30xx, L4, A100 and later)."


def overflow_of(model_type: str, dtype: str) -> str | None:
    """Why a model of this type cannot be trained in `dtype` ("float16"), and what to do; None: nothing is known."""
    if dtype != "float16" or model_type not in _OVERFLOWING:
        return None
    return f"activations of a {model_type} model pass 65,504, where float16 ends, and become NaN. {_MEND}"


def advice(autocast: torch.dtype | None) -> str:
    """What to do about a figure that is not finite under a frozen base, or at a first step; empty unless in float16."""
    return f"In float16 whatever passes 65,504 becomes infinite. {_MEND}" if autocast == torch.float16 else ""
