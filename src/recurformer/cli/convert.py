"""`recurformer convert`: a model as another kind of folder."""

from __future__ import annotations

import signal
import sys
from typing import Any

import click


@click.command()
@click.argument("source", type=click.Path(), metavar="SRC")
@click.argument("destination", type=click.Path(), metavar="DST")
@click.option("--to", default="recurformer", type=click.Choice(["recurformer", "hf", "llama", "official"]),
              help="Kind of the new folder.")  # fmt: skip
@click.option("--layers", metavar="KINDS", help="New kinds of the layers: recurrent, standard, first:K, or the "
              "numbers of the recurrent ones, as 0,5.  [default: those of SRC]")  # fmt: skip
@click.option("--tokenizer", metavar="bytes|FILE|DIR", help="Tokenizer of the new folder.  [default: that of SRC]")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16", "fp64"]), help="Dtype of the new parameters.  "
              "[default: as stored]")  # fmt: skip
def convert(
    source: str, destination: str, to: Any, layers: str | None, tokenizer: str | None, dtype: str | None
) -> None:
    """Write the model in SRC as another kind of folder, DST, which appears when it is complete.

    SRC is a model's or a run's folder, a Llama-style folder of Hugging Face (Llama, Mistral, Qwen2, Qwen3), or an
    official checkpoint. A recurformer folder loads in transformers as it is (import recurformer.hf first); "hf" adds
    what generation and tokenizers want there. Models without recurrent layers can be written as "llama".
    """
    import torch

    from recurformer import interop

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # leaves no unfinished folder behind

    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
    config = interop.convert(
        source, destination, to, layers=layers, tokenizer=tokenizer, dtype=None if dtype is None else types[dtype]
    )
    count, kind = config.num_parameters(embedding=True), config.kind
    print(f"{destination}: {count:,} parameters, {config.n_layers} layers ({kind}), as {to}")
