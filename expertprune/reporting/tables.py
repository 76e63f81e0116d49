"""Tables for the terminal and the model card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import get_args

from rich.box import HORIZONTALS
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from expertprune import formats
from expertprune.artifacts.evaluation import Average, Evaluation, Measured
from expertprune.artifacts.evaluation import Group as DocumentGroup
from expertprune.artifacts.plan import KINDS, Plan, VocabularyPlan
from expertprune.artifacts.sweep import Sweep
from expertprune.composition.overlap import Comparison, StructureComparison
from expertprune.composition.tradeoff import TradeOff
from expertprune.evaluation.retention import pooled
from expertprune.spec.schema import TO_BASE, Spec
from expertprune.units import format_indices

METRIC_LABELS = {
    "bits_per_byte": "bits per byte",
    "perplexity": "perplexity",
    "kl": "KL to base, bits/token",
    "agreement": "same likeliest token as the base",
    "questions": "accuracy",
}


UNNAMED = "not named in the spec"


MEASURES = {"bits": "bits of text", "accuracy": "accuracy of tasks"}


def metric_label(metric: str) -> str:
    """A metric's name for people."""
    return METRIC_LABELS.get(metric, metric.replace("_", " "))


def retention_rows(evaluation: Evaluation) -> list[list[str]]:
    """Name, metric, base, expert, retention, interval.

    First the headline: bits per byte over all documents of a group. Then text, corpus by corpus;
    questions and tasks below it, each with its interval; the averages of suites last. What the spec
    does not name is not here: see `other_rows`.
    """
    rows = []
    for group in get_args(DocumentGroup):
        if (numbers := pooled(evaluation, group)) is not None:
            cells = [_number(value) for value in (numbers.base, numbers.expert, numbers.retention)]
            rows.append([group, f"bits per byte, all {numbers.examples} documents", *cells, _interval(numbers)])
    rows += _corpus_rows(evaluation, others=False)
    for name, numbers in evaluation.all_tasks.items():
        agreement = "" if numbers.agreement is None else f", {numbers.agreement:.0%} as the base"
        agreement += "" if numbers.common is None else f", the same for {numbers.common:.0%} of its text"
        label = f"{numbers.metric} ({numbers.examples} examples{_flips(numbers)}{agreement})"
        cells = [_number(value) for value in (numbers.base, numbers.expert, numbers.retention)]
        rows.append([name, label, *cells, _interval(numbers)])
    # Without tasks, the rows of all documents stand for the averages.
    for group, averages in evaluation.summary.items() if evaluation.all_tasks else ():
        for measure, average in averages.items():
            label = f"mean of {len(average.metrics)}, {MEASURES[measure]}"
            rows.append([group, label, "", "", _number(average.retention), _interval(average)])
    return rows


def other_rows(evaluation: Evaluation) -> list[list[str]]:
    """The same of corpora that the spec does not name (`evaluate.others`)."""
    return _corpus_rows(evaluation, others=True)


def _corpus_rows(evaluation: Evaluation, others: bool) -> list[list[str]]:
    """Text, corpus by corpus, and questions below it."""
    return [
        [corpus, *_metric_cells(metric, numbers)]
        for asked in (False, True)
        for corpus, result in evaluation.corpora.items()
        if (result.group == "other") == others
        for metric, numbers in result.metrics.items()
        if (metric == "questions") == asked
    ]


def _metric_cells(metric: str, numbers: Measured) -> list[str]:
    """The cells of a corpus' metric, behind its name."""
    label = metric_label(metric)
    if metric == "questions":
        label += f" ({numbers.examples} questions{_flips(numbers)})"
    if metric in TO_BASE:
        return [label, "", _number(numbers.expert), "", _interval(numbers)]
    return [label, *(_number(each) for each in (numbers.base, numbers.expert, numbers.retention)), _interval(numbers)]


def _flips(numbers: Measured) -> str:
    """Answers that the expert has right and the base has not, and the other way round."""
    return "" if numbers.gained is None else f", +{numbers.gained} −{numbers.lost}"


def retention_notes(evaluation: Evaluation) -> list[str]:
    """Why a retention or an interval is undefined, one line each."""
    of_corpora = {
        f"{name}, {metric_label(metric)}": numbers
        for name, result in evaluation.corpora.items()
        for metric, numbers in result.metrics.items()
    }
    everything = {**of_corpora, **evaluation.all_tasks}
    return [f"{name}: {numbers.note}" for name, numbers in everything.items() if numbers.note is not None]


def _number(value: float | None) -> str:
    return formats.UNDEFINED if value is None else formats.ratio(value)


def _interval(numbers: Measured | Average) -> str:
    return formats.interval(numbers.low, numbers.high)


