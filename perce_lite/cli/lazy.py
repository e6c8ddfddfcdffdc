"""The one way in which the command line imports late, so that help and refusals answer without torch."""

import importlib
from dataclasses import dataclass
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

DEFAULT_AFTER_CTRL_C = "The same command starts over."


class Lazy:
    """A module that is imported when an attribute of it is first used: `plan = Lazy("perce_lite.planning.plan")`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


@dataclass(frozen=True)
class Command:
    """A command, known before its module is imported.

    target: "module:name" in `perce_lite.cli`; the name is a function, or a `typer.Typer` of sub-commands
    help: first line of the function's docstring
    panel: heading under which `--help` lists it
    after_ctrl_c: what holds after Ctrl-C, by sub-command where there are some
    """

    target: str
    help: str
    panel: str
    after_ctrl_c: str | dict[str, str] = DEFAULT_AFTER_CTRL_C

    def load(self, name: str) -> Any:
        """The click command with its options; imports its module."""
        module, _, attribute = self.target.partition(":")
        target = getattr(importlib.import_module(f"perce_lite.cli.{module}"), attribute)
        if not isinstance(target, typer.Typer):
            function, target = target, typer.Typer(add_completion=False, pretty_exceptions_enable=False)
            target.command(name)(function)
        return typer.main.get_command(target)


class LazyGroup(TyperGroup):
    """Lists commands in the order of `known`; imports a command's module when the command is called."""

    known: ClassVar[dict[str, Command]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # What `--help` shows and what a misspelt name is compared with; options are not known yet.
        self.commands = {
            name: TyperCommand(name, help=command.help, rich_help_panel=command.panel)
            for name, command in self.known.items()
        }

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.known)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, self.known[name].load(name) if name in self.known else command, rest
