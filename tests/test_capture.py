"""What calibration sees: states and gradients against autograd of zeros added to them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvqtool import capture as capturing
from kvqtool import forward
from kvqtool.capture import KeyStates, Watcher, capture
from kvqtool.probe import probe

Seen = dict[tuple[int, str], Tensor]
TOKENS = 24
IDS = torch.randint(0, 256, (TOKENS,), generator=torch.Generator().manual_seed(0))
PARTS = ("key before", "key after", "value")


class Recorder(Watcher):
    """Keeps everything it is shown, and refuses to be shown anything twice."""

    def __init__(self) -> None:
        self.states: Seen = {}
        self.gradients: Seen = {}

    def key(self, layer: int, states: KeyStates, gradients: KeyStates | None) -> None:
        for name, form in (("key before", "before_rope"), ("key after", "after_rope")):
            slope = getattr(gradients, form) if gradients else None
            self._keep((layer, name), getattr(states, form), slope)

    def value(self, layer: int, states: Tensor, gradients: Tensor | None) -> None:
        self._keep((layer, "value"), states, gradients)

    def _keep(self, at: tuple[int, str], states: Tensor, gradients: Tensor | None) -> None:
        assert at not in self.states
        self.states[at] = states.detach().clone()
        if gradients is not None:
            self.gradients[at] = gradients.detach().clone()


def captured(model: Any, *, gradients: bool = True) -> Recorder:
    recorder = Recorder()
    with capture(model, probe(model), recorder, gradients=gradients) as run:
        run.run(IDS)
    return recorder


def loss_of(model: Any, added: dict[nn.Module, Tensor]) -> Tensor:
    """Return the summed next-token loss with something added to each projection's output."""
    handles = [
        module.register_forward_hook(lambda m, args, out: out + added[m]) for module in added
    ]
    logits = model(IDS[None]).logits[0, :-1]
    for handle in handles:
        handle.remove()
    return nn.functional.cross_entropy(logits, IDS[1:], reduction="sum")


def projections(model: Any) -> dict[tuple[int, str], nn.Module]:
    """Return the modules whose outputs are keys before RoPE, and values."""
    found = {}
    for index, layer in enumerate(model.model.layers):
        found[index, "key before"] = layer.self_attn.k_proj
        found[index, "value"] = layer.self_attn.v_proj
    return found


def slopes_of(model: Any) -> Seen:
    """Return the loss's gradients by autograd, of explicit zeros added to keys and values."""
    modules = projections(model)
    weight = model.model.embed_tokens.weight
    added = {
        module: weight.new_zeros(1, TOKENS, module.out_features).requires_grad_()
        for module in modules.values()
    }
    loss_of(model, added).backward()
    model.zero_grad()
    return {at: added[module].grad[0] for at, module in modules.items()}


def assert_close(found: Seen, expected: Seen, tolerance: float = 1e-4) -> None:
    for at, tensor in expected.items():
        assert (found[at] - tensor).abs().max() <= tolerance * tensor.abs().max(), at


