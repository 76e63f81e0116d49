"""Where the documents of corpora come from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from expertprune.spec.values import Count, LocalPath, LocalPaths, Names

_CHAT = ("messages", "prompt", "completion", "tools")
_OF_FILES = ("evaluation",)
_OF_DATASET = ("config", "revision", "split", "evaluation_split", "data_files")


class Section(BaseModel):
    """A mapping of a spec. Unknown keys are errors, and nothing is assigned afterwards."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="wrap")
    @classmethod
    def _no_number_is_true(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        """Refuse YAML's truth values (`true`, `on`, `yes`) where they would become a number."""
        found = check(value)
        if isinstance(value, bool) and not isinstance(found, bool) and isinstance(found, int | float):
            raise ValueError("must be a number")
        return found


class Generate(Section):
    """Calibrate on what the base itself writes, through vLLM, in place of the source's documents.

    What is generated is filtered (empty, repetitive or repeated text, other languages), and kept in
    the store with the base and the seed.
    """

    tokens: Count = Field(200_000, description="How many tokens to generate, such as 200k.")
    from_: Literal["prompts", "continuation"] = Field(
        "prompts",
        alias="from",
        description="prompts: answer the source's prompts, through the chat template; continuation: go on where the "
        "first words of each document end.",
    )
    temperature: float = Field(1.0, ge=0, le=5, description="0 is greedy.")
    seed: int = Field(0, ge=0, description="Of the draws.")


def _dataset_files(value: Any) -> Any:
    return {"train": value} if isinstance(value, str | list) else value


DataFiles = Annotated[
    dict[str, LocalPaths], BeforeValidator(_dataset_files, json_schema_input_type=str | list[str] | dict[str, Names])
]


class Source(Section):
    """Where the documents of one corpus come from: files, or a Hugging Face dataset.

    They are texts (`field`, `template`) or conversations (`messages`, or `prompt` and `completion`).
    The base's chat template renders conversations, and the loss counts on their answers only.
    """

    path: LocalPaths | None = Field(None, description="JSONL, parquet, CSV, .txt or .md file(s), relative to the spec.")
    field: str | None = Field(
        None,
        description="Field of a row that holds the text (default: text). Dots lead to a nested one: "
        "messages.0.content.",
    )
    template: str | None = Field(
        None, description="Text built from fields, which hold text, numbers or booleans: 'Q: {question}\\nA: {answer}'."
    )
    messages: str | None = Field(
        None,
        description="Field that holds a conversation: a list of role and content, or of from and value (ShareGPT).",
    )
    tools: str | None = Field(None, description="Field that holds the tools that the messages may call.")
    prompt: str | None = Field(None, description="Field that holds what a user says; goes with 'completion'.")
    completion: str | None = Field(None, description="Field that holds the answer.")
    documents: Literal["chat", "raw"] = Field(
        "chat",
        description="How a model reads conversations. chat: by the base's chat template; raw: as plain text without "
        "roles, of which every token counts.",
    )
    generate: Generate | None = Field(None, description="Calibrate on what the base answers, or how it goes on.")
    dataset: LocalPath | None = Field(
        None,
        description="Hugging Face dataset, or the folder of one (beside the spec, or a path that begins with '.', '/' or "
        "'~'), streamed; calibration.seed chooses among its rows.",
    )
    data_files: DataFiles | None = Field(
        None, description="Its files, where 'dataset' is a format such as json, csv or parquet; by split, or of train."
    )
    config: str | None = Field(None, description="Configuration of the dataset, such as a language.")
    revision: str | None = Field(
        None, description="Branch, tag or commit of the dataset; default: its newest when the rows are first read."
    )
    split: str | None = Field(None, description="Split of the dataset (default: train).")
    evaluation: LocalPaths | None = Field(None, description="File(s) of the evaluation split, read as `path` is.")
    evaluation_split: str | None = Field(None, description="Evaluation split of the dataset.")
    questions: LocalPath | None = Field(
        None, description="JSONL of multiple-choice questions: question, choices, answer."
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give exactly one of 'path' and 'dataset'")
        wrong = _OF_DATASET if self.path else _OF_FILES
        if set_here := [key for key in wrong if getattr(self, key) is not None]:
            raise ValueError(f"{', '.join(set_here)} does not go with {'path' if self.path else 'dataset'!r}")
        return self

    @model_validator(mode="after")
    def _one_form(self) -> Source:
        forms = [key for key in ("field", "template", "messages", "prompt") if getattr(self, key) is not None]
        if len(forms) > 1:
            raise ValueError(f"give '{forms[0]}' or '{forms[1]}', not both")
        answers = self.generate is not None and self.generate.from_ == "prompts"
        if self.completion is not None and self.prompt is None:
            raise ValueError("give 'prompt' with 'completion'")
        if self.prompt is not None and self.completion is None and not answers:
            raise ValueError("give 'completion' with 'prompt', or 'generate' with from: prompts")
        if self.tools is not None and self.messages is None:
            raise ValueError("'tools' goes with 'messages'")
        if answers and not self.chat:
            raise ValueError("generate.from: prompts needs 'messages' or 'prompt'; texts go on with from: continuation")
        if answers and self.documents == "raw":
            raise ValueError("generate.from: prompts asks through the chat template, so it does not go with 'raw'")
        return self

    @property
    def chat(self) -> bool:
        """Whether rows hold conversations."""
        return any(getattr(self, key) is not None for key in _CHAT)

    @property
    def is_local(self) -> bool:
        """Whether `dataset` is written as a folder of this machine, which no name on the hub is."""
        return self.dataset is not None and self.dataset.startswith((".", "/", "~"))

    def with_paths(self, change: Callable[[str, str], str], beside: Path | None = None) -> Source:
        """A copy with other paths; `change` takes a path's key and the path.

        Args:
            beside: a data set that is a folder in this one is a path too.
        """
        lists = {key: [change(key, path) for path in getattr(self, key) or ()] for key in ("path", "evaluation")}
        questions = change("questions", self.questions) if self.questions is not None else None
        files = self.data_files
        if files is not None:
            files = {
                split: [_changed(path, partial(change, f"data_files.{split}")) for path in paths]
                for split, paths in files.items()
            }
        dataset, folder = self.dataset, beside if files is None else None  # with files it names their format
        if dataset is not None and (self.is_local or (folder is not None and (folder / dataset).is_dir())):
            dataset = change("dataset", dataset)
        changed = {key: paths or None for key, paths in lists.items()}
        return self.model_copy(update={**changed, "dataset": dataset, "questions": questions, "data_files": files})


def _changed(path: str, change: Callable[[str], str]) -> str:
    """A data file's path after `change`; addresses stay, and of a pattern the folder changes."""
    if "://" in path:
        return path
    if "*" in Path(path).name:
        return str(Path(change(str(Path(path).parent))) / Path(path).name)
    return change(path)


class Corpora(Section):
    """Where the corpora of the named values are found."""

    catalogue: LocalPath | None = Field(
        None, description="Folder with a catalogue.yaml; default: the corpora that ship."
    )
    sources: dict[str, Source] = Field(
        default_factory=dict, description="Your own corpora, by value ('de') or by dimension and value ('language/de')."
    )
