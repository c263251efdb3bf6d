"""What took long to find out, kept in the user's cache as JSON; a cache that fails costs time only."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import platformdirs

from laras.record_base import digest_of, write_atomically

_T = TypeVar("_T")


def remembered(
    kind: str,
    key: Mapping[str, Any],
    make: Callable[[], _T],
    *,
    read: Callable[[Any], _T],
    written: Callable[[_T], Any],
) -> _T:
    """What `make` gives for this key, from the cache where it was made before.

    Args:
        kind: Folder of the cache.
        key: All that the result depends on; values of JSON.
        make: Its errors are passed on, and nothing is kept then.
        read: Of parsed JSON; any ValueError, KeyError or TypeError of it means that the file is damaged.
        written: To values of JSON.
    """
    path = Path(platformdirs.user_cache_dir("laras", appauthor=False)) / kind / f"{digest_of(key)[:32]}.json"
    try:
        return read(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent or damaged: made again
    found = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(written(found), separators=(",", ":")))
    except OSError:
        pass
    return found
