"""What of this machine works for training, and what to do about the rest; nothing here imports torch."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import platformdirs

from laras.formatting import size
from laras.planning.attention import DISTRIBUTIONS, has_kernel
from laras.planning.backend import UNSLOTH_VERSION, is_installed, machine_refusals
from laras.planning.catalogue import NATIVE_BF16_SINCE

Status = Literal["ok", "note", "problem"]
_OLDEST_PYTHON = (3, 11)
_DISK_BYTES = 20 * 2**30
_HUB_HOST, _HUB_TIMEOUT_S = "huggingface.co", 1.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: Of the thing.
        status: `note` is worth knowing, `problem` keeps something from working.
        found: What is there.
        advice: What to do; empty when nothing is to be done.
    """

    name: str
    status: Status
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Looks at everything, in less than three seconds."""
    cards = _gpus()
    return [
        _python(),
        *_driver_and_gpus(cards),
        _precision(cards),
        _quantisation(cards),
        _attention(cards),
        _unsloth(cards),
        _trackers(),
        _disk("disk", Path.cwd()),
        _disk("cache", Path(platformdirs.user_cache_dir("laras", appauthor=False))),
        _hub(),
    ]


def _python() -> Finding:
    found = f"{platform.python_version()}, torch {_version('torch')}, transformers {_version('transformers')}"
    if sys.version_info < _OLDEST_PYTHON:
        return Finding("python", "problem", found, "install Python 3.11 or newer")
    if _version("torch") is None:
        return Finding("python", "problem", found, "pip install laras, which brings torch")
    return Finding("python", "ok", found)


def _gpus() -> list[dict[str, Any]]:
    """Name, memory, and compute capability of each card by NVML; empty without a driver."""
    cards: list[dict[str, Any]] = []
    with suppress(Exception):
        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
        try:
            driver = nvml.nvmlSystemGetDriverVersion()
            for index in range(nvml.nvmlDeviceGetCount()):
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                cards.append(
                    {
                        "name": nvml.nvmlDeviceGetName(handle),
                        "total": int(memory.total),
                        "free": int(memory.free),
                        "capability": tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)),
                        "driver": driver,
                    }
                )
        finally:
            nvml.nvmlShutdown()
    return cards


def _driver_and_gpus(cards: list[dict[str, Any]]) -> list[Finding]:
    if not cards:
        advice = "training runs on the CPU: small models only. With an NVIDIA card, install its driver"
        return [Finding("driver", "note", "no NVIDIA driver", advice), Finding("gpu", "note", "none", "")]
    build = _version("torch") or ""
    findings = [Finding("driver", "ok", str(cards[0]["driver"]))]
    if "+cpu" in build:
        findings[0] = Finding("driver", "problem", f"{cards[0]['driver']}, but torch {build} is for the CPU",
                              "install a CUDA build of torch (pytorch.org)")  # fmt: skip
    for card in cards:
        found = f"{card['name']}, {size(card['free'])} of {size(card['total'])} free"
        busy = card["free"] < 0.8 * card["total"]
        advice = "other processes hold memory, which a plan leaves out; end them for a larger one" if busy else ""
        findings.append(Finding("gpu", "note" if busy else "ok", found, advice))
    return findings


def _precision(cards: list[dict[str, Any]]) -> Finding:
    if not cards:
        return Finding("bf16", "note", "a CPU trains in fp32", "")
    if cards[0]["capability"] >= NATIVE_BF16_SINCE:
        return Finding("bf16", "ok", "native")
    return Finding("bf16", "note", "not native before compute capability 8.0", "fp16 with a gradient scaler is used")


def _quantisation(cards: list[dict[str, Any]]) -> Finding:
    found = _version("bitsandbytes")
    if found is None:
        return Finding(
            "4-bit", "note", "bitsandbytes is absent", "pip install 'laras[bnb]' for QLoRA and 8-bit optimizers"
        )
    if not cards:
        return Finding("4-bit", "note", f"bitsandbytes {found}, no GPU", "")
    return Finding("4-bit", "ok", f"bitsandbytes {found}")


def _attention(cards: list[dict[str, Any]]) -> Finding:
    paths = ["sdpa"]
    if cards and cards[0]["capability"] >= NATIVE_BF16_SINCE:
        paths.append("varlen (packing)")
    paths += [name for name in DISTRIBUTIONS if has_kernel(name)]
    advice = "" if len(paths) > 1 else "packing without padding needs compute capability 8.0"
    return Finding("attention", "ok" if len(paths) > 1 else "note", ", ".join(paths), advice)


def _trackers() -> Finding:
    present = [name for name in ("tensorboard", "wandb", "trackio") if importlib.util.find_spec(name) is not None]
    notes = []
    if "wandb" in present and not (os.environ.get("WANDB_API_KEY") or (Path.home() / ".netrc").is_file()):
        notes.append("wandb has no key: `wandb login`, else it logs offline")
    return Finding("trackers", "note" if notes else "ok", ", ".join(["metrics.jsonl", *present]), "; ".join(notes))


def _unsloth(cards: list[dict[str, Any]]) -> Finding:
    found = _version("unsloth")
    if found is None:
        advice = "not needed: Laras' own layers were faster in every case measured. For `backend: unsloth`: pip install"
        return Finding("unsloth", "note", "absent", f"{advice} 'laras[unsloth]'")
    if not is_installed():
        advice = "Laras' own layers are used; pip install 'laras[unsloth]' brings what is missing"
        return Finding("unsloth", "note", f"Unsloth {found} without unsloth_zoo", advice)
    refusals = machine_refusals(max((card["capability"] for card in cards), default=None))
    if refusals:
        return Finding("unsloth", "note", f"Unsloth {found}, but {'; '.join(refusals)}", "Laras' own layers are used")
    if found != UNSLOTH_VERSION:
        advice = f"Laras is written for {UNSLOTH_VERSION}: pip install 'laras[unsloth]'"
        return Finding("unsloth", "note", f"Unsloth {found}", advice)
    return Finding("unsloth", "ok", f"Unsloth {found}; taken with `backend: unsloth` only")


def _disk(name: str, folder: Path) -> Finding:
    place = next((one for one in (folder, *folder.parents) if one.exists()), Path.cwd())
    free = shutil.disk_usage(place).free
    found = f"{size(free)} free"
    if not os.access(place, os.W_OK):
        return Finding(name, "problem", f"{found}, not writable", "choose a folder that can be written")
    if free < _DISK_BYTES:
        return Finding(
            name, "note", found, "a 7B model takes 15 GiB, each checkpoint of full fine-tuning several times that"
        )
    return Finding(name, "ok", found)


def _hub() -> Finding:
    if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True"):
        return Finding("hub", "note", "HF_HUB_OFFLINE is set", "local folders work; unset it to download")
    try:
        socket.create_connection((_HUB_HOST, 443), timeout=_HUB_TIMEOUT_S).close()
    except OSError as error:
        return Finding(
            "hub", "note", f"{_HUB_HOST} cannot be reached ({error})", "local folders work; check the network"
        )
    return Finding("hub", "ok", f"{_HUB_HOST} answers")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
