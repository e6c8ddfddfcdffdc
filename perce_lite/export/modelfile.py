"""Ollama's Modelfile: a chat template retold in Ollama's Go templates, stop tokens and system prompt; and read back.

A chat template is asked, by rendering probes, what it writes ahead of, between and behind messages. What comes of it is
rendered again for fixed dialogues and has to be the chat template's own text, or it is refused.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from perce_lite.data.chat_template import Chat
from perce_lite.data.rows import Message
from perce_lite.errors import ExportError, TemplateError
from perce_lite.export.proof import ANSWER, QUESTION, Proof
from perce_lite.recipe import Recipe

NAME = "Modelfile"

_LINE = re.compile(r'^(FROM|TEMPLATE|SYSTEM|PARAMETER \w+) (?:"""(.*?)"""|"(.*?)"|(.*?))$\n?', re.M | re.S)
_ANSWER_TOKENS = 200  # beside a row's: what `generate` takes unless it is told otherwise
_MARKS = ("sysmark7", "askmark7", "saymark7", "askmark8")
_FOLDED = "\n\n"  # between a system prompt and the first question, where a template has no system role
_FIRST, _AFTER_SYSTEM = "eq $i 0", "and $.System (eq $i 1)"
_LAST = "eq (len (slice $.Messages $i)) 1"
_ROLE = 'eq .Role "{}"'


@dataclass(frozen=True)
class Modelfile:
    """What a Modelfile says: the file of weights, Ollama's template, tokens that end an answer, the system prompt.

    parameters: others than `stop`, by name
    """

    weights: str
    template: str
    stops: tuple[str, ...]
    system: str
    parameters: tuple[tuple[str, str], ...] = ()

    def text(self) -> str:
        """The file.

        Raises:
            ExportError: a text that cannot stand in it.
        """
        for what, value in (("template", self.template), ("system prompt", self.system)):
            if '"""' in value:
                raise ExportError(f'ollama: the {what} holds """, which ends a text in a Modelfile.')
        lines = [f"FROM ./{self.weights}", f'TEMPLATE """{self.template}"""']
        lines += [f'SYSTEM """{self.system}"""'] if self.system else []
        lines += [f'PARAMETER stop "{stop}"' for stop in self.stops]
        lines += [f"PARAMETER {name} {value}" for name, value in self.parameters]
        return "\n".join(lines) + "\n"


def read(path: Path) -> Modelfile:
    """The Modelfile at `path`.

    Raises:
        ExportError: none there, or one that says something else than ours.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"{path}: cannot be read: {error}. Export again.") from error
    instructions: dict[str, list[str]] = {}
    for match in _LINE.finditer(text):
        instructions.setdefault(match[1], []).append(match[2] or match[3] or match[4] or "")
    rest = _LINE.sub("", text)
    if rest.strip() or [len(instructions.get(instruction, [])) for instruction in ("FROM", "TEMPLATE")] != [1, 1]:
        raise ExportError(f"{path}: damaged: it does not say FROM, TEMPLATE, SYSTEM and stop tokens as it did.")
    stops = tuple(instructions.get("PARAMETER stop", []))
    others = ((name.split()[-1], values) for name, values in instructions.items() if name.startswith("PARAMETER"))
    parameters = tuple((name, value) for name, values in others if name != "stop" for value in values)
    weights = instructions["FROM"][0].removeprefix("./")
    return Modelfile(weights, instructions["TEMPLATE"][0], stops, "".join(instructions.get("SYSTEM", [])), parameters)


def parameters_of(recipe: Recipe) -> tuple[tuple[str, str], ...]:
    """Ollama's parameters for an adapter of `recipe`: a context for its rows and an answer, its way of drawing tokens.

    Ollama's own default context may be shorter than a row, and it cuts what is longer without a word.
    """
    drawn = recipe.evaluation.generation
    temperature = drawn.get("temperature", 1.0) if drawn.get("do_sample") else 0
    context = recipe.train.get("max_length", 1024) + _ANSWER_TOKENS
    return ("num_ctx", str(context)), ("temperature", f"{temperature:g}")


def check(folder: Path, proof: Proof, weights: str) -> None:
    """Raises ExportError where the Modelfile in `folder` does not say what it did when it was written.

    weights: the file that is proven, so the one that it has to name
    """
    path = folder / NAME
    modelfile = read(path)
    for prompt, dialogue in zip(proof.rendered, dialogues(proof.messages), strict=True):
        if (got := render(modelfile.template, dialogue)) != prompt:
            raise ExportError(
                f"{path}: another template: a fixed dialogue ends in {got[-60:]!r}, and in training in "
                f"{prompt[-60:]!r}. Export again."
            )
    if list(modelfile.stops) != proof.stops:
        raise ExportError(
            f"{path}: other stop tokens: {', '.join(modelfile.stops)}; training saw {', '.join(proof.stops)}."
        )
    if modelfile.system != system_of(proof.messages):
        raise ExportError(f"{path}: another system prompt than that of training. Export again.")
    if modelfile.weights != weights:
        raise ExportError(f"{path}: FROM names {modelfile.weights}, and what is proven is {weights}. Export again.")
    if not (folder / weights).is_file():
        raise ExportError(f"{path}: FROM names {weights}, which is not there. Export again.")


def system_of(messages: Sequence[Message]) -> str:
    """What stands ahead of the fixed question: the system prompt, or the first part of the user's turn, if any."""
    if messages[0]["role"] == "system":
        return messages[0]["content"]
    return messages[0]["content"].removesuffix(QUESTION).removesuffix(_FOLDED)


# Asking the chat template


