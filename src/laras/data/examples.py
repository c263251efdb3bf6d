"""From sources to tokenised rows: read, validate, render, tokenise and compare, batch by batch.

Rows pass once; what stays in memory is token ids, labels, and a sketch of each distinct row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from laras.config import RunConfig
from laras.data.duplicates import DuplicateFinder
from laras.data.formats import OPTIONAL_FIELDS, Example, Layout, detect_layout, normalize_row
from laras.data.read import SourceRow
from laras.data.render import Encoded, Renderer, RenderProblem, build_renderer, target_count
from laras.data.sources import Source
from laras.data.store import token_table
from laras.errors import DataError
from laras.progress import Observer
from laras.records import Format, RowProblem, SplitName

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

    from laras.data.render import MaskSource

DETECTION_ROWS = 1_000  # the format is found by the columns of so many rows
_BATCH_ROWS = 512

Part = SplitName | None


@dataclass
class Collected:
    """Everything that the rows gave. Lists run over the kept rows, in the order of the sources.

    Attributes:
        format: Found or given.
        mask_source: What tells the tokens that carry loss.
        tables: Tokenised rows, to be put together.
        targets: Tokens of each row that carry loss.
        parts: Split that each row was given for; None where Laras divides.
        strata: Value of the field that the splits are stratified by; empty without one.
        problems: Rows that cannot be used, in the order of the sources.
        overlong: Places of the rows beyond the cap, with their length in tokens.
        rows: Read, bad ones included.
    """

    format: Format
    mask_source: MaskSource
    duplicates: DuplicateFinder
    tables: list[pa.Table] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    strata: list[str] = field(default_factory=list)
    problems: list[RowProblem] = field(default_factory=list)
    overlong: list[tuple[str, int, int]] = field(default_factory=list)
    rows: int = 0


class _Placed(NamedTuple):
    """A row with where it stands."""

    source: Source
    index: int  # 0-based among all rows of all sources
    row: SourceRow


class _Candidate(NamedTuple):
    """A row that holds an example."""

    placed: _Placed
    stratum: str
    example: Example


def collect_examples(
    config: RunConfig,
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    cap_tokens: int,
    observer: Observer,
) -> Collected:
    """Reads and encodes all rows.

    Raises:
        DataError: The columns fit no format, or the tokenizer or its template cannot be used.
    """
    rows = _placed_rows(sources, config.limit)
    first = list(islice(rows, DETECTION_ROWS))
    layout = _layout(config, first)
    renderer = build_renderer(tokenizer, layout.format, config.completion_only_loss)
    finder = DuplicateFinder(config.split.near_duplicate_threshold)
    collected = Collected(layout.format, renderer.mask_source, finder)
    _encode(chain(first, rows), layout, renderer, config, cap_tokens, collected, observer)
    # Problems of rendering are found a batch later than those of reading.
    order = {source.record.path: number for number, source in enumerate(sources)}
    collected.problems.sort(key=lambda problem: (order[problem.file], problem.line))
    return collected


def _placed_rows(sources: Iterable[Source], limit: int | None) -> Iterator[_Placed]:
    """All rows; with a limit, so many of every part."""
    index = 0
    taken: dict[Part, int] = {}
    for source in sources:
        left = None if limit is None else limit - taken.get(source.part, 0)
        if left == 0:
            continue
        for row in islice(source.rows(), left):
            yield _Placed(source, index, row)
            index += 1
            taken[source.part] = taken.get(source.part, 0) + 1


def _layout(config: RunConfig, first: list[_Placed]) -> Layout:
    """The format by the columns of the first rows; optional fields are looked for in all rows."""
    columns = dict.fromkeys(chain.from_iterable(p.row.value for p in first if isinstance(p.row.value, Mapping)))
    problems = [
        f"{p.source.record.path}:{p.row.line}: {p.row.reason or 'not an object'}"
        for p in first
        if not isinstance(p.row.value, Mapping)
    ]
    if not columns:
        if not first:
            raise DataError("the dataset holds no row", hint="put examples into it, one a row")
        raise DataError(
            f"all of the first {len(first):,} rows are bad" if len(first) >= DETECTION_ROWS else "all rows are bad",
            problems=problems,
            hint="every row must be an object with the same fields",
        )
    try:
        found = detect_layout([str(column) for column in columns], config.dataset_format, config.columns)
    except DataError as error:
        raise DataError(error.message, problems=[*error.problems, *problems], hint=error.hint) from None
    stratify_by = config.split.stratify_by
    if stratify_by is not None and stratify_by not in columns:
        raise DataError(
            f"split.stratify_by: the data has no field {stratify_by!r}",
            problems=problems,
            hint=f"it has {', '.join(map(str, columns))}",
        )
    taken = {*config.columns, *config.columns.values()}
    optional = {name: name for name in OPTIONAL_FIELDS[found.format] if name not in taken}
    return Layout(found.format, {**optional, **found.columns})


def _encode(
    rows: Iterator[_Placed],
    layout: Layout,
    renderer: Renderer,
    config: RunConfig,
    cap_tokens: int,
    collected: Collected,
    observer: Observer,
) -> None:
    action: Literal["stopped", "skipped"] = "skipped" if config.on_bad_rows == "skip" else "stopped"
    under_way: deque[list[_Candidate]] = deque()

    def reject(placed: _Placed, reason: str) -> None:
        collected.problems.append(
            RowProblem(file=placed.source.record.path, line=placed.row.line, reason=reason, action=action)
        )

    def batches() -> Iterator[list[Example]]:
        while batch := list(islice(rows, _BATCH_ROWS)):
            collected.rows += len(batch)
            candidates = []
            for placed in batch:
                candidate = _candidate(placed, layout, config.split.stratify_by)
                if isinstance(candidate, str):
                    reject(placed, candidate)
                else:
                    candidates.append(candidate)
            under_way.append(candidates)
            yield [candidate.example for candidate in candidates]

    for results in renderer.encode_batches(batches()):
        kept: list[tuple[_Candidate, Encoded]] = []
        for candidate, result in zip(under_way.popleft(), results, strict=True):
            reason = _unusable(candidate, result, config, cap_tokens, collected)
            if reason:
                reject(candidate.placed, reason)
            elif isinstance(result, Encoded) and not (
                config.overlong != "truncate" and len(result.input_ids) > cap_tokens
            ):
                kept.append((candidate, result))
        _keep(kept, cap_tokens, collected, config.split.stratify_by is not None)
        observer.stage_progress(collected.rows, None, "rows")


def _candidate(placed: _Placed, layout: Layout, stratify_by: str | None) -> _Candidate | str:
    row = placed.row
    if row.reason is not None:
        return row.reason
    example = normalize_row(row.value, layout)
    if isinstance(example, str):
        return example
    stratum: Any = None
    if stratify_by is not None:
        stratum = row.value.get(stratify_by)
        if stratum is None:
            return f"missing field {stratify_by!r}, which `split.stratify_by` names"
    return _Candidate(placed, str(stratum), example)


def _unusable(
    candidate: _Candidate, result: Encoded | RenderProblem, config: RunConfig, cap_tokens: int, collected: Collected
) -> str | None:
    """Why an example cannot be learned from; notes the ones beyond the cap."""
    if isinstance(result, RenderProblem):
        return result.reason
    length = len(result.input_ids)
    if length <= cap_tokens:
        return None
    placed = candidate.placed
    collected.overlong.append((placed.source.record.path, placed.row.line, length))
    if config.overlong == "truncate" and not target_count(result.labels[:cap_tokens]):
        return f"{length:,} tokens, and none of the first {cap_tokens:,} carries loss: the prompt alone is too long"
    return None


def _keep(kept: list[tuple[_Candidate, Encoded]], cap_tokens: int, collected: Collected, stratified: bool) -> None:
    if not kept:
        return
    ids = [encoded.input_ids[:cap_tokens] for _, encoded in kept]
    labels = [encoded.labels[:cap_tokens] for _, encoded in kept]
    collected.tables.append(token_table(ids, labels, [candidate.placed.index for candidate, _ in kept]))
    collected.targets += [target_count(row) for row in labels]
    collected.parts += [candidate.placed.source.part for candidate, _ in kept]
    if stratified:
        collected.strata += [candidate.stratum for candidate, _ in kept]
    collected.duplicates.add([candidate.example for candidate, _ in kept])
