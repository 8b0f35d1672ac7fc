"""Every hand-written backward pass equals autograd on the plain dense formulas, in double precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from support.losses import (
    CONFIG,
    GROUPS,
    D,
    F,
    N,
    agree,
    autograd,
    gradients,
    kept,
    mean_square,
    random_inputs,
    random_weights,
    sae_batch,
)
from unsleep.dictionaries import losses, sparse
from unsleep.dictionaries.losses import Batch


@given(st.integers(0, 300), st.sampled_from([1, 3, F]))
def test_top_k(seed: int, k: int):
    w, x = random_weights(seed), random_inputs(seed)
    done = gradients("topk", w, sae_batch(w, x), k=k)

    def loss(p: dict[str, Tensor]) -> Tensor:
        pre = (x - p["b_dec"]) @ p["enc"].T + p["b_enc"]
        return mean_square(pre.relu() * kept(pre, k, True) @ p["dec"] + p["b_dec"], x)

    agree(done, autograd(w, loss))


@given(st.integers(0, 300), st.sampled_from([1, 3, F]))
def test_batch_top_k(seed: int, k: int):
    w, x = random_weights(seed), random_inputs(seed)
    done = gradients("batchtopk", w, sae_batch(w, x), k=k)

    def loss(p: dict[str, Tensor]) -> Tensor:
        pre = (x - p["b_dec"]) @ p["enc"].T + p["b_enc"]
        return mean_square(pre.relu() * kept(pre, k, False) @ p["dec"] + p["b_dec"], x)

    agree(done, autograd(w, loss))
    assert done.active <= k * N


@given(st.integers(0, 300), st.sampled_from([1, 3, F]))
def test_matryoshka(seed: int, k: int):
    w, x = random_weights(seed), random_inputs(seed)
    done = gradients("matryoshka", w, sae_batch(w, x), k=k)

    def loss(p: dict[str, Tensor]) -> Tensor:
        pre = (x - p["b_dec"]) @ p["enc"].T + p["b_enc"]
        code = pre.relu() * kept(pre, k, False)
        ends = torch.tensor(GROUPS).cumsum(0).tolist()
        parts = [mean_square(code[:, :end] @ p["dec"][:end] + p["b_dec"], x) for end in ends]
        return torch.stack(parts).mean()

    agree(done, autograd(w, loss))


@given(st.integers(0, 300), st.booleans())
def test_standard_by_either_path(seed: int, few: bool):
    w, x = random_weights(seed), random_inputs(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "SPARSE_BELOW", 2.0 if few else 0.0)
        done = gradients("standard", w, sae_batch(w, x))

    def loss(p: dict[str, Tensor]) -> Tensor:
        code = ((x - p["b_dec"]) @ p["enc"].T + p["b_enc"]).relu()
        cost = CONFIG.sparsity * (code * p["dec"].norm(dim=1)).sum() / len(x)
        return mean_square(code @ p["dec"] + p["b_dec"], x) + cost

    agree(done, autograd(w, loss))


class Jump(torch.autograd.Function):
    """z · H(z − θ) and H(z − θ) with the rectangle's pseudo-derivatives in θ, as the paper writes them."""

    @staticmethod
    def forward(ctx, z: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z, theta)
        on = (z > theta).double()
        return z * on, on

    @staticmethod
    def backward(ctx, of_value: Tensor, of_step: Tensor) -> tuple[Tensor, Tensor]:
        z, theta = ctx.saved_tensors
        near = ((z - theta).abs() < CONFIG.bandwidth / 2).double() / CONFIG.bandwidth
        return of_value * (z > theta), -(theta * near * of_value + near * of_step).sum(0)


@given(st.integers(0, 300), st.booleans())
def test_jump_relu_by_either_path(seed: int, few: bool):
    w, x = random_weights(seed, extras=("log_threshold",)), random_inputs(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "SPARSE_BELOW", 2.0 if few else 0.0)
        done = gradients("jumprelu", w, sae_batch(w, x))

    def loss(p: dict[str, Tensor]) -> Tensor:
        pre = (x - p["b_dec"]) @ p["enc"].T + p["b_enc"]
        code, on = Jump.apply(pre, p["log_threshold"].exp())
        return mean_square(code @ p["dec"] + p["b_dec"], x) + CONFIG.sparsity * on.sum() / len(x)

    agree(done, autograd(w, loss))


