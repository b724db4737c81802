"""Blocks of the official implementation, from the user's own checkout: nothing of it is part of this package.

The checkout's package `olmo` is imported from its own folder. It also imports packages for data, storage and
configuration files, which no block needs. Where such a package is missing, an empty module takes its place.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch
from torch import nn

REPOSITORY = "https://github.com/geniucos/recurrent-transformer"
# Packages that the checkout imports at its top, for work that is not done here.
UNUSED = (
    "omegaconf", "boto3", "botocore", "cached_path", "datasets", "google", "importlib_resources", "requests", "rich",
    "tokenizers",
)  # fmt: skip
COMPILED_SHAPES = 64  # its tiles have log2(N) shapes, each compiled by itself; PyTorch's default stops at 8
KINDS = ("recurrent", "sequential")


@dataclass
class OfficialBlock:
    """One block as the official benchmark times it.

    Attributes:
        module: holds the parameters; its gradients must be zeroed in place, never dropped.
        forward: (B, N, D) float32 to the same.
        how: what it runs through, in words.
    """

    module: nn.Module
    forward: Any
    how: str


class Anything(type):
    """A class that stands for a missing one: it has every attribute, takes any arguments and adds up to nothing."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return anything(name)

    def __add__(cls, other: Any) -> Any:
        return other


def anything(name: str) -> Any:
    """A class of this name that can be made and called with any arguments, also as a decorator."""
    accept = {"__init__": lambda self, *a, **k: None, "__call__": lambda self, first=None, *a, **k: first}
    return Anything(name, (), accept)


class StandIn(types.ModuleType):
    """An empty module of which anything can be imported."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return anything(name)


class Finder:
    """The last finder of modules: it finds a stand-in for a package of `UNUSED` that no other finder has found."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        unused = name.partition(".")[0] in UNUSED
        return ModuleSpec(name, self, is_package=True) if unused else None  # pyright: ignore[reportArgumentType]

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to do."""


@contextmanager
def stand_ins() -> Iterator[None]:
    """Let the missing packages of `UNUSED` be imported inside the block. Afterwards they are missing again."""
    finder = Finder()
    sys.meta_path.append(finder)  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        sys.meta_path.remove(finder)  # pyright: ignore[reportArgumentType]
        for name in [name for name, module in sys.modules.items() if isinstance(module, StandIn)]:
            del sys.modules[name]


def load_package(checkout: str | Path) -> tuple[Any, Any, Any]:
    """Return the modules olmo.config, olmo.model and olmo.efficient_utils of a checkout.

    Raises:
        ValueError: when the folder is no such checkout, or its package does not import.
    """
    folder = Path(checkout).resolve()
    if not (folder / "olmo" / "efficient_utils.py").is_file():
        raise ValueError(f"{checkout} has no olmo/efficient_utils.py; give a checkout of {REPOSITORY}")
    loaded = sys.modules.get("olmo")
    if loaded is not None and Path(str(loaded.__file__)).parent.parent != folder:
        raise ValueError(f"another package olmo is loaded already, from {loaded.__file__}; measure it by itself")
    sys.path.insert(0, str(folder))
    try:
        with stand_ins():
            config, model, utils = (
                importlib.import_module(f"olmo.{n}") for n in ("config", "model", "efficient_utils")
            )
    except Exception as error:
        raise ValueError(f"the package olmo in {checkout} does not import: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(folder))
    return config, model, utils


def load_block(
    checkout: str | Path, kind: str, batch_size: int, length: int, d_model: int, n_heads: int, device: torch.device
) -> OfficialBlock:
    """Return a newly initialised block with the paper's options: layer norm, full QK-norm, GELU, bf16.

    The recurrent block has ALiBi and, on a GPU, runs in the CUDA graph that its own `cuda_capture_block` makes, with or
    without gradients as they are enabled now. The sequential one runs through torch.compile, without ALiBi as its own
    benchmark times it: causal flash attention.

    Args:
        checkout: folder of the official repository.
        kind: of `KINDS`.
        batch_size, length, d_model, n_heads: B, N, D, H.
        device: where.

    Raises:
        ValueError: see `load_package`.
    """
    config, model, utils = load_package(checkout)
    settings = config.ModelConfig(
        d_model=d_model, n_heads=n_heads, mlp_hidden_size=4 * d_model, n_layers=1, max_sequence_length=length,
        rope=False, alibi=True, activation_type=config.ActivationType.gelu, block_type=config.BlockType[kind],
        layer_norm_type=config.LayerNormType.default, layer_norm_with_affine=True, bias_for_layer_norm=False,
        attention_layer_norm=True, attention_layer_norm_with_affine=True, include_bias=False,
        attention_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0, init_device=str(device),
        init_fn=config.InitFnType.mitchell, weight_tying=False, vocab_size=128, embedding_size=128,
        eos_token_id=1, pad_token_id=0, bwd_mlp_chunks=4, precision=torch.bfloat16,
    )  # fmt: skip
    import torch._dynamo.config as compiler

    compiler.recompile_limit = max(compiler.recompile_limit, COMPILED_SHAPES)
    efficient = torch.backends.cuda.mem_efficient_sdp_enabled()
    whole = model.OLMo(settings).to(device).train()
    torch.backends.cuda.enable_mem_efficient_sdp(efficient)  # it switches this off for the whole process
    block = whole.transformer.blocks[0]
    if kind == "sequential":
        if device.type == "cuda":
            block.compile()
        how = "torch.compile, no ALiBi" if device.type == "cuda" else "plain, no ALiBi"
        return OfficialBlock(block, lambda x: block(x, attention_bias=None)[0], how)
    run = types.SimpleNamespace(model=settings, device_train_batch_size=batch_size)
    bias = utils.alibi_attention_bias(whole, run, length)
    if device.type != "cuda":
        return OfficialBlock(block, lambda x: block(x, attention_bias=bias)[0], "plain")
    x = torch.randn(batch_size, length, d_model, device=device, requires_grad=torch.is_grad_enabled())
    z = block(x, attention_bias=bias)[0]  # as its own benchmark: once without a graph, so that all is compiled
    if torch.is_grad_enabled():
        z.sum().backward()
    del x, z
    return OfficialBlock(block, utils.cuda_capture_block(block, run, bias), "its CUDA graph")
