"""A GPU whose memory is full: by which errors that shows, and whether a base has room before it is loaded."""

import re

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from perce_lite.model.architecture import model_class

_GIB = 2**30

_WORDS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "cudaErrorMemoryAllocation")
"""What torch, cuBLAS and cuDNN say in errors that are no `torch.OutOfMemoryError`; pinned host memory too."""


def gpu_is_full(error: BaseException) -> bool:
    """Whether `error` says that a GPU, or host memory pinned for it, has no room left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


_FAILED = re.compile(r"CUDA (driver )?error|CUBLAS_STATUS_|CUDNN_STATUS_")
"""What torch and CUDA's libraries say of a GPU that fails."""


def gpu_has_failed(error: BaseException) -> bool:
    """Whether `error` is a GPU's own: by torch's type for it, or by the words of its libraries."""
    if isinstance(error, torch.AcceleratorError):
        return True
    return type(error) is RuntimeError and _FAILED.search(str(error)) is not None


def why_no_room(shapes: PreTrainedModel, dtype: torch.dtype, in_4_bit: bool, hosted: str | None = None) -> str | None:
    """Why a base of these shapes (`on_meta`) cannot be loaded to the current GPU, by its free memory; None: it may be.

    dtype: of what is not quantised; hosted: path of a module that goes to the host instead
    """
    need = _at_least(shapes, dtype, in_4_bit, hosted)
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if need <= free:
        return None
    return f"its weights alone take {need / _GIB:.2f} GiB, and {free / _GIB:.2f} GiB of the GPU are free"


def on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration on the meta device: shapes only, no memory for weights."""
    with torch.device("meta"):
        kind = model_class(config)
        automatic = issubclass(kind, AutoModelForCausalLM | AutoModelForImageTextToText)
        return kind.from_config(config) if automatic else kind(config)


def _at_least(model: PreTrainedModel, dtype: torch.dtype, in_4_bit: bool, hosted: str | None) -> int:
    """Bytes of the weights on the GPU, quantisation constants left out; `model` may have shapes alone."""
    elsewhere = set() if hosted is None else set(model.get_submodule(hosted).parameters())
    head = model.get_output_embeddings()
    linears = [module.weight for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    quantised = {id(weight) for weight in linears} if in_4_bit else set()
    return sum(
        parameter.numel() // 2 if id(parameter) in quantised else parameter.numel() * dtype.itemsize
        for parameter in model.parameters()
        if parameter not in elsewhere
    )