def retention_table(evaluation: Evaluation) -> Table:
    """The retention table for the terminal."""
    corpus = "corpus or task" if evaluation.all_tasks else "corpus"
    notes = Text("\n".join(retention_notes(evaluation)))
    table = Table(corpus, "metric", title="What the expert kept", caption=notes or None, caption_justify="left")
    for column in ("base", "expert", "retention", "95% interval"):
        table.add_column(column, justify="right")
    others = other_rows(evaluation)
    for number, rows in enumerate((retention_rows(evaluation), others)):
        previous = None
        if number and others:
            table.add_section()
            table.add_row(Text(f"{UNNAMED}:"))
        for corpus, *cells in rows:
            table.add_row(Text(corpus if corpus != previous else ""), *cells)
            previous = corpus
    return table


def widths(value: int | list[int], gone: Collection[int] = ()) -> str:
    """A structure's width: `"1152"`, or `"640 to 1472 (mean 1152)"` where layers differ; `gone` are left out."""
    if isinstance(value, list):
        value = [each for layer, each in enumerate(value) if layer not in gone]
    if not isinstance(value, list) or len(set(value)) == 1:
        return str(value[0] if isinstance(value, list) else value)
    return f"{min(value)} to {max(value)} (mean {sum(value) / len(value):.4g})"


def plan_table(plan: Plan) -> Table:
    """By structure: kept units, who protected them, and shared and exclusive ones."""
    table = Table("structure", "kept in each layer", "protected by", "shared", "expert-exclusive", "general-exclusive")
    for structure, entry in plan.budget.items():
        protected: Counter[str] = Counter()
        for reason in plan.reasons(structure):
            protected.update(reason.protected)
        uncut = "not cut" if entry.kept == entry.of else "left with their KV groups"
        who = ", ".join(f"{name} {count:,}" for name, count in protected.items()) or uncut
        kinds = kind_cells(plan, structure)
        gone = f" (without {format_indices(plan.gone)})" if structure == "layers" else ""
        where = within(plan, structure)
        table.add_row(
            structure, f"{widths(entry.kept, plan.gone)} of {widths(entry.of, plan.gone)}{where}{gone}", who, *kinds
        )
    return table


def within(plan: Plan, structure: str) -> str:
    """What a structure's widths are of, where they are not of a layer: `" in each routed expert"`."""
    return " in each routed expert" if structure == "ffn" and any(shape.experts for shape in plan.shapes) else ""


def kinds_sentences(spec: Spec) -> str:
    """What shared and exclusive units are, and whether that decided anything."""
    fusion = spec.compose.fusion
    layers = (
        " Of a whole layer, its influence stands for its activation, and all kinds are scored alike."
        if spec.budget.layers
        else ""
    )
    weighted = " Fusion is weighted here, so the kind of a unit did not change its score."
    return (
        "A unit is shared if its activation on the expert's text and its activation on general text, each over its "
        f"layer's mean, differ by at most {fusion.tau:g} of their sum. If not, it is exclusive to the side on which it is "
        f"more active.{layers} Layers that lose none are not counted.{weighted if fusion.method == 'weighted' else ''}"
    )


def kind_cells(plan: Plan, structure: str) -> list[str]:
    """How many of a structure's shared, expert-exclusive and general-exclusive units stay, as text."""
    found = plan.kinds(structure)
    return [f"{found[kind].kept:,} of {found[kind].units:,} kept" if kind in found else "" for kind in KINDS]


def vocabulary_table(vocabulary: VocabularyPlan) -> Table:
    """The vocabulary rows that a plan keeps, and why."""
    why, rows = vocabulary.why, vocabulary.rows
    table = Table(title=Text(f"vocabulary: {rows.rows:,} of {rows.of:,} rows"), show_header=False, title_justify="left")
    if why is None:
        return table
    for name, count in why.protected.items():
        table.add_row(Text(f"kept: {name}"), f"{count:,}")
    for name, covered in why.coverage.items():
        table.add_row(Text(f"covered: {name}"), f"{covered:.4%} of {why.tokens[name]:,} calibration tokens")
        if (unseen := why.unseen.get(name)) is not None:
            interval = f"{unseen.low:.4%} to {unseen.high:.4%}"
            table.add_row(Text(f"covered: {name}, unseen text"), f"about {unseen.estimate:.4%} ({interval})")
    if rows.padding:
        table.add_row("rows without a token", f"{len(rows.padding):,}")
    if why.threshold is not None:
        table.add_row("largest relevance dropped", f"{why.threshold:.3g}")
    for label, texts in (("last kept", why.last_kept), ("first dropped", why.first_dropped)):
        table.add_row(label, Text(" ".join(map(repr, texts))))
    return table


