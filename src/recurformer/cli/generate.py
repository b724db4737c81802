"""`recurformer generate`: continue prompts."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from recurformer.cli.common import device_option
from recurformer.cli.streams import lacks_characters, say
from recurformer.settings import shown


@click.command()
@click.argument("run", type=click.Path())
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Text to continue; may be repeated. All "
              "prompts run as one batch.  [default: the start of a text]")  # fmt: skip
@click.option("--prompt-file", "prompt_files", multiple=True, type=click.Path(), metavar="FILE", help="File with a "
              "text to continue, without its last line break; may be repeated. - is stdin.")  # fmt: skip
@click.option("--max-new-tokens", default=200, type=click.IntRange(min=0), help="Generated tokens at most.")
@click.option("--temperature", default=0.8, type=float, help="Temperature of the sampling. 0 takes the most probable "
              "token.")  # fmt: skip
@click.option("--top-k", default=0, type=int, help="Number of most probable tokens to sample from. 0 means all.")
@click.option("--top-p", default=1.0, type=float, help="Total probability of the most probable tokens to sample from.")
@click.option("--min-p", default=0.0, type=float, help="Probability of a token to sample at least, as a part of the "
              "largest one.")  # fmt: skip
@click.option("--repetition-penalty", default=1.0, type=float, help="Divisor of the scores of earlier tokens. Above 1, "
              "they become less probable.")  # fmt: skip
@click.option("--stop", "stops", multiple=True, metavar="TEXT", help=r"Text that ends a continuation, in addition to "
              r"the end of text; may be repeated. \n and \t may be spelled out.")  # fmt: skip
@click.option("--samples", default=1, type=click.IntRange(min=1), help="Continuations of each prompt.")
@click.option("--seed", type=int, help="Random seed of the sampling.  [default: another one each time]")
@click.option("--scan", default="auto", help="Scan of the recurrent layers for the prompt.")
@click.option("--prompt-chunk", "prefill_chunk", type=click.IntRange(min=1), metavar="N", help="Positions of prompts "
              "that go through the layers at once; fewer take less memory.  [default: chosen by memory]")  # fmt: skip
@device_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each continuation as output.")
def generate(
    run: str,
    prompts: tuple[str, ...],
    prompt_files: tuple[str, ...],
    max_new_tokens: int,
    stops: tuple[str, ...],
    samples: int,
    scan: str,
    device: str,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue prompts with the model in RUN.

    RUN is the folder of a training run, whose best checkpoint is taken, or of a model. A single continuation is printed
    piece by piece. Several are printed at the end, each under its number.
    """
    from recurformer.text import complete, open_model

    prompts = (*prompts, *map(_prompt_of, prompt_files)) or ("",)
    _refuse_other_bytes("--prompt", prompts)
    _refuse_other_bytes("--stop", stops)
    model, tokenizer, folder = open_model(run, device, scan)
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer beside its model; save one into it (recurformer.save)")
    if lacking := lacks_characters():
        say(f"stdout has the encoding {lacking}: other characters are written as \\uXXXX; set PYTHONUTF8=1 for UTF-8")
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
            print(json.dumps(asdict(completion), ensure_ascii=lacking is not None))
        else:
            print(f"--- {number} ---\n{completion.prompt}{completion.text}")


def _refuse_other_bytes(option: str, texts: tuple[str, ...]) -> None:
    """Raise ValueError for a text with bytes that are not UTF-8: Python keeps them in the words of a command line."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{option} {shown(text)} holds bytes that are not UTF-8; give it as UTF-8 text") from None


def _prompt_of(file: str) -> str:
    """Return the text of a prompt's file, or of stdin for "-", without its last line break.

    Raises:
        ValueError: for a file that can't be read or is no UTF-8 text.
    """
    name = "stdin" if file == "-" else repr(file)
    try:
        raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return raw.decode().removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise ValueError(f"the prompt's file {name} can't be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no UTF-8 text (byte {error.start}); convert the prompt's file") from None