@pytest.mark.parametrize("gqa", (True, False))
class TestGradients:
    """methods.md 7.13."""

    def test_they_are_autograds_of_an_added_zero(
        self, tiny_llama: Callable[..., Any], gqa: bool
    ) -> None:
        model = tiny_llama(gqa=gqa)
        assert_close(captured(model).gradients, slopes_of(model))

    def test_the_loss_changes_as_they_say(self, tiny_llama: Callable[..., Any], gqa: bool) -> None:
        """A central difference along a random direction, against J . dA."""
        model, generator = tiny_llama(gqa=gqa), torch.Generator().manual_seed(3)
        model.model.embed_tokens.weight.data *= 20  # or attention is too even to matter
        gradients = captured(model).gradients
        model = model.double()
        for at, module in projections(model).items():
            shape, step = (1, TOKENS, module.out_features), 1e-2
            direction = torch.randn(shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                up, down = (loss_of(model, {module: s * step * direction}) for s in (1, -1))
            slope = float((gradients[at].double() * direction[0]).sum())
            assert float(up - down) / (2 * step) == pytest.approx(slope, rel=1e-2)

    def test_rotated_keys_have_the_rotated_gradients(
        self, tiny_llama: Callable[..., Any], gqa: bool
    ) -> None:
        """A rotation keeps products: k . g is the same before and after it."""
        seen = captured(tiny_llama(gqa=gqa))
        for layer in (0, 1):
            before, after = (
                (seen.states[layer, name] * seen.gradients[layer, name])
                .view(TOKENS, -1, 2, 8)
                .sum(2)
                for name in ("key before", "key after")
            )
            assert before.numpy() == pytest.approx(after.numpy(), abs=1e-4)


@pytest.mark.parametrize("gradients", (True, False))
def test_states_are_what_the_projections_put_out(
    tiny_llama: Callable[..., Any], gradients: bool
) -> None:
    model, expected = tiny_llama(), {}
    handles = [
        module.register_forward_hook(lambda m, args, out, at=at: expected.update({at: out[0]}))
        for at, module in projections(model).items()
    ]
    with torch.no_grad():
        model(IDS[None])
    for handle in handles:
        handle.remove()
    seen = captured(model, gradients=gradients)
    assert set(seen.states) == {(layer, part) for layer in (0, 1) for part in PARTS}
    assert bool(seen.gradients) == gradients
    assert_close(seen.states, expected, 1e-5)


def test_keys_after_rope_are_what_the_stock_cache_holds(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    with torch.no_grad():
        cache = model(IDS[None], use_cache=True).past_key_values
    expected = {
        (i, "key after"): layer.keys[0].transpose(0, 1).flatten(1)
        for i, layer in enumerate(cache.layers)
    }
    assert_close(captured(model, gradients=False).states, expected, 1e-5)


def test_recomputed_layers_give_the_same_gradients(
    tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(attention_dropout=0.5)
    expected = captured(model)
    monkeypatch.setattr(capturing, "_ACTIVATION_BYTES", 0)
    found = captured(model)
    assert_close(found.gradients, expected.gradients, 1e-5)
    assert_close(found.states, expected.states, 1e-5)


def test_a_forward_of_a_layers_own_is_put_back(
    tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate gives one to every layer of a spread model."""
    model = tiny_llama()
    own = [layer.forward for layer in model.model.layers]
    for layer, forward_of_its_own in zip(model.model.layers, own, strict=True):
        layer.forward = forward_of_its_own
    monkeypatch.setattr(capturing, "_ACTIVATION_BYTES", 0)
    captured(model)
    assert [layer.__dict__["forward"] for layer in model.model.layers] == own


def test_a_loss_in_chunks_gives_the_same_gradients(
    tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    expected = captured(model).gradients
    monkeypatch.setattr(forward, "_CHUNK_BYTES", 4 * 256 * 5)  # five positions
    assert_close(captured(model).gradients, expected, 1e-5)


@pytest.mark.parametrize("recompute", (True, False))
@pytest.mark.parametrize("fails", (True, False))
class TestPutBack:
    @pytest.fixture
    def model(
        self,
        tiny_llama: Callable[..., Any],
        monkeypatch: pytest.MonkeyPatch,
        recompute: bool,
        fails: bool,
    ) -> Any:
        """Return a model after a capture that went through or failed half way."""
        if recompute:
            monkeypatch.setattr(capturing, "_ACTIVATION_BYTES", 0)
        model = tiny_llama(attention_dropout=0.25)
        model.model.embed_tokens.weight.requires_grad_(False)
        seam, recorder = probe(model), Recorder()
        try:
            with capture(model, seam, recorder, gradients=True) as run:
                run.run(IDS)
                if fails:
                    run.run(IDS)  # the recorder refuses
        except AssertionError:
            assert fails
        return model

    def test_weights_are_trainable_where_they_were(self, model: Any) -> None:
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert {name for name in frozen if "lm_head" not in name} == {"model.embed_tokens.weight"}

    def test_weights_have_no_gradients(self, model: Any) -> None:
        assert all(p.grad is None for p in model.parameters())

    def test_attention_is_the_models_own(self, model: Any) -> None:
        assert model.config._attn_implementation == "sdpa"

    def test_nothing_is_recomputed_any_more(self, model: Any) -> None:
        assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        assert not any("forward" in vars(m) for m in model.modules())
        assert not model.training

    def test_dropout_is_the_models_own(self, model: Any) -> None:
        assert {layer.self_attn.attention_dropout for layer in model.model.layers} == {0.25}

    def test_hooks_are_gone(self, model: Any) -> None:
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())

    def test_modules_hold_nothing_of_the_capture(self, model: Any) -> None:
        held = [vars(m).get("_kvqtool_capture") for m in model.modules()]
        assert not any(each and any(part is not None for part in each) for each in held)
