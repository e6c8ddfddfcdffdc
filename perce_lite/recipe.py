"""A recipe: YAML 1.2 in, `Recipe` out, every fault in one error with its line.

`train:` takes the fields of `PerCEConfig` and `lora:` those of `peft.LoraConfig`, by their own names; torch is
imported only when those two are checked.
"""

import datetime
import re
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from perce_lite.errors import RecipeError
from perce_lite.files import digest, home
from perce_lite.recipe_checks import choice_faults, cross_faults, export_faults, pydantic_fault, third_party_faults
from perce_lite.recipe_yaml import apply_overrides, read_yaml, recipes_nearby


class Section(BaseModel):
    """A part of a recipe; unknown keys are faults."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Section):
    """Where the rows come from."""

    path: str | None = Field(None, description="JSONL or parquet file, or a folder of LaMP files; from the recipe on")
    hub: str | None = Field(None, description="a data set of the Hub, instead of path")
    hub_config: str | None = Field(None, description="its configuration, such as abstract_generation_user")
    format: Literal["auto", "rows", "alpaca", "documents", "lamp", "longlamp"] = Field(
        "auto", description="shape of a record"
    )
    columns: dict[str, str] = Field({}, description="our column name: the name it has in your file")
    users: list[str] | None = Field(None, description="keep these users only")
    max_rows: int | None = Field(
        None, ge=1, description="keep so many rows with a profile of each split, spread over users"
    )


class Profile(Section):
    """Which of a user's texts go into the profile."""

    select: Literal["bm25", "recency", "all"] = Field("bm25", description="nearest to the query, or newest, first")
    top_k: int = Field(4, ge=1, description="items a row at the most")
    max_tokens: int | None = Field(None, ge=1, description="tokens of the profile at the most")
    earlier_by: Literal["document", "month", "year"] = Field(
        "document", description="how much older than the row a document of the profile must be"
    )


class Template(Section):
    """How profile and query become chat messages."""

    position: Literal["auto", "system", "user"] = Field(
        "auto", description="profile in the system message, or ahead of the query; auto: system where there is one"
    )
    system: str | None = Field(
        "You are a helpful assistant.", description="system message of both passes where a row has none of its own"
    )
    profile: str = Field("Texts by this user:\n\n{profile}", description="what stands around the profile")
    item: str = Field("{title}\n{text}", description="one item of a profile that is a list")
    separator: str = Field("\n\n", description="between items, and between profile and what follows")
    date: str = Field(
        "2024-07-26",
        description="what a chat template that asks for today's date is told, on every day of a run and after it; "
        "the default is the one that Llama's template takes where it is told none",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {"enable_thinking": False}, description="passed to the tokenizer's own chat template"
    )

    @field_validator("date", mode="before")
    @classmethod
    def _a_day(cls, value: Any) -> str:
        return datetime.date.fromisoformat(str(value)).isoformat()  # YAML reads a day as a date


class Split(Section):
    """How rows become train, validation and test where the data does not say."""

    by: Literal["auto", "given", "row", "user", "time"] = Field(
        "auto", description="auto: given where the data has one, else time for documents and row for rows"
    )
    validation: float = Field(0.1, ge=0, lt=1, description="share of rows, or of users")
    test: float = Field(0.1, ge=0, lt=1, description="share of rows, or of users")
    unseen_users: float = Field(
        0.0, ge=0, lt=1, description="share of users whom training never meets, where the data names none"
    )
    seed: int = Field(0, description="of the shuffle")


class Evaluation(Section):
    """The held-out figures at the end of a run."""

    max_rows: int = Field(24, ge=1, description="held-out rows of a split at the most, spread over users")
    max_new_tokens: int = Field(60, ge=1, description="tokens of a generated answer")
    generated_rows: int = Field(
        8, ge=0, description="eval, compare: rows whose answers are generated and scored; 0: none"
    )
    samples: int = Field(
        3,
        ge=0,
        description="eval, compare: answers drawn at temperature 0.7 beside the greedy one, with the own profile",
    )
    personal: list[Annotated[float, Field(ge=0)]] = Field(
        [0.25, 0.5, 1.0], description="eval: strengths of --personal whose answers are judged too, beside plain ones"
    )
    personal_by: str | None = Field(
        None, description="eval, compare: another model whose PIR chooses personal tokens too; loaded before the model"
    )
    candidates: int = Field(
        3, ge=0, description="eval, compare: further users whose profiles a text's writer is told from"
    )
    generation: dict[str, Any] = Field(
        {}, description="eval, compare: options of transformers' generate, such as {do_sample: true, temperature: 0.7}"
    )
    general: str | None = Field(
        None, description="eval: JSONL of prompt and completion that has nothing to do with the users; null: built in"
    )


