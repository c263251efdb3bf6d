"""`laras doctor`: what of this machine works, and what to do about the rest."""

from __future__ import annotations

from dataclasses import asdict

from laras.cli.options import JsonOption, print_json


def doctor_command(as_json: JsonOption = False) -> None:
    """Show what works on this machine, and what to do about the rest.

    Python, GPU, precision, 4-bit, attention, trackers, disk, Hub; in less than three seconds, and nothing is changed.
    """
    from laras.planning.doctor import examine

    findings = examine()
    if as_json:
        usable = all(one.status != "problem" for one in findings)
        print_json({"usable": usable, "findings": [asdict(one) for one in findings]})
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("", "status", "found", "what to do"):
        table.add_column(name, overflow="fold")
    for one in findings:
        table.add_row(one.name, one.status, *(escape(text) for text in (one.found, one.advice)))
    Console(highlight=False).print(table)
