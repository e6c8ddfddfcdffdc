"""Files of an export as transformers 4 reads them too: serving programs are often a major version behind."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perce_lite.files import read_json, write_json

_ONLY_IN_5 = ("backend", "is_local", "local_files_only")
"""Fields of a tokenizer's config that say how it was loaded, not what it is."""


def make_readable(folder: Path) -> None:
    """Adds what transformers 4 looks for to the configs of model and tokenizer in `folder`, where they are there.

    transformers 5 reads both ways: it converts the older names itself.
    """
    for name, older in (("tokenizer_config.json", _tokenizer), ("config.json", _model)):
        known = read_json(folder / name)
        if known is not None:
            write_json(folder / name, older(known))


def _tokenizer(config: Mapping[str, Any]) -> dict[str, Any]:
    changed = {key: value for key, value in config.items() if key not in _ONLY_IN_5}
    if changed.get("tokenizer_class") == "TokenizersBackend":
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(changed.get("extra_special_tokens"), list):  # a dictionary of named tokens before
        changed["additional_special_tokens"] = changed.pop("extra_special_tokens")
    return changed


def _model(config: Mapping[str, Any]) -> dict[str, Any]:
    changed = {key: _model(value) if key == "text_config" else value for key, value in config.items()}
    rope = changed.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return changed
    both = rope.get("full_attention", rope)
    if not isinstance(both, Mapping) or "rope_theta" not in both:
        return changed
    changed["rope_theta"] = both["rope_theta"]
    scaling = {key: value for key, value in both.items() if key not in ("rope_theta", "partial_rotary_factor")}
    changed["rope_scaling"] = None if scaling.get("rope_type") == "default" else scaling
    if "partial_rotary_factor" in both:
        changed["partial_rotary_factor"] = both["partial_rotary_factor"]
    if "sliding_attention" in rope:
        changed["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    return changed
