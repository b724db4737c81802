"""Zero-shot accuracy: whether a model finds the right one of several continuations most probable, as in lm-eval.

Items are JSON lines, plain or .gz:
    {"context": "...", "choices": [" a", " b"], "label": 1}            right when choice 1 is the most probable one
    {"contexts": ["...", "..."], "continuation": " c", "label": 0}     right when context 0 makes it most probable
    {"context": "...", "continuation": " c"}                           right when greedy decoding would write it
"""

from __future__ import annotations

import gzip
import itertools
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recurformer.evaluation import counting
from recurformer.generation.modes import evaluating
from recurformer.generation.prompt import pad_prompts
from recurformer.layer import accumulation_dtype
from recurformer.model import LanguageModel
from recurformer.reading import LARGEST, check_regular, parse
from recurformer.settings import shown

if TYPE_CHECKING:
    from recurformer.data import Tokenizer

SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Item:
    """One question: pairs of context and continuation, and the number of the right pair; None for a single pair."""

    pairs: tuple[tuple[str, str], ...]
    label: int | None


@dataclass(frozen=True)
class TaskResult:
    """Result of a model on one task."""

    task: str
    items: int
    accuracy: float  # part of the items that are right; the first of equally probable choices counts
    standard_error: float  # standard error of the accuracy, sqrt(p (1 - p) / (n - 1)); nan for one item
    accuracy_per_character: float | None  # choices compared by log-probability / characters; None without choices
    perplexity: float | None  # exp(-mean log-probability) of the continuations; None with choices

    def to_dict(self) -> dict[str, Any]:
        """Return every number under its own name, ready for JSON; None where it is not finite."""
        values = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


@dataclass(frozen=True)
class Scored:
    """Probability of one continuation."""

    log_probability: float  # nats, summed over its tokens
    greedy: bool  # whether each of its tokens is the most probable one


def find_tasks(paths: Iterable[str | Path]) -> dict[str, Path]:
    """Return {task name: file} for files of items and for folders that hold some.

    Raises:
        ValueError: for any other path, and for two files of one name.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES))
        if not files or not files[0].is_file() or not files[0].name.endswith(SUFFIXES):
            raise ValueError(f"{path} is no task: give a {' or '.join(SUFFIXES)} file, or a folder that holds some")
        for file in files:
            name = file.name.removesuffix(".gz").removesuffix(".jsonl")
            if name in found:
                raise ValueError(f"{found[name]} and {file} are both named {name}; rename one")
            found[name] = file
    return found


def read_items(path: Path, limit: int | None = None) -> list[Item]:
    """Return the first `limit` items of a task's file; None: all. A byte order mark and blank lines are skipped.

    Raises:
        ValueError: for a line that is no item, naming file and line; for a damaged file, and one without items.
    """
    check_regular(path)
    items: list[Item] = []
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
            for number in itertools.count(1):
                line = lines.readline(LARGEST)
                if not line or (limit is not None and len(items) >= limit):
                    break
                if len(line) == LARGEST:
                    raise ValueError(f"{path}, line {number}, has more than {LARGEST:,} bytes; it is no item")
                if text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():
                    items.append(_item_in_line(text, f"{path}, line {number},"))
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again") from error
    if not items:
        raise ValueError(f"{path} holds no items")
    if len({one.label is None for one in items}) > 1:
        raise ValueError(f"{path} mixes items with and without choices; split it")
    return items


def _item_in_line(text: str, place: str) -> Item:
    try:
        return item(parse(text, ".json", place))
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(place) else f"{place} is no item: {message}") from None


def item(values: Any) -> Item:
    """Return an item from its JSON object.

    Raises:
        ValueError: for a field that is missing or of the wrong type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{shown(values)} is no JSON object with context and choices or continuation")
    if "choices" in values:
        pairs = tuple((_text(values, "context"), choice) for choice in _texts(values, "choices"))
    else:
        contexts = _texts(values, "contexts") if "contexts" in values else (_text(values, "context"),)
        pairs = tuple((context, _text(values, "continuation")) for context in contexts)
    if not all(choice for _, choice in pairs):
        raise ValueError("a choice or continuation is empty; it must be text")
    if "choices" not in values and "contexts" not in values:
        return Item(pairs, None)
    label = values.get("label")
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(pairs):
        raise ValueError(f"label is {shown(label)}; it must be a whole number from 0 to {len(pairs) - 1}")
    return Item(pairs, label)


def _text(values: dict[str, Any], name: str) -> str:
    found = values.get(name)
    if not isinstance(found, str):
        raise ValueError(f"{name} is {shown(found)}; it must be text" if name in values else f"it lacks {name!r}")
    return found


def _texts(values: dict[str, Any], name: str) -> tuple[str, ...]:
    """Return a list of texts. One text in its place, as from a CSV file, would be read letter by letter."""
    found = values[name]
    if not isinstance(found, list) or not found or not all(isinstance(one, str) for one in found):
        raise ValueError(f"{name} is {shown(found)}; it must be a list of one or more texts")
    return tuple(found)


