"""The recurrence of Mamba-2 in chunks of matrix products: values and gradients of the token by token form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quadriga.kernels import ops
from quadriga.kernels.reference import STATE_CHUNK
from quadriga.model.config import Mamba2Spec
from quadriga.nn.context import PackedContext
from quadriga.nn.mamba import Mamba2
from quadriga.train.optim import decays

H, P, G, N = 6, 5, 3, 7


def inputs(n_tokens: int, dtype: torch.dtype = torch.float64, fades: float = 0.2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n_tokens)
    shapes = [(n_tokens, H, P), (n_tokens, G, N), (n_tokens, G, N), (n_tokens, H), (n_tokens, H), (H, N, P)]
    x, b, c, step, decay, state = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [t.to(dtype) for t in (x, b, c, step.exp(), -fades * decay.exp(), state)]


def token_by_token(
    x: Tensor, b: Tensor, c: Tensor, step: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The statement itself."""
    out = []
    for t in range(len(x)):
        heads = []
        for h in range(H):
            group = h // (H // G)
            heads.append(log_decay[t, h].exp() * state[h] + torch.outer(b[t, group], step[t, h] * x[t, h]))
        state = torch.stack(heads)
        out.append(torch.stack([c[t, h // (H // G)] @ state[h] for h in range(H)]))
    return torch.stack(out), state


@pytest.mark.parametrize("n_tokens", [1, 2, STATE_CHUNK, STATE_CHUNK + 1, 2 * STATE_CHUNK + 9])
def test_chunks_compute_what_tokens_do_one_by_one(n_tokens: int) -> None:
    for mine, wanted in zip(ops.state_space(*inputs(n_tokens)), token_by_token(*inputs(n_tokens)), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


def test_a_text_in_two_passes_is_the_text_in_one() -> None:
    *rows, state = inputs(STATE_CHUNK + 30)
    whole, end = ops.state_space(*rows, state)
    first, between = ops.state_space(*(t[:41] for t in rows), state)
    second, last = ops.state_space(*(t[41:] for t in rows), between)
    torch.testing.assert_close(torch.cat((first, second)), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, end, rtol=1e-12, atol=1e-12)


def test_what_fades_fast_keeps_its_digits() -> None:
    """Logarithms of -200 a token sum to -1e4 in a chunk: the difference of two such sums has an error of 1e-3."""
    wide = inputs(STATE_CHUNK, fades=40.0)
    wide[4][::2] *= 1e-4  # every second token forgets hardly anything
    exact, _ = token_by_token(*wide)
    mine, _ = ops.state_space(*(t.float() for t in wide))
    assert float((mine - exact).abs().max() / exact.abs().max()) < 1e-6


def test_gradients_are_those_of_the_tokens() -> None:
    def gradients(form: object) -> list[Tensor]:
        values = [t.requires_grad_() for t in inputs(STATE_CHUNK + 5)]
        out, state = form(*values)  # type: ignore[operator]
        (out.sin().sum() + state.cos().sum()).backward()
        return [t.grad for t in values if t.grad is not None]

    mine, wanted = gradients(ops.state_space), gradients(token_by_token)
    assert len(mine) == len(wanted) == 6
    for one, other in zip(mine, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_texts_side_by_side_do_not_see_each_other() -> None:
    spec = Mamba2Spec(n_heads=H, head_dim=P, n_groups=G, state_dim=N, taps=3, eps=1e-5)
    layer = Mamba2(13, spec, 0).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    x = torch.randn(9, 13, generator=generator, dtype=torch.float64)
    together = layer(x, PackedContext([4, 5]))
    apart = torch.cat([layer(part, PackedContext([len(part)])) for part in (x[:4], x[4:])])
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(layer(x, PackedContext([9]))[4:], apart[4:])


def test_rates_steps_skips_and_biases_do_not_decay() -> None:
    shapes = dict(
        Mamba2(8, Mamba2Spec(n_heads=H, head_dim=P, n_groups=G, state_dim=N, taps=3, eps=1e-5), 0).named_parameters()
    )
    small = {name for name in shapes if not decays(f"layers.0.mamba.{name}")}
    assert small == {"conv_bias", "rate", "dt", "skip", "norm.weight"}
