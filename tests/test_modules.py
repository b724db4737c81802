"""Tools that work through calls of submodules act, or are refused by name: nothing is silently without effect."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import CLOSE, assert_close, every_scan, layer_of, logits_of, loss_of, random_tokens, tiny
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from recurformer import LanguageModel
from recurformer.generation.engine import DecodeEngine

TOKENS = random_tokens(2, 9)
PADS = torch.ones(2, 9, dtype=torch.bool)
PADS[0, :3] = False


def ways(model: LanguageModel) -> dict[str, Any]:
    """Every way to compute with a model, by name, each without arguments."""
    return {
        "logits": lambda: model(TOKENS),
        "pads": lambda: model(TOKENS, attention_mask=PADS),
        "cache": lambda: model(TOKENS, use_cache=True),
        "loss": lambda: model(TOKENS, targets=TOKENS),
        "loss without logits": lambda: model(TOKENS, targets=TOKENS, return_logits=False),
        "generate": lambda: model.generate(TOKENS, 3, temperature=0.0),
        "generate by calls": lambda: model.generate(TOKENS, 3, temperature=0.0, step="model"),
    }


def same(found: Any, expected: Any, real: Tensor, tolerance: float) -> None:
    """Compare tokens, or the logits at real positions and the loss of a call."""
    if isinstance(found, Tensor):
        assert torch.equal(found, expected)
        return
    if expected.logits is not None:
        assert_close(found.logits[real], expected.logits[real], tolerance)
    if expected.loss is not None:
        assert_close(found.loss, expected.loss, tolerance)


# --- embedding, output layer, layers, model --------------------------------------------------------------------------


@every_scan
@pytest.mark.parametrize("tied", [False, True])
def test_a_hook_on_the_embedding_acts_everywhere(tied: bool, scan: str):
    model = tiny(scan=scan, layers="first:1", n_layers=3, tie_embeddings=tied)
    noise, calls = torch.randn(32, generator=torch.Generator().manual_seed(5)), []
    expected = copy.deepcopy(model)
    if not tied:
        with torch.no_grad():
            expected.embedding.weight += noise

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        calls.append(output.shape)
        return output + noise

    model.embedding.register_forward_hook(hook)
    for name, run in ways(model).items():
        calls.clear()
        found = run()
        assert calls, name
        if not tied:
            same(found, ways(expected)[name](), PADS if name == "pads" else torch.ones_like(PADS), CLOSE[torch.float32])


@every_scan
def test_a_hook_on_the_output_layer_acts_everywhere(scan: str):
    model, boost = tiny(scan=scan, vocab_multiple=64), torch.zeros(128)
    boost[7] = 100.0
    plain = logits_of(model, TOKENS)

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output + boost

    model.head.register_forward_hook(hook)
    assert_close(logits_of(model, TOKENS), plain + boost[:97])
    expected = nn.functional.cross_entropy((plain + boost[:97]).flatten(0, 1), TOKENS.flatten())
    for return_logits in (True, False):
        assert_close(model(TOKENS, targets=TOKENS, return_logits=return_logits).loss, expected)
    assert (model.generate(TOKENS, 3, temperature=0.0)[:, 9:] == 7).all()


def test_a_gradient_hook_on_the_output_layer_fires():
    model, seen = tiny(), list[Any]()
    model.head.register_full_backward_hook(lambda _, __, gradients: seen.append(gradients[0].shape))
    model(TOKENS, targets=TOKENS, return_logits=False).loss.backward()
    assert seen == [(2, 9, 97)]


@every_scan
def test_hooks_on_layers_and_on_the_model_fire_in_generation(scan: str):
    model, calls = tiny(scan=scan, n_layers=3), []
    plain = model.generate(TOKENS, 4, temperature=0.0)
    for name, module in {"model": model, "layer": layer_of(model, 1)}.items():
        handle = module.register_forward_hook(lambda *_, name=name: calls.append(name))
        assert torch.equal(model.generate(TOKENS, 4, temperature=0.0), plain)
        assert calls == [name] * 4  # the prompt, and three tokens
        calls.clear()
        with pytest.raises(ValueError, match="decode with step='model'"):
            DecodeEngine(model, 2)
        handle.remove()
    DecodeEngine(model, 2)


# --- projections and norms -------------------------------------------------------------------------------------------


def a_hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


def a_backward_hook(module: nn.Module) -> None:
    module.register_full_backward_hook(lambda *_: None)


def another_forward(module: nn.Module) -> None:
    module.forward = lambda x: 2 * x


def pruning(module: nn.Module) -> None:
    prune.l1_unstructured(module, "weight", 0.5)


def old_spectral_norm(module: nn.Module) -> None:
    nn.utils.spectral_norm(module)


@every_scan
@pytest.mark.parametrize("tool", [a_hook, a_backward_hook, another_forward, pruning, old_spectral_norm])
@pytest.mark.parametrize("place", ["0.q_proj", "0.down_proj", "1.o_proj", "2.up_proj"])
def test_what_would_have_no_effect_on_a_projection_is_refused(place: str, tool: Any, scan: str):
    model = tiny(scan=scan, layers="first:2", n_layers=3)
    tool(model.layers.get_submodule(place))
    for run in ways(model).values():
        with pytest.raises(ValueError, match=rf"{place[2:]} has (the hook|a forward of its own).*would have no effect"):
            run()


@pytest.mark.parametrize("place", ["layers.0.attention_norm", "layers.1.k_norm", "norm"])
def test_what_would_have_no_effect_on_a_norm_is_refused(place: str):
    model = tiny(layers="first:1")
    a_hook(model.get_submodule(place))
    for run in ways(model).values():
        with pytest.raises(ValueError, match=rf"{place.rpartition('.')[2]} has the hook a_hook.<locals>.*no effect"):
            run()


def test_another_linear_module_is_refused():
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = tiny()
    layer_of(model, 0).k_proj = Doubled(32, 32, bias=False)
    with pytest.raises(TypeError, match="k_proj is a Doubled, where a linear module was"):
        model(TOKENS)


def test_pruning_acts_once_it_is_made_permanent():
    model = tiny()
    before = logits_of(model, TOKENS)
    pruning(layer_of(model, 0).q_proj)
    prune.remove(layer_of(model, 0).q_proj, "weight")
    assert (layer_of(model, 0).q_proj.weight == 0).float().mean() == 0.5
    assert not torch.allclose(logits_of(model, TOKENS), before)


# --- parametrisations ------------------------------------------------------------------------------------------------


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@every_scan
@pytest.mark.parametrize(
    "place", ["embedding", "head", "norm", "layers.0.q_proj", "layers.0.up_proj", "layers.2.v_proj", "layers.1.q_norm"]
)
def test_a_parametrised_weight_acts_everywhere(place: str, scan: str):
    model = tiny(scan=scan, layers="first:2", n_layers=3)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.get_parameter(f"{place}.weight").div_(2)
    parametrize.register_parametrization(model.get_submodule(place), "weight", Halved())
    for name, run in ways(model).items():
        same(run(), ways(expected)[name](), torch.ones_like(PADS), 0)


def test_spectral_norm_as_a_parametrisation_acts():
    model = tiny()
    plain, projection = logits_of(model, TOKENS), layer_of(model, 0).up_proj
    parametrizations.spectral_norm(projection, n_power_iterations=100)
    loss_of(model.train(), TOKENS).backward()
    assert torch.linalg.matrix_norm(projection.weight, 2).item() == pytest.approx(1, abs=1e-2)
    assert dict(projection.named_parameters())["parametrizations.weight.original"].grad is not None
    assert not torch.allclose(logits_of(model, TOKENS), plain, atol=0.1)
