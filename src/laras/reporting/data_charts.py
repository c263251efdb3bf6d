"""The figure of the data."""

from __future__ import annotations

from laras.formatting import number
from laras.records import LengthStats, SplitManifest
from laras.reporting.drawing import INK, RED, SERIES_COLORS, Drawing, finish, new_figure, step_axis

# A cap that lies farther away than so many times the longest example would press the lengths together.
_CAP_SHOWN_UNTIL = 2.0


def lengths_chart(split: SplitManifest, cap_tokens: int | None) -> Drawing | None:
    """Token lengths of each split on one scale, with the cap."""
    parts: list[tuple[str, LengthStats]] = [
        (name, info.tokens)
        for name, info in (("train", split.train), ("validation", split.validation), ("test (sealed)", split.test))
        if info.tokens.histogram_counts and info.tokens.rows
    ]
    if not parts:
        return None
    longest = max(stats.max for _, stats in parts)
    is_near = cap_tokens is not None and cap_tokens <= _CAP_SHOWN_UNTIL * longest
    last_tokens = 1.05 * max(longest, cap_tokens if cap_tokens is not None and is_near else 0)
    figure, axes = new_figure(len(parts), 1, height=0.6 + 1.15 * len(parts), share_x=True)
    for axis, (name, stats), color in zip(axes, parts, SERIES_COLORS, strict=False):
        axis.stairs(stats.histogram_counts, stats.histogram_edges, fill=True, color=color, alpha=0.3)
        axis.stairs(stats.histogram_counts, stats.histogram_edges, color=color, linewidth=1.2)
        axis.axvline(stats.median, color=INK, linewidth=1.1, linestyle="-", label=f"median {number(stats.median, 0)}")
        axis.axvline(
            stats.p95, color=INK, linewidth=1.1, linestyle=(0, (5, 2)), label=f"95% below {number(stats.p95, 0)}"
        )
        if cap_tokens is not None:
            label = f"cap {cap_tokens:,}" + ("" if cap_tokens <= last_tokens else ", beyond this axis")
            axis.axvline(cap_tokens, color=RED, linewidth=1.6, linestyle=(0, (1.2, 1.6)), label=label)
        axis.set_title(f"{name}: {stats.rows:,} rows")
        axis.set_ylim(bottom=0)
        axis.set_xlim(0, last_tokens)
        axis.set_ylabel("rows")
        axis.legend(loc="lower right", bbox_to_anchor=(1.0, 0.97), ncols=3)  # beside the title, off the lines
    step_axis(axes[-1], "tokens in an example")
    description = " ".join(
        f"{name}: {stats.rows:,} rows of {stats.min:,} to {stats.max:,} tokens, median {number(stats.median, 0)}, "
        f"95% below {number(stats.p95, 0)}."
        for name, stats in parts
    )
    if cap_tokens is not None:
        description += f" Cap: {cap_tokens:,} tokens."
    return finish(figure, "lengths", "Token lengths of each split", description)
