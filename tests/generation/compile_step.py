"""Compile the kernels of a decoding step for an H100 without having one; prints what became of each as JSON.

Run by test_fused_step.py in a process of its own, where Triton has not been set to interpret. Per kernel and preset:
registers a thread, bytes of spills, narrow (16-bit) loads, and loads of weights or pairs (16 bytes wide) before and
after it waits for the kernels before it, -1 where it does not.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[1] / "scan"))
from compile_kernels import compile_launch  # pyright: ignore[reportMissingImports]

from recurformer import LanguageModel, ModelConfig
from recurformer.generation.fused.make import make_step
from recurformer.generation.fused.tuning import Tuning
from recurformer.generation.state import DecodeState

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
found: dict[str, dict[str, int]] = {}


def describe(made: Any) -> dict[str, int]:
    ptx = made.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        said = subprocess.run(
            [PTXAS, "-v", "-arch=sm_90a", file.name, "-o", os.devnull], capture_output=True, text=True, check=True
        ).stderr
    before, _, after = ptx.partition("griddepcontrol.wait")
    wide = r"ld\.global(?:\.\w+)*\.v4\.b32"
    return {
        "registers": int(re.findall(r"Used (\d+) registers", said)[0]),
        "spills": sum(int(n) for n in re.findall(r"(\d+) bytes spill", said)),
        "narrow": len(re.findall(r"ld\.global(?:\.\w+)*\.b16\b", ptx)),
        "before": len(re.findall(wide, before)) if after else -1,
        "after": len(re.findall(wide, after)) if after else len(re.findall(wide, before)),
    }


def main(presets: list[str]) -> None:
    name = ""

    def launcher(kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            title = f"{name} {kernel.fn.__name__} {'x'.join(map(str, grid))} w{options.get('num_warps', 4)}"
            if "PRODUCT" in options:
                title += f" {options['PRODUCT'].N}x{options['PRODUCT'].IN}"
            if title not in found:
                found[title] = describe(compile_launch(kernel, args, dict(options)))

        return launch

    JITFunction.__getitem__ = launcher  # pyright: ignore[reportAttributeAccessIssue]
    for preset in presets:
        name, kind, batch, *tuned = preset.split(":")
        config = ModelConfig.preset(name, layers=kind, n_layers=2)
        name = f"{name}:{kind}:{batch}"
        B, shape = int(batch), (2, int(batch), config.kv_heads, 4096, config.head_width)
        with torch.device("meta"):
            model = LanguageModel(config).to(torch.bfloat16)
            state = DecodeState(
                torch.empty(B, dtype=torch.int64), torch.empty((), dtype=torch.int32),
                torch.empty(B, dtype=torch.int32), torch.empty(shape, dtype=torch.bfloat16),
                torch.empty(shape, dtype=torch.bfloat16), None, None, torch.empty(B, config.vocab_size),
            )  # fmt: skip
        tuning = Tuning(**{key: json.loads(value) for key, value in (item.split("=") for item in tuned)})
        make_step(model, state, defer=True, tuning=tuning)()
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main(sys.argv[1:])
