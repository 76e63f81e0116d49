"""The YAML that a user writes. Unknown keys are errors; all errors are reported at once."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from expertprune.spec.sources import Corpora, Section
from expertprune.spec.values import (
    Aggregate,
    Amount,
    Coverage,
    Device,
    FileName,
    Fraction,
    Keep,
    LocalPath,
    Names,
    Rows,
    Size,
    listed,
)

Dimension = Literal["language", "domain", "task"]


DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)


Serving = Literal["transformers", "vllm", "gguf"]


SERVED: tuple[Serving, ...] = ("transformers", "vllm")


Metric = Literal["bits_per_byte", "perplexity", "kl", "agreement", "questions"]


METRICS: tuple[Metric, ...] = get_args(Metric)


PER_TOKEN: tuple[Metric, ...] = ("perplexity", "kl", "agreement")


TO_BASE: tuple[Metric, ...] = ("kl", "agreement")  # they compare with the base, which has no value of its own


class Base(Section):
    """The general model that is cut."""

    model: LocalPath = Field(description="Hub id, local folder, .gguf file, or the name of a bundled model.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="What the model is run in; auto: as stored on a GPU; on a CPU float32, or bfloat16 where it is stored "
        "so and the processor is faster with it. A GGUF file is also converted to it (auto: bfloat16).",
    )
    device: Device = Field(
        "auto",
        description="Where it is run: cpu, cuda, or one GPU of several such as cuda:1; auto: a GPU where there is one.",
    )
    layers: Literal["auto", "resident", "streamed"] = Field(
        "auto",
        description="resident: the whole model is in the memory of the device; streamed: one layer at a time is read "
        "from the checkpoint, so the model may be larger than memory; auto: streamed where it does not fit.",
    )
    trust_remote_code: bool = Field(
        False,
        description="The model comes with Python code of its own. That alone does not run it: give "
        "--trust-remote-code on the command line.",
    )


class Dimensions(Section):
    """What the expert is for. Several values of one dimension: it serves all of them."""

    language: Names = Field(default_factory=list)
    domain: Names = Field(default_factory=list)
    task: Names = Field(default_factory=list)

    @model_validator(mode="after")
    def _one_at_least(self) -> Dimensions:
        if not self.chosen:
            raise ValueError(f"name at least one of {', '.join(DIMENSIONS)}")
        return self

    @property
    def chosen(self) -> dict[Dimension, list[str]]:
        """The dimensions that have values, in their fixed order."""
        return {name: values for name in DIMENSIONS if (values := getattr(self, name))}


class Calibration(Section):
    """How much of each corpus is profiled."""

    documents: int = Field(256, ge=1, description="At most so many documents of each corpus.")
    max_tokens: int = Field(512, ge=2, description="Longer documents are cut at so many tokens.")
    windows: int = Field(
        1, ge=1, description="At most so many windows of max_tokens, spread evenly over each longer document."
    )
    prompt_weight: float = Field(
        1.0,
        ge=0,
        description="How much a token of a conversation counts in statistics and in the repair where it is not an "
        "answer's. The loss counts on answers only.",
    )
    tokens_per_batch: int = Field(2048, ge=1, description="Speed and memory only: results do not depend on it.")
    seed: int = Field(0, ge=0, description="Chooses the documents where a corpus has more of them.")


class Relevance(Section):
    """How a unit is scored on a corpus."""

    criterion: str = Field(
        "auto",
        description="fisher, taylor, impact, activation, fluctuation, regional, magnitude or random; whole routed "
        "experts can also have reap or frequency. auto: fisher, or reap where only whole routed experts are cut.",
    )
    experts: str | None = Field(
        None, description="Another criterion for whole routed experts; default: reap where criterion is auto."
    )
    loss: Literal["language_model", "kl"] = Field(
        "language_model",
        description="For taylor and fisher: the loss against the text's next tokens (language_model), or against "
        "tokens drawn from the model's own predictions (kl).",
    )
    seed: int = Field(0, ge=0, description="For criteria that draw random numbers.")


class Fusion(Section):
    """How general and expert relevance become one score."""

    method: Literal["weighted", "shared_exclusive"] = Field(
        "shared_exclusive",
        description="weighted: the general score counts lambda on every unit; shared_exclusive: on shared units only, while "
        "exclusive ones keep the score of their own side (after arXiv:2510.22489).",
    )
    tau: float = Field(0.1, ge=0, le=1, description="Units whose activation differs by at most this are shared.")
    lambda_: float = Field(0.25, ge=0, le=1, alias="lambda", description="Weight of the general score.")
    beta: float = Field(1.0, ge=0, le=1, description="Its weight on general-exclusive units.")
    rows: float = Field(0.5, ge=0, le=1, description="Its weight on vocabulary rows.")


class Compose(Section):
    """How the scores of several corpora become one decision per unit."""

    rule: str = Field(
        "intersection",
        description="How much a unit counts for several dimensions: intersection (its largest score; only what no "
        "dimension needs goes), union (its smallest), mean, or a rule of an installed plugin.",
    )
    aggregate: Aggregate = Field(
        "mean", description="Over the documents of a corpus: mean, max, or a quantile such as 0.9."
    )
    scale: Literal["share", "percentile", "standard"] = Field(
        "share",
        description="share: part of the corpus' total over the model; percentile: rank within the layer; "
        "standard: distance from the layer's mean in standard deviations, as FLAP ranks.",
    )
    fusion: Fusion = Field(default_factory=Fusion)
    allocation: Literal["auto", "uniform", "global"] = Field(
        "auto",
        description="global: one ranking over layers; uniform: every layer keeps the same width, as stock configs say it; "
        "auto: global where all that serve_with names read layers of different widths of the base's family, else uniform.",
    )

    @model_validator(mode="after")
    def _zero_is_no_relevance(self) -> Compose:
        """`beta` draws scores towards zero; where that is the mean of a layer, those below it would rise."""
        fusion = self.fusion
        if self.scale == "standard" and fusion.method == "shared_exclusive" and fusion.beta < 1:
            raise ValueError(
                f"fusion.beta {fusion.beta:g} weighs scores above zero, and scale: standard has scores below it, which "
                "it would raise; take scale: share or percentile, or beta: 1"
            )
        return self


class Retention(Section):
    """A small expert that keeps at least this much of held-back calibration text.

    The forecast says which cut to build first. At most three experts are built and measured.
    """

    expert: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Bits per byte of the base over the expert's, on every corpus of the dimensions."
    )
    general: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="The same on the general corpora.")

    @model_validator(mode="after")
    def _one_at_least(self) -> Retention:
        if self.expert is None and self.general is None:
            raise ValueError("name at least one of expert, general")
        return self


class Budget(Section):
    """What goes, in the way that suits you.

    One rule for every key: a fraction (0.25), a percentage (25%) and a whole number (384) say what
    is *removed*; `keep: 1152`, `keep: 75%` and `remove: 384` say it outright. A whole number of
    vocabulary rows must say which it is. Counts and fractions of a structure are of each layer, or
    of the average layer where layers may have different widths.
    """

    layers: Amount = Field(
        0,
        description="Whole decoder layers, never the first one. They go before anything else, so the other keys are of "
        "the layers that stay.",
    )
    ffn: Amount = Field(0, description="FFN neurons; in a mixture, of each routed expert.")
    query_heads: Amount = Field(0, description="Query heads, the same number in each KV group.")
    kv_groups: Amount = Field(0, description="KV heads with their query heads.")
    experts: Amount = Field(0, description="Routed experts, the same number in each layer; never shared ones.")
    vocabulary: Rows | None = Field(
        None,
        description="Vocabulary rows of the whole model: keep: 32768, 80%, or coverage: 0.999, which keeps as many rows as "
        "cover that part of the tokens of unseen text in every corpus of the dimensions.",
    )
    parameters: Fraction | None = Field(
        None,
        description="Of all parameters; FFN neurons make up what the other keys do not remove, or FFN neurons and KV "
        "groups against each other where allocation is global and no KV groups are named. In a mixture whole routed "
        "experts do, or FFN neurons where experts are named. It never takes whole layers: name them in layers.",
    )
    max_parameters: Size | None = Field(None, description="What may be left of the whole model, such as 100M.")
    retention: Retention | None = Field(None, description="As much as can go while this much is kept.")
    multiple_of: int = Field(64, ge=1, description="Kept FFN widths are a multiple of this.")
    tensor_parallel: int = Field(
        1,
        ge=1,
        description="GPUs that share each layer when it is served: kept KV heads are a multiple of this, and kept FFN "
        "widths of this times multiple_of.",
    )
    floor: float = Field(
        0.1, ge=0, le=1, description="At least this fraction of each structure stays in every layer, and of the layers."
    )

    @property
    def ffn_step(self) -> int:
        """Kept FFN widths are a multiple of this."""
        return self.multiple_of * self.tensor_parallel

    @property
    def overall(self) -> bool:
        """Whether it counts all parameters, as a fraction or as what may be left."""
        return self.parameters is not None or self.max_parameters is not None

    @model_validator(mode="after")
    def _one_way(self) -> Budget:
        choices = ("parameters", "max_parameters", "retention")
        ways = [name for name in choices if getattr(self, name) is not None]
        if len(ways) > 1:
            raise ValueError(f"give one of {', '.join(ways)}, not several")
        if ways and self.ffn:
            raise ValueError(f"give 'ffn' or {ways[0]!r}, not both: {ways[0]!r} chooses the FFN width itself")
        if ways and isinstance(self.vocabulary, Coverage):
            raise ValueError(f"give vocabulary as keep: or remove: where {ways[0]!r} counts what it removes")
        if isinstance(self.query_heads, Keep) and self.kv_groups:
            raise ValueError("give query_heads as what goes, not as keep:, where kv_groups take query heads with them")
        if self.vocabulary is not None and self.retention is not None:
            raise ValueError("give 'vocabulary' or 'retention', not both: retention tries widths of layers alone")
        if self.layers and self.retention is not None:
            raise ValueError("give 'layers' or 'retention', not both: retention tries widths of layers alone")
        keys = (
            "layers",
            "ffn",
            "query_heads",
            "kv_groups",
            "experts",
            "vocabulary",
            "parameters",
            "max_parameters",
            "retention",
        )
        if not self.model_fields_set & set(keys):
            raise ValueError(f"name at least one of {', '.join(keys)}")
        return self


class Compensation(Section):
    """How the layers that were cut are repaired, without training."""

    method: str = Field(
        "least_squares",
        description="least_squares: solve for the kept columns of every cut output projection, so that the pruned "
        "model's residual stream comes close to the base's; none: keep the columns unchanged.",
    )
    general: float = Field(
        0.5,
        ge=0,
        le=1,
        description="How much the general corpora count in it together, whatever their number of tokens; the dimensions "
        "share the rest equally.",
    )
    ridge: float = Field(
        15_000,
        gt=0,
        description="Ridge towards the original columns, in tokens: they weigh as much as so many tokens on which each "
        "column alone keeps its value.",
    )


class Evaluate(Section):
    """What is measured of base and expert. Default: the evaluation documents of every corpus that the spec names."""

    corpora: Names | None = Field(
        None, min_length=1, description="Names as in dimensions and general; default: all of them."
    )
    others: Names = Field(
        default_factory=list,
        description="Corpora that the spec does not name, such as [de, math, software]: measured, and shown apart. No "
        "average counts them, and nothing is chosen by them.",
    )
    documents: int = Field(64, ge=1, description="At most so many evaluation documents of each corpus.")
    max_tokens: int = Field(1024, ge=2, description="Longer documents are cut at so many tokens.")
    metrics: list[Metric] | None = Field(
        None,
        min_length=1,
        description="Default: all of them, or bits_per_byte and questions where the vocabulary is cut, because the "
        "others are per token.",
    )
    enabled: bool = True

    def chosen_metrics(self, other_tokens: bool) -> list[Metric]:
        """`metrics`, or by default all that compare base and expert, whose tokens may be others."""
        if self.metrics is not None:
            return self.metrics
        return [metric for metric in METRICS if not (other_tokens and metric in PER_TOKEN)]

    @property
    def reads_documents(self) -> bool:
        """Whether anything but questions is measured."""
        return self.metrics is None or set(self.metrics) != {"questions"}


def _shorthand(key: str, section: type[Section]) -> BeforeValidator:
    """A section that may be written as the value of its first key alone."""
    return BeforeValidator(
        lambda value: {key: value} if isinstance(value, str) else value, json_schema_input_type=str | section
    )


class Spec(Section):
    """An expert, as its user describes it."""

    name: FileName
    base: Annotated[Base, _shorthand("model", Base)]
    dimensions: Dimensions
    general: Names = Field(
        default_factory=lambda: ["general"], description="Corpora whose capability is retained; [] for none."
    )
    corpora: Annotated[Corpora, _shorthand("catalogue", Corpora)] = Field(default_factory=Corpora)
    calibration: Calibration = Field(default_factory=Calibration)
    relevance: Annotated[Relevance, _shorthand("criterion", Relevance)] = Field(default_factory=Relevance)
    compose: Compose = Field(default_factory=Compose)
    budget: Budget
    serve_with: Annotated[list[Serving], BeforeValidator(listed, json_schema_input_type=Serving | list[Serving])] = (
        Field(
            default_factory=lambda: list(SERVED),
            min_length=1,
            description="What will load the expert: transformers, vllm, gguf (what `export` writes), or several of them.",
        )
    )
    compensation: Annotated[Compensation, _shorthand("method", Compensation)] = Field(default_factory=Compensation)
    evaluate: Evaluate = Field(default_factory=Evaluate)

    @model_validator(mode="after")
    def _comparable_metrics(self) -> Spec:
        """Where the vocabulary is cut, tokens differ, and only what is counted in bytes or answers compares."""
        wrong = [metric for metric in self.evaluate.metrics or () if metric in PER_TOKEN]
        if wrong and self.budget.vocabulary is not None:
            raise ValueError(
                f"evaluate.metrics: {', '.join(wrong)} cannot be measured where budget.vocabulary is given: they are "
                "per token, and the expert's tokens are others; use bits_per_byte"
            )
        return self

    @model_validator(mode="after")
    def _floor_of_something(self) -> Spec:
        """A floor holds for corpora; without a general one, any expert would keep it."""
        floor = self.budget.retention
        if floor is not None and floor.general is not None and not self.general:
            raise ValueError(
                "budget.retention.general: 'general' names no corpus that could keep it; name one, or leave the key out"
            )
        return self

    def document(self) -> dict[str, Any]:
        """The spec as plain data that gives the same spec back; defaults are written out."""
        data: dict[str, Any] = self.model_dump(mode="json", by_alias=True)
        return data
