"""Arnold against the paper's sum written out, its causality, and its cache; float64 on the CPU."""

import math

import pytest
import torch
from torch import Tensor, nn

from kalmagrove.nn import flex
from kalmagrove.nn.arnold import (
    BlockPooling,
    DecodingCache,
    MultiResolutionAttention,
    Resolution,
    attend,
    local_attention,
    masked_attention,
    strided_attention,
)

GROUPS = {
    "full": (Resolution(3, 6),),
    "window": (Resolution(2, 6, window=5),),
    "coarse": (Resolution(1, 6, stride=3),),
    "coarse-window": (Resolution(1, 4, stride=2, window=7),),
    "three": (Resolution(2, 4, window=4), Resolution(1, 6, stride=3), Resolution(1, 4, stride=2, window=6)),
}
LENGTHS = (1, 2, 3, 7, 13, 20)


def attention(groups: tuple[Resolution, ...], *, tricks: bool = True, seed: int = 0) -> MultiResolutionAttention:
    torch.manual_seed(seed)
    layer = MultiResolutionAttention(
        10,
        groups,
        lambda name, n_in, n_out: nn.Linear(n_in, n_out, bias=False),
        qk_norm=tricks,
        short_conv=3 if tricks else 0,
        value_residual=tricks,
    ).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return layer


