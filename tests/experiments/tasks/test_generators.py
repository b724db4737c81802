"""Labels of every task against computations that share nothing with the generators: plain Python on lists."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from recurformer.experiments.tasks import TASKS, make_task
from recurformer.experiments.tasks.generators import DEEPEST, KEYS, permutations
from recurformer.experiments.tasks.sweep import chance_of
from recurformer.loss import IGNORE

Labels = Callable[[list[int]], list[int]]


def running_sum(modulus: int) -> Labels:
    return lambda tokens: [sum(tokens[: i + 1]) % modulus for i in range(len(tokens))]


def matrices(name: str) -> Labels:
    """The running product as permutation matrices, looked up among all of them."""
    elements = permutations(int(name[1]), even=name[0] == "a")

    def matrix(p: tuple[int, ...]) -> np.ndarray:
        made = np.zeros((len(p), len(p)), dtype=int)
        made[list(p), range(len(p))] = 1  # column k has its one in row p[k]: k goes to p[k]
        return made

    all_of_them = [matrix(p) for p in elements]
    numbers = {m.tobytes(): n for n, m in enumerate(all_of_them)}

    def labels(tokens: list[int]) -> list[int]:
        product, found = np.eye(len(elements[0]), dtype=int), []
        for token in tokens:
            product = all_of_them[token] @ product  # the first applied first
            found.append(numbers[product.tobytes()])
        return found

    return labels


def depths(kinds: int) -> Labels:
    def labels(tokens: list[int]) -> list[int]:
        stack: list[int] = []
        found = []
        for token in tokens:
            if token < kinds:
                stack.append(token)
            else:
                assert stack.pop() == token - kinds  # a bracket closes the innermost of its kind
            assert len(stack) <= DEEPEST
            found.append(len(stack))
        return found

    return labels


def hops(k: int) -> Labels:
    def labels(tokens: list[int]) -> list[int]:
        found = []
        for i in range(len(tokens)):
            place: int | None = i
            for _ in range(k):
                if place is not None:
                    earlier = [j for j in range(1, place + 1) if tokens[j - 1] == tokens[place]]
                    place = max(earlier, default=None)
            found.append(IGNORE if place is None else tokens[place])
        return found

    return labels


def copied(items: int) -> Labels:
    def labels(tokens: list[int]) -> list[int]:
        content = [token for token in tokens if token < 8]
        assert len(content) == items
        assert tokens[-items:] == [9] * items
        assert set(tokens[:-items]) <= set(range(9))
        return [IGNORE] * (len(tokens) - items) + content

    return labels


def recalled(pairs: int) -> Labels:
    def labels(tokens: list[int]) -> list[int]:
        known = dict(zip(tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True))
        assert len(known) == pairs
        assert all(KEYS <= value < 2 * KEYS for value in known.values())
        asked = [token for token in tokens[2 * pairs :] if token != 2 * KEYS]
        assert sorted(asked) == sorted(known)
        return [IGNORE] * (2 * pairs) + [known.get(token, IGNORE) for token in tokens[2 * pairs :]]

    return labels


CASES: dict[str, Labels] = {
    "parity": running_sum(2),
    "modular": running_sum(5),
    "modular:7": running_sum(7),
    "s3": matrices("s3"),
    "a5": matrices("a5"),
    "s5": matrices("s5"),
    "dyck": depths(2),
    "dyck:1": depths(1),
    "dyck:6": depths(6),
    "khop": hops(2),
    "khop:1": hops(1),
    "khop:5": hops(5),
    "selective-copy": copied(4),
    "selective-copy:1": copied(1),
    "recall": recalled(4),
    "recall:16": recalled(16),
}


@pytest.mark.parametrize("name", CASES)
def test_labels_are_right(name: str):
    task = make_task(name)
    for length in (task.shortest, task.shortest + 1, task.shortest + 12, 61):
        tokens, targets = task.sample(12, length, seed=length)
        assert tokens.shape == targets.shape == (12, length)
        assert tokens.min() >= 0
        assert max(tokens.max(), targets.max()) < task.vocab_size
        assert [CASES[name](row) for row in tokens.tolist()] == targets.tolist()


def test_every_task_is_checked():
    assert {name.partition(":")[0] for name in CASES} == set(TASKS)


@pytest.mark.parametrize(("name", "size"), [("s3", 6), ("a5", 60), ("s5", 120)])
def test_the_groups_are_groups(name: str, size: int):
    elements = permutations(int(name[1]), even=name[0] == "a")
    assert len(set(elements)) == size
    assert elements[0] == tuple(range(len(elements[0])))
    products = {tuple(a[k] for k in b) for a, b in itertools.product(elements[:7], elements)}
    assert products <= set(elements)
    assert make_task(name).vocab_size == size


def test_a_seed_is_a_data_set_and_tokens_are_spread():
    for name in TASKS:
        task = make_task(name)
        one, again, other = (task.sample(50, 40, seed=seed) for seed in (3, 3, 4))
        assert torch.equal(one[0], again[0])
        assert torch.equal(one[1], again[1])
        assert not torch.equal(one[0], other[0])
    _, depth = make_task("dyck").sample(200, 64, seed=0)
    assert set(depth.flatten().tolist()) == set(range(DEEPEST + 1))
    tokens, _ = make_task("recall").sample(200, 40, seed=0)
    asked = (tokens[:, 8:] != 2 * KEYS).float().mean(0)  # any place after the pairs may ask
    assert asked.min() > 0.02
    assert asked.max() < 0.3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("parity:3", "parity takes no number"),
        ("party", "did you mean 'parity'"),
        ("modular:1", "from 2 to 1000"),
        ("recall:17", "from 1 to 16"),
        ("khop:x", "must be from"),
        ("khop:", "must be from"),
    ],
)
def test_unknown_tasks_are_refused(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        make_task(name)


def test_lengths_that_hold_no_task_are_refused():
    with pytest.raises(ValueError, match="needs at least 1 of at least 12"):
        make_task("recall").sample(3, 11, seed=0)
    with pytest.raises(ValueError, match="needs at least 1"):
        make_task("parity").sample(0, 11, seed=0)


@pytest.mark.parametrize("name", ["parity", "modular:5", "s3", "a5", "s5"])
def test_chance_is_one_over_the_number_of_answers(name: str) -> None:
    _, labels = make_task(name).sample(400, 40, 0)
    answers = labels[labels >= 0].unique()
    assert chance_of(name) == pytest.approx(1 / len(answers))


def test_tasks_with_unequal_answers_name_no_chance() -> None:
    assert [chance_of(name) for name in ("dyck:2", "khop:2", "selective-copy:4", "recall:4")] == [None] * 4