class Fleet(Section):
    """Who gets an adapter of their own."""

    group_by: Literal["user", "cohort", "all"] = Field("user", description="what an adapter belongs to")
    min_examples: int = Field(8, ge=1, description="training rows that a user needs for an adapter of their own")
    init_from: Literal["auto", "cohort", "all", "none"] = Field(
        "auto",
        description="what it starts from; auto: the cohort's adapter if the data names cohorts, else the shared one",
    )
    slots: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="users trained at once over one forward; auto: what fits the memory; 1: one by one"
    )
    train: dict[str, Any] = Field(
        {}, description="fields of train: that differ for the adapters that start from another"
    )
    gate: float | None = Field(
        0.0, description="nats a token on validation rows by which it must beat what it replaces; null: no gate"
    )
    max_examples: int | None = Field(
        None, ge=1, description="training rows of a user that are trained on at the most, the last ones; null: all"
    )
    patience: int | None = Field(
        None, ge=1, description="early_stopping.patience of users' adapters, each by the user's own validation rows"
    )
    adapter_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="what adapters are stored as from now on; training computes in float32 in any case"
    )

    @field_validator("slots", mode="before")
    @classmethod
    def _auto_or_a_number(cls, slots: Any) -> Any:
        if slots != "auto" and (not isinstance(slots, int) or isinstance(slots, bool) or slots < 1):
            raise ValueError("is neither auto nor a whole number of at least 1")
        return slots


class EarlyStopping(Section):
    """When training ends before its last step: `train`, and a fleet's shared and cohort adapters."""

    patience: int | None = Field(
        None,
        ge=1,
        description="measurements of the validation rows in a row without a lower loss after which training ends; the "
        "adapter of the best step is kept; null: train to the last step",
    )
    every: int | None = Field(
        None, ge=1, description="optimizer steps from one measurement to the next; null: an epoch"
    )


class Export(Section):
    """Where the adapter is to go."""

    to: list[Literal["peft", "merged", "gguf-lora", "gguf", "vllm", "ollama"]] = Field(
        [], description="targets of `perce-lite export` that the adapter has to fit; asked before training"
    )


