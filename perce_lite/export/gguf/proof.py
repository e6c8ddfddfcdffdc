"""The proof of a whole GGUF: a real llama.cpp says with it what the merged model said, chat template and all."""

from pathlib import Path
from typing import Any

import numpy as np

from perce_lite.errors import ExportError
from perce_lite.export import llamacpp
from perce_lite.export.gguf.common import check_model, check_rows, check_vocabulary, mean_shift, read
from perce_lite.export.gguf.model import FILE
from perce_lite.export.proof import OTHER_PROGRAM, ROUNDED, Proof, does_as_recorded, gap

TOLERANCES = {"F32": OTHER_PROGRAM, "F16": ROUNDED}
"""Nats, by what the weights are written as; of all others the proof is loose."""

NOT_DONE = f"llama.cpp was not asked, for it is not installed: {llamacpp.INSTALL}"


def verify(folder: Path, proof: Proof) -> dict[str, Any]:
    """Reads the model back and has llama.cpp run it; the largest difference in nats, or for coarse weights the shares.

    Raises:
        ExportError: whatever is wrong, each fault with a message of its own.
    """
    path, quant = folder / FILE, proof.quant
    known = llamacpp.read_base(path)
    check_vocabulary(known, proof)
    check_model(known, proof)
    if not llamacpp.installed():
        check_rows(read(path), proof, path)
        return {"off_adapter": None, "not_done": NOT_DONE}
    llama = llamacpp.Llama(known, None, 2 * len(proof.ids))
    got = llama.log_probs(proof.ids, len(proof.adapter))
    if gap(got, proof.base) <= proof.tolerance:
        does_as_recorded(proof, got, str(path))  # says that the base speaks, which is more than that a hash is wrong
    if quant in TOLERANCES or not np.isfinite(got).all():
        check_rows(read(path), proof, path)
    if quant in TOLERANCES:
        result = {"off_adapter": does_as_recorded(proof, got, str(path))}
    else:
        result = _loosely(proof, got, path, quant)
        check_rows(read(path), proof, path)
    return {**result, "greedy": _answers(llama, proof, path, got[0], exact=quant in TOLERANCES)}


def _loosely(proof: Proof, got: list[float], path: Path, quant: str) -> dict[str, Any]:
    """With rounded weights: the greater part of what the adapter does has to be there, not drowned by the rounding.

    Raises:
        ExportError: it does nothing, or too little, or the rounding does much more than the adapter.
    """
    meant, off = (np.array(proof.adapter) - np.array(log_probs) for log_probs in (proof.base, got))
    share = 1 - float(off @ meant / (meant @ meant))  # of the adapter's own direction
    off_by, effect = float(np.abs(off).mean()), mean_shift(proof)
    if share < 0.25:
        raise ExportError(
            f"{path}: it loads and does nothing: a fixed text has by and large the bare base's log-probs."
        )
    if not (share >= 0.5 and off_by <= 2 * effect):  # so that no number at all fails too
        raise ExportError(
            f"{path}: {quant} rounds too much away: of the {effect:.3f} nats a token by which the adapter moves a "
            f"fixed text {share:.0%} are left, with {off_by:.3f} of noise. Take a finer --quant."
        )
    return {"off_adapter": None, "off_shift": off_by, "mean_shift": effect, "share": share}


def _answers(llama: llamacpp.Llama, proof: Proof, path: Path, first: float, exact: bool) -> int:
    """How many first tokens of the greedy answer are the merged model's, the question put through the file's template.

    first: the log-prob of the fixed answer's first token behind the ids of the question

    Raises:
        ExportError: the file's template and tokenizer make other ids of the question, or the answer is another one.
    """
    at = len(proof.ids) - len(proof.adapter)
    prompt = proof.ids[:at]
    count, through = llama.chat(proof.messages, proof.template.chat_template_kwargs, proof.ids[at])
    if count != at or not abs(through - first) <= proof.tolerance:
        raise ExportError(
            f"{path}: a swapped tokenizer: its chat template and tokenizer make other ids of a fixed question than "
            f"training saw ({count} and {at}). Export again."
        )
    same = 0
    while same < len(proof.greedy) and llama.greedy([*prompt, *proof.greedy[:same]]) == proof.greedy[same]:
        same += 1
    if exact and same < len(proof.greedy):
        raise ExportError(
            f"{path}: its greedy answer to a fixed question is the merged model's for {same} tokens, and should be for "
            f"{len(proof.greedy)}."
        )
    return same