def evaluate_task(
    model: LanguageModel,
    tokenizer: Tokenizer,
    path: str | Path,
    *,
    window: int,
    batch_size: int = 16,
    limit: int | None = None,
    progress: bool = False,
) -> TaskResult:
    """Score a task's file.

    Args:
        model: runs in evaluation mode, and has its own mode again afterwards.
        window: positions of one sequence at most. Longer contexts lose their beginning.
        batch_size: continuations at once. It changes speed and memory, not the result.
        limit: score only the first items of the file.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: for a file that holds no items, or a tokenizer of another vocabulary.
    """
    for name, value in {"window": window, "batch_size": batch_size, "limit": limit}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}")
    (name,) = find_tasks([path])
    items = read_items(Path(path), limit)
    requests = [encode_pair(tokenizer, *pair) for one in items for pair in one.pairs]
    scores = iter(score(model, requests, window, batch_size, progress))
    right, right_per_character, nats = 0, 0, 0.0
    for one in items:
        found = [next(scores) for _ in one.pairs]
        if one.label is None:
            right += found[0].greedy
            nats -= found[0].log_probability
            continue
        sums = [s.log_probability for s in found]
        right += first_largest(sums) == one.label
        lengths = [len(continuation) for _, continuation in one.pairs]
        right_per_character += first_largest([s / n for s, n in zip(sums, lengths, strict=True)]) == one.label
    n, lone = len(items), items[0].label is None
    accuracy = right / n
    return TaskResult(
        task=name,
        items=n,
        accuracy=accuracy,
        standard_error=math.sqrt(accuracy * (1 - accuracy) / (n - 1)) if n > 1 else math.nan,
        accuracy_per_character=None if lone else right_per_character / n,
        perplexity=(math.exp(nats / n) if nats / n < 700 else math.inf) if lone else None,
    )


def first_largest(numbers: Sequence[float]) -> int:
    """Return the index of the largest number, the first of equals."""
    return max(range(len(numbers)), key=lambda i: (numbers[i], -i))


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the ids of a context and of its continuation, as lm-eval splits them.

    Blanks at the end of the context count as part of the continuation. The continuation's ids are those of the whole
    text beyond as many as the context has. An empty context becomes the end-of-text token.
    """
    kept = context.rstrip()
    continuation, context = context[len(kept) :] + continuation, kept
    if not context:
        return [tokenizer.eos_id or 0], tokenizer.encode(continuation)
    before = tokenizer.encode(context)
    after = tokenizer.encode(context + continuation)[len(before) :]
    if not after:
        raise ValueError(f"the continuation {continuation!r} has no token of its own after {context[-20:]!r}")
    return before, after


def score(
    model: LanguageModel,
    requests: Sequence[tuple[list[int], list[int]]],
    window: int,
    batch_size: int,
    progress: bool = False,
) -> list[Scored]:
    """Return the log-probability of each continuation after its context, in the order of the requests.

    Args:
        requests: (ids of the context, at least one; ids of the continuation, at least one).
    """
    device = model.embedding.weight.device
    order = sorted(
        range(len(requests)), key=lambda i: -sum(map(len, requests[i]))
    )  # rows of one batch: alike in length
    found: dict[int, Scored] = {}
    with evaluating(model), torch.no_grad(), counting(len(requests), progress, "continuations") as advance:
        for rows in batches(order, batch_size):
            inputs = [(requests[i][0] + requests[i][1])[-window - 1 : -1] for i in rows]
            tokens, valid = pad_prompts(inputs)  # on the left: every row ends with its continuation
            longest = max(len(requests[i][1]) for i in rows)
            mask = None if valid.all() else valid.to(device)
            out = model(tokens.to(device), attention_mask=mask, return_logits=False, return_hidden=True)
            x = out.hidden[:, -longest:]
            logits = model.logits(x)
            logits = logits.to(accumulation_dtype(logits.dtype)).log_softmax(-1)
            for row, i in enumerate(rows):
                wanted = torch.tensor(requests[i][1], device=device)[-x.shape[1] :]
                own = logits[row, -len(wanted) :]
                total = float(own.gather(1, wanted[:, None]).sum())
                if math.isnan(total):
                    raise ValueError("the model's logits are not numbers; its weights are damaged or it has diverged")
                found[i] = Scored(total, bool((own.argmax(-1) == wanted).all()))
            advance(len(rows))
    return [found[i] for i in range(len(requests))]


def batches(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Yield consecutive parts of at most `size`."""
    for start in range(0, len(order), size):
        yield order[start : start + size]


def show(results: Sequence[TaskResult]) -> None:
    """Print a table of results."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for n, heading in enumerate(("task", "items", "accuracy", "± s.e.", "per character", "perplexity")):
        table.add_column(heading, justify="right" if n else "left", no_wrap=True)
    for r in results:
        per_character = "" if r.accuracy_per_character is None else f"{r.accuracy_per_character:.4f}"
        perplexity = "" if r.perplexity is None else f"{r.perplexity:.3f}"
        table.add_row(
            Text(r.task), f"{r.items:,}", f"{r.accuracy:.4f}", f"{r.standard_error:.4f}", per_character, perplexity
        )
    Console().print(table)