class Recipe(Section):
    """All that a run depends on."""

    model: str = Field("smollm2-135m", description="smollm2-135m (built in), a Hub id, a folder or a GGUF file")
    quantization: Literal["nf4", "none"] = Field("nf4", description="nf4: 4 bit with double quantisation")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("auto", description="compute dtype")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where there is one")
    embedding_on_host: bool = Field(
        False, description="keep the embedding table in the host's memory, off the GPU; not for a tied head"
    )
    data: Data
    profile: Profile = Profile()
    template: Template = Template()
    split: Split = Split()
    early_stopping: EarlyStopping = EarlyStopping()
    evaluation: Evaluation = Evaluation()
    fleet: Fleet = Fleet()
    export: Export = Export()
    lora: dict[str, Any] = Field({}, description="fields of peft.LoraConfig, and core_only")
    train: dict[str, Any] = Field({}, description="fields of PerCEConfig, so of trl.SFTConfig")
    _source: str = PrivateAttr("")

    @property
    def source(self) -> str:
        """The file that the recipe was read from; empty for one that lies in an adapter."""
        return self._source

    @property
    def output_dir(self) -> Path:
        """Where checkpoints and the adapter go: `train.output_dir`, else runs/<name of the recipe>."""
        return Path(self.train.get("output_dir") or Path("runs") / Path(self.source).stem)

    @property
    def data_path(self) -> Path | None:
        """`data.path`, taken from the recipe's own folder on."""
        return None if self.data.path is None else Path(self.source).parent / Path(self.data.path).expanduser()

    @property
    def model_folder(self) -> Path | None:
        """The folder that `model` names, from the recipe's own on or as it stands; None where it names none."""
        places = self._places(self.model) if self.model else ()  # a script's model may have no name
        return next((place for place in places if place.is_dir()), None)

    def model_is_there(self) -> bool:
        """Whether `model` is something; only a name that is spelt like a path can be told to be nothing."""
        as_path = self.model.startswith(("/", "./", "../", "~")) or self.model.endswith(".gguf")
        return not as_path or any(place.exists() for place in self._places(self.model))

    @property
    def model_file(self) -> Path | None:
        """The GGUF file that `model` names, looked for as `model_folder` is; None where it names none."""
        return next((place for place in self._places(self.model) if place.is_file()), None)

    @property
    def model_path(self) -> Path | None:
        """The folder or the GGUF file that `model` names; None of a built-in model and a Hub id."""
        return self.model_folder or self.model_file

    @property
    def chat_template_file(self) -> Path | None:
        """The file that `train.chat_template_path` names, looked for as `model_folder` is; None where it names none."""
        file = self.train.get("chat_template_path")
        return None if file is None else next((path for path in self._places(file) if path.is_file()), None)

    def _places(self, name: str) -> list[Path]:
        """Where a path of the recipe may lie: from its own folder on, else as it stands."""
        path = Path(name).expanduser()
        return [place.absolute() for place in ([Path(self.source).parent / path, path] if self.source else [path])]

    @property
    def core_only(self) -> bool:
        """`lora.core_only`: A and B of what an adapter starts from are frozen, and a core between them is trained."""
        return bool(self.lora.get(CORE_ONLY, False))

    def without_cores(self) -> "Recipe":
        """The same recipe, training whole adapters."""
        whole = {name: value for name, value in self.lora.items() if name != CORE_ONLY}
        return self.model_copy(update={"lora": whole})

    def of_users(self) -> "Recipe":
        """The recipe of a fleet's adapters that start from another: `fleet.train` goes before `train`."""
        return self.model_copy(update={"train": {**self.train, **self.fleet.train}})

    def with_patience(self, patience: int | None) -> "Recipe":
        """The same recipe with another `early_stopping.patience`."""
        return self.model_copy(update={"early_stopping": self.early_stopping.model_copy(update={"patience": patience})})

    def fleet_fingerprint(self) -> str:
        """As `fingerprint`, without which users and rows there are; how many rows of a user at the most counts."""
        data = self.data.model_copy(update={"users": None, "max_rows": None})
        plain = self.model_copy(update={"data": data}).fingerprint()
        return plain if self.fleet.max_examples is None else f"{plain} {self.fleet.max_examples}"

    @property
    def profile_pass(self) -> str:
        """`PerCEConfig.profile_pass`: "frozen" if the adapter is off for the profile."""
        return str(self.train.get("profile_pass", "full"))

    def fingerprint(self) -> str:
        """Equal for recipes that train the same adapter: where it goes, what is logged and how it fits do not count."""
        plain = self.model_dump(mode="json")
        plain["train"] = {name: value for name, value in plain["train"].items() if trains(name)}
        template = self.chat_template_file
        if template is not None:  # what it says counts, not where it lies
            plain["train"]["chat_template_path"] = digest(template.read_bytes().hex())
        plain["data"].pop("path")
        stopping = plain.pop("early_stopping")
        if self.early_stopping.patience is not None:
            plain["early_stopping"] = {**stopping, "rows": self.evaluation.max_rows}
        plain["lora"] = {**plain["lora"], CORE_ONLY: True} if self.core_only else self.without_cores().lora
        for name in ("embedding_on_host", "evaluation", "fleet", "export"):
            plain.pop(name)
        return digest({**plain, "method": METHOD_VERSION})


METHOD_VERSION = 2
"""Part of a run's fingerprint; raise it when a default that a recipe need not name trains another adapter. 2: the
additive weighting."""

CORE_ONLY = "core_only"
"""The one field of `lora:` that is ours: see `perce_lite.model.lora_core`."""

_NOT_TRAINED_BY = re.compile(
    r"(log|logging|save|hub|gradient_checkpointing)_|(output_dir|store|report_to|run_name|project|disable_tqdm|push_to_hub|"
    r"skip_memory_metrics|gradient_checkpointing|activation_offloading)$"
)
"""Fields of `train:` that change places, logs or memory, not what is trained."""


def trains(name: str) -> bool:
    """Whether the field `name` of `train:` changes what is trained, not only where it goes or how it fits."""
    return not _NOT_TRAINED_BY.match(name)


