#!/usr/bin/env bash
# Every path of benchmarks/gpu.sh once, at small shapes, in under a minute: errors show early. No number here means much.
#
#   benchmarks/smoke.sh OUT
#
# OFFICIAL=DIR   also the blocks of a checkout of github.com/geniucos/recurrent-transformer (compiling them takes longer)
set -uo pipefail
out=${1:?usage: benchmarks/smoke.sh OUT}
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" - "$out" "${OFFICIAL:-}" <<'PYTHON'
import shutil, sys, time, traceback

import torch

from recurformer.cli import main
from recurformer.choose import SCAN_CHOICES
from recurformer.scan.algorithms import SCANS

out, official = sys.argv[1:]
gpu = torch.cuda.is_available()
layers = ",".join(name for name in SCANS if name not in ("reference", "wavefront"))
stacks = ",".join(name for name in SCAN_CHOICES if name not in ("auto", "reference"))
N = 128 if gpu else 16  # FlexAttention begins at 128
small = ["--d-model", "128", "--n-heads", "2", "--batch-size", "4", "--length", str(N), "--repeats", "2", "--warmup", "2"]
commands = [
    ["info", "nano", "--layers", "first:1"],
    ["bench", "layer", *small, "--scans", layers],
    ["bench", "layer", *small, "--scans", stacks, "--stack", "3"],
    ["bench", "model", "--presets", "nano", "--kinds", "standard,first:1", "--tokens", str(8 * N), "--length", str(N),
     "--micro-batch-sizes", "4", "--recompute", "both", "--repeats", "1", "--warmup", "2"],
    ["bench", "decode", "--models", "nano:recurrent,nano:first:1,nano:standard", "--batch-sizes", "1,2", "--contexts", "64",
     "--step", "auto,plain", "--tokens", "4", "--repeats", "1", "--warmup", "1"],
    ["bench", "prefill", "--presets", "nano", "--scans", stacks, "--length", str(N), "--repeats", "1", "--warmup", "1"],
]
if gpu and shutil.which("ncu"):
    scan = "fused" if "fused" in SCANS else "tiled"
    commands.append(["bench", "traffic", "--measure", "--scan", scan, "--batch-size", "1", "--n-heads", "2",
                     *(word for N in (16, 32, 64, 128) for word in ("--length", str(N)))])
if gpu and official:
    commands.append(["bench", "layer", *small, "--length", "16", "--scans", layers, "--no-standard", "--official", official])

failed = []
for number, command in enumerate(commands):
    start = time.time()
    print("==", *command, flush=True)
    try:
        main([*command, *(["--out", f"{out}/{number}"] if command[0] == "bench" else [])])
    except SystemExit as stop:
        if stop.code:
            failed.append(" ".join(command))
    except Exception:
        traceback.print_exc()
        failed.append(" ".join(command))
    print(f"== {time.time() - start:.1f} s", flush=True)
print("failed:\n" + "\n".join(failed) if failed else "all commands ran")
sys.exit(bool(failed))
PYTHON
