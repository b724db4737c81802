"""`recurformer generate`: continue prompts."""

from __future__ import annotations

from typing import Any

import click

from recurformer.cli.common import device_option


@click.command()
@click.argument("run", type=click.Path())
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Text to continue; may be repeated: all "
              "prompts run as one batch.  [default: the start of a text]")  # fmt: skip
@click.option("--max-new-tokens", default=200, type=click.IntRange(min=0), help="New tokens at most.")
@click.option("--temperature", default=0.8, type=float, help="Temperature of the sampling; 0: the most probable token.")
@click.option("--top-k", default=0, type=int, help="Most probable tokens to draw from; 0: all.")
@click.option("--top-p", default=1.0, type=float, help="Probability that the tokens to draw from reach together.")
@click.option(
    "--min-p", default=0.0, type=float, help="Least probability of a token to draw, as a part of the largest."
)
@click.option("--repetition-penalty", default=1.0, type=float, help="Penalty on tokens seen before; 1: none.")
@click.option("--stop", "stops", multiple=True, metavar="TEXT", help=r"End before this text, besides the end of "
              r"text; \n and \t may be spelled out. May be repeated.")  # fmt: skip
@click.option("--samples", default=1, type=click.IntRange(min=1), help="Continuations of each prompt.")
@click.option("--seed", type=int, help="Random seed of the sampling.  [default: another one each time]")
@click.option("--scan", default="auto", help="Scan that reads the prompt in recurrent layers.")
@click.option("--prompt-chunk", "prefill_chunk", type=click.IntRange(min=1), metavar="N", help="Positions of prompts "
              "that go through the layers at once; fewer take less memory.  [default: chosen by memory]")  # fmt: skip
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a continuation.")
def generate(
    run: str,
    prompts: tuple[str, ...],
    max_new_tokens: int,
    stops: tuple[str, ...],
    samples: int,
    scan: str,
    device: str,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue prompts with the model in RUN: a run's folder, which means its best checkpoint, or a model's folder. A
    single continuation is printed as it comes. Several are printed at the end, each under its number."""
    import json
    from dataclasses import asdict

    from recurformer.generation.text import complete, open_model

    model, tokenizer, folder = open_model(run, device, scan)
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer beside its model; save one into it (recurformer.save)")
    prompts = prompts or ("",)
    single = len(prompts) == 1 and samples == 1 and not as_json
    spelled_out = tuple(stop.replace("\\n", "\n").replace("\\t", "\t") for stop in stops)
    options = {"stops": spelled_out, "samples": samples, **sampling}

    def show(text: str) -> None:
        print(text, end="", flush=True)

    started = False

    def show_after_prompt(text: str) -> None:
        nonlocal started
        show(text if started else prompts[0] + text)
        started = True

    found = complete(model, tokenizer, prompts, max_new_tokens, show=show_after_prompt if single else None, **options)
    if single:
        print("" if started else prompts[0])
        return
    for number, completion in enumerate(found, 1):
        if as_json:
            print(json.dumps(asdict(completion), ensure_ascii=False))
        else:
            print(f"--- {number} ---\n{completion.prompt}{completion.text}")
