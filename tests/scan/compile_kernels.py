"""Compile the fused scan's kernels for an H100 without having one, and print the narrow loads of each as JSON.

test_fused.py runs this script in a new process, where Triton does not interpret. A narrow load reads 16 bits of global
memory.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from recurformer import ModelConfig
from recurformer.scan.fused.engine import Engine
from recurformer.scan.fused.shape import EngineShape
from recurformer.scan.fused.workspace import DeviceFacts

TYPES = {
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1",
}  # fmt: skip
narrow: dict[str, int] = {}


def described(value: Any, path: tuple[int, ...], constants: dict[Any, Any], attributes: dict[Any, Any]) -> str:
    """Return the type of an argument; note under its path what Triton knows of its value when it compiles."""
    if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
        attributes[path] = [["tt.divisibility", 16]]
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, int) and value == 1:  # Triton takes it for a constant
        constants[path] = value
        return "constexpr"
    return "i32" if isinstance(value, int) else "fp32"


def compile_launch(kernel: Any, args: tuple, options: dict[str, Any]) -> Any:
    """Compile a kernel as a launch with these arguments would, and count its narrow loads in `narrow`."""
    bound = dict(zip([p.name for p in kernel.params], args, strict=False))
    bound |= {name: options.pop(name) for name in list(options) if name in {p.name for p in kernel.params}}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = bound[parameter.name]
        if parameter.is_constexpr:
            constants[(place,)], signature[parameter.name] = value, "constexpr"
        elif isinstance(value, tuple):  # a named tuple of tensors and integers
            parts = [described(part, (place, n), constants, attributes) for n, part in enumerate(value)]
            signature[parameter.name] = type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype][1:]}[{block}]>"
        else:
            signature[parameter.name] = described(value, (place,), constants, attributes)
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    name = kernel.fn.__name__ + ("_pull" if bound.get("PULL") else "")
    narrow[name] = len(re.findall(r"ld\.global(?:\.\w+)*\.b16\b", made.asm["ptx"]))
    return made


def main(wanted: list[str]) -> None:
    """Compile the kernels of these names and print their narrow loads."""

    def launcher(kernel: Any, grid: Any) -> Any:
        name = kernel.fn.__name__
        return lambda *args, **options: compile_launch(kernel, args, options) if name in wanted else None

    JITFunction.__getitem__ = launcher  # pyright: ignore[reportAttributeAccessIssue]
    config = ModelConfig(vocab_size=1, d_model=1024, n_layers=1, n_heads=16)
    shape = EngineShape(
        config, L=1, B=32, C=32, leaf=8, leaf_backward=16, dtype=torch.bfloat16, device=torch.device("meta"),
        segmented=False, keeps_attention=True, keeps_inner=True, keeps_raw=True, branch_scale=1.0,
    )  # fmt: skip
    engine = Engine(shape, DeviceFacts(launches_early=True))  # as on an H100
    engine.forward.step()
    engine.backward.step()
    print(json.dumps(narrow))


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main(sys.argv[1:])