def naive_group(query: Tensor, key: Tensor, value: Tensor, group: Resolution, pool: tuple[Tensor, Tensor]) -> Tensor:
    """Equation 4 for one head, query by query: (sequence, head_dim) each, keys and values not pooled yet.

    ``pool`` is what weighs the tokens of a block: a query (head_dim,) and a bias (stride,).
    """
    outputs = []
    for position in range(len(query)):
        scores, seen = ([0.0], [torch.zeros_like(value[0])]) if group.stride > 1 else ([], [])
        for block in range(len(key) // group.stride):
            first, last = block * group.stride, (block + 1) * group.stride - 1
            if last > position or (group.window is not None and first <= position - group.window):
                continue
            parts = (key[first : last + 1] @ pool[0] + pool[1]).softmax(dim=0)
            pooled_key = parts @ key[first : last + 1]
            scores.append(float(query[position] @ pooled_key) / math.sqrt(group.head_dim))
            seen.append(parts @ value[first : last + 1])
        weights = torch.tensor(scores, dtype=value.dtype).softmax(dim=0)
        outputs.append(sum(weight * v for weight, v in zip(weights, seen, strict=True)))
    return torch.stack(outputs)


@pytest.mark.parametrize("group", [g for groups in GROUPS.values() for g in groups], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_group_equals_the_sum_of_the_paper_written_out(group: Resolution, length: int) -> None:
    layer = attention((group,), tricks=False)
    layer.rotary = nn.ModuleDict()
    x = torch.randn(1, length, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    heads = [
        projection(x)[0].unflatten(-1, (group.num_heads, group.head_dim)).transpose(0, 1)
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
    ]
    pools = [(torch.zeros(group.head_dim), torch.zeros(1))] * group.num_heads
    if group.stride > 1:
        pools = list(zip(layer.pools["0"].query.detach()[:, 0], layer.pools["0"].bias.detach()[:, 0], strict=True))
    naive = [
        naive_group(q.detach(), k.detach(), v.detach(), group, (pool[0].double(), pool[1].double()))
        for q, k, v, pool in zip(*heads, pools, strict=True)
    ]
    expected = layer.o_proj(torch.cat(naive, dim=-1))
    assert torch.allclose(layer(x)[0][0], expected, atol=1e-12)


@pytest.mark.parametrize("name", GROUPS)
def test_no_position_sees_a_later_token_by_perturbation(name: str) -> None:
    layer, length = attention(GROUPS[name]), 13
    x = torch.randn(2, length, 10, dtype=torch.float64)
    first_values = torch.randn(2, length, sum(layer.widths), dtype=torch.float64)
    before, _ = layer(x, first_values)
    for position in range(length):
        changed = x.clone()
        changed[:, position:] += 3.0
        after, _ = layer(changed, first_values)
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.allclose(after[:, position:], before[:, position:])


@pytest.mark.parametrize("name", GROUPS)
def test_no_position_sees_a_later_token_by_gradient(name: str) -> None:
    layer, length = attention(GROUPS[name]), 11
    x = torch.randn(1, length, 10, dtype=torch.float64, requires_grad=True)
    output, _ = layer(x)
    for position in range(length):
        (gradient,) = torch.autograd.grad(output[0, position].sum(), x, retain_graph=True)
        assert not gradient[0, position + 1 :].any()
        if position + 1 >= max(group.stride for group in GROUPS[name]):
            assert gradient[0, : position + 1].any()


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("portions", [(20,), (1,) * 20, (2, 1, 1, 7, 9), (19, 1), (3, 3, 3, 3, 3, 3, 2)], ids=str)
def test_cached_decoding_equals_the_full_forward(name: str, portions: tuple[int, ...]) -> None:
    layer = attention(GROUPS[name])
    x = torch.randn(2, 20, 10, dtype=torch.float64)
    first_values = torch.randn(2, 20, sum(layer.widths), dtype=torch.float64)
    expected, _ = layer(x, first_values)
    state: dict[str, Tensor] = {}
    outputs, offset = [], 0
    for portion in portions:
        here = slice(offset, offset + portion)
        outputs.append(layer(x[:, here], first_values[:, here], state, offset)[0])
        offset += portion
    assert torch.allclose(torch.cat(outputs, dim=1), expected, atol=1e-12)


def test_the_cache_keeps_only_what_its_resolutions_can_still_see() -> None:
    layer = attention((Resolution(1, 4, window=4), Resolution(1, 4, stride=3)), tricks=False)
    state: dict[str, Tensor] = {}
    for offset in range(20):
        layer(torch.randn(1, 1, 10, dtype=torch.float64), None, state, offset)
    assert state["0.keys"].shape[2] == 3
    assert state["1.keys"].shape[2] == 20 // 3
    assert state["1.open_keys"].shape[2] == 20 % 3


def test_the_cache_reorders_rows_and_counts_bytes() -> None:
    cache = DecodingCache(1)
    cache.layers[0]["keys"] = torch.arange(6.0).reshape(3, 2)
    assert cache.num_bytes() == 24
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert cache.layers[0]["keys"].tolist() == [[4, 5], [0, 1], [0, 1]]


@pytest.mark.parametrize("length", [1, 4, 5, 12, 13])
def test_local_attention_equals_masked_attention(length: int) -> None:
    query, key, value = torch.randn(3, 2, 3, length, 6, dtype=torch.float64)
    positions = torch.arange(length)
    visible = Resolution(3, 6, window=5).visible(positions, positions)
    assert torch.allclose(local_attention(query, key, value, 5), masked_attention(query, key, value, visible))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_sees_the_same_window() -> None:
    # Without a GPU it has no gradient; tests/test_on_a_gpu.py has it.
    query, key, value = torch.randn(3, 2, 3, 256, 16)
    torch.testing.assert_close(flex.windowed(query, key, value, 37), local_attention(query, key, value, 37))


@pytest.mark.parametrize("stride", [2, 3, 4, 8])
@pytest.mark.parametrize("length", [1, 3, 4, 17, 64])
def test_attention_to_blocks_by_causal_attention_is_the_same(length: int, stride: int) -> None:
    inputs = [t.requires_grad_() for t in torch.randn(3, 2, 3, length, 6, dtype=torch.float64)]

    def pooled(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return query, *BlockPooling(3, 6, stride).double()(key, value)

    own = strided_attention(*pooled(*inputs), stride)
    chunked = attend(Resolution(3, 6, stride), *pooled(*inputs))
    assert torch.allclose(own, chunked, atol=1e-12)
    weights = torch.randn(own.shape, dtype=torch.float64)
    for ours, theirs in zip(*(torch.autograd.grad(y, inputs, weights) for y in (own, chunked)), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 8])
@pytest.mark.parametrize(("stride", "window"), [(1, None), (4, None), (4, 4), (4, 9), (4, 16)])
@pytest.mark.parametrize("kept", [0, 4096])
def test_chunks_of_queries_change_nothing(
    chunk: int, stride: int, window: int | None, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolution = Resolution(3, 6, stride, window)
    query, key, value = torch.randn(3, 2, 3, 50, 6, dtype=torch.float64)
    if stride > 1:
        key, value = BlockPooling(3, 6, stride).double()(key, value)
    inputs = [t.detach().requires_grad_() for t in (query, key, value)]
    weights = torch.randn(query.shape, dtype=torch.float64)
    whole = attend(resolution, *inputs)
    expected = whole, *torch.autograd.grad(whole, inputs, weights)
    for name in ("CHUNK_OF_TOKENS", "CHUNK_OF_BLOCKS"):
        monkeypatch.setattr(f"kalmagrove.nn.arnold.{name}", chunk)
    monkeypatch.setattr("kalmagrove.nn.chunked.LONGEST_KEPT", kept)
    own = attend(resolution, *inputs)
    for ours, theirs in zip((own, *torch.autograd.grad(own, inputs, weights)), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_plain_causal_attention_equals_pytorchs_own_with_its_gradients(length: int) -> None:
    inputs = [t.requires_grad_() for t in torch.randn(3, 2, 3, length, 6, dtype=torch.float64)]
    weights = torch.randn(2, 3, length, 6, dtype=torch.float64)
    own = attend(Resolution(3, 6), *inputs)
    fused = nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
    gradients = (torch.autograd.grad(y, inputs, weights) for y in (own, fused))
    for ours, theirs in ((own, fused), *zip(*gradients, strict=True)):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_pooling_starts_as_the_mean_and_leaves_out_the_block_that_is_not_finished() -> None:
    x = torch.arange(7.0).reshape(1, 1, 7, 1)
    for pooled in BlockPooling(1, 1, 3)(x, 10 * x):
        assert (pooled / pooled[0, 0, 0]).flatten().tolist() == [1.0, 4.0]


def test_pooling_weighs_tokens_by_their_keys_and_places() -> None:
    key, value = torch.randn(2, 1, 2, 6, 4)
    pool = BlockPooling(2, 4, 3)
    with torch.no_grad():
        pool.query.normal_()
        pool.bias.normal_()
    for head in range(2):
        scores = key[0, head] @ pool.query[head, 0] + pool.bias[head, 0].repeat(2)
        for block in range(2):
            here = slice(3 * block, 3 * block + 3)
            weights = scores[here].softmax(0)
            for pooled, x in zip(pool(key, value), (key, value), strict=True):
                torch.testing.assert_close(pooled[0, head, block], weights @ x[0, head, here])


def test_full_attention_equals_pytorchs_own() -> None:
    layer = attention((Resolution(3, 6),), tricks=False)
    layer.rotary = nn.ModuleDict()
    x = torch.randn(2, 9, 10, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (3, 6)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    assert torch.allclose(layer(x)[0], layer.o_proj(attended))


@pytest.mark.parametrize("wrong", [{"num_heads": 0}, {"stride": 0}, {"head_dim": -1}])
def test_a_resolution_needs_positive_numbers(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Resolution(**{"num_heads": 1, "head_dim": 4} | wrong)


def test_a_window_shorter_than_the_stride_is_refused() -> None:
    with pytest.raises(ValueError, match="window 3 is shorter than stride 4"):
        Resolution(1, 4, stride=4, window=3)
