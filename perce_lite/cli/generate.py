"""The command `perce-lite generate`."""

import json as jsons
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from perce_lite.cli.lazy import Lazy
from perce_lite.cli.options import (
    Data,
    Json,
    Model,
    Personal,
    ProfileText,
    Seed,
    Temperature,
    TemplateFile,
    TopP,
    UserName,
    say_loading,
    text_or_file,
    write,
)
from perce_lite.console import progress_bar
from perce_lite.errors import DataError
from perce_lite.files import written_aside
from perce_lite.fleet import queries
from perce_lite.locks import one_writer
from perce_lite.model import questions
from perce_lite.model.adapter_files import Said, read_metadata

generation = Lazy("perce_lite.model.generate")


def generate(
    adapter: Annotated[Path, typer.Option(help="The folder of an adapter, such as runs/quickstart/adapter.")],
    prompt: Annotated[str | None, typer.Option(help="What to ask; the answer comes word by word.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Instead: a file (- or nothing: a pipe), a prompt a line, or JSONL."),
    ] = None,
    profile: ProfileText = None,
    no_profile: Annotated[bool, typer.Option("--no-profile", help="Go without a profile.")] = False,
    user: UserName = None,
    base: Annotated[bool, typer.Option("--base", help="Answer with the base, the adapter switched off.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at the most.")] = 200,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    personal: Personal = 0.0,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="--prompts: answered at once.")] = 8,
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="--prompts: write the JSONL to this file, whole or not at all.")
    ] = None,
    model: Model = None,
    data: Data = None,
    template: TemplateFile = None,
    json: Json = None,
) -> None:
    """Answer prompts with an adapter, or with its base."""
    if sum((profile is not None, no_profile, user is not None)) > 1:
        raise typer.BadParameter("give one of --profile, --no-profile and --user")
    queries.refuse_deleted(adapter, user)
    if prompt is not None and (prompts is not None or out is not None):
        raise typer.BadParameter("--prompt is one prompt; --prompts and --out are for many")
    if prompt is None and prompts is None and sys.stdin.isatty():
        raise typer.BadParameter("give --prompt TEXT, --prompts FILE, or pipe prompts in, one a line")
    said = Said(model, data, template)
    text = "" if no_profile else text_or_file(profile)
    metadata = read_metadata(adapter, said)
    if prompt is not None:
        asked = [questions.question_of(prompt, "--prompt", text, user)]
    else:
        name = "standard input" if prompts is None or str(prompts) == "-" else str(prompts)
        asked = questions.read_questions(_lines(prompts), name, text, user)
    wanted = questions.wanted_profiles(metadata, asked)
    say_loading(metadata)
    options = generation.sampling(temperature, top_p)
    loaded = generation.load_adapter(metadata)
    answering = partial(loaded.answers, asked, wanted, max_new_tokens, not base, personal, seed, batch_size, **options)
    if prompt is not None:
        [figures] = answering(stream=True)
        write(json, figures)
        return
    answers: list[dict[str, Any]] = []
    with _output(out) as stream, progress_bar() as bar:
        task = bar.add_task("Answering", total=len(asked), note="")
        for answer in answering():
            print(jsons.dumps(answer, ensure_ascii=False), file=stream, flush=True)
            answers.append(answer)
            bar.advance(task)
    write(json, {"answers": answers})


def _lines(path: Path | None) -> list[str]:
    """The lines of a file, or of standard input.

    Raises:
        DataError: it cannot be read as UTF-8.
    """
    try:
        if path is None or str(path) == "-":
            return sys.stdin.read().splitlines()
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts {path or '-'}: cannot be read as UTF-8: {error}") from error


@contextmanager
def _output(path: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that takes its name when all is written."""
    if path is None or str(path) == "-":
        yield sys.stdout
        return
    with one_writer(path), written_aside(path) as aside, aside.open("w", encoding="utf-8") as stream:
        yield stream