def vocabulary_tables(tradeoff: TradeOff) -> Group:
    """Vocabularies of several sizes, and the effect of each on every corpus."""
    base = tradeoff.base
    kept = ", ".join(f"{reason} {count:,}" for reason, count in tradeoff.always_kept.items())
    about = Text(
        f"{base.model}: {base.tokenizer}, {base.tokens:,} tokens in {base.rows:,} rows, {base.parameters:,} parameters.\n"
        f"Always kept: {kept} (they overlap); at least {tradeoff.smallest:,} rows.\n"
        "Covered: the share of the base's tokens whose rows are kept, in calibration text and in measured text."
    )
    sizes = Table("rows", "parameters", "of base", "saved", title=Text(f"{tradeoff.name}: sizes"))
    table = Table("corpus", "rows", "covered,\ncalibration", "covered,\nmeasured", title=Text("by corpus"))
    for header in ("tokens\nper word", "tokens,\nof the base's"):
        table.add_column(header)
    for column in (*sizes.columns, *table.columns[1:]):
        column.justify = "right"
    for size in tradeoff.sizes:
        sizes.add_row(f"{size.rows:,}", f"{size.parameters:,}", f"{size.fraction:.1%}", f"{size.saved:,}")
    for name, corpus in tradeoff.corpora.items():
        label = f"{name} ({corpus.split}, {corpus.words:,} words)"
        table.add_row(Text(label), f"{base.rows:,}", "", "", f"{corpus.tokens_per_word:.3f}", "")
        for number, size in enumerate(tradeoff.sizes, 1):
            here = size.corpora[name]
            table.add_row(
                "", f"{size.rows:,}", f"{here.calibration_coverage:.4%}", f"{here.coverage:.4%}",
                f"{here.tokens_per_word:.3f}", f"{here.tokens_of_base:.1%}",
                end_section=number == len(tradeoff.sizes),
            )  # fmt: skip
    return Group(about, sizes, table)


def comparison_tables(comparison: Comparison) -> Group:
    """Pairs of corpora as one matrix per structure, in clustering order."""
    about = (
        f"Above the diagonal: overlap (Jaccard index) of the least relevant {comparison.fraction:.0%} of each layer's "
        f"units. Below it: rank correlation of their relevance ({comparison.criterion}). Lines separate clusters."
    )
    parts: list[RenderableType] = [Text(about)]
    for structure, result in comparison.structures.items():
        size = f"{result.irrelevant:,} of {result.units:,} units, overlap by chance {result.chance:.2f}"
        parts += [Text(f"\n{structure}: {size}"), _matrix(result, [corpus.name for corpus in comparison.corpora])]
    return Group(*parts)


def _matrix(result: StructureComparison, names: list[str]) -> Table:
    table = Table("", box=HORIZONTALS, padding=(0, int(len(names) <= 15), 0, 0))  # 20 corpora fit into 120 columns
    for number in range(1, len(names) + 1):
        table.add_column(str(number), justify="right", no_wrap=True)
    order = result.clustering.order
    last = {members[-1] for members in result.clustering.clusters}
    for row, corpus in enumerate(order):
        cells = [
            ""
            if row == column
            else f"{(result.overlap if row < column else result.rank_correlation)[corpus, other]:.2f}"
            for column, other in enumerate(order)
        ]
        table.add_row(Text(f"{row + 1:>{len(str(len(names)))}} {names[corpus]}"), *cells, end_section=corpus in last)
    return table


def sweep_rows(sweep: Sweep) -> list[list[str]]:
    """One row per budget: size, retention of expert and general text, accuracy if measured."""
    asked = _corpora_with_questions(sweep)
    rows = []
    for point in sweep.points:
        retention = [
            "" if kept is None else f"{_number(kept.retention)} ({formats.interval(kept.low, kept.high)})"
            for kept in (point.expert, point.general)
        ]
        accuracy = [_number(point.corpora[name].metrics["questions"].expert) for name in asked]
        size = [f"{point.parameters['after']:,}", f"{point.fraction:.1%}", f"{point.bytes / 1e6:.1f}"]
        rows.append([f"{point.budget:g}", *size, *retention, *accuracy])
    return rows


def _corpora_with_questions(sweep: Sweep) -> dict[str, float | None]:
    """Corpora whose questions were asked, and the base's accuracy."""
    corpora = sweep.points[0].corpora if sweep.points else {}
    metrics = {name: result.metrics for name, result in corpora.items()}
    return {name: numbers["questions"].base for name, numbers in metrics.items() if "questions" in numbers}


def sweep_table(sweep: Sweep) -> Table:
    """A sweep for the terminal."""
    title = f"{sweep.name}: what is kept, of {sweep.base.parameters:,} parameters and in bits per byte"
    table = Table("removed", title=Text(title))
    headers = ["parameters", "of base", "MB", "expert\n(95% interval)", "general\n(95% interval)"]
    headers += [f"accuracy\n{name}\n(base {_number(base)})" for name, base in _corpora_with_questions(sweep).items()]
    for header in headers:
        table.add_column(Text(header), justify="right")
    for row in sweep_rows(sweep):
        table.add_row(*row)
    return table
