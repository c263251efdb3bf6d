"""From sources to tokenised rows: read, validate, render, tokenise and compare, batch by batch.

Rows pass once; what stays in memory is token ids, labels, and a sketch of each distinct row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, NamedTuple

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
        unused: Columns that the format has no use for.
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
    unused: tuple[str, ...] = ()


class _Placed(NamedTuple):
    """A row with where it stands."""

    source: Source
    position: int  # 0-based among all rows of all sources
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
    encoder = _Encoder(config, layout, renderer, cap_tokens)
    encoder.encode(chain(first, rows), observer)
    collected = encoder.collected
    # Problems of rendering are found a batch later than those of reading.
    order = {source.record.path: number for number, source in enumerate(sources)}
    collected.problems.sort(key=lambda problem: (order[problem.file], problem.line))
    return collected


def _placed_rows(sources: Iterable[Source], limit: int | None) -> Iterator[_Placed]:
    """All rows; with a limit, so many of every part."""
    position = 0
    taken: dict[Part, int] = {}
    for source in sources:
        left = None if limit is None else limit - taken.get(source.part, 0)
        if left == 0:
            continue
        for row in islice(source.rows(), left):
            yield _Placed(source, position, row)
            position += 1
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
            hint="save the file as UTF-8"
            if any("not UTF-8" in problem for problem in problems)
            else "every row must be an object with the same fields",
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
    fields = {**optional, **found.columns}
    used = {*fields.values(), stratify_by}
    return Layout(found.format, fields, tuple(str(column) for column in columns if column not in used))


class _Encoder:
    """Takes rows batch by batch into a `Collected`."""

    def __init__(self, config: RunConfig, layout: Layout, renderer: Renderer, cap_tokens: int) -> None:
        self.collected = Collected(
            layout.format,
            renderer.mask_source,
            DuplicateFinder(config.split.near_duplicate_threshold),
            unused=layout.unused,
        )
        self._config = config
        self._layout = layout
        self._renderer = renderer
        self._cap_tokens = cap_tokens
        self._under_way: deque[list[_Candidate]] = deque()  # the renderer is a batch ahead of its results

    def encode(self, rows: Iterator[_Placed], observer: Observer) -> None:
        """Encodes all rows."""
        for results in self._renderer.encode_batches(self._batches(rows)):
            pairs = zip(self._under_way.popleft(), results, strict=True)
            usable = [(candidate, self._usable(candidate, result)) for candidate, result in pairs]
            self._keep([(candidate, encoded) for candidate, encoded in usable if encoded is not None])
            observer.stage_progress(self.collected.rows, None, "rows")

    def _batches(self, rows: Iterator[_Placed]) -> Iterator[list[Example]]:
        while batch := list(islice(rows, _BATCH_ROWS)):
            self.collected.rows += len(batch)
            candidates = []
            for placed in batch:
                candidate = _candidate(placed, self._layout, self._config.split.stratify_by)
                if isinstance(candidate, str):
                    self._reject(placed, candidate)
                else:
                    candidates.append(candidate)
            self._under_way.append(candidates)
            yield [candidate.example for candidate in candidates]

    def _reject(self, placed: _Placed, reason: str) -> None:
        self.collected.problems.append(
            RowProblem(
                file=placed.source.record.path,
                line=placed.row.line,
                reason=reason,
                action="skipped" if self._config.on_bad_rows == "skip" else "stopped",
            )
        )

    def _usable(self, candidate: _Candidate, result: Encoded | RenderProblem) -> Encoded | None:
        """What is kept of an example, cut to the cap; notes why nothing is."""
        if isinstance(result, RenderProblem):
            self._reject(candidate.placed, result.reason)
            return None
        length, cap = len(result.input_ids), self._cap_tokens
        if length <= cap:
            return result
        placed = candidate.placed
        self.collected.overlong.append((placed.source.record.path, placed.row.line, length))
        if self._config.overlong != "truncate":
            return None
        cut = Encoded(result.input_ids[:cap], result.labels[:cap], result.text)
        if not target_count(cut.labels):
            self._reject(
                placed, f"{length:,} tokens, and none of the first {cap:,} carries loss: the prompt alone is too long"
            )
            return None
        return cut

    def _keep(self, kept: list[tuple[_Candidate, Encoded]]) -> None:
        if not kept:
            return
        collected = self.collected
        labels = [encoded.labels for _, encoded in kept]
        collected.tables.append(
            token_table(
                [encoded.input_ids for _, encoded in kept], labels, [candidate.placed.position for candidate, _ in kept]
            )
        )
        collected.targets += [target_count(row) for row in labels]
        collected.parts += [candidate.placed.source.part for candidate, _ in kept]
        if self._config.split.stratify_by is not None:
            collected.strata += [candidate.stratum for candidate, _ in kept]
        collected.duplicates.add([candidate.example for candidate, _ in kept])


def _candidate(placed: _Placed, layout: Layout, stratify_by: str | None) -> _Candidate | str:
    """The example in a row, or why there is none."""
    row = placed.row
    if row.reason is not None:
        return row.reason
    example = normalize_row(row.value, layout)
    if isinstance(example, str):
        return example
    stratum = None
    if stratify_by is not None:
        stratum = row.value.get(stratify_by)
        if stratum is None:
            return f"missing field {stratify_by!r}, which `split.stratify_by` names"
    return _Candidate(placed, str(stratum), example)
