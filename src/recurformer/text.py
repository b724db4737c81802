"""Prompts in, text out: generation between a tokenizer and a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recurformer.data.tokenizer import has_tokenizer, load_tokenizer
from recurformer.generation.prompt import pad_prompts
from recurformer.generation.rows import generate_rows
from recurformer.generation.stopping import StopFinder, stop_texts
from recurformer.store.folders import load, resolve

if TYPE_CHECKING:
    from recurformer.data.tokenizer import Tokenizer
    from recurformer.model import LanguageModel


@dataclass(frozen=True)
class Completion:
    """One continuation of one prompt."""

    prompt: str
    text: str  # without the prompt, and without the stop that ended it
    tokens: int  # new tokens, with the one that ended the continuation
    ended: bool  # by the end-of-text token or a stop, not by the limit


def open_model(
    folder: str | Path, device: str = "auto", scan: str = "auto"
) -> tuple[LanguageModel, Tokenizer | None, Path]:
    """Return a model, its tokenizer (None when its folder has none) and the folder they were found in.

    Raises:
        ValueError: for a folder without a model, a damaged tokenizer, or a device that is not here.
    """
    place = pick_device(device)
    folder = resolve(folder)
    model = load(folder, device=place)
    model.scan = scan
    return model, load_tokenizer(folder) if has_tokenizer(folder) else None, folder


def pick_device(name: str) -> torch.device:
    """Return the device of a name; "auto" is the GPU if there is one.

    Raises:
        ValueError: for a device that is not here.
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
    **options: Any,
) -> list[Completion]:
    """Continue prompts of any lengths at once. The tokenizer's end of text ends a continuation, if it has one.

    Args:
        model: makes the tokens.
        tokenizer: makes ids of the prompts and text of new ids. The text is the one behind the prompt, so that prompt
            and text together are the decoded text of all ids.
        prompts: texts; an empty one begins at the end-of-text token.
        max_new_tokens: new tokens of each continuation at most.
        stops: texts that end a continuation, wherever the borders between its tokens are. The spelling of a special
            token stands for the token.
        samples: continuations of each prompt; those of one prompt are neighbours in the result.
        show: function that is called with each piece of text as it comes, never with half a character or with text
            that may turn out to begin a stop. It needs a single continuation.
        options: temperature, top_k, top_p, min_p, repetition_penalty, seed and prefill_chunk, as in `generate_rows`.

    Raises:
        ValueError: for no prompt, for options outside their limits, and for a tokenizer with more ids than the model.
    """
    stops = stop_texts(stops)
    if not prompts:
        raise ValueError("no prompt; give at least one, which may be empty")
    if show is not None and (len(prompts) > 1 or samples > 1):
        raise ValueError(f"{len(prompts)} prompts x {samples} samples cannot be shown as they come; ask for one")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}; "
            "the two do not belong together"
        )
    encoded = [list(tokenizer.encode(prompt)) or [tokenizer.eos_id or 0] for prompt in prompts]
    tokens, mask = pad_prompts(encoded)
    device = model.embedding.weight.device
    first = StopFinder(stops, tokenizer, encoded[0])

    def stream(ids: torch.Tensor) -> None:
        token = int(ids[0])
        if show is not None and token != tokenizer.eos_id and (text := first.feed(token)):
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
        **options,
    )
    if show is not None and (text := first.finish()):
        show(text)
    completions = []
    for row, (ids, length) in enumerate(zip(made.tokens[:, tokens.shape[1] :].tolist(), made.lengths, strict=True)):
        finder = StopFinder(stops, tokenizer, encoded[row // samples])
        for token in ids[:length]:
            if token == tokenizer.eos_id:
                break
            finder.feed(token)
        finder.finish()
        completions.append(Completion(prompts[row // samples], finder.text, length, made.ended[row] or finder.found))
    return completions
