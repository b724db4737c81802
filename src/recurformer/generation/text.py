"""Prompts in, text out: what `generate` does between the tokenizer and the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from recurformer.data.tokenizer import Tokenizer
    from recurformer.model import LanguageModel


@dataclass(frozen=True)
class Completion:
    """One continuation of one prompt."""

    prompt: str
    text: str  # without the prompt, and without the stop that ended it
    tokens: int  # generated, the one that ended it included
    ended: bool  # by the end-of-text token or a stop, not by the limit


def open_model(
    folder: str | Path, device: str = "auto", scan: str = "auto"
) -> tuple[LanguageModel, Tokenizer | None, Path]:
    """A model, its tokenizer (None when there is none beside it) and the folder they were found in.

    Raises:
        ValueError: for a folder without a model, a damaged tokenizer, or a device that is not here.
    """
    from recurformer.data.tokenizer import has_tokenizer, load_tokenizer
    from recurformer.store.folders import load, resolve

    place = pick_device(device)
    folder = resolve(folder)
    model = load(folder, device=place)
    model.scan = scan
    return model, load_tokenizer(folder) if has_tokenizer(folder) else None, folder


def pick_device(name: str) -> torch.device:
    """The device of a name; "auto" is the GPU if there is one.

    Raises:
        ValueError: when it is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device is {name!r}, which cannot be used here ({reason}); choose auto or cpu") from None
    if device.type == "meta":
        raise ValueError(f"device is {name!r}, which holds shapes and no values; choose auto or cpu")
    return device


def complete(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    stops: Sequence[str] = (),
    samples: int = 1,
    show: Callable[[str], Any] | None = None,
    **sampling: Any,
) -> list[Completion]:
    """Continue prompts of any lengths at once. The tokenizer's end of text ends a continuation, if it has one.

    Args:
        prompts: texts; an empty one begins at the end-of-text token.
        stops: texts that end a continuation, wherever the borders between its tokens are.
        samples: continuations of each prompt; those of one prompt are neighbours in the result.
        show: called with each piece of text as it comes, never half a character, nor what may turn out to begin a stop;
            needs a single continuation.
        sampling: temperature, top_k, top_p, min_p, repetition_penalty, seed as in `generate`.
    """
    from recurformer.generation.prompt import pad_prompts
    from recurformer.generation.rows import generate_rows
    from recurformer.generation.stopping import StopFinder

    if not prompts:
        raise ValueError("no prompt; give at least one, which may be empty")
    if show is not None and (len(prompts) > 1 or samples > 1):
        raise ValueError(f"{len(prompts)} prompts x {samples} samples cannot be shown as they come; ask for one")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}; "
            "the two do not belong together"
        )
    encoded = [list(tokenizer.encode(prompt)) for prompt in prompts]
    for ids in encoded:
        if not ids:
            ids.append(tokenizer.eos_id or 0)
    tokens, mask = pad_prompts(encoded)
    device = model.embedding.weight.device
    shown = StopFinder(stops, tokenizer)

    def stream(ids: torch.Tensor) -> None:
        token = int(ids[0])
        if show is not None and token != tokenizer.eos_id and (text := shown.feed(token)):
            show(text)

    made = generate_rows(
        model,
        tokens.to(device),
        max_new_tokens,
        attention_mask=mask.to(device),
        num_samples=samples,
        eos_token_id=tokenizer.eos_id,
        stop=stops,
        tokenizer=tokenizer,
        stream=None if show is None else stream,
        **sampling,
    )
    if show is not None and (text := shown.finish()):
        show(text)
    completions = []
    for row, (ids, length) in enumerate(zip(made.tokens[:, tokens.shape[1] :].tolist(), made.lengths, strict=True)):
        finder = StopFinder(stops, tokenizer)
        for token in ids[:length]:
            if token == tokenizer.eos_id:
                break
            finder.feed(token)
        finder.finish()
        completions.append(Completion(prompts[row // samples], finder.text, length, made.ended[row] or finder.found))
    return completions
