"""Every error that PerCE Lite raises on purpose.

PerceLiteError              the command line prints it as one clean line and exits with 2
|- RecipeError              a recipe's faults, all of them at once
|- ConfigError              a `PerCEConfig` that cannot be trained (also a ValueError)
|- DataError                rows that cannot be read, or none that can be trained on
|- TemplateError            a chat template that is missing or hides the profile
|- ModelError               a base model that is not there or did not arrive whole
|- DeviceError              a device that was asked for and is absent
|- AdapterError             a folder that is no adapter, or one of another base
|- RunError                 an output folder that belongs to another run
|- FleetError               a fleet folder that cannot be used, or a user it does not know
|- ExportError              an export that cannot be made, or whose proof fails
|- ServeError               a server that cannot be started as it was asked for
|- BenchError               a measurement that failed, or that there is nothing to measure for
|- NotebookError            a command in a notebook that ended badly
|- PlanError                a GPU that is not known, or a model whose memory cannot be told beforehand
|- GpuOutOfMemoryError      a GPU whose memory is full; says what would fit
|  `- BaseTooLargeError     the base alone does not fit
|- PathError                a file or folder that cannot be read or written
|- DiskFullError            no space left where something had to be written
|- CompatibilityError       a version of another library that lacks what PerCE Lite leans on
`- NonFiniteLossError       a loss that is not a number; names the rows
"""

from perce_lite.words import counted


class PerceLiteError(Exception):
    """The root of the tree. The message says what, where, what is allowed and how to mend it."""


class RecipeError(PerceLiteError):
    """A recipe that cannot be used. `faults` holds every fault, one sentence each."""

    def __init__(self, source: str, faults: list[str]) -> None:
        self.faults = faults
        super().__init__(f"{source}: {counted(len(faults), 'fault')}\n" + "\n".join(f"  {fault}" for fault in faults))


class ConfigError(PerceLiteError, ValueError):
    """A training configuration whose loss would not be PerCE's. `faults` as in `RecipeError`."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        super().__init__("; ".join(faults))


class DataError(PerceLiteError):
    """Rows that cannot be read or trained on; names file and line."""


class TemplateError(PerceLiteError):
    """A chat template that is missing, refuses the messages or hides the profile."""


class RowRefusedError(TemplateError):
    """A row whose messages a chat template does not take, or does not show.

    reason: why, without the row, so that rows refused for the same reason are counted together
    """

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.reason = reason


class ModelError(PerceLiteError):
    """A base model that is not there, or did not arrive whole."""


class DeviceError(PerceLiteError):
    """A device that was asked for and is absent."""


class AdapterError(PerceLiteError):
    """A folder that is no adapter, or one of another base."""


class RunError(PerceLiteError):
    """An output folder that belongs to another run."""


class FleetError(PerceLiteError):
    """A fleet folder that cannot be used, or a user or an adapter that the fleet does not know."""


class ExportError(PerceLiteError):
    """An export that its target cannot take, that has no place to go, or whose proof fails."""


class ServeError(PerceLiteError):
    """A server that cannot be started as it was asked for."""


class BenchError(PerceLiteError):
    """A measurement that failed, or that there is nothing to measure for. Names the arm."""


class NotebookError(PerceLiteError):
    """A command in a notebook that ended badly and has said why; the cells below it are not run."""

    def _render_traceback_(self) -> list[str]:  # what IPython shows instead of a trace
        return [str(self)]


class PlanError(PerceLiteError):
    """A GPU that is not known, or a model whose memory cannot be told beforehand."""


class GpuOutOfMemoryError(PerceLiteError):
    """A GPU whose memory is full. Says what is kept and which `--set` would fit."""


class BaseTooLargeError(GpuOutOfMemoryError):
    """A base that does not fit the GPU."""


class PathError(PerceLiteError):
    """A file or folder that cannot be read or written. Says which, why, and what to give instead."""


class DiskFullError(PerceLiteError):
    """No space left where something had to be written."""


class CompatibilityError(PerceLiteError):
    """A version of another library that lacks something PerCE Lite leans on. Says which."""


class NonFiniteLossError(PerceLiteError):
    """A loss that is not a number. Nothing of the step is kept."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
