"""`laras inspect`: what the data is, before anything is trained on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from laras.cli.options import ConfigArguments, JsonOption, print_json, read_config
from laras.cli.view import open_view
from laras.errors import BadRowsError

if TYPE_CHECKING:
    from rich.table import Table

    from laras.pipeline import Inspection
    from laras.records import DatasetProfile, LengthStats

_BAR_CHARS = 40
_SHOWN_PROBLEMS = 20
_LOSS_ON = {
    "generation-markers": "assistant turns, as the chat template marks them",
    "derived": "assistant turns, found in the chat template's text and verified",
    "boundary": "completions",
    "all-tokens": "every token",
}
_SHOWN_STATISTICS = ("rows", "min", "median", "mean", "p90", "p95", "p99", "max", "total")


def inspect_command(arguments: ConfigArguments = None, as_json: JsonOption = False) -> None:
    """Show what the data is: format, lengths, duplicates, splits, bad rows."""
    from laras.pipeline import inspect

    config, _ = read_config(arguments)
    try:
        with open_view() as view:
            inspection = inspect(config, view)
    except BadRowsError as error:
        if as_json:
            print_json(error.report)
        raise
    if as_json:
        print_json(inspection_json(inspection))
    else:
        _show(inspection)


def inspection_json(inspection: Inspection) -> dict[str, Any]:
    """What `laras inspect --json` prints (docs: "What programs can rely on")."""
    from laras.data.split import SPLITS

    profile, manifest = inspection.profile, inspection.manifest
    splits = {}
    for name in SPLITS:
        split = getattr(manifest, name)
        splits[name] = {"rows": split.rows, "tokens": split.tokens.model_dump(mode="json"), "sha256": split.sha256}
    return {
        **profile.model_dump(mode="json", exclude={"schema_version", "parent_digest"}),
        "splits": splits,
        "drift": [drift.model_dump(mode="json") for drift in manifest.drift],
        "excluded_rows": manifest.excluded_rows,
        "warnings": list(manifest.warnings),
    }


def _show(inspection: Inspection) -> None:
    from rich.console import Console

    from laras.data.split import SPLITS

    profile, manifest = inspection.profile, inspection.manifest
    console = Console(highlight=False)
    console.print(_facts(profile))
    console.print()
    sets = [("all", profile.tokens), *((name, getattr(manifest, name).tokens) for name in SPLITS)]
    console.print(_lengths_table(sets))
    lines = [_histogram(profile.tokens)]
    lines += [
        f"lengths of {drift.split} against train: distance {drift.ks_statistic:.3f}, p = {drift.p_value:.2g}"
        for drift in manifest.drift
    ]
    for stratum, counts in manifest.strata.items():
        rows = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        lines.append(f"{manifest.stratify_by} = {stratum}: {rows}")
    lines += [f"{p.file}:{p.line}: {p.reason} ({p.action})" for p in profile.problems[:_SHOWN_PROBLEMS]]
    if len(profile.problems) > _SHOWN_PROBLEMS:
        lines.append(f"... and {len(profile.problems) - _SHOWN_PROBLEMS:,} more; --json lists all")
    console.print("\n".join(lines), markup=False)


def _facts(profile: DatasetProfile) -> Table:
    from rich.table import Table

    tokens = profile.tokens
    longer = f"{profile.truncated_rows:,} rows are longer ({profile.overlong})"
    near = f"{profile.near_duplicate_groups:,} groups of near duplicates"
    facts = Table.grid(padding=(0, 2))
    facts.add_row("source", profile.source)
    facts.add_row("format", profile.format)
    facts.add_row("loss on", _LOSS_ON[profile.mask_source])
    facts.add_row("rows", f"{profile.rows:,} read, {profile.kept_rows:,} kept")
    facts.add_row("tokens", f"{tokens.total:,}, of which {tokens.target_total:,} carry loss")
    facts.add_row("cap", f"{profile.max_length_tokens:,} tokens; {longer}")
    facts.add_row("duplicates", f"{profile.duplicate_rows:,} rows; {near}")
    return facts


def _lengths_table(sets: Sequence[tuple[str, LengthStats]]) -> Table:
    from rich.table import Table

    table = Table(title="Token lengths", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for name in _SHOWN_STATISTICS:
        table.add_column(name, justify="right")
    for name, stats in sets:
        table.add_row(name, *(f"{getattr(stats, statistic):,.0f}" for statistic in _SHOWN_STATISTICS))
    return table


def _histogram(stats: LengthStats) -> str:
    most = max(stats.histogram_counts, default=1)
    edges = stats.histogram_edges
    lines = []
    for low, high, count in zip(edges, edges[1:], stats.histogram_counts, strict=False):
        lengths = f"{low:,} to {high - 1:,}" if high - low > 1 else f"{low:,}"
        lines.append(f"{lengths:>18}  {'#' * -(-count * _BAR_CHARS // most):<{_BAR_CHARS}}  {count:,}")
    return "\n".join(["", " tokens", *lines, ""])