@given(st.integers(0, 300))
def test_gated(seed: int):
    w, x = random_weights(seed, extras=("b_mag", "r_mag")), random_inputs(seed)
    done = gradients("gated", w, sae_batch(w, x))

    def loss(p: dict[str, Tensor]) -> Tensor:
        a = (x - p["b_dec"]) @ p["enc"].T
        gate = a + p["b_enc"]
        code = (a * p["r_mag"].exp() + p["b_mag"]).relu() * (gate > 0)
        aside = gate.relu() @ p["dec"].detach() + p["b_dec"].detach()
        return (
            mean_square(code @ p["dec"] + p["b_dec"], x)
            + mean_square(aside, x)
            + (CONFIG.sparsity * gate.relu().sum() / len(x))
        )

    agree(done, autograd(w, loss))


@given(st.integers(0, 300), st.sampled_from([1, 3, F]))
def test_a_skip_transcoder(seed: int, k: int):
    w, x, y = random_weights(seed, 4, ("skip",)), random_inputs(seed, d=4), random_inputs(seed + 9)
    done = gradients("topk", w, Batch(x, y - w.b_dec, False, torch.float64), k=k)

    def loss(p: dict[str, Tensor]) -> Tensor:
        pre = x @ p["enc"].T + p["b_enc"]
        return mean_square(pre.relu() * kept(pre, k, True) @ p["dec"] + p["b_dec"] + x @ p["skip"].T, y)

    agree(done, autograd(w, loss))


@given(st.integers(0, 300))
def test_reviving_dead_features(seed: int):
    w, x = random_weights(seed), random_inputs(seed)
    batch = sae_batch(w, x)
    done = gradients("topk", w, batch)
    before = {name: grad.clone() for name, grad in done.grads.items()}
    silent = torch.arange(0, F, 2)
    losses.revive(w, batch, done, silent, 4, 0.1)

    def loss(p: dict[str, Tensor]) -> Tensor:
        pre = ((x - p["b_dec"]) @ p["enc"].T + p["b_enc"])[:, silent]
        rebuilt = pre.relu() * kept(pre, 4, True) @ p["dec"][silent]
        return 0.1 * (rebuilt + done.error).square().sum() * D / done.error.square().sum()

    agree(done._replace(grads={n: done.grads[n] - before[n] for n in before}), autograd(w, loss))


@given(st.integers(0, 300), st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_largest_of_a_batch_are_its_largest(seed: int, count: int, dtype: torch.dtype):
    pre = torch.randn(5, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)
    code = sparse.largest(pre, count)
    level = pre.float().flatten().sort(descending=True).values[count - 1].clamp_min(0)
    expected = torch.where((pre >= level) & (pre > 0), pre, 0)
    got = torch.zeros_like(pre).index_put_((code.token, code.ids), code.values)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert code.offsets.tolist() == [int((code.token < t).sum()) for t in range(5)]


@given(st.integers(0, 50))
def test_the_largest_are_found_though_the_sample_misleads(seed: int):
    g = torch.Generator().manual_seed(seed)
    pre = torch.randn(64, 2**13, generator=g) * torch.tensor([1.0, 9.0]).repeat(2**12)  # the sample sees one kind
    code = sparse.largest(pre, 300)
    assert len(code.ids) == 300
    assert float(code.values.min()) == float(pre.flatten().topk(300).values.min())


@given(st.integers(0, 300), st.sampled_from([1, 5, 16]))
def test_top_k_in_two_rounds_finds_the_largest(seed: int, k: int):
    pre = torch.randn(3, 16 * 80, generator=torch.Generator().manual_seed(seed))
    values, ids = sparse.top_k(pre, k)
    torch.testing.assert_close(values.sort(-1).values, pre.topk(k).values.sort(-1).values, rtol=0, atol=0)
    torch.testing.assert_close(pre.gather(-1, ids), values, rtol=0, atol=0)
    assert all(len(set(row)) == k for row in ids.tolist())
