"""Whether the kernel that `attn_implementation` names is installed; known before anything is read or loaded."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from laras.errors import ConfigError

# Distributions that bring a kernel, as transformers 5.17 looks for them (`utils/import_utils.py`).
DISTRIBUTIONS = {
    "flash_attention_2": "flash-attn",
    "flash_attention_3": "flash-attn-3",
    "flash_attention_4": "flash-attn-4",
}


def has_kernel(name: str) -> bool:
    """Whether what a kernel needs beyond torch is there, or `kernels`, which fetches it."""
    return name not in DISTRIBUTIONS or _has(DISTRIBUTIONS[name]) or _has("kernels")


def require_attention(name: str) -> None:
    """Refuses an `attn_implementation` whose package is absent.

    Raises:
        ConfigError: With the package to install.
    """
    if not has_kernel(name):
        raise ConfigError(
            f"attn_implementation {name} needs the package {DISTRIBUTIONS[name]}, which is not installed",
            hint=f"pip install {DISTRIBUTIONS[name]}, or leave it `auto`: torch's own kernels pack documents too",
        )


def _has(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True