_LORA_DEFAULTS = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def train_defaults(on_cpu: bool) -> dict[str, Any]:
    """What a recipe's `train:` starts from where it differs from TRL: see the README, "What is different from TRL"."""
    return {
        "learning_rate": 2e-4,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1.0,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "optim": "adamw_torch" if on_cpu else "adamw_8bit",
        "gradient_checkpointing": not on_cpu,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 10,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": on_cpu,
        "store": str(home() / "store"),
    }


def load_recipe(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Reads `path`, applies `overrides` ("train.learning_rate=1e-4") and checks all of it.

    Raises:
        RecipeError: no such file, not YAML, or every fault found, each with its line.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(str(path), [f"there is no such recipe. {recipes_nearby(path)}"])
    plain, lines = read_yaml(path)
    faults = apply_overrides(plain, lines, overrides)
    recipe = None
    try:
        recipe = Recipe.model_validate(plain)
        recipe._source = str(path.absolute())
    except ValidationError as error:
        faults += [pydantic_fault(fault, Recipe, lines) for fault in error.errors()]
    faults += cross_faults(plain, lines) + third_party_faults(plain, lines)
    faults += choice_faults(plain, lines)
    if not faults:
        faults = export_faults(plain, lines)
    if faults:
        raise RecipeError(str(path), faults)
    assert recipe is not None
    return recipe


def with_train(recipe: Recipe, what: str, overrides: typing.Sequence[str]) -> Recipe:
    """`recipe` with other fields of `train:`, each "clip_min=0.2"; `what` names them in a fault.

    Raises:
        RecipeError: an unknown field, a value of the wrong type, or a combination that `PerCEConfig` refuses.
    """
    plain: dict[str, Any] = {}
    faults = apply_overrides(plain, {}, [f"train.{override}" for override in overrides])
    faults += third_party_faults(plain, {}) + choice_faults(plain, {})
    if faults:
        raise RecipeError(what, faults)
    changed = recipe.model_copy(update={"train": {**recipe.train, **plain.get("train", {})}})
    try:
        training_config(changed)
    except RecipeError as error:
        raise RecipeError(what, error.faults) from error
    return changed


def training_config(recipe: Recipe, **more: Any) -> Any:
    """The recipe's `PerCEConfig`; `more` fills in what the recipe leaves open.

    Raises:
        RecipeError: a combination that `PerCEConfig` refuses.
    """
    from perce_lite.config import DTYPES, PerCEConfig, chosen_dtype, pick_device

    device = pick_device(recipe.device)
    dtype = chosen_dtype(recipe.dtype, device)
    precision = {"bf16": dtype == DTYPES["bfloat16"], "fp16": dtype == DTYPES["float16"]}
    values = {**train_defaults(device.type == "cpu"), **precision, "output_dir": str(recipe.output_dir), **more}
    template = recipe.chat_template_file
    fields = recipe.train if template is None else {**recipe.train, "chat_template_path": str(template)}
    try:
        return PerCEConfig(**{**values, **fields})
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(recipe.source, [f"train: {fault}" for fault in getattr(error, "faults", [error])]) from error


def lora_config(recipe: Recipe) -> Any:
    """The recipe's `peft.LoraConfig`: rank 16 on every linear layer, no dropout, unless it says otherwise.

    Raises:
        RecipeError: a combination that `LoraConfig` refuses.
    """
    from peft import LoraConfig

    try:
        return LoraConfig(**{**_LORA_DEFAULTS, **recipe.without_cores().lora})
    except (ValueError, TypeError, AttributeError) as error:
        raise RecipeError(recipe.source, [f"lora: {error}"]) from error


def refuse_early_stopping(recipe: Recipe, command: str) -> None:
    """For commands whose trainings are compared at a number of steps that is given.

    Raises:
        RecipeError: `early_stopping.patience` is set.
    """
    if recipe.early_stopping.patience is not None:
        raise RecipeError(
            recipe.source,
            [
                f"early_stopping.patience: perce-lite {command} compares trainings of equal steps, which none may end "
                "earlier. Here: --set early_stopping.patience=null"
            ],
        )


def refuse_cores(recipe: Recipe, command: str) -> None:
    """For commands that train from nothing: there is no adapter whose A and B could be frozen.

    Raises:
        RecipeError: `lora.core_only` is set.
    """
    if recipe.core_only:
        raise RecipeError(
            recipe.source,
            [
                f"lora.core_only: perce-lite {command} trains from nothing, and a core stands between the A and B of "
                "an adapter that is there already. perce-lite fleet has one; here: --set lora.core_only=false"
            ],
        )
