"""A fleet laid out for vLLM's filesystem LoRA resolver: names, base, who is served by what, what is left out."""

import json
import os
import shlex
from pathlib import Path

import toys
from fleet_fixtures import TEXT, rows_of
from peft import PeftModel
from safetensors import safe_open
from test_export_fleet import fleet, states, trained

from perce_lite.files import safe_name
from perce_lite.fleet.registry import opened

pytest_plugins = ["cli_fixtures"]
__all__ = ["fleet", "trained"]


def resolved(serve: str, name: str) -> Path | None:
    """The folder that vLLM's resolver loads for a request's model, by its rules, under the command that was printed."""
    words = shlex.split(serve.replace("\\\n", " "))
    environment = dict(word.split("=", 1) for word in words if "=" in word and word.startswith("VLLM_"))
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert environment["VLLM_PLUGINS"] == "lora_filesystem_resolver"
    base = words[words.index("serve") + 1]
    cache = environment["VLLM_LORA_RESOLVER_CACHE_DIR"]
    folder = os.path.join(cache, name)
    if not os.path.realpath(folder).startswith(os.path.realpath(cache) + os.sep):
        return None
    if not os.path.exists(os.path.join(folder, "adapter_config.json")):
        return None
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    assert config["r"] <= int(words[words.index("--max-lora-rank") + 1])
    assert Path(words[words.index("--chat-template") + 1]).is_file()
    fits = config["peft_type"] == "LORA" and config["base_model_name_or_path"] == base
    return Path(folder) if fits else None


def test_every_user_is_found_under_the_name_that_users_json_gives(fleet, figures, run):
    told = figures("export", "--all", "--fleet", fleet, "--to", "vllm")
    assert states(told) == {"all all": "exported", "user user0": "exported", "user user2": "exported"}
    assert told["folder"] == str(fleet / "vllm")
    users = json.loads((fleet / "vllm/users.json").read_text())
    assert users == {
        "user0": safe_name("user0"), "user1": safe_name("all all"), "user2": safe_name("user2"),
    }  # fmt: skip
    for name in users.values():
        folder = resolved(told["serve"], name)
        assert folder is not None
        model = PeftModel.from_pretrained(toys.toy_model("chatml", 600), folder)
        assert any("lora_A" in parameter for parameter, _ in model.named_parameters())
    for name in ("users.json", "..", "nobody", "../adapters/all"):
        assert resolved(told["serve"], name) is None
    readme = (fleet / "vllm/README.md").read_text()
    assert all(line.strip() in readme for line in told["serve"].splitlines())
    assert "--enable-lora" in readme.partition("SGLang")[2]
    assert f'adapter_id="{fleet / "vllm" / told_name(told)}", adapter_source="local"' in readme
    code, out, _ = run("export", "--all", "--fleet", fleet, "--to", "vllm")
    assert code == 0
    assert "3 kept" in out
    assert "vllm serve" in out


def told_name(told: dict) -> str:
    return Path(told["exports"][0]["folder"]).name


def test_who_is_not_served_any_more_is_taken_out(fleet, figures, run):
    figures("export", "--all", "--fleet", fleet, "--to", "vllm")
    with opened(fleet) as registry:
        registry.judged(registry.get("user", "user2"), "held back", "worse")
    code, _, err = run("export", "--all", "--fleet", fleet, "--to", "vllm")
    assert code == 0
    assert f"{safe_name('user2')}: removed, for it serves nobody any more" in err
    assert not (fleet / "vllm" / safe_name("user2")).exists()
    assert json.loads((fleet / "vllm/users.json").read_text())["user2"] == safe_name("all all")
    code, out, _ = run("adapters", "delete", "user0", "--fleet", fleet, "--yes")
    assert code == 0
    assert not (fleet / "vllm" / safe_name("user0")).exists()
    assert not (fleet / "vllm/users.json").exists(), "it names the user"
    assert str(fleet / "vllm" / safe_name("all all")) in out.replace("\n", ""), "it has seen the user's texts"
    told = figures("export", "--all", "--fleet", fleet, "--to", "vllm")
    assert "user0" not in json.loads((fleet / "vllm/users.json").read_text())
    assert resolved(told["serve"], safe_name("user0")) is None


def test_elsewhere_with_a_user_whom_the_base_serves(fleet, figures, tmp_path):
    with opened(fleet) as registry:
        registry.judged(registry.get("all", "all"), "held back", "worse")
    told = figures("export", "--all", "--fleet", fleet, "--to", "vllm", "--out", "my place")
    assert told["folder"] == str(tmp_path / "my place")
    assert json.loads(Path("my place/users.json").read_text())["user1"] is None
    assert resolved(told["serve"], safe_name("user2")) == tmp_path / "my place" / safe_name("user2")


def test_cores_are_laid_out_as_whole_adapters(recipe, run, figures):
    text = TEXT + "lora: {r: 4, core_only: true}\n"
    assert run("fleet", recipe(rows_of(2), text))[0] == 0
    told = figures("export", "--all", "--fleet", "out", "--to", "vllm")
    folder = resolved(told["serve"], safe_name("user1"))
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        names = list(file.keys())
    assert {name.rsplit(".", 2)[1] for name in names} == {"lora_A", "lora_B"}


def test_where_nothing_could_be_exported_there_is_nothing_to_serve(fleet, run, figures, monkeypatch):
    monkeypatch.setattr("perce_lite.export.export_all._export", lambda *args: {"state": "failed", "why": "broken"})
    code, out, _ = run("export", "--all", "--fleet", fleet, "--to", "vllm", "--json", "told.json")
    assert code == 3
    assert "serve" not in json.loads(Path("told.json").read_text())
    assert "vllm serve" not in out
