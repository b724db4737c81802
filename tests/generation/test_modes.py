"""Evaluation mode during a call, for calls that nest and for threads that overlap."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers import random_tokens, tiny
from torch import Tensor

from recurformer.evaluation import evaluating as evaluating_of_evaluation
from recurformer.generation.modes import evaluating


def test_nested_calls_restore_every_modules_own_mode():
    model = tiny().train()
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    with evaluating(model):
        with evaluating(model.layers[0]):
            assert not any(module.training for module in model.modules())
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes
    assert evaluating_of_evaluation is evaluating


def test_an_error_restores_the_mode():
    model = tiny().train()
    with pytest.raises(KeyboardInterrupt), evaluating(model):
        raise KeyboardInterrupt
    assert all(module.training for module in model.modules())
    with evaluating(model):
        assert not model.training
    assert model.training


def test_threads_that_overlap_leave_the_model_in_training_mode():
    """The first call ends while the second, which began in evaluation mode, still runs."""
    model, tokens = tiny().train(), random_tokens(1, 4)
    second_began, first_ended = threading.Event(), threading.Event()
    seen: list[bool] = []

    def first(_: Tensor) -> None:
        assert second_began.wait(30)

    def second(_: Tensor) -> None:
        second_began.set()
        if first_ended.is_set():
            seen.append(model.training)

    def run_first() -> None:
        model.generate(tokens, 2, stream=first)
        first_ended.set()

    def run_second() -> None:
        model.generate(tokens, 4, stream=lambda ids: (second(ids), first_ended.wait(30)))

    threads = [threading.Thread(target=run) for run in (run_first, run_second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen
    assert not any(seen)  # the second call stayed in evaluation mode to its end
    assert all(module.training for module in model.modules())


def test_a_thread_beside_an_evaluation_leaves_both_as_they_were():
    model = tiny().train()
    with evaluating(model):
        thread = threading.Thread(target=lambda: model.generate(random_tokens(1, 4), 2))
        thread.start()
        thread.join(60)
        assert not model.training
    assert model.training
    assert torch.is_grad_enabled()
