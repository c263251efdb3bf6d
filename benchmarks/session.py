"""What a GPU has to say of throughput, in one call and by priority: cases, peers, variants.

    python benchmarks/throughput.py --session --out DIR --peers PEERS --budget-s 540 [--groups 16k]

Each result is a line of DIR/throughput.jsonl as soon as it is there, and what has a line is not run again, so that a
second call goes on where the first ran out of time. A call is one `run`, whose lines alone are compared. PEERS holds
the peers' runner (`go.sh`, `bench_peers.py`); without it they are left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import throughput

LEAST_S, CASE_S, PEER_S = 40, 75, 110  # least and most seconds for one; a case takes 30, and twice that of 7B
# (what, case) by group: `laras` runs here, the others are peers at that many tokens a step or of that shape. A group
# holds all that is compared with one another, so that machines with several GPUs can run one group on each.
GROUPS = {
    "16k": [
        ("laras", "qlora_full_16k"), ("laras", "lora_16k"), ("laras", "lora_full_16k"),
        ("16k", "unsloth_qlora_pack_gc"), ("16k", "unsloth_pack"), ("16k", "unsloth_pack_gc"),
        ("laras", "qlora_full_16k@graph=1"), ("laras", "qlora_full_16k@kind=offload"),
        ("8k", "trl_pad8_gc"), ("laras", "unoptimised"),
    ],
    "8k": [
        ("laras", "qlora_full_8k"), ("laras", "lora_8k"), ("laras", "lora_full_8k"),
        ("8k", "unsloth_qlora_pack_gc"), ("8k", "unsloth_pack"), ("8k", "unsloth_pack_gc"),
        ("7b", "unsloth_qlora_pack_gc"), ("laras", "7b_qlora_full_8k"),
        ("laras", "qlora_full_8k@graph=1"), ("laras", "7b_qlora_full_8k@kind=offload"),
    ],
    # Inputs of layers in main memory beside the same with them on the card; then what each change since v4 does to the
    # case that it was made for, and what is not on by default.
    "variants": [
        ("laras", "small_lora_4k"), ("laras", "small_lora_4k@graph=1"),
        ("laras", "lora_16k"), ("laras", "qlora_full_16k@kind=offload"), ("laras", "qlora_full_16k"),
        ("laras", "7b_qlora_full_8k@kind=offload"), ("laras", "7b_qlora_full_8k"),
        ("laras", "qlora_full_8k@kind=offload"), ("laras", "qlora_full_8k"),
        ("laras", "lora_full_16k@kind=offload"), ("laras", "lora_full_16k"),
        ("laras", "qlora_full_16k@kind=offload,chunk=8192"),
        ("laras", "qlora_full_16k@unpack_kernel=0"),
        ("laras", "qlora_full_16k@qkv_again=0"), ("laras", "qlora_full_16k@middle_in_chunks=0"),
        ("laras", "qlora_full_16k@grouped_sums=0"), ("laras", "qlora_full_16k@product_in_up=0"),
        ("laras", "qlora_full_16k@own_halves=0"), ("laras", "qlora_full_16k@middle_in_place=0"),
        ("laras", "lora_16k@whole_heads=0"), ("laras", "lora_16k@grouped_sums=0"),
        ("laras", "lora_full_16k@own_halves=0"), ("laras", "qlora_full_16k@chunk=2048"),
        ("laras", "lora_selective_16k"), ("laras", "transformers_layers_16k"),
    ],
}  # fmt: skip


def run_session(arguments):
    """Runs what has no line yet, until the budget is spent; returns whether nothing is left."""
    started, run = time.time(), _name_of_run()
    done = _done(arguments.out / "throughput.jsonl")
    cases = [one for group in arguments.groups.split(",") for one in GROUPS[group]]
    named = [(what, case if what == "laras" else f"{case}@{what}") for what, case in cases]
    left = [(what, name) for what, name in named if name not in done and (what == "laras" or arguments.peers)]
    while left and (left_s := arguments.budget_s - (time.time() - started)) >= (5 if throughput.TINY else LEAST_S):
        what, name = left.pop(0)
        if what == "laras":
            result = throughput.run_case(name, arguments, min(left_s, CASE_S * (2 if name.startswith("7b") else 1)))
        else:
            result = _peer(name.partition("@")[0], what, arguments, min(left_s, PEER_S))
        throughput.keep({**result, "run": run}, arguments.out)
    throughput.report(arguments.out)
    return not left


def _name_of_run():
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{card}, {time.strftime('%Y-%m-%d %H:%M')}, card {os.environ.get('CUDA_VISIBLE_DEVICES', '0')}"


def _done(file):
    if not file.exists():
        return set()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {row["name"] for row in rows if "error" not in row}


def _peer(case, what, arguments, limit_s):
    """One case of the peers' runner, in the environment that `go.sh` installs once."""
    marker = arguments.root / "peers_installed"
    arguments.root.mkdir(parents=True, exist_ok=True)
    if not marker.exists() and (arguments.peers / "go.sh").exists() and not throughput.TINY:
        subprocess.run(["bash", str(arguments.peers / "go.sh"), "--list"], check=False, stdout=sys.stderr)
        marker.touch()
    environment = {**os.environ, "PACK_ROWS": "4" if what == "16k" else "2"}
    environment |= {"SITE": "/tmp/site", "SITE_TRL": "/tmp/site_trl", "SITE_XF": "/tmp/site_xf"}
    if what == "7b":
        environment["SHAPE"] = "7b"
    command = [sys.executable, str(arguments.peers / "bench_peers.py"), "--only", case, "--root", str(arguments.root)]
    command += ["--out", str(arguments.out / "peers"), "--budget", str(int(limit_s)), "--timeout", str(int(limit_s))]
    command += ["--tiny"] if throughput.TINY else []
    name = f"{case}@{what}"
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s + 10, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"name": name, "error": f"out of time after {limit_s:.0f} s"}
    lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    found = next((line for line in lines if line.get("name") == case), None)
    if found is None or not found.get("ok"):
        return {**(found or {}), "name": name, "error": (found or {}).get("error", (ran.stdout + ran.stderr)[-1500:])}
    return {**found, "name": name}
