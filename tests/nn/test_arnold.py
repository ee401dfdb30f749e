"""Arnold against attention written out query by query, its causality, and its cache; float64 on the CPU."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kalmagrove.nn import attend as attend_module
from kalmagrove.nn import flex
from kalmagrove.nn.arnold import MultiResolutionAttention
from kalmagrove.nn.attend import attend
from kalmagrove.nn.decoding import document_starts, placement
from kalmagrove.nn.pooling import BlockPooling
from kalmagrove.nn.resolution import Resolution

GROUPS = {
    "full": (Resolution(3, 6),),
    "window": (Resolution(2, 6, [(1, 5)]),),
    "blocks": (Resolution(1, 6, [(1, 3), (3, None)]),),
    "blocks-end": (Resolution(1, 4, [(1, 4), (2, 9)]),),
    "three-scales": (Resolution(1, 4, [(1, 2), (2, 5), (4, 14)]),),
    "three-groups": (Resolution(2, 4, [(1, 4)]), Resolution(1, 6, [(1, 5), (3, None)]), Resolution(1, 4)),
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


def naive_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: Resolution,
    pools: dict[int, tuple[Tensor, Tensor]],
    start: int = 0,
) -> Tensor:
    """One head, query by query: (sequence, head_dim) each. A token is seen at the finest scale that reaches it.

    ``pools`` has, by scale, what weighs the tokens of a block: a query (head_dim,) and a bias (stride,).
    """
    outputs = []
    for position in range(len(query)):
        scores, seen = [], []
        for scale, (stride, reach) in enumerate(group.scales):
            for block in range(len(key) // stride):
                first, last = block * stride, (block + 1) * stride - 1
                beyond_finer = scale == 0 or first <= position - group.scales[scale - 1][1]
                within = reach is None or first > position - reach
                if last > position or first < start or not beyond_finer or not within:
                    continue
                part_key, part_value = key[first : last + 1], value[first : last + 1]
                weights = torch.ones(1, dtype=key.dtype)
                if scale > 0:
                    weights = (part_key @ pools[scale][0] + pools[scale][1]).softmax(dim=0)
                scores.append(float(query[position] @ (weights @ part_key)) / math.sqrt(group.head_dim))
                seen.append(weights @ part_value)
        shares = torch.tensor(scores, dtype=value.dtype).softmax(dim=0)
        outputs.append(sum(share * v for share, v in zip(shares, seen, strict=True)))
    return torch.stack(outputs)


@pytest.mark.parametrize("group", [g for groups in GROUPS.values() for g in groups], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_group_equals_the_sum_written_out(group: Resolution, length: int) -> None:
    layer = attention((group,), tricks=False)
    layer.rotary = nn.ModuleDict()
    x = torch.randn(1, length, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    heads = [
        projection(x)[0].unflatten(-1, (group.num_heads, group.head_dim)).transpose(0, 1).detach()
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
    ]
    naive = []
    for head, (q, k, v) in enumerate(zip(*heads, strict=True)):
        pools = {
            scale: tuple(t.detach()[head, 0] for t in (layer.pools[f"0_{scale}"].query, layer.pools[f"0_{scale}"].bias))
            for scale, _ in group.coarse
        }
        naive.append(naive_head(q, k, v, group, pools))
    expected = layer.o_proj(torch.cat(naive, dim=-1))
    assert torch.allclose(layer(x)[0][0], expected, atol=1e-12)


@pytest.mark.parametrize("group", [g for groups in GROUPS.values() for g in groups], ids=str)
def test_every_past_token_is_covered_where_a_scale_reaches_everything(group: Resolution) -> None:
    for position in range(30):
        covered = set()
        for scale, (stride, _) in enumerate(group.scales):
            firsts = torch.arange(30 // stride) * stride
            seen = group.visible(scale, torch.tensor([position]), firsts)[0]
            for first in firsts[seen].tolist():
                covered |= set(range(first, first + stride))
        reach = group.scales[-1][1]
        oldest = 0 if reach is None else position - reach + group.scales[-1][0]
        assert covered >= set(range(max(0, oldest), position + 1))
        assert max(covered) == position


@pytest.mark.parametrize("name", GROUPS)
def test_no_position_sees_a_later_token_by_perturbation(name: str) -> None:
    layer, length = attention(GROUPS[name]), 17
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
    layer, length = attention(GROUPS[name]), 17
    x = torch.randn(1, length, 10, dtype=torch.float64, requires_grad=True)
    output, _ = layer(x)
    for position in range(length):
        (gradient,) = torch.autograd.grad(output[0, position].sum(), x, retain_graph=True)
        assert not gradient[0, position + 1 :].any()
        assert gradient[0, position].any()


@pytest.mark.parametrize("name", GROUPS)
def test_no_position_sees_a_later_token_over_several_chunks_of_queries(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, length = attention(GROUPS[name]), 17
    x = torch.randn(1, length, 10, dtype=torch.float64)
    whole, _ = layer(x)
    monkeypatch.setattr(attend_module, "CHUNK_ON_CPU", 4)
    x.requires_grad_()
    output, _ = layer(x)
    assert torch.allclose(output, whole, atol=1e-12)
    for position in range(length):
        (gradient,) = torch.autograd.grad(output[0, position].sum(), x, retain_graph=True)
        assert not gradient[0, position + 1 :].any() and gradient[0, position].any()
        changed = x.detach().clone()
        changed[:, position:] += 3.0
        assert torch.equal(layer(changed)[0][:, :position], output[:, :position])


def cached(
    layer: MultiResolutionAttention, x: Tensor, values: Tensor, portions: tuple[int, ...], **where: Any
) -> Tensor:
    state: dict[str, Tensor] = {}
    outputs, seen = [], 0
    starts = where.pop("document_starts", None)
    for portion in portions:
        here = slice(seen, seen + portion)
        own = placement(
            portion, x.device, seen=seen, document_starts=None if starts is None else starts[:, here], **where
        )
        outputs.append(layer(x[:, here], values[:, here], own, state)[0])
        seen += portion
    return torch.cat(outputs, dim=1)


PORTIONS = [(20,), (1,) * 20, (2, 1, 1, 7, 9), (19, 1), (3, 3, 3, 3, 3, 3, 2), (12, 8)]


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("portions", PORTIONS, ids=str)
def test_cached_decoding_equals_the_full_forward(name: str, portions: tuple[int, ...]) -> None:
    layer = attention(GROUPS[name])
    x = torch.randn(2, 20, 10, dtype=torch.float64)
    first_values = torch.randn(2, 20, sum(layer.widths), dtype=torch.float64)
    expected, _ = layer(x, first_values)
    assert torch.allclose(cached(layer, x, first_values, portions), expected, atol=1e-12)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("portions", [p for p in PORTIONS if p[0] >= 7 or len(p) == 20], ids=str)
def test_rows_of_a_padded_batch_decode_as_if_they_were_alone(name: str, portions: tuple[int, ...]) -> None:
    layer, padding = attention(GROUPS[name]), torch.tensor([0, 3, 7])
    x = torch.randn(3, 20, 10, dtype=torch.float64)
    first_values = torch.randn(3, 20, sum(layer.widths), dtype=torch.float64)
    together = cached(layer, x, first_values, portions, padding=padding)
    assert together.isfinite().all()
    for row, count in enumerate(padding.tolist()):
        alone, _ = layer(x[row : row + 1, count:], first_values[row : row + 1, count:])
        assert torch.allclose(together[row, count:], alone[0], atol=1e-12)


@pytest.mark.parametrize("name", GROUPS)
def test_rows_of_a_padded_batch_are_as_if_they_were_alone_without_a_cache(name: str) -> None:
    layer, padding = attention(GROUPS[name]), torch.tensor([0, 3, 7])
    x = torch.randn(3, 20, 10, dtype=torch.float64)
    together, _ = layer(x, where=placement(20, x.device, padding=padding))
    for row, count in enumerate(padding.tolist()):
        assert torch.allclose(together[row, count:], layer(x[row : row + 1, count:])[0][0], atol=1e-12)


def test_tokens_behind_others_need_what_remembers_these() -> None:
    x = torch.randn(1, 5, 10, dtype=torch.float64)
    with pytest.raises(ValueError, match="7 tokens stand before these: give the state"):
        attention(GROUPS["blocks"])(x, where=placement(5, x.device, seen=7))


@pytest.mark.parametrize("name", GROUPS)
def test_documents_do_not_see_each_other(name: str) -> None:
    layer = attention(GROUPS[name])
    x = torch.randn(1, 20, 10, dtype=torch.float64)
    values = torch.randn(1, 20, sum(layer.widths), dtype=torch.float64)
    is_end = torch.zeros(1, 20, dtype=torch.bool)
    is_end[0, [4, 12]] = True
    starts, following = document_starts(is_end, torch.arange(20))
    assert starts[0].tolist() == [0] * 5 + [5] * 8 + [13] * 7 and following.tolist() == [13]
    where = placement(20, x.device, document_starts=starts)
    before, _ = layer(x, values, where)
    for first, last in ((0, 5), (5, 13), (13, 20)):
        changed = torch.randn_like(x)
        changed[:, first:last] = x[:, first:last]
        after, _ = layer(changed, values, where)
        assert torch.equal(after[:, first:last], before[:, first:last])
    assert torch.allclose(layer(x[:, :5], values[:, :5])[0], before[:, :5], atol=1e-12)
    for portions in PORTIONS:
        assert torch.allclose(cached(layer, x, values, portions, document_starts=starts), before, atol=1e-12)


def test_a_document_that_ends_with_a_portion_is_known_in_the_next() -> None:
    is_end = torch.tensor([[False, False, True], [False, True, False]])
    whole, following = document_starts(is_end, torch.arange(3))
    before, pieces = None, []
    for place in range(3):
        piece, before = document_starts(is_end[:, place : place + 1], torch.arange(place, place + 1), before)
        pieces.append(piece)
    assert torch.equal(torch.cat(pieces, dim=1), whole)
    assert torch.equal(before, following) and following.tolist() == [3, 2]


def test_the_cache_keeps_only_what_its_resolutions_can_still_see() -> None:
    layer = attention((Resolution(1, 4, [(1, 4), (2, 9)]), Resolution(1, 4, [(1, 4), (3, None)])), tricks=False)
    state: dict[str, Tensor] = {}
    for seen in range(20):
        layer(torch.randn(1, 1, 10, dtype=torch.float64), None, placement(1, torch.device("cpu"), seen=seen), state)
    assert state["0.0.keys"].shape[2] == 3
    # Blocks that begin at 12 and later are less than 9 tokens before position 20.
    assert state["0.1.keys"].shape[2] == 4
    assert state["1.1.keys"].shape[2] == 20 // 3
    assert state["1.open_keys"].shape[2] == 2
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in state.values())


def pooled(resolution: Resolution, key: Tensor, value: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    pools = [BlockPooling(key.shape[1], key.shape[3], stride).to(key) for _, (stride, _) in resolution.coarse]
    blocks = [pool(key, value) for pool in pools]
    return [key, *(k for k, _ in blocks)], [value, *(v for _, v in blocks)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("scales", [[(1, 37)], [(1, 37), (4, None)], [(1, 16), (4, 60), (8, 130)]], ids=str)
def test_flex_attention_sees_the_same(scales: list[tuple[int, int | None]]) -> None:
    # Without a GPU it has no gradient; tests/test_on_a_gpu.py has it.
    resolution = Resolution(3, 16, scales)
    query, key, value = torch.randn(3, 2, 3, 250, 16)
    keys, values = pooled(resolution, key, value)
    with torch.no_grad():
        own = flex.attention_of_scales(query, torch.cat(keys, dim=2), torch.cat(values, dim=2), resolution)
        torch.testing.assert_close(own, attend(resolution, query, keys, values))


@pytest.mark.parametrize("chunk", [1, 3, 8])
@pytest.mark.parametrize(
    "scales", [[(1, None)], [(1, 7)], [(1, 4), (4, None)], [(1, 9), (3, 20)], [(1, 2), (2, 6), (6, None)]]
)
@pytest.mark.parametrize("kept", [0, 4096])
@pytest.mark.parametrize("with_documents", [False, True])
def test_chunks_of_queries_change_nothing_and_equal_pytorchs_own_kernel(
    chunk: int,
    scales: list[tuple[int, int | None]],
    kept: int,
    with_documents: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolution = Resolution(3, 6, scales)
    inputs = [t.requires_grad_() for t in torch.randn(3, 2, 3, 50, 6, dtype=torch.float64)]
    slope = torch.randn(2, 3, 50, 6, dtype=torch.float64)
    starts = torch.tensor([[0] * 20 + [20] * 30, [0] * 3 + [3] * 47]) if with_documents else None

    def outcome() -> list[Tensor]:
        whole = attend(resolution, inputs[0], *pooled(resolution, *inputs[1:]), starts)
        return [whole, *torch.autograd.grad(whole, inputs, slope)]

    monkeypatch.setattr("kalmagrove.nn.attend.is_by_hand", lambda _: False)
    expected = outcome()
    monkeypatch.undo()
    monkeypatch.setattr("kalmagrove.nn.attend.CHUNK_ON_CPU", chunk)
    monkeypatch.setattr("kalmagrove.nn.chunked.LONGEST_KEPT", kept)
    for ours, theirs in zip(outcome(), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_plain_causal_attention_equals_pytorchs_own_with_its_gradients(length: int) -> None:
    inputs = [t.requires_grad_() for t in torch.randn(3, 2, 3, length, 6, dtype=torch.float64)]
    weights = torch.randn(2, 3, length, 6, dtype=torch.float64)
    own = attend(Resolution(3, 6), inputs[0], [inputs[1]], [inputs[2]])
    fused = nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
    gradients = (torch.autograd.grad(y, inputs, weights) for y in (own, fused))
    for ours, theirs in ((own, fused), *zip(*gradients, strict=True)):
        assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize(
    ("length", "scales"), [(5, ((1, None),)), (9, ((1, 5), (2, None))), (30, ((1, 5), (2, 20), (4, None)))]
)
def test_scales_that_a_text_is_too_short_for_are_left_out(
    length: int, scales: tuple[tuple[int, int | None], ...]
) -> None:
    assert Resolution(1, 4, [(1, 5), (2, 20), (4, None)]).used(length).scales == scales


def test_pooling_starts_as_the_mean_and_leaves_out_the_block_that_is_not_finished() -> None:
    x = torch.arange(7.0).reshape(1, 1, 7, 1)
    for means in BlockPooling(1, 1, 3)(x, 10 * x):
        assert (means / means[0, 0, 0]).flatten().tolist() == [1.0, 4.0]


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
            for means, x in zip(pool(key, value), (key, value), strict=True):
                torch.testing.assert_close(means[0, head, block], weights @ x[0, head, here])


def test_the_gradients_of_pooling_are_autograds() -> None:
    key, value = torch.randn(2, 3, 2, 7, 4, dtype=torch.float64, requires_grad=True).unbind()
    pool = BlockPooling(2, 4, 3).double()
    nn.init.normal_(pool.query)
    nn.init.normal_(pool.bias)

    def plain(key: Tensor, value: Tensor, query: Tensor, bias: Tensor) -> list[Tensor]:
        blocks = [x[:, :, :6].unflatten(2, (2, 3)) for x in (key, value)]
        weights = (torch.einsum("bhnsd,hd->bhns", blocks[0], query[:, 0]) + bias).softmax(-1)
        return [torch.einsum("bhns,bhnsd->bhnd", weights, x) for x in blocks]

    inputs = (key, value, pool.query, pool.bias)
    slopes = torch.randn(2, 3, 2, 2, 4, dtype=torch.float64).unbind()
    own, expected = (torch.autograd.grad(means, inputs, slopes) for means in (pool(key, value), plain(*inputs)))
    for ours, theirs in zip(own, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_full_attention_equals_pytorchs_own() -> None:
    layer = attention((Resolution(3, 6),), tricks=False)
    layer.rotary = nn.ModuleDict()
    x = torch.randn(2, 9, 10, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (3, 6)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    assert torch.allclose(layer(x)[0], layer.o_proj(attended))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_heads": 0}, "must be positive"),
        ({"head_dim": -1}, "must be positive"),
        ({"scales": []}, "must be positive"),
        ({"scales": [(1, 0)]}, "must be positive"),
        ({"scales": [(1, 2.5)]}, "must be positive integers"),
        ({"scales": [(2, None)]}, "the first scale has stride 1"),
        ({"scales": [(1, None), (4, None)]}, "covers everything"),
        ({"scales": [(1, 8), (4, 16), (6, None)]}, "stride 6 is no multiple of the finer one, 4"),
        ({"scales": [(1, 3), (4, None)]}, "reach 3 is shorter than the next stride, 4"),
        ({"scales": [(1, 8), (4, 8)]}, "reach 8 is not above the finer one, 8"),
        ({"scales": [4]}, "a list of pairs"),
        ({"scales": 4}, "a list of pairs"),
    ],
)
def test_scales_that_do_not_fit_together_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Resolution(**{"num_heads": 1, "head_dim": 4} | wrong)
