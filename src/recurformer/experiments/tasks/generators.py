"""The tasks: random sequences with exact labels, of any length.

Labels are for the token AT each position, as a model's targets are; -100 where there is nothing to answer. Inputs and
answers share one vocabulary. Each task is drawn from a generator alone, so that a seed is a data set.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from recurformer.loss import IGNORE
from recurformer.settings import suggest

Sample = tuple[Tensor, Tensor]  # tokens and targets, both (B, N) int64


@dataclass(frozen=True)
class Task:
    """One task of a given difficulty."""

    name: str  # as `make_task` takes it
    about: str
    vocab_size: int
    shortest: int  # the least length that makes sense
    draw: Callable[[int, int, Generator], Sample]

    def sample(self, count: int, length: int, seed: int | Generator) -> Sample:
        """`count` sequences of `length` tokens, and what to answer at each position; both (count, length) int64.

        Raises:
            ValueError: for a length that is too short.
        """
        if length < self.shortest or count < 1:
            raise ValueError(
                f"{count} sequences of length {length}: {self.name} needs at least 1 of at least {self.shortest}"
            )
        generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
        return self.draw(count, length, generator)


def modular(modulus: int) -> Task:
    """Running sum of digits 0 ... m - 1, modulo m. For m = 2 this is parity."""

    def draw(count: int, length: int, generator: Generator) -> Sample:
        tokens = torch.randint(modulus, (count, length), generator=generator)
        return tokens, tokens.cumsum(1) % modulus

    name, about = f"modular:{modulus}", f"sum of the digits so far, modulo {modulus}"
    if modulus == 2:
        name, about = "parity", "parity of the ones so far"
    return Task(name, about, modulus, 1, draw)


def permutations(n: int, even: bool) -> list[tuple[int, ...]]:
    """The permutations of 0 ... n - 1 in lexicographic order, all or the even ones; element 0 is the identity."""
    return [
        p
        for p in itertools.permutations(range(n))
        if not even or sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0
    ]


def group(name: str) -> Task:
    """Product of the group elements so far, the first applied first; each token is an element."""
    elements = permutations(int(name[1]), even=name[0] == "a")
    number = {p: n for n, p in enumerate(elements)}
    table = torch.tensor([[number[tuple(b[k] for k in a)] for b in elements] for a in elements])  # a, then b

    def draw(count: int, length: int, generator: Generator) -> Sample:
        tokens = torch.randint(len(elements), (count, length), generator=generator)
        state, states = torch.zeros(count, dtype=torch.long), []
        for i in range(length):
            state = table[state, tokens[:, i]]
            states.append(state)
        return tokens, torch.stack(states, dim=1)

    about = f"product of the elements of {name.upper()} so far ({len(elements)} of them)"
    return Task(name, about, len(elements), 1, draw)


DEEPEST = 8  # of the bracket sequences


def dyck(kinds: int) -> Task:
    """Depth of nested brackets of several kinds, at most `DEEPEST`: open a random one or close the innermost."""

    def draw(count: int, length: int, generator: Generator) -> Sample:
        opens = torch.randint(2, (count, length), generator=generator).bool()
        kind = torch.randint(kinds, (count, length), generator=generator)
        stack = torch.zeros(count, DEEPEST, dtype=torch.long)
        depth, rows = torch.zeros(count, dtype=torch.long), torch.arange(count)
        tokens, depths = torch.empty(count, length, dtype=torch.long), torch.empty(count, length, dtype=torch.long)
        for i in range(length):
            opening = (opens[:, i] | (depth == 0)) & (depth < DEEPEST)
            top = stack[rows, (depth - 1).clamp(min=0)]
            tokens[:, i] = torch.where(opening, kind[:, i], kinds + top)
            slot = depth.clamp(max=DEEPEST - 1)
            stack[rows, slot] = torch.where(opening, kind[:, i], stack[rows, slot])
            depth = depth + torch.where(opening, 1, -1)
            depths[:, i] = depth
        return tokens, depths

    about = f"depth of brackets of {kinds} kinds, up to {DEEPEST} deep"
    return Task(f"dyck:{kinds}", about, max(2 * kinds, DEEPEST + 1), 1, draw)


LETTERS = 4  # of k-hop induction


def khop(hops: int) -> Task:
    """From a letter to what followed its last occurrence, k times (Sanford et al., 2024).

    hop(i) is the largest j <= i with x_{j-1} = x_i; the answer is x at hop(hop(... i)). No answer where there is none.
    """

    def draw(count: int, length: int, generator: Generator) -> Sample:
        tokens = torch.randint(LETTERS, (count, length), generator=generator)
        after = torch.full((count, LETTERS), -1)  # position after the last occurrence of each letter
        hop = torch.empty(count, length, dtype=torch.long)
        rows = torch.arange(count)
        for i in range(length):
            if i > 0:
                after[rows, tokens[:, i - 1]] = i
            hop[:, i] = after[rows, tokens[:, i]]
        place = torch.arange(length).expand(count, -1)
        for _ in range(hops):
            place = torch.where(place >= 0, hop.gather(1, place.clamp(min=0)), -1)
        answers = tokens.gather(1, place.clamp(min=0))
        return tokens, torch.where(place >= 0, answers, IGNORE)

    return Task(f"khop:{hops}", f"{hops} steps of induction over {LETTERS} letters", LETTERS, 2 * hops + 1, draw)


def selective_copy(items: int, letters: int = 8) -> Task:
    """Letters scattered among blanks, to be written out in order at the end (Gu and Dao, 2023).

    Tokens: 0 ... letters - 1, then the blank, then the mark that asks for the next letter.
    """

    def draw(count: int, length: int, generator: Generator) -> Sample:
        tokens = torch.full((count, length), letters)
        tokens[:, length - items :] = letters + 1
        content = torch.randint(letters, (count, items), generator=generator)
        order = torch.rand(count, length - items, generator=generator).argsort(1)
        tokens.scatter_(1, order[:, :items].sort(1).values, content)
        targets = torch.full((count, length), IGNORE)
        targets[:, length - items :] = content
        return tokens, targets

    about = f"{items} letters scattered among blanks, repeated at the end"
    return Task(f"selective-copy:{items}", about, letters + 2, 2 * items, draw)


KEYS = 16  # of associative recall; as many values


def recall(pairs: int) -> Task:
    """Keys and values, then each key once among blanks: answer its value (multi-query recall, Arora et al., 2023).

    Tokens: keys 0 ... KEYS - 1, values KEYS ... 2 KEYS - 1, the blank 2 KEYS.
    """

    def draw(count: int, length: int, generator: Generator) -> Sample:
        keys = torch.rand(count, KEYS, generator=generator).argsort(1)[:, :pairs]
        values = KEYS + torch.randint(KEYS, (count, pairs), generator=generator)
        tokens = torch.full((count, length), 2 * KEYS)
        tokens[:, : 2 * pairs] = torch.stack([keys, values], dim=2).flatten(1)
        targets = torch.full((count, length), IGNORE)
        # Random places in random order: the n-th key, in the order of its definition, is asked at places[:, n].
        places = 2 * pairs + torch.rand(count, length - 2 * pairs, generator=generator).argsort(1)[:, :pairs]
        tokens.scatter_(1, places, keys)
        targets.scatter_(1, places, values)
        return tokens, targets

    about = f"{pairs} pairs of {KEYS} keys and values, each key asked once"
    return Task(f"recall:{pairs}", about, 2 * KEYS + 1, 3 * pairs, draw)


@dataclass(frozen=True)
class Family:
    """How a task's name becomes a task."""

    make: Callable[[int], Task]
    default: int = 0
    limits: tuple[int, int] | None = None  # of the number after the colon; None: there is none


