"""The data stage: from what the configuration names to three splits of tokenised rows and two records."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from laras.config import DatasetFiles, RunConfig
from laras.data.analyze import length_stats
from laras.data.cache import Entry, cache_key, load_prepared, store_prepared, tokenizer_digest
from laras.data.divide import divide_rows
from laras.data.duplicates import Groups
from laras.data.examples import Collected, collect_examples
from laras.data.members import members_digest, members_of
from laras.data.render import CHAT_FORMATS
from laras.data.sources import Source, find_sources
from laras.errors import BadRowsError, DataError
from laras.progress import Observer
from laras.record_base import digest_of
from laras.records import DatasetProfile, RowProblem, SplitManifest

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

_SHOWN_REASONS = 5
_SHOWN_COLUMNS = 10
_VARYING = re.compile(r"'[^']*'|0x[0-9a-f]{2}|\d[\d,]*")


@dataclass(frozen=True)
class PreparedData:
    """Rows ready for training. Tables have the columns of `laras.data.store`, rows in the order of the source.

    Attributes:
        profile: What the data is.
        manifest: How it was divided; its parent is the profile.
        train: Rows to learn from.
        validation: Rows to choose the best checkpoint by.
        test: Rows to be sealed before anything else happens.
        members: Hashes of which content is in which split (`laras.data.members`).
    """

    profile: DatasetProfile
    manifest: SplitManifest
    train: pa.Table
    validation: pa.Table
    test: pa.Table
    members: pa.Table


def prepare_dataset(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, context_tokens: int, observer: Observer
) -> PreparedData:
    """Reads, validates, renders, tokenises, compares and divides the data; writes nothing but the cache.

    The same files, settings and tokenizer are prepared once: a second call reads the cache.

    Args:
        config: What the user wants.
        tokenizer: A fast one, with the chat template to use.
        context_tokens: Positions that the model was made for; caps the examples as `config.max_length` does.
        observer: Is told what happens.

    Raises:
        DataError: Names everything that is wrong with the data, each bad row by file and line.
    """
    name = _source_name(config.dataset)
    observer.stage_started(f"reading {name}")
    sources = find_sources(config.dataset)
    cap_tokens = min(config.max_length, context_tokens)
    known = {
        "source": name,
        "files": tuple(source.record for source in sources),
        "max_length_tokens": cap_tokens,
        "overlong": config.overlong,
        "tokenizer_digest": tokenizer_digest(tokenizer),
    }
    key = cache_key(config, known, tokenizer.chat_template)
    entry = load_prepared(key, observer)
    if entry is None:
        entry = _prepared_anew(config, sources, tokenizer, known, observer)
        store_prepared(key, entry, observer)
    if unused := entry.profile.unused_columns:
        more = f" and {len(unused) - _SHOWN_COLUMNS} more" if len(unused) > _SHOWN_COLUMNS else ""
        observer.message(f"columns that are not used: {', '.join(map(repr, unused[:_SHOWN_COLUMNS]))}{more}")
    for warning in entry.manifest.warnings:
        observer.warning(warning)
    return PreparedData(entry.profile, entry.manifest, **entry.tables)


def _prepared_anew(
    config: RunConfig,
    sources: list[Source],
    tokenizer: PreTrainedTokenizerBase,
    known: dict[str, Any],
    observer: Observer,
) -> Entry:
    import pyarrow as pa

    cap_tokens = known["max_length_tokens"]
    collected = collect_examples(config, sources, tokenizer, cap_tokens, observer)
    _stop_if_unusable(config, collected, cap_tokens)
    observer.stage_started("comparing and dividing rows")
    table = pa.concat_tables(collected.tables)
    groups = collected.duplicates.groups()
    template = digest_of(tokenizer.get_chat_template()) if collected.format in CHAT_FORMATS else None
    profile = _profile(collected, table, groups, {**known, "chat_template_digest": template})
    tables, manifest = _divide(config, table, collected, groups)
    tables["members"] = members_of(table, tables, groups)
    added = {"parent_digest": profile.digest(), "members_sha256": members_digest(tables["members"])}
    return Entry(profile, manifest.model_copy(update=added), tables)


def _profile(collected: Collected, table: pa.Table, groups: Groups, known: dict[str, Any]) -> DatasetProfile:
    return DatasetProfile(
        format=collected.format,
        rows=collected.rows,
        kept_rows=table.num_rows,
        problems=tuple(collected.problems),
        tokens=length_stats(table.column("length").to_numpy(), collected.targets),
        truncated_rows=len(collected.overlong),
        duplicate_rows=groups.duplicate_rows,
        near_duplicate_groups=groups.shared,
        mask_source=collected.mask_source,
        unused_columns=collected.unused,
        **known,
    )


def _divide(
    config: RunConfig, table: pa.Table, collected: Collected, groups: Groups
) -> tuple[dict[str, pa.Table], SplitManifest]:
    try:
        tables, manifest = divide_rows(config, table, collected, groups)
    except DataError as error:
        if groups.shared and config.split.near_duplicate_threshold < 1:
            hint = f"{error.hint}; `split: {{near_duplicate_threshold: 1}}` lets near duplicates count as different"
            raise DataError(error.message, problems=error.problems, hint=hint) from None
        raise
    return {str(split): rows for split, rows in tables.items()}, manifest


def _source_name(dataset: str | DatasetFiles) -> str:
    if isinstance(dataset, str):
        return dataset
    train = (dataset.train,) if isinstance(dataset.train, str) else dataset.train
    return ", ".join(name for name in (*train, dataset.validation, dataset.test) if name)


def _stop_if_unusable(config: RunConfig, collected: Collected, cap_tokens: int) -> None:
    """All that is wrong with the rows, in one error."""
    kept = len(collected.targets)
    problems = list(collected.problems)
    if config.overlong == "error":
        problems += [
            RowProblem(file=file, line=line, reason=f"{length:,} tokens; the cap is {cap_tokens:,}", action="stopped")
            for file, line, length in collected.overlong
        ]
    stops = bool(problems) and (config.on_bad_rows == "stop" or len(problems) > len(collected.problems))
    if kept and not stops:
        return
    if not problems and len(collected.overlong) == collected.rows:
        raise DataError(
            f"all {collected.rows:,} examples are longer than the cap of {cap_tokens:,} tokens and were dropped; "
            f"the shortest has {min(length for _, _, length in collected.overlong):,}",
            hint=f"{_longer(config, cap_tokens)}, or write `overlong: truncate`",
        )
    message = (
        f"{len(problems):,} of {collected.rows:,} rows are bad" if kept else f"all {collected.rows:,} rows are bad"
    )
    if not kept and len(problems) < collected.rows:
        message = f"no row is usable: {len(problems):,} of {collected.rows:,} are bad, the others too long"
    raise BadRowsError(
        f"{message}: {_reason_counts(problems)}",
        problems=[f"{problem.file}:{problem.line}: {problem.reason}" for problem in problems],
        hint=_hint(config, problems, kept, cap_tokens),
        report={
            "format": collected.format,
            "rows": collected.rows,
            "kept_rows": kept,
            "problems": [problem.model_dump(mode="json") for problem in problems],
        },
    )


def _longer(config: RunConfig, cap_tokens: int) -> str:
    """What would make the cap longer."""
    if cap_tokens < config.max_length:
        return f"take a model whose context is longer than {cap_tokens:,} tokens"
    return "raise `max_length`"


def _hint(config: RunConfig, problems: list[RowProblem], kept: int, cap_tokens: int) -> str:
    hints = []
    if any("not UTF-8" in problem.reason for problem in problems):
        hints.append("save the file as UTF-8")
    if any(" tokens" in problem.reason for problem in problems):
        hints.append(f"{_longer(config, cap_tokens)}, or choose `overlong: truncate` or `drop`")
    skip = config.on_bad_rows == "stop" and kept
    hints.append("correct the rows" + (", or leave them out with `on_bad_rows: skip`" if skip else ""))
    return "; ".join(hints)


def _reason_counts(problems: list[RowProblem]) -> str:
    """How often each kind of reason occurs, details left out."""
    kinds: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for problem in problems:
        kind = _VARYING.sub("…", problem.reason)
        kinds[kind] += 1
        examples.setdefault(kind, problem.reason)
    shown = [
        f"{count:,} x {examples[kind] if count == 1 else kind}" for kind, count in kinds.most_common(_SHOWN_REASONS)
    ]
    if len(kinds) > _SHOWN_REASONS:
        shown.append(f"{len(kinds) - _SHOWN_REASONS} other reasons")
    return ", ".join(shown)
