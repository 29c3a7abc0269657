"""Encoding on the fused path: both routes find exactly the largest float32 dot products, whatever it takes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from saelab_kernels import compiled
from saelab_kernels.encode import reference

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from saelab_kernels.dots.fused import WIDTH, sampled_dot  # noqa: E402
from saelab_kernels.encode import above, emit, fused, settle, stream, surplus  # noqa: E402
from saelab_kernels.select import fused as select  # noqa: E402
from saelab_kernels.select.radix import batch_threshold  # noqa: E402

# the interpreter computes with numpy, which warns where infinity meets infinity
pytestmark = [pytest.mark.fused, pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUTES = ["A", "B"]
SHAPES = [
    (1, 1, 1, 1, torch.bfloat16),
    (3, 33, 129, 5, torch.float32),
    (2, 33, 129, 5, torch.bfloat16),
    (2, 33, 129, 5, torch.float16),
    (1, 7, 1000, 17, torch.float32),
    (2, 48, 40, 40, torch.bfloat16),
    (2, 16, 300, 1, torch.float32),
]
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few hundred features, so that results are put together from several."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(stream, "CHUNK_BYTES", 1)


@pytest.fixture
def layer(device):
    def layer(n_tokens, d, n_features, dtype=torch.float32):
        x = torch.randn(n_tokens, d, device=device).to(dtype)
        W = F.normalize(torch.randn(n_features, d, device=device), dim=1).to(dtype)
        return x, W, 0.1 * torch.randn(n_features, device=device)

    return layer


def every_exact(x, W, b):
    """All pre-activations as the fused path defines them; in torch where the interpreter would take seconds."""
    if W.is_cuda:
        return sampled_dot(x, W, torch.arange(len(W), device=W.device).expand(len(x), -1)) + b
    parts = x.float()[:, None] * W.float()
    parts = F.pad(parts, (0, WIDTH - parts.shape[2]))  # one product for each lane
    while parts.shape[2] > 1:
        left, right = parts.chunk(2, dim=2)
        parts = left + right
    return parts[:, :, 0] + b


def ranked(values, k):
    """The k largest of each row and their indices: NaN first, equal values (NaN among them) by ascending index."""
    return [part[:, :k] for part in values.sort(dim=1, descending=True, stable=True)]


def exact_topk(x, W, b, k):
    return ranked(every_exact(x, W, b), k)


def same(ours, expected):
    return all(torch.equal(a.nan_to_num(nan=7e37), e.nan_to_num(nan=7e37)) for a, e in zip(ours, expected, strict=True))


def packed(values, indices):
    """Candidates as the kernels write them, from the definition of their order."""
    bits = values.view(torch.int32).long()
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (order << 32) | (0x7FFFFFFF - indices)


def features_in(pairs):
    return 0x7FFFFFFF - (pairs & 0x7FFFFFFF)


# --- encode_emit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_tokens", "d", "n_features", "dtype"),
    [
        (1, 1, 1, torch.float32),
        (130, 33, 129, torch.bfloat16),
        (7, 33, 129, torch.float16),
        (7, 33, 129, torch.float32),
    ],
)
def test_what_is_clearly_above_both_thresholds_is_emitted_and_what_is_clearly_below_is_not(
    layer, n_tokens, d, n_features, dtype
):
    x, W, b = layer(n_tokens, d, n_features, dtype)
    row_thr, col_thr = torch.randn(n_tokens, device=x.device), torch.randn(n_features, device=x.device)
    for rows, columns in ((row_thr, None), (None, col_thr), (row_thr, col_thr)):
        found = emit.encode_emit(x, W, b, rows, columns, n_features)
        pre_acts = x.double() @ W.double().T + b.double()
        height = torch.full_like(pre_acts, INF)
        for threshold in (rows[:, None] if rows is not None else None, columns):
            height = height if threshold is None else torch.minimum(height, pre_acts - threshold)
        sizes = x.double().norm(dim=1)[:, None] * W.double().norm(dim=1)
        rounding = 4 * 2.0**-24 * d**0.5 * sizes
        for n in range(n_tokens):
            emitted = torch.zeros(n_features, dtype=torch.bool, device=x.device)
            emitted[features_in(found.pairs[n, : found.counts[n]])] = True
            assert emitted.sum() == found.counts[n]
            assert emitted[height[n] > rounding[n]].all()
            assert not emitted[height[n] < -rounding[n]].any()


def test_emitted_values_are_float32_sums_and_not_tf32(layer, relative_rms):
    x, W, b = layer(5, 200, 70)
    found = emit.encode_emit(x, W, b, None, None, 70)
    best = select.select_topk(found.pairs, found.counts, 70)
    values = torch.empty_like(best.values).scatter_(1, best.indices, best.values)
    assert relative_rms(values, x.double() @ W.double().T + b) < 1e-6


def test_a_count_beyond_the_room_is_reported_and_the_room_is_kept(layer):
    x, W, b = layer(3, 16, 200)
    found = emit.encode_emit(x, W, b, None, None, 20)
    assert found.counts.tolist() == [200] * 3
    assert all(len(set(features_in(row).tolist())) == 20 for row in found.pairs)


def test_nan_is_always_emitted_and_nothing_beyond_the_last_feature_is(layer):
    x, W, b = layer(5, 16, 40)
    x[2], W[7] = NAN, NAN
    infinite = torch.full((5,), INF, device=x.device)
    found = emit.encode_emit(x, W, b, infinite, None, 40)
    assert found.counts.tolist() == [1, 1, 40, 1, 1]
    best = select.select_topk(found.pairs, found.counts, 40)
    assert best.indices[2].tolist() == list(range(40))
    assert best.values[2].isnan().all()
    assert (best.indices[:2, 0] == 7).all()


def test_the_same_set_is_emitted_whatever_the_tile(layer):
    x, W, b = layer(70, 40, 150, torch.bfloat16)
    thresholds = torch.zeros(70, device=x.device)
    small = emit.Tile(32, 32, 16, 4, 2)
    for found in (emit.encode_emit(x, W, b, thresholds, None, 150, tile=tile) for tile in (None, small)):
        expected = (x.float() @ W.float().T + b > 0).sum(1)
        assert (found.counts - expected).abs().max() <= 1


# --- selection ------------------------------------------------------------------------------------------------------


@triton.jit
def _pack(value_ptr, pair_ptr, N: tl.constexpr):
    index = tl.arange(0, N)
    tl.store(pair_ptr + index, select.pack(select.order_of(tl.load(value_ptr + index)), index))


@pytest.mark.parametrize(("cap", "k"), [(1, 1), (7, 3), (129, 97), (1100, 64), (40, 40)])
def test_selection_is_a_sort_of_the_candidates_bit_for_bit(device, cap, k):
    values, indices = torch.randn(2, cap, device=device), torch.arange(cap, device=device).flip(0).expand(2, -1)
    values[:, ::3] = 0.5  # many equal values
    pairs = packed(values, indices)
    counts = torch.tensor([cap + 5, cap // 2], dtype=torch.int32, device=device)
    found = select.select_topk(pairs, counts, k)
    for n, count in enumerate((cap, cap // 2)):
        order = pairs[n, :count].sort(descending=True).indices[:k]
        n_found = len(order)
        assert torch.equal(found.values[n, :n_found], values[n, order])
        assert torch.equal(found.indices[n, :n_found], indices[n, order])
        assert (found.values[n, n_found:] == -INF).all()
        assert not found.indices[n, n_found:].any()
        assert found.kth[n] == found.values[n, -1]


def test_the_order_is_that_of_the_reference_for_every_kind_of_number(device):
    special = [-0.0, 0.0, -0.0, INF, -INF, NAN, -NAN, 1e-45, -1e-45, 3e38, -3e38, 1.0, 1.0, -1.0, 2.5, 7.0]
    values = torch.tensor(special, device=device)
    pairs = torch.empty(1, len(special), dtype=torch.int64, device=device)
    _pack[1,](values, pairs, N=len(special))
    best = select.select_topk(pairs, torch.tensor([99], dtype=torch.int32, device=device), len(special))
    assert same((best.values, best.indices), ranked(values[None], len(special)))


def test_selection_beyond_what_registers_hold_is_refused(device):
    with pytest.raises(ValueError, match="select_topk takes 1 to 1024"):
        select.select_topk(torch.zeros(1, 2000, dtype=torch.int64, device=device), torch.zeros(1), 1025)


@pytest.mark.parametrize("kind", ["random", "equal", "ascending", "descending", "peak", "nan", "minus infinity"])
def test_the_running_largest_of_chunks_are_those_of_the_whole(device, kind):
    n_features, keep = 1300, 30
    rising = torch.arange(n_features, device=device).float()
    column = {
        "random": torch.randn(n_features, device=device),
        "equal": torch.ones(n_features, device=device),
        "ascending": rising,
        "descending": -rising,
        "peak": -(rising - 640).abs(),  # in the block that would be the first not to fit
        "nan": torch.where(rising % 3 == 0, NAN, rising),
        "minus infinity": torch.full_like(rising, -INF),
    }[kind]
    x, b = torch.ones(1, 1, device=device), torch.zeros(n_features, device=device)
    count, pair = stream.running_largest(x, column[:, None], b, keep)
    best = select.select_topk(pair, count, keep)
    assert torch.equal(best.indices, ranked(column[None], keep)[1])
    features = features_in(pair[0, : count[0]])
    assert (features.diff() > 0).all()


@pytest.mark.parametrize("n_keep", [1, 77, 2500, 5000])
def test_the_threshold_of_a_batch_is_its_nth_largest_value(device, n_keep):
    values = torch.randn(5000, device=device)
    values[::2] = values[::2].round()  # ties
    values[:2], values[2] = NAN, -INF
    expected = values.sort(descending=True).values[n_keep - 1]
    found = batch_threshold(values, n_keep)
    assert found.shape == ()
    assert torch.equal(found.nan_to_num(nan=7e37), expected.nan_to_num(nan=7e37))


def test_a_threshold_beyond_the_values_is_refused(device):
    with pytest.raises(ValueError, match="n_keep must be between 1 and the 3 values, got 4"):
        batch_threshold(torch.zeros(3, device=device), 4)


# --- encode_topk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("n_tokens", "d", "n_features", "k", "dtype"), SHAPES)
def test_both_routes_give_the_largest_float32_dot_products_bit_for_bit(
    layer, relative_rms, route, n_tokens, d, n_features, k, dtype
):
    x, W, b = layer(n_tokens, d, n_features, dtype)
    ours = fused.encode_topk(x, W, b, k, route=route)
    assert same(ours, exact_topk(x, W, b, k))
    expected = reference.encode_topk(x.double(), W.double(), b.double(), k)
    assert relative_rms(ours[0], expected[0]) < 1e-6
    assert (ours[1] == expected[1]).double().mean() > 0.95  # the rest are swaps within rounding


@pytest.mark.parametrize("route", ROUTES)
def test_two_runs_are_equal_and_a_token_does_not_depend_on_its_batch(layer, route):
    x, W, b = layer(2, 24, 300)
    whole = fused.encode_topk(x, W, b, 9, route=route)
    assert same(whole, fused.encode_topk(x, W, b, 9, route=route))
    assert same([part[1:2] for part in whole], fused.encode_topk(x[1:2], W, b, 9, route=route))


@pytest.mark.parametrize("route", ROUTES)
def test_ties_go_to_the_lower_index_also_across_chunks(layer, route):
    x, W, b = layer(2, 8, 300)
    W[:], b[:] = W[:1].clone(), 0.0
    b[[270, 17]] = 1.0
    values, indices = fused.encode_topk(x, W, b, 6, route=route)
    assert indices.tolist() == [[17, 270, 0, 1, 2, 3]] * 2
    assert (values[:, 2:] == values[:, 2:3]).all()


@pytest.mark.parametrize("route", ROUTES)
def test_a_token_of_zeros_has_the_largest_biases(layer, route):
    x, W, b = layer(2, 8, 400)
    x[1] = 0
    b -= 5  # negative values are ranked too
    values, indices = fused.encode_topk(x, W, b, 7, route=route)
    assert torch.equal(values[1], b.sort(descending=True).values[:7])
    assert torch.equal(indices[1], b.sort(descending=True, stable=True).indices[:7])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_token_that_is_not_finite_stays_so_and_spoils_no_other(layer, route, bad):
    x, W, b = layer(3, 16, 90)
    good = fused.encode_topk(x, W, b, 7, route=route)
    x[1, 3] = bad
    ours = fused.encode_topk(x, W, b, 7, route=route)
    assert not ours[0][1].isfinite().any()
    assert same(ours, exact_topk(x, W, b, 7))
    assert same([part[[0, 2]] for part in ours], [part[[0, 2]] for part in good])


@pytest.mark.parametrize("route", ROUTES)
def test_a_weight_that_is_not_a_number_reaches_every_token(layer, route):
    x, W, b = layer(2, 16, 90)
    W[63, 4] = NAN
    values, indices = fused.encode_topk(x, W, b, 7, route=route)
    assert (indices[:, 0] == 63).all()
    assert values[:, 0].isnan().all()
    assert same((values, indices), exact_topk(x, W, b, 7))


@pytest.mark.parametrize(("rank", "aim", "room"), [(1, 1, 12), (16, 12, 1), (1, 1, 1)])
def test_rows_with_too_few_or_too_many_candidates_are_searched_again_exactly(layer, monkeypatch, rank, aim, room):
    x, W, b = layer(3, 16, 400)
    emitted = []
    spy = emit.encode_emit
    monkeypatch.setattr(emit, "encode_emit", lambda *args: emitted.append(spy(*args)) or emitted[-1])
    for name, value in (("SAMPLE_RANK", rank), ("AIM", aim), ("ROOM", room)):
        monkeypatch.setattr(fused, name, value)
    ours = fused.encode_topk(x, W, b, 8, route="B")
    counts, cap = emitted[-1].counts, emitted[-1].pairs.shape[1]
    assert ((counts < fused.candidates(8, 400)) | (counts > cap)).any()
    assert same(ours, exact_topk(x, W, b, 8))


@pytest.mark.parametrize("route", ROUTES)
def test_what_sixteen_bits_cannot_tell_apart_is_decided_exactly(layer, monkeypatch, route):
    x, W, b = layer(2, 24, 120)
    W = F.normalize(W[:1] + 1e-3 * W, dim=1)  # a hundred nearly equal features: no margin could be enough
    searched = []
    spy = fused._again
    monkeypatch.setattr(fused, "_again", lambda x, *rest: searched.append(len(x)) or spy(x, *rest))
    assert same(fused.encode_topk(x, W, b * 1e-4, 8, route=route), exact_topk(x, W, b * 1e-4, 8))
    assert sum(searched) == 2


def test_a_row_whose_proof_fails_twice_is_rescored_in_full(layer, monkeypatch):
    x, W, b = layer(2, 8, 200)
    monkeypatch.setattr(settle, "SAFETY", 1e30)
    assert same(fused.encode_topk(x, W, b, 5, route="A"), exact_topk(x, W, b, 5))


def test_a_copy_of_the_weights_in_low_precision_changes_nothing_but_the_search(layer):
    x, W, b = layer(2, 24, 300)
    ours = fused.encode_topk(x, W, b, 6, W_low=W.half())
    assert same(ours, exact_topk(x, W, b, 6))
    assert same(fused.encode_topk(x, W, b, 6, W_low=W), ours)


def test_blocks_of_tokens_change_nothing(layer, monkeypatch):
    x, W, b = layer(3, 8, 200)
    whole = fused.encode_topk(x, W, b, 4)
    monkeypatch.setattr(stream, "ROWS", 2)
    assert same(fused.encode_topk(x, W, b, 4), whole)


def test_a_k_beyond_the_registers_is_written_out(layer, relative_rms):
    x, W, b = layer(2, 8, 1500)
    values, indices = fused.encode_topk(x, W, b, 700)
    expected = reference.encode_topk(x.double(), W.double(), b.double(), 700)
    assert values.dtype == torch.float32
    assert relative_rms(values, expected[0]) < 1e-6
    assert (indices == expected[1]).double().mean() > 0.95


def test_an_empty_batch_gives_an_empty_result(layer):
    x, W, b = layer(0, 16, 300)
    values, indices = fused.encode_topk(x, W, b, 4)
    assert values.shape == indices.shape == (0, 4)
    assert indices.dtype == torch.int64
    assert above.encode_above(x, W, b, b).offsets.tolist() == [0]


def test_a_fused_product_that_cannot_be_compiled_gives_way_to_chunks(layer, monkeypatch):
    from triton.runtime.errors import OutOfResources

    def fail(*_):
        raise OutOfResources(300000, 232448, "shared memory")

    monkeypatch.setattr(compiled, "_failed", {})
    monkeypatch.setattr(emit, "encode_emit", fail)
    monkeypatch.setattr(fused, "route_for", lambda *_: fused.Choice("B", "for the test"))
    x, W, b = layer(2, 8, 200)
    assert same(fused.encode_topk(x, W, b, 4), exact_topk(x, W, b, 4))
    with pytest.raises(OutOfResources):
        fused.encode_topk(x, W, b, 4, route="B")


@pytest.mark.parametrize(
    ("d", "n_features", "k", "dtype", "name", "reason"),
    [
        (768, 65536, 64, torch.bfloat16, "B", "expected times"),
        (2304, 65536, 64, torch.bfloat16, "A", "expected times"),
        (768, 65536, 64, torch.float32, "A", "no tensor cores"),
        (768, 200, 64, torch.bfloat16, "A", "most of 200 features"),
        (768, 2048, 64, torch.bfloat16, "A", "tiles"),
    ],
)
def test_the_route_follows_from_the_shape_and_says_why(d, n_features, k, dtype, name, reason):
    choice = fused.route_for(8192, d, n_features, k, dtype)
    assert choice.name == name
    assert reason in choice.reason


def test_a_route_that_there_is_not_is_refused(layer):
    with pytest.raises(ValueError, match='route must be "A", "B" or None, got \'C\''):
        fused.encode_topk(*layer(1, 1, 1), 1, route="C")


# --- encode_above ---------------------------------------------------------------------------------------------------


def exact_above(x, W, b, floor):
    chosen = ~(every_exact(x, W, b) <= floor)
    tokens, features = chosen.nonzero(as_tuple=True)
    return every_exact(x, W, b)[tokens, features], features, F.pad(chosen.sum(1).cumsum(0), (1, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_tokens", "d", "n_features"), [(1, 1, 1), (3, 33, 129), (1, 16, 1000)])
def test_everything_above_its_floor_is_found_and_nothing_else(layer, dtype, n_tokens, d, n_features):
    x, W, b = layer(n_tokens, d, n_features, dtype)
    floor = torch.randn(n_features, device=x.device)
    assert same(above.encode_above(x, W, b, floor), exact_above(x, W, b, floor))


def test_the_floor_itself_is_not_above_it(layer):
    x, W, b = layer(2, 16, 129)
    pre_acts = every_exact(x, W, b)
    assert same(above.encode_above(x, W, b, pre_acts[1]), exact_above(x, W, b, pre_acts[1]))
    assert above.encode_above(x[1:2], W, b, pre_acts[1]).offsets.tolist() == [0, 0]


def test_tokens_with_more_than_there_was_room_for_and_blocks_of_tokens_change_nothing(layer, monkeypatch):
    x, W, b = layer(5, 16, 120)
    x[[1, 4]] = 0  # next to nothing for these
    floor = b + 0.01
    whole = above.encode_above(x, W, b, floor)
    assert same(whole, above.encode_above(x, W, b, floor, cap=20))
    assert whole.offsets.diff().max() > 20
    monkeypatch.setattr(stream, "ROWS", 2)
    assert same(whole, above.encode_above(x, W, b, floor, cap=60))


def test_infinities_and_nan_count_as_the_definition_says(layer):
    x, W, b = layer(4, 8, 90)
    floor = torch.zeros(90, device=x.device)
    x[1, 2], x[2, 3], W[5, 1], b[6], floor[7], floor[8] = NAN, INF, NAN, -INF, INF, -INF
    assert same(above.encode_above(x, W, b, floor), exact_above(x, W, b, floor))


def test_an_error_beyond_what_was_expected_widens_the_search(layer, monkeypatch):
    x, W, b = layer(2, 64, 90)
    x[:, 0], W[:, 0], W[:, 1:] = 100.25, 1.003, 0.1 * W[:, 1:]  # the error of one product does not average out
    floor = every_exact(x, W, b)[0] - 1e-4
    spreads = []
    spy = surplus.emit_above
    monkeypatch.setattr(surplus, "emit_above", lambda *a, **b: spreads.append(b["spread"]) or spy(*a, **b))
    assert same(above.encode_above(x, W, b, floor), exact_above(x, W, b, floor))
    assert len(spreads) == 2


# --- on a GPU, at real sizes ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("d", "n_features", "k"), [(768, 65536, 64), (2304, 16384, 32), (1000, 30001, 129)])
def test_both_routes_agree_bit_for_bit_at_real_sizes(layer, dtype, d, n_features, k):
    x, W, b = layer(4096 + 33, d, n_features, dtype)
    a = fused.encode_topk(x, W, b, k, route="A")
    for route in ("B", "B", "A"):
        assert same(a, fused.encode_topk(x, W, b, k, route=route))
    assert same([part[:40] for part in a], exact_topk(x[:40], W, b, k))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_everything_above_its_floor_is_found_at_real_sizes(layer, dtype):
    x, W, b = layer(2000, 768, 20000, dtype)
    floor = 2.5 + torch.rand(20000, device=x.device)
    ours = above.encode_above(x, W, b, floor, cap=64)
    assert same(ours, above.encode_above(x, W, b, floor))
    some = above.encode_above(x[:50], W, b, floor)
    assert same(some, exact_above(x[:50], W, b, floor))
    assert torch.equal(ours.acts[: len(some.acts)], some.acts)
