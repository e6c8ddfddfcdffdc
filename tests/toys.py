"""Tiny stand-ins for the tests: chat templates, tokenizers, models, checkpoints and personal texts.

Every function is deterministic in its arguments and leaves the global random states alone.
"""

import os
import random
from datetime import date, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

# Before the first use of tokenizers: its thread pool warns when a test forks later on.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, processors, trainers
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 600

ABOUT: dict[str, Any] = {
    "recipe": {"model": "toy", "quantization": "none", "data": {"path": "rows.jsonl"}},
    "estimator": "base", "train_on": "factual", "clip_min": 0.8, "clip_max": 5.0, "run": "r", "chat_template": "",
    "data": {"rows": 1, "users": 1, "fingerprint": "f"}, "metrics": {"losses": []},
}  # fmt: skip
"""Metadata of an adapter that a test saves without a run."""

# Both sides of every tag are trimmed (`{%- -%}`), so that a template renders the same whatever the
# environment's trim_blocks and lstrip_blocks are.
TEMPLATES: dict[str, str] = {
    "chatml": r"""
{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\nYou are a helpful AI assistant named Toy<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%} {{- '<|im_start|>assistant\n' -}} {%- endif -%}
""",
    "llama3": r"""
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' -}}
    {{- message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
""",
    "gemma": r"""
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {{- raise_exception('System role not supported') -}}
    {%- elif message['role'] != ('assistant' if loop.index0 % 2 else 'user') -%}
        {{- raise_exception('Conversation roles must alternate user/assistant/...') -}}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else 'user' -%}
    {{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%} {{- '<start_of_turn>model\n' -}} {%- endif -%}
""",
    "qwen3": r"""
{#- With no user message, no turn counts as after the last query. -#}
{%- set last = namespace(query=messages | length - 1) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%} {%- set last.query = loop.index0 -%} {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\n' -}}
    {%- set content = message['content'] -%}
    {%- if message['role'] == 'assistant' -%}
        {%- set reasoning = '' -%}
        {%- if message['reasoning_content'] is string -%}
            {%- set reasoning = message['reasoning_content'].strip('\n') -%}
        {%- elif '</think>' in content -%}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
            {%- set content = content.split('</think>')[-1].lstrip('\n') -%}
        {%- endif -%}
        {%- if loop.index0 > last.query and (loop.last or reasoning) -%}
            {{- '<think>\n' + reasoning + '\n</think>\n\n' -}}
            {%- set content = content.lstrip('\n') -%}
        {%- endif -%}
    {%- endif -%}
    {{- content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if enable_thinking is defined and enable_thinking is false -%}
        {{- '<think>\n\n</think>\n\n' -}}
    {%- endif -%}
{%- endif -%}
""",
}

# The special added tokens, those with special=False, and the named ones: bos, eos, pad.
_SPECIAL = {
    "chatml": "<|endoftext|> <|im_start|> <|im_end|>".split(),
    "llama3": (
        "<|begin_of_text|> <|end_of_text|> <|finetune_right_pad_id|> <|start_header_id|> <|end_header_id|> <|eot_id|>"
    ).split(),
    "gemma": "<pad> <eos> <bos> <start_of_turn> <end_of_turn>".split(),
    "qwen3": "<|endoftext|> <|im_start|> <|im_end|>".split(),
}
_PLAIN = {"qwen3": ["<think>", "</think>"]}
_NAMED: dict[str, tuple[str | None, str, str]] = {
    # SmolLM2 declares this bos, though nothing ever puts it in front.
    "chatml": ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"),
    "gemma": ("<bos>", "<end_of_turn>", "<pad>"),
    "qwen3": (None, "<|im_end|>", "<|endoftext|>"),
}
_ADDS_BOS = {"llama3": "<|begin_of_text|>", "gemma": "<bos>"}
_MODEL_TYPES = {"chatml": "llama", "llama3": "llama", "gemma": "gemma2", "qwen3": "qwen3"}

# As Llama 3 and Qwen split: unlike GPT-2, they keep line breaks together, so that one token can
# hold those at the end of a prompt and those at the start of a completion.
_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PROSE = """\
system user assistant model
You are a helpful AI assistant named Toy. Answer in the words of the writer, and keep it short.
What is the weather like today? I don't know, but it's probably going to rain again.
She said that we'll need 12 eggs, 250 grams of flour and 3 spoons of sugar, didn't she?
Write a title for the following text. Write a short review. Continue the message below."""


def _tokenizer_lines() -> list[str]:
    """The few hundred lines that the tokenizers are trained on."""
    documents = [d[key] for d in toy_documents(10, 15) for key in ("title", "text")]
    rows = [r[key] for r in toy_rows(5, 10) for key in ("prompt", "completion")]
    return _PROSE.splitlines() * 5 + ["\n\n", "\n\n\n"] * 50 + documents + rows


