"""Figures as a person reads them in the terminal."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from perce_lite.cli.views.page import words
from perce_lite.cli.views.sections import WEIGHT_FIGURES, Section, kept_step, mean_gain, stopped_early
from perce_lite.cli.views.train_sections import held_out, worse_than_the_base, worth
from perce_lite.console import console
from perce_lite.export_targets import merge_drift
from perce_lite.fleet.result import FleetResult
from perce_lite.words import counted

if TYPE_CHECKING:  # importing them would import torch
    from perce_lite.evaluation.bench.fleetengine import EngineCost
    from perce_lite.evaluation.bench.fleetscale import FleetScale
    from perce_lite.evaluation.bench.generating import GenerationCost

_STYLES = {"template": "dim", "profile": "cyan", "query": "yellow", "response": "bold green"}


def show_training(figures: dict[str, Any]) -> None:
    """The end of `perce-lite train`: losses, weights, one answer, where the adapter lies and how to use it."""
    verdict = worse_than_the_base(figures["losses"])
    if verdict:
        console.print(verdict, style="bold red", soft_wrap=True)
    if figures["losses"]:
        console.print(_losses(figures["losses"]))
        console.print(worth(figures["losses"]), soft_wrap=True)
    else:
        console.print("No held-out rows: raise split.test to see what training did.", style="yellow")
    if "early_stopping" in figures:
        console.print(kept_step(figures["early_stopping"]), soft_wrap=True)
    weights = figures["weights"]
    if "weight_mean" in weights:
        console.print(
            f"Weights: {weights['share_above_min']:.0%} of tokens above the lowest weight, "
            f"{weights['share_at_max']:.1%} at the highest, mean {weights['weight_mean']:.2f}, "
            f"effective tokens {weights['effective_tokens']:.0%}."
        )
    sample = figures["sample"]
    if sample is not None:
        console.print(_answers(sample))
    console.print(Text.assemble("Adapter: ", (figures["adapter"], "bold")))
    if sample is not None:
        console.print("Look at it:" if verdict else "Use it:", style="bold")
        words = ["perce-lite", "generate", "--adapter", figures["adapter"], "--user", sample["user"]]
        command = shlex.join([*words, "--prompt", sample["query"]])
        console.print(command, markup=False, soft_wrap=True)


def _losses(losses: list[dict[str, Any]]) -> Table:
    table = Table(title=Text(f"Loss a token (nats, lower is better): {held_out(losses)}"), title_justify="left")
    for name in ("profile in the prompt", "before", "after", "change", "personal: before", "after", "change"):
        table.add_column(name, justify="left" if name.startswith("profile") else "right")
    for loss in losses:
        table.add_row(loss["profile"], *_before_after(loss), *_before_after(loss["personal"]))
    return table


def _before_after(loss: dict[str, Any]) -> tuple[str, str, Text]:
    change = loss["adapter"] - loss["base"]
    return (
        f"{loss['base']:.3f}",
        f"{loss['adapter']:.3f}",
        Text(f"{change:+.3f}", style="green" if change < 0 else "red"),
    )


def _answers(sample: dict[str, Any]) -> Table:
    table = Table(
        title=Text(f"A held-out query of {sample['user']}: {sample['query']}"), title_justify="left", show_header=False
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for who in ("base", "adapter", "written"):
        label = {"written": f"{sample['user']} wrote"}.get(who, who)
        table.add_row(Text(label), Text(sample[who]))
    return table


def _show_findings(findings: list[dict[str, Any]]) -> None:
    """What spoils a run, and what mends it."""
    if not findings:
        console.print("Nothing was found that spoils a run.")
        return
    table = Table(title="What may spoil a run", title_justify="left")
    for name in ("found", "rows", "such as", "what to do"):
        table.add_column(name, justify="right" if name == "rows" else "left", overflow="fold")
    for finding in findings:
        table.add_row(
            Text(finding["what"]), str(finding["count"]), Text("\n".join(finding["first"])), Text(finding["mend"])
        )
    console.print(table)


def show_check(figures: dict[str, Any]) -> None:
    """`perce-lite check`: rows, drops, lengths and the example."""
    table = Table(title="Rows", title_justify="left")
    for name in ("split", "read", "kept", "dropped", "users"):
        table.add_column(name, justify="left" if name == "split" else "right")
    lengths = Table(title=f"Tokens a row: min / median / max (limit {figures['max_length']})", title_justify="left")
    for name in ("split", "with profile", "without", "response", "rows with profile items left out"):
        lengths.add_column(name, justify="left" if name == "split" else "right")
    drops = Table(title="Dropped", title_justify="left")
    for name in ("split", "user", "reason", "rows", "such as"):
        drops.add_column(name, justify="right" if name == "rows" else "left")
    for name, split in figures["splits"].items():
        table.add_row(
            name,
            *(str(split[key]) for key in ("read", "kept")),
            str(split["read"] - split["kept"]),
            str(len(split["users"])),
        )
        spreads = [split[key] for key in ("with_profile_tokens", "without_profile_tokens", "response_tokens")]
        cells = [f"{spread['min']} / {spread['median']} / {spread['max']}" if spread else "-" for spread in spreads]
        lengths.add_row(
            name, *cells, f"{split['rows_with_items_left_out']} ({counted(split['profile_items_left_out'], 'item')})"
        )
        for drop in split["dropped"]:
            drops.add_row(name, Text(drop["user"]), drop["reason"], str(drop["rows"]), Text(drop["such_as"]))
    console.print(table, lengths, *([drops] if drops.row_count else []))
    _show_findings(figures["findings"])
    console.print(f"An adapter has {figures['adapter_bytes'] / 2**20:.1f} MiB.")
    broken = sum(split["control_tokens_broken"] for split in figures["splits"].values())
    if broken:
        console.print(
            f"{counted(broken, 'place')} in user text spelled a control token of the template; a space was put into it."
        )
    hidden = sum(split["thoughts_left_out"] for split in figures["splits"].values())
    if hidden:
        console.print(
            f"{counted(hidden, 'thought is', 'thoughts are')} not trained on: the chat template does not show them."
        )
    example = figures["example"]
    console.print(
        Text.assemble("The model sees: ", *(pair for kind, style in _STYLES.items() for pair in ((kind, style), " ")))
    )
    for side, title in (("with_profile", "with the profile"), ("without_profile", "without")):
        text = Text.assemble(*((piece, _STYLES[kind]) for piece, kind in example[side]))
        console.print(Panel(text, title=Text(f"{example['row']}, user {example['user']}, {title}"), title_align="left"))


def show_inspection(figures: dict[str, Any], page: Path) -> None:
    """`perce-lite inspect`: health beside the control, the verdict, the most personal words, where the page lies."""
    table = Table(title=f"PerContrast over {counted(len(figures['rows']), 'row')}", title_justify="left")
    for name in ("", "own profile", "another user's"):
        table.add_column(name, justify="right" if name else "left")
    for key, (name, form) in WEIGHT_FIGURES.items():
        table.add_row(
            name, *(form.format(figures[who][key]) if key in figures[who] else "-" for who in ("own", "swapped"))
        )
    console.print(table)
    style = {"signal": "green", "none": "red"}.get(figures["signal"]["says"], "yellow")
    console.print(Text(figures["signal"]["sentence"], style=style))
    words = ", ".join(f"{word['word']} {word['pir']:+.1f}" for word in figures["words"])
    console.print(Text(f"Most personal words (mean PIR, nats): {words}"))
    idle = len(figures["idle_rows"])
    if idle:
        console.print(
            Text(counted(idle, "row has", "rows have") + " a profile that does nothing; the page names them.")
        )
    console.print(Text.assemble("Page: ", (str(page), "bold")))


def show_fleet(result: FleetResult, page: Path | None) -> None:
    """The end of `perce-lite fleet`: what was due, what became of it, who is served."""
    due = ", ".join(f"{count} {kind}" for kind, count in result.due.items() if count)
    console.print(f"Due: {due or 'nothing'}." + (" Nothing was trained (--dry-run)." if result.dry_run else ""))
    if not result.dry_run:
        console.print(f"Trained {result.trained}, of them held back {result.held_back}; failed {result.failed}.")
    console.print(", ".join(f"{count} {state}" for state, count in result.states.items()))
    for sentence in stopped_early(result.adapters):
        console.print(sentence, soft_wrap=True)
    if result.gains.users:
        console.print(Text(mean_gain(result.gains)))
    if page is not None:
        console.print(Text.assemble("Page: ", (str(page), "bold")))


def show_facts(figures: dict[str, Any]) -> None:
    """Names and values, one a line."""
    for name, value in figures.items():
        text = "\n".join(map(str, value)) if isinstance(value, list) and name != "adapter" else value
        text = " ".join(value) if name == "adapter" and value else text
        console.print(Text.assemble((f"{name}: ", "bold"), str(text)), soft_wrap=True)


def show_sections(sentences: Sequence[str], sections: Sequence[Section], page: Path | None = None) -> None:
    """`perce-lite eval` and `perce-lite compare`: the tables, what they say in words, where the page lies."""
    for section in sections:
        table = Table(title_justify="left", caption_justify="left")
        table.title, table.caption = Text(section.title, style="bold"), Text(section.note)
        for number, name in enumerate(section.head):
            table.add_column(Text(name), justify="left" if number < words(section) else "right", overflow="fold")
        for row in section.rows:
            table.add_row(*map(Text, row))
        console.print(table)
    for sentence in sentences:
        console.print(Text(sentence))
    if page is not None:
        console.print(Text.assemble("Page: ", (str(page), "bold")))


def show_registry(section: Section) -> None:
    """`perce-lite adapters list`: plain columns, for a table of ten thousand rows takes rich many seconds."""
    rows = [[control_free(cell) for cell in row] for row in (section.head, *section.rows)]
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    filled = ([cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)] for row in rows)
    print("\n".join("  ".join(row).rstrip() for row in filled), file=console.file)
    console.print(Text(section.note, style="dim"), soft_wrap=True)


def _width(cell: str) -> int:
    """Columns that a cell takes on the screen."""
    return len(cell) if cell.isascii() else cell_len(cell)


def control_free(text: str) -> str:
    """`text` without what would move the cursor or break the line."""
    return (
        text
        if text.isprintable()
        else "".join(character if character.isprintable() else "\ufffd" for character in text)
    )


def show_store(root: Path, bases: list[dict[str, int | str]]) -> None:
    """`perce-lite store show`."""
    table = Table(title=Text(f"Store {root}"), title_justify="left")
    for name in ("base", "users", "entries", "MiB"):
        table.add_column(name, justify="left" if name == "base" else "right")
    for base in bases:
        table.add_row(str(base["base"]), str(base["users"]), str(base["entries"]), f"{int(base['bytes']) / 2**20:.2f}")
    console.print(table if bases else Text(f"The store {root} is empty."))


def show_bench(figures: dict[str, Any]) -> None:
    """`perce-lite bench`: the arms beside plain SFT, one line a bar, the machine."""
    rows, settings = figures["rows"], figures["settings"]
    workload = (
        f"{rows['rows']} rows, {rows['tokens']} tokens, {rows['profile_share']:.0%} of them profile; "
        f"steps {settings['steps']} of {rows['batch']} rows, repeats {settings['repeats']}"
    )
    table = Table(title=Text(f"Cost, {workload}"), title_justify="left", caption_justify="left", box=None)
    for name in ("arm", "tokens/s", "step, s", "x sft", "peak", "x sft", "kept", "disk"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for name, arm in figures["arms"].items():
        if "out_of_memory" in arm:
            table.add_row(name, Text("out of memory", style="red"))
            continue
        table.add_row(
            name,
            *(f"{arm['tokens_per_second']:.0f}", f"{arm['step_seconds']:.3f}", _with_range(arm["time"])),
            *(f"{arm['peak_bytes'] / 2**20:.0f}", _median(arm["memory"]), _median(arm["activations"])),
            f"{arm['disk_bytes'] / 2**20:.2f}",
        )
    epochs = f"scoring and {settings['epochs']} epochs"
    table.caption = Text(
        f"x sft: median (range over repeats); the time of a cold store: {epochs}. peak, disk: MiB. "
        "kept: what a forward keeps for its backward, x sft."
    )
    console.print(table)
    for bar in (bar for bar in figures["bars"] if bar["arm"] in figures["arms"]):
        _show_bar(bar, f"{bar['bar']}, at most {bar['limit']:.2f} x sft")
    _show_machine(figures)


def _median(ratio: dict[str, Any] | None) -> str:
    return "-" if ratio is None else f"{ratio['median']:.2f}"


def show_fleet_bench(figures: dict[str, Any]) -> None:
    """`perce-lite bench --fleet`: a table a length, one line a bar, the machine."""
    settings = figures["settings"]
    for length, arms in figures["lengths"].items():
        workload = f"rows of {length} tokens, steps {settings['steps']}, rank {settings['rank']}"
        repeats = f"repeats {settings['repeats']}"
        table = Table(title=Text(f"Many users, {workload}, {repeats}"), title_justify="left", box=None)
        for name in ("arm", "users/h", "x one-by-one", "peak MiB", "x one-by-one"):
            table.add_column(name, justify="left" if name == "arm" else "right")
        for name, arm in arms.items():
            if "out_of_memory" in arm:
                table.add_row(name, Text("out of memory", style="red"))
                continue
            users, peak = f"{arm['users_per_hour']:.0f}", f"{arm['peak_bytes'] / 2**20:.0f}"
            table.add_row(name, users, _with_range(arm["speed"]), peak, _with_range(arm["memory"]))
        console.print(table)
    for bar in figures["bars"]:
        word, unit = ("at least", "users an hour") if bar["of"] == "speed" else ("at most", "memory")
        limit = f"{word} {bar['limit']:.1f} x the {unit} of {bar['to']}"
        _show_bar(bar, f"{bar['arm']} at {bar['length']} tokens, {limit}")
    _show_machine(figures)


def show_fleet_scale(scale: "FleetScale") -> None:
    """`perce-lite bench --fleet-scale`: a line a phase, then the bars."""
    title = f"A fleet's commands, {scale.texts} texts a user, one thread; enrolment: with an engine that trains nothing"
    table = Table(title=Text(title), title_justify="left", box=None)
    for name in ("users", "phase", "due", "seconds", "CPU seconds", "MiB"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for phase in scale.phases:
        due = "" if phase.due is None else f"{phase.due}"
        times = f"{phase.seconds:.1f}", f"{phase.cpu_seconds:.1f}"
        table.add_row(str(phase.users), phase.name, due, *times, f"{phase.mib:.0f}")
    console.print(table)
    for bar in scale.bars:
        word, style = ("met", "green") if bar.met else ("not met", "red")
        limit = f"  10,000 users, {bar.name}, at most {bar.limit:g} {bar.unit}: {bar.measured:.2f} {bar.unit}"
        console.print(Text.assemble((f"{word:10}", style), limit))


def show_engine_cost(cost: "EngineCost") -> None:
    """`perce-lite bench --fleet-engine`: what a user costs beside the training, and the bars."""
    console.print(f"{cost.users} users who train nothing, over {cost.workers} workers: {cost.seconds:.1f} s")
    bars = (
        (cost.cheap, f"a user, at most 5 % of a second: {cost.ms:.1f} ms"),
        (
            cost.flat,
            f"the driver's memory stays: {cost.mib_early:.0f} MiB after a tenth, {cost.mib_late:.0f} at the end",
        ),
    )
    for met, text in bars:
        console.print(Text.assemble(("met" if met else "not met", "green" if met else "red"), f"  {text}"))


def show_serve_bench(figures: dict[str, Any]) -> None:
    """`perce-lite bench --serve`: a line a way to be asked."""
    title = f"One question, medians of {figures['repeats']}, threads: {figures['threads']}"
    table = Table(title=Text(title), title_justify="left", box=None)
    for name in ("", "first token, s", "then tokens a second"):
        table.add_column(name, justify="right" if name else "left")
    for name, way in figures["ways"].items():
        table.add_row(name, f"{way['first_token_s']:.2f}", f"{way['tokens_per_s']:.1f}")
    console.print(table)


def show_generation_cost(cost: "GenerationCost") -> None:
    """`perce-lite bench --generation`: seconds a token, plain and with the contrast, and the bar."""
    title = Text(f"Answers to {cost.rows} queries, {cost.tokens} tokens each")
    table = Table(title=title, title_justify="left", box=None)
    for name in ("", "a token, ms", "prompts and first tokens, s"):
        table.add_column(name, justify="right" if name else "left")
    for name, seconds, prompt in zip(
        ("plain", "--personal 0.5"), (cost.plain_seconds, cost.personal_seconds), cost.prompt, strict=True
    ):
        table.add_row(name, f"{seconds * 1000:.1f}", f"{prompt:.2f}")
    console.print(table)
    figures = cost.figures()
    runs = f" ({min(cost.ratios):.2f} to {max(cost.ratios):.2f})"
    word, style = ("met", "green") if figures["met"] else ("not met", "red")
    sentence = f"  a token with the contrast, at most {figures['limit']:.1f} x a plain one: {cost.ratio:.2f} x{runs}"
    console.print(Text.assemble((f"{word:10}", style), sentence))


def _show_bar(bar: dict[str, Any], requirement: str) -> None:
    """One bar: met, not met or not judged, and what was measured."""
    if bar["met"] is None:
        got = "" if bar["ratio"] is None else f", here {bar['ratio']:.2f} x"
        console.print(Text(f"not judged  {requirement}{got}: {bar['why']}", style="dim"))
    else:
        word, style = ("met", "green") if bar["met"] else ("not met", "red")
        console.print(Text.assemble((f"{word:10}", style), f"  {requirement}: {bar['ratio']:.3f} x"))


def _show_machine(figures: dict[str, Any]) -> None:
    machine = figures["machine"]
    if machine is not None:
        cores = f"{machine['cores']} cores, {machine['threads']} threads, torch {machine['torch']}"
        console.print(Text(f"{machine['name']}, {cores}, model {figures['model']}"))


def _with_range(spread: dict[str, Any] | None) -> str:
    return "-" if spread is None else f"{spread['median']:.2f} ({spread['min']:.2f}-{spread['max']:.2f})"


def show_export(figures: dict[str, Any]) -> None:
    """The end of `perce-lite export`: what was proven, how closely, and where it lies."""
    proof = figures["proof"]
    if "not_done" in proof:
        console.print(f"Read back and whole, but not proven: {proof['not_done']}.", style="yellow")
    if "off_shift" in proof:
        distance = (
            f"{proof['off_shift']:.3f} nats a token off what it moves in training, which is {proof['mean_shift']:.3f}"
        )
        where = f" of {proof['base_gguf']}" if "base_gguf" in proof else ""
        what = "Too coarse to prove anything" if "rounding" in proof else "Proven loosely"
        text = f"{what}, on the rounded weights{where}, over {proof['tokens']} tokens: {distance}."
        console.print(text, markup=False, soft_wrap=True)
    if proof.get("off_adapter") is not None:
        distance = f"{proof['off_adapter']:.5f} nats off at the most, {proof['tolerance']:.5f} allowed"
        effect = f"the adapter changes them by up to {proof['effect']:.3f}"
        console.print(f"Proven over {proof['tokens']} tokens: {distance}; {effect}.")
    if "greedy" in proof:
        console.print(f"The first {proof['greedy']} tokens of its greedy answer are those of the merged model.")
    if "drift" in figures:
        console.print(merge_drift(figures["drift"]))
    console.print(f"Export: {figures['folder']}", markup=False, soft_wrap=True)
    if "pushed" in figures:
        console.print(f"Pushed: {figures['pushed']}", markup=False, soft_wrap=True)


def show_exports(figures: dict[str, Any]) -> None:
    """The end of `perce-lite export --all`: what became of each adapter, and whom the base serves."""
    states = [export["state"] for export in figures["exports"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("exported", "kept", "failed"))
    console.print(f"{counted(len(states), 'adapter')} in service: {counts}.")
    for outcome in figures["exports"]:
        style = "red" if outcome["state"] == "failed" else None
        serves = counted(len(outcome["users"]), "user")
        console.print(
            f"{outcome['state']:9} {outcome['adapter']} ({serves}): {outcome.get('why') or outcome['folder']}",
            markup=False,
            soft_wrap=True,
            style=style,
        )
    if figures["served_by_base"]:
        users = counted(len(figures["served_by_base"]), "user is", "users are")
        console.print(f"{users} served by the base alone: there is nothing to export.")
    if "serve" in figures:
        console.print("Serve them (SGLang, LoRAX: README.md there), and ask for a user's model, users.json:")
        console.print(figures["serve"], markup=False, soft_wrap=True)
