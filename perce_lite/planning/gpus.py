"""GPUs by name or size: what of their memory a program sees, and what they compute in."""

import difflib
import re
from dataclasses import dataclass

from perce_lite.errors import PlanError

GIB = 2**30
"""Bytes in a GiB."""

COMMON_SIZES = (6, 8, 12, 16, 24)
"""GB of the GPUs that a plan speaks of where none is named and none is there."""


@dataclass(frozen=True)
class Gpu:
    """A GPU. `bytes` is what a program sees of its memory, a little less than what the box says.

    bf16: whether it computes in bf16, as those from compute capability 8.0 on do; older ones (T4) take fp16
    """

    name: str
    bytes: int
    bf16: bool = True


_SEEN = 0.975
"""Share of a consumer GPU's nominal memory that a program sees; the driver keeps the rest."""

_BY_SIZE = {
    6: "RTX 2060, RTX 3050 6GB, RTX 4050",
    8: "RTX 2070, RTX 2080, RTX 3050, RTX 3060 Ti, RTX 3070, RTX 3070 Ti, RTX 4060, RTX 4060 Ti, RTX 5060",
    10: "RTX 3080",
    11: "RTX 2080 Ti",
    12: "RTX 3060, RTX 3080 Ti, RTX 3080 12GB, RTX 4070, RTX 4070 Super, RTX 4070 Ti, RTX 5070",
    16: "RTX 4060 Ti 16GB, RTX 4070 Ti Super, RTX 4080, RTX 4080 Super, RTX 5060 Ti, RTX 5070 Ti, RTX 5080, RTX A4000",
    24: "RTX 3090, RTX 3090 Ti, RTX 4090, RTX A5000",
    32: "RTX 5090",
    48: "RTX A6000, RTX 6000 Ada",
}
_SERVERS = {
    "T4": 14.7, "L4": 22.0, "A10": 22.0, "A10G": 22.0, "A30": 23.5, "L40": 44.4,
    "L40S": 44.4, "A100 40GB": 39.4, "A100 80GB": 79.1, "H100": 79.1, "H200": 139.0,
}  # fmt: skip
"""GiB that torch sees of GPUs whose memory corrects errors and keeps a part for that."""

_WITHOUT_BF16 = re.compile(r"RTX 20\d\d|T4")

_TOO_OLD = re.compile(r"(v100|p100|p40|titanv|gtx1\d\d\d(ti)?)(\d+gi?b)?")
"""Pascal and Volta: CUDA 13, for which current torch is built, makes no code for them."""


def _gpus() -> dict[str, Gpu]:
    sizes = {name: size * _SEEN for size, names in _BY_SIZE.items() for name in names.split(", ")} | _SERVERS
    return {name: Gpu(name, int(size * GIB), not _WITHOUT_BF16.match(name)) for name, size in sizes.items()}


GPUS = _gpus()
"""Common GPUs by name. Memory: the makers' data sheets; which of them lack bf16: compute capability below 8.0."""


def of_size(gigabytes: float) -> Gpu:
    """A consumer GPU with so many GB on its box."""
    return Gpu(f"{gigabytes:g} GB", int(gigabytes * _SEEN * GIB))


def gpu(given: str) -> Gpu:
    """The GPU that `--gpu` names: a size such as 8GB or "8 GiB", or a name such as "RTX 4070".

    Raises:
        PlanError: neither; with the nearest name.
    """
    size = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:G|GB|GiB)?\s*", given, re.IGNORECASE)
    if size is not None:
        if not 1 <= float(size[1]) <= 1024:
            raise PlanError(f"--gpu {given}: a GPU has 1 to 1024 GB")
        return of_size(float(size[1]))
    known = {_plain(name): name for name in GPUS}
    asked = _plain(given)
    if asked in known:
        return GPUS[known[asked]]
    stated = re.fullmatch(r"(.*\S)[\s_-]+(\d+)\s*gi?b", given, re.IGNORECASE)
    if stated is not None and _plain(stated[1]) in known:
        card = GPUS[known[_plain(stated[1])]]
        if abs(card.bytes / GIB / float(stated[2]) - 1) < 0.1:
            return card
    if _TOO_OLD.fullmatch(asked):
        raise PlanError(
            f"--gpu {given}: CUDA 13, for which current torch is built, has no code for so old a GPU. With an older "
            "build of torch nothing of PerCE Lite was tried there; plan by its memory: --gpu 16GB"
        )
    near = difflib.get_close_matches(asked, known, n=3, cutoff=0.4)
    mend = f"did you mean {' or '.join(known[name] for name in near)}?" if near else f"known: {', '.join(GPUS)}."
    raise PlanError(f"--gpu {given}: no such GPU; {mend} Or give its memory: --gpu 8GB")


def _plain(name: str) -> str:
    """A name without what people write or leave out: maker, brand, spaces, case."""
    return re.sub(r"nvidia|geforce|tesla|quadro|[\s_-]", "", name.lower())


def present() -> Gpu | None:
    """The GPU of this machine that training would take, or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(0)
    return Gpu(facts.name, facts.total_memory, torch.cuda.get_device_capability(0)[0] >= 8)
