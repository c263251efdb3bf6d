"""Prepared data in the user's cache folder, named by everything it depends on.

An entry is written aside and renamed, so it is whole or absent; its rows are checked against the digests in its
records when it is read, and a damaged entry is made anew. The oldest entries make room for new ones. The test rows are
sealed here as they are in a run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import platformdirs

from laras import __version__
from laras.config import RunConfig
from laras.data.members import members_digest
from laras.data.sealed import seal_test, unseal
from laras.data.store import read_tokens, tokens_digest, write_tokens
from laras.errors import RunStateError
from laras.progress import Observer
from laras.record_base import digest_of
from laras.records import DatasetProfile, SplitManifest

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

_LAYOUT = 4  # raised whenever the same settings would give other rows or records
_KEPT_ENTRIES = 10
_SETTINGS = (
    "dataset",
    "dataset_format",
    "columns",
    "on_bad_rows",
    "overlong",
    "completion_only_loss",
    "limit",
    "split",
    "seed",
)
_PLAIN_SPLITS = ("train", "validation")


class Entry(NamedTuple):
    """Prepared data: the records, the tokenised rows of each split, and the `members` of the splits."""

    profile: DatasetProfile
    manifest: SplitManifest
    tables: dict[str, pa.Table]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of vocabulary, rules and special tokens; the chat template has a digest of its own."""
    digest = hashlib.sha256(digest_of(_special_tokens(tokenizer)).encode())
    if tokenizer.is_fast:
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    return {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}


def cache_key(config: RunConfig, known: Mapping[str, Any], chat_template: Any) -> str:
    """Digest of the settings that matter, of what is known of files and tokenizer, and of the chat template."""
    facts = {**known, "files": [file.model_dump(mode="json") for file in known["files"]]}
    settings = config.model_dump(mode="json", include=set(_SETTINGS))
    return digest_of(
        {"layout": _LAYOUT, "version": __version__, "settings": settings, "facts": facts, "template": chat_template}
    )


def load_prepared(key: str, observer: Observer) -> Entry | None:
    """The entry of a key, or None when there is none or it is damaged."""
    folder = _folder() / key
    if not folder.is_dir():
        return None
    try:
        profile, manifest = DatasetProfile.load(folder), SplitManifest.load(folder)
        tables = {split: read_tokens(folder / f"{split}.parquet") for split in _PLAIN_SPLITS}
        for split, table in tables.items():
            if tokens_digest(table) != getattr(manifest, split).sha256:
                raise RunStateError(f"{split}.parquet was altered")
        tables["test"] = unseal(folder, manifest.test.sha256)
        tables["members"] = read_tokens(folder / "members.parquet")
        if members_digest(tables["members"]) != manifest.members_sha256:
            raise RunStateError("members.parquet was altered")
        if manifest.parent_digest != profile.digest():
            raise RunStateError("the records do not belong together")
    except (RunStateError, OSError, KeyError) as error:  # the last one: a table of other columns
        observer.message(f"the cached rows are damaged and are made anew: {str(error).splitlines()[0]}")
        shutil.rmtree(folder, ignore_errors=True)
        return None
    observer.message("the rows are taken from the cache, as files, settings and tokenizer are unchanged")
    return Entry(profile, manifest, tables)


def store_prepared(key: str, entry: Entry, observer: Observer) -> None:
    """Writes an entry whole or not at all; a cache that cannot be written costs time later, never the run."""
    aside = None
    try:
        _folder().mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=_folder()))
        for name in (*_PLAIN_SPLITS, "members"):
            write_tokens(entry.tables[name], aside / f"{name}.parquet")
        seal_test(entry.tables["test"], aside)
        entry.profile.save(aside)
        entry.manifest.save(aside)
        if not (_folder() / key).exists():
            aside.rename(_folder() / key)
        _forget_oldest()
    except OSError as error:
        observer.message(f"the prepared rows are not cached: {error}")
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def _folder() -> Path:
    return Path(platformdirs.user_cache_dir("laras", appauthor=False)) / "prepared"


def _forget_oldest() -> None:
    entries = [entry for entry in os.scandir(_folder()) if entry.is_dir() and not entry.name.startswith(".")]
    for entry in sorted(entries, key=lambda entry: entry.stat().st_mtime)[:-_KEPT_ENTRIES]:
        shutil.rmtree(entry.path, ignore_errors=True)
