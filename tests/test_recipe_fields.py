"""Fields that are read from sources are those of the classes, and take and refuse the same values."""

import dataclasses
import typing

import pytest
from peft import LoraConfig
from transformers import GenerationConfig

from perce_lite.config import PerCEConfig
from perce_lite.errors import CompatibilityError
from perce_lite.recipe_checks import _type_fault
from perce_lite.recipe_fields import _CLASSES, fields_of, generation_options

CLASSES = {"PerCEConfig": PerCEConfig, "LoraConfig": LoraConfig}


@pytest.mark.parametrize("name", CLASSES)
def test_they_are_the_fields_of_the_class(name):
    real = {field.name for field in dataclasses.fields(CLASSES[name]) if field.init}
    assert set(fields_of(name)) == real


def test_they_are_the_options_of_generation():
    assert generation_options() == {name for name in vars(GenerationConfig()) if not name.startswith("_")}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("value", [None, True, 0, 3, 0.5, "x", "3", [], ["x"], {}, {"x": 1}])
def test_they_take_and_refuse_what_the_class_s_hints_do(name, value):
    hints = typing.get_type_hints(CLASSES[name])
    for field, hint in fields_of(name).items():
        assert _type_fault(hint, value) == _type_fault(hints[field], value), field


@pytest.mark.parametrize("entry", [("trl", "gone.py", "SFTConfig"), ("trl", "trainer/sft_config.py", "Gone")])
def test_a_class_that_has_moved_is_one_clear_error(monkeypatch, entry):
    monkeypatch.setitem(_CLASSES, "LoraConfig", (entry,))
    with pytest.raises(CompatibilityError, match=r"gone\.py|Gone"):
        fields_of.__wrapped__("LoraConfig")