TASKS: dict[str, Family] = {
    "parity": Family(lambda _: modular(2)),
    "modular": Family(modular, 5, (2, 1000)),
    "s3": Family(lambda _: group("s3")),
    "a5": Family(lambda _: group("a5")),
    "s5": Family(lambda _: group("s5")),
    "dyck": Family(dyck, 2, (1, 1000)),
    "khop": Family(khop, 2, (1, 100)),
    "selective-copy": Family(selective_copy, 4, (1, 1000)),
    "recall": Family(recall, 4, (1, KEYS)),
}


def make_task(name: str) -> Task:
    """A task by its name, or with its difficulty after a colon: "parity", "modular:7", "khop:3", "recall:8".

    Raises:
        ValueError: for an unknown name or a number out of its limits.
    """
    base, colon, number = name.partition(":")
    if base not in TASKS:
        raise ValueError(f"no task {name!r}; choose one of {', '.join(TASKS)}{suggest(base, TASKS)}")
    family = TASKS[base]
    if not colon:
        return family.make(family.default)
    if family.limits is None:
        raise ValueError(f"task {name!r}: {base} takes no number; leave out {colon + number!r}")
    low, high = family.limits
    if not (number.isascii() and number.isdigit()) or not low <= int(number) <= high:
        raise ValueError(f"task {name!r}: the number after the colon must be from {low} to {high}")
    return family.make(int(number))