def dialogues(messages: Sequence[Message]) -> list[list[Message]]:
    """What a template is tried with: the fixed question as training put it, and dialogues with and without system."""
    ask, say = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
    system = {"role": "system", "content": "Be kind.\nBe short."}
    again = [ask, say, {"role": "user", "content": "And now? {x}"}]
    return [list(messages), [ask], [system, ask], again, [system, *again]]


def prompts(chat: Chat, messages: Sequence[Message]) -> list[str]:
    """The prompts that the chat template makes of `dialogues`, as llama.cpp is given them: it puts bos first by itself.

    Raises:
        ExportError: the template refuses one.
    """
    return [_rendered(chat, dialogue) for dialogue in dialogues(messages)]


def _rendered(chat: Chat, messages: Sequence[Message]) -> str:
    tokenizer = chat.tokenizer
    given = list(messages)
    if not _knows_system(chat) and given[0]["role"] == "system":
        first = f"{given[0]['content']}{_FOLDED}{given[1]['content']}"
        given = [{**given[1], "content": first}, *given[2:]]
    text = _apply(chat, given)
    bos = tokenizer.bos_token
    adds_bos = bos is not None and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    return text.removeprefix(bos) if adds_bos else text


def _apply(chat: Chat, messages: Sequence[Message]) -> str:
    try:
        return chat.render(list(messages), "a dialogue", add_generation_prompt=True)
    except TemplateError as error:
        raise ExportError(f"ollama: {error}") from error


def _knows_system(chat: Chat) -> bool:
    try:
        return _MARKS[0] in _apply(chat, _marked(system=True)[:2])
    except ExportError:
        return False


def _marked(system: bool) -> list[Message]:
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, _MARKS, strict=True)]
    return messages if system else messages[1:]


def retold(chat: Chat, messages: Sequence[Message]) -> str:
    """The chat template as a Go template of Ollama.

    Raises:
        ExportError: one that cannot be retold, so that some dialogue would read otherwise than in training.
    """
    pieces = re.split("|".join(_MARKS), _rendered(chat, _marked(system=True)))
    bare = re.split("|".join(_MARKS), _rendered(chat, _marked(system=False)))
    shown = len(pieces) == 5 and len(bare) == 4
    template = _written(pieces, bare) if shown and "{{" not in "".join([*pieces, *bare]) else ""
    wanted = prompts(chat, messages)
    if not template or [render(template, dialogue) for dialogue in dialogues(messages)] != wanted:
        raise ExportError(
            "ollama: the chat template cannot be retold in Ollama's template language: what it writes around a message "
            "depends on more than role and place. Export --to gguf, which holds the chat template as it is."
        )
    return template


def _written(pieces: Sequence[str], bare: Sequence[str]) -> str:
    """The Go template of what stands around the marks, with a system prompt (5 pieces) and without (4)."""
    system, after_system, answers, between, waits = pieces
    first = bare[0]
    opens = (
        f"{{{{ if {_FIRST} }}}}{first}{{{{ else if {_AFTER_SYSTEM} }}}}{after_system}"
        f"{{{{ else }}}}{between}{{{{ end }}}}"
    )
    closes = waits if waits == answers else f"{{{{ if {_LAST} }}}}{waits}{{{{ else }}}}{answers}{{{{ end }}}}"
    system_role, user_role = _ROLE.format("system"), _ROLE.format("user")
    return (
        "{{ range $i, $_ := .Messages }}"
        f"{{{{ if {system_role} }}}}{system}{{{{ .Content }}}}"
        f"{{{{ else if {user_role} }}}}{opens}{{{{ .Content }}}}{closes}"
        "{{ else }}{{ .Content }}{{ end }}{{ end }}"
    )


# Ollama's side


def render(template: str, messages: Sequence[Message]) -> str:
    """What Ollama makes of `messages` with a template of `retold`; of Go's language it knows what `retold` writes.

    Raises:
        ExportError: a template that says something else.
    """
    parts = re.split(r"\{\{ (.*?) \}\}", template)
    if len(parts) < 5 or parts[0] or parts[1] != "range $i, $_ := .Messages" or parts[-2] != "end" or parts[-1]:
        raise ExportError("The Modelfile's template is not one that PerCE Lite wrote. Export again.")
    system = any(turn["role"] == "system" for turn in messages)
    turns = []
    for index, message in enumerate(messages):
        holds = {
            _FIRST: index == 0,
            _AFTER_SYSTEM: system and index == 1,
            _LAST: index == len(messages) - 1,
            **{_ROLE.format(role): message["role"] == role for role in ("system", "user")},
        }
        turns.append(_turn(parts[2:-2], message["content"], holds))
    return "".join(turns)


def _turn(parts: Sequence[str], content: str, holds: Mapping[str, bool]) -> str:
    """One message. parts: text and, at odd places, what stands in braces; holds: which conditions do."""
    pieces: list[str] = []
    open_ifs: list[tuple[bool, bool]] = []  # whether this branch speaks, whether one of the `if` has spoken
    for at, part in enumerate(parts):
        speaks = all(now for now, _ in open_ifs)
        word, _, condition = part.partition("if ")
        if at % 2 == 0 or part == ".Content":
            pieces += [part if at % 2 == 0 else content] if speaks else []
        elif word in ("", "else ") and condition in holds:
            spoken = open_ifs.pop()[1] if word else False
            now = not spoken and holds[condition]
            open_ifs.append((now, spoken or now))
        elif part == "else" and open_ifs:
            open_ifs.append((not open_ifs.pop()[1], True))
        elif part == "end" and open_ifs:
            open_ifs.pop()
        else:
            raise ExportError(f"The Modelfile's template says {part!r}, which PerCE Lite does not write. Export again.")
    if open_ifs:
        raise ExportError("The Modelfile's template has an `if` without its end. Export again.")
    return "".join(pieces)
