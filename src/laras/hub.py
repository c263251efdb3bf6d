"""The Hub when there is no way to it: what is in its cache serves, without waiting for the network file by file.

Its client tries each file again for 23 seconds, and a tokenizer has several. So it is asked once for a sign of life.
"""

from __future__ import annotations

import os
import sys
from functools import cache

_PROBE_S = 3.0


@cache
def is_out_of_reach() -> bool:
    """Whether the Hub does not answer; if so, this process uses the cache alone from then on."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False  # as the user has it
    from huggingface_hub import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_PROBE_S)
    except Exception:  # noqa: BLE001 - a proxy, a resolver, a certificate: each has its own way to fail
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for what is not imported yet, and for children
        if "datasets" in sys.modules:
            setattr(sys.modules["datasets"].config, "HF_HUB_OFFLINE", True)  # noqa: B010 - has its own copy
        return True
    return False


def reason_of(error: Exception) -> str:
    """The first line of an error of the Hub's libraries, which speak of a setting where it was `is_out_of_reach`."""
    if is_out_of_reach():
        from huggingface_hub import constants

        return f"{constants.ENDPOINT} does not answer, and its cache lacks this"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
