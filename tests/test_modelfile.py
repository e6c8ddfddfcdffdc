"""Chat templates retold in Ollama's Go templates, and Modelfiles that are read back as they were written."""

import pytest
import toys

from perce_lite.data.chat_template import Chat
from perce_lite.errors import ExportError
from perce_lite.export import modelfile
from perce_lite.export.modelfile import Modelfile

MISTRAL = r"""
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}
    {%- set told, rest = messages[0]['content'] + '\n\n', messages[1:] -%}
{%- else -%}
    {%- set told, rest = '', messages -%}
{%- endif -%}
{%- for one in rest -%}
    {%- if one['role'] == 'user' -%}
        {{- '[INST] ' + (told if loop.first else '') + one['content'] + '[/INST]' -}}
    {%- else -%}
        {{- ' ' + one['content'] + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "An otter."},
    {"role": "user", "content": "Where?"},
]
READS = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    "An otter.<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
    "\n\nAn otter.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhere?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "<start_of_turn>user\nBe brief.\n\nWho?<end_of_turn>\n<start_of_turn>model\nAn otter.<end_of_turn>"
    "\n<start_of_turn>user\nWhere?<end_of_turn>\n<start_of_turn>model\n",
    "qwen3": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    "An otter.<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "mistral": "[INST] Be brief.\n\nWho?[/INST] An otter.<|eot_id|>[INST] Where?[/INST]",
}


def chat_of(family: str) -> Chat:
    tokenizer = toys.toy_tokenizer("llama3" if family == "mistral" else family)
    if family == "mistral":
        tokenizer.chat_template = MISTRAL
    return Chat(tokenizer)


@pytest.mark.parametrize("family", READS)
def test_a_dialogue_reads_as_in_training_without_the_bos_that_is_put_first_anyway(family):
    chat = chat_of(family)
    template = modelfile.retold(chat, DIALOGUE[1:2])
    assert modelfile.render(template, DIALOGUE) == READS[family]


def test_the_template_of_chatml():
    assert modelfile.retold(chat_of("chatml"), DIALOGUE[1:2]) == (
        '{{ range $i, $_ := .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}'
        '{{ else if eq .Role "user" }}{{ if eq $i 0 }}<|im_start|>system\nYou are a helpful AI assistant named Toy'
        "<|im_end|>\n<|im_start|>user\n{{ else if and $.System (eq $i 1) }}<|im_end|>\n<|im_start|>user\n"
        "{{ else }}<|im_end|>\n<|im_start|>user\n{{ end }}{{ .Content }}<|im_end|>\n<|im_start|>assistant\n"
        "{{ else }}{{ .Content }}{{ end }}{{ end }}"
    )


def test_a_modelfile_is_read_back(tmp_path):
    for file in (
        Modelfile("model.gguf", "a {{ .Content }}\n\nSYSTEM b", ("<|im_end|>", "</s>"), 'Say "x".\nPARAMETER y'),
        Modelfile("model.gguf", "x", (), ""),
    ):
        (tmp_path / "Modelfile").write_text(file.text())
        assert modelfile.read(tmp_path / "Modelfile") == file
    with pytest.raises(ExportError, match='the system prompt holds """'):
        Modelfile("model.gguf", "x", (), 'a """ b').text()
    with pytest.raises(ExportError, match="cannot be read"):
        modelfile.read(tmp_path / "none")