@lru_cache
def _trained_tokenizer(family: str) -> Tokenizer:
    """The byte-level BPE of a family; added tokens get the highest ids, as in Llama 3."""
    special, plain = _SPECIAL[family], _PLAIN.get(family, [])
    tokenizer = Tokenizer(models.BPE())
    byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = Sequence([Split(Regex(_SPLIT), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(special) - len(plain),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_lines(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    if bos := _ADDS_BOS.get(family):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def toy_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A new byte-level BPE tokenizer of `VOCAB_SIZE` tokens with the family's template.

    As with the real ones, "llama3" and "gemma" put bos in front when a plain text is encoded with
    `add_special_tokens=True`, and their templates write bos too.
    """
    bos, eos, pad = _NAMED[family]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_trained_tokenizer(family),
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        extra_special_tokens=[t for t in _SPECIAL[family] if t not in (bos, eos, pad)],
        model_max_length=2048,
    )
    tokenizer.chat_template = TEMPLATES[family]
    return tokenizer


def toy_model(family: str, vocab_size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random two-layer causal LM of the family, in eval mode; logits are (B, T, vocab_size).

    The config names no bos, eos or pad id, since only the tokenizer knows them.
    """
    settings: dict[str, Any] = dict(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        initializer_range=0.2,
        tie_word_embeddings=family != "llama3",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    if family == "gemma":
        settings |= dict(final_logit_softcapping=30.0, attn_logit_softcapping=50.0, query_pre_attn_scalar=16)
    config = AutoConfig.for_model(_MODEL_TYPES[family], **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Drawn in float32 whatever the dtype: another dtype would draw other numbers.
        drawn: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model: PreTrainedModel = drawn.to(dtype).eval()
    if family == "gemma":
        # Gemma multiplies embeddings by sqrt(64) and norms what the layers add to them: unless that
        # is scaled up too, the tied output predicts the token just read, whatever came before.
        for name, weight in model.named_parameters():
            if "layernorm" in name and ".post_" in name:
                torch.nn.init.constant_(weight, 3.0)
    return model


def toy_folder(path: Path, family: str = "chatml", seed: int = 0) -> Path:
    """Saves a toy model and the tokenizer that fits it to `path`; returns `path`."""
    tokenizer = toy_tokenizer(family)
    model = toy_model(family, len(tokenizer), seed)
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


_PETS = """
otter lantern fjord saffron gazebo cobalt mandolin truffle glacier origami walnut zeppelin crème
pebble tangerine smörgås compass velvet harpoon jasmine thimble obsidian marmot 抹茶 parsnip
quartz kestrel lagoon nutmeg bonsai
""".split()
_TOPICS = "garden harbour kitchen library market museum station theatre village workshop".split()
_WORDS = {
    "adjective": "small old quiet bright strange lovely broken heavy green famous".split(),
    "verb": "finds follows loves hides paints carries forgets watches repairs sells".split(),
    "time": "morning evening winter summer weekend holiday".split(),
}
_PATTERNS = (
    "the {adjective} {pet} {verb} the {other}",
    "my {pet} {verb} the {adjective} {other} at the {topic}",
    "in the {topic} the {adjective} {pet} {verb} a {other} every {time}",
    "this {time} we saw how the {pet} {verb} the {other} near the {adjective} {topic}",
)


def pet_words(user: int, seed: int = 0) -> list[str]:
    """The three pet words of a user; those of the first ten users are disjoint."""
    pool = random.Random(f"pets {seed}").sample(_PETS, len(_PETS))
    return [pool[(3 * user + i) % len(pool)] for i in range(3)]


def _note(rng: random.Random, pets: list[str], topic: str) -> dict[str, str]:
    """{title, text}; a text has 6 to 14 words, two of the three pet words among them."""
    pet, other = rng.sample(pets, 2)
    words = {kind: rng.choice(choices) for kind, choices in _WORDS.items()}
    text = rng.choice(_PATTERNS).format(pet=pet, other=other, topic=topic, **words)
    return {"title": f"{rng.choice(pets)} and the {topic}", "text": text}


def _request(rng: random.Random, topic: str) -> str:
    """Asks for a note on the topic, without pet words: those must come from the user's past."""
    return f"write a {rng.choice(_WORDS['adjective'])} note about the {topic}"


def toy_documents(users: int = 4, per_user: int = 10, seed: int = 0) -> list[dict[str, Any]]:
    """Documents {user, id, idx, date, title, query, text}, user by user, each user's oldest first.

    `idx` counts from 0 within a user; `date` is an ISO string that strictly increases with it.
    """
    documents = []
    for user in range(users):
        rng, pets = random.Random(f"documents {seed} {user}"), pet_words(user, seed)
        day = date(2024, 1, 1)
        for idx in range(per_user):
            day += timedelta(days=rng.randint(1, 20))
            topic = rng.choice(_TOPICS)
            head = {"user": f"user{user}", "id": f"user{user}-{idx}", "idx": idx}
            note = {"query": _request(rng, topic), **_note(rng, pets, topic)}
            documents.append({**head, "date": day.isoformat(), **note})
    return documents


def toy_rows(users: int = 3, per_user: int = 6, seed: int = 0) -> list[dict[str, Any]]:
    """Rows {user, profile: 2 to 4 of {title, text}, prompt, completion}, user by user.

    A row's profile is drawn from the user's six notes, so notes recur over rows, and a completion
    shares a pet word with every text of its profile.
    """
    rows = []
    for user in range(users):
        rng, pets = random.Random(f"rows {seed} {user}"), pet_words(user, seed)
        notes = [_note(rng, pets, topic) for topic in rng.sample(_TOPICS, 6)]
        for _ in range(per_user):
            topic = rng.choice(_TOPICS)
            profile = [dict(note) for note in rng.sample(notes, rng.randint(2, 4))]
            prompt, completion = _request(rng, topic), _note(rng, pets, topic)["text"]
            row = {"user": f"user{user}", "profile": profile}
            rows.append({**row, "prompt": prompt, "completion": completion})
    return rows
