"""What a run ran on: versions, device and processes, as its record says."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

from laras import __version__
from laras.planning.hardware import driver_version
from laras.records import Environment, HardwareSpec

_PACKAGES = (
    "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "bitsandbytes", "unsloth",
    "unsloth-zoo", "xformers", "triton",
)  # fmt: skip


def read_environment(hardware: HardwareSpec) -> Environment:
    """The environment of this process, now."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return Environment(
        laras_version=__version__,
        python_version=platform.python_version(),
        platform=f"{sys.platform}-{platform.machine()}",
        packages=packages,
        device=hardware.gpu_name,
        driver=driver_version() if hardware.kind == "cuda" else None,
        processes=int(os.environ.get("WORLD_SIZE", "1")),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
