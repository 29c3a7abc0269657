"""Search: the top activations of every feature and their histogram over many tokens, for three kinds of encoder.

Ours goes over all tokens in equal segments. In between, on a share of the segments, the encoder's product alone is run
in both precisions, which is the floor, and the way peers search: all activations of a chunk, and a running torch.topk.
Their times are scaled to all tokens. Peers keep no histogram here; ours does.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gates
from benchmarks.cases.inputs import exact_pre_acts
from benchmarks.data import planted
from benchmarks.memory import peak_bytes
from benchmarks.shapes import Shape
from benchmarks.timing import timer

N_TOP = 32
KINDS = ("relu", "jumprelu", "topk")
_N_SEGMENTS = 20
#: The others run on every fourth segment: enough to know their rate, and a fourth of the time.
_EVERY = 4
#: A pass prepares its weights once for a chunk, so ours takes four of the chunks that suit a product alone.
_OUR_CHUNKS = 4
#: Tokens of the checks, and features at which the top activations are compared with float64.
_N_CHECKED, _N_FEATURES_CHECKED = 12_000, 64
_LARGEST_ERROR = {"cpu": 1e-5, "cuda": 1e-2}  # of bfloat16 weights on a GPU


class Encoder(NamedTuple):
    """An encoder of which about k features are active on a token."""

    kind: str
    W: Tensor  # [F, d]
    b: Tensor  # float32 [F]
    threshold: Tensor  # float32 [F], of jumprelu
    k: int


def run(shapes: tuple[Shape, ...], *, n_tokens: int, device: str, smoke: bool = False) -> list[dict[str, Any]]:
    """One row for each shape and kind; a shape's tokens are those of a chunk.

    Raises:
        GateError: interpreted kernels, no such device, a wrong result, or one that depends on the chunks.
    """
    gates.refuse_interpreted()
    gates.refuse_unknown_device(device)
    rows = []
    for shape in shapes:
        acts = tokens_to_search(shape, n_tokens, device)
        for kind in KINDS:
            encoder = new_encoder(kind, shape, acts)
            check(encoder, acts[: min(_N_CHECKED, len(acts))], shape)
            rows.append(_row(encoder, acts, shape))
    return rows


def tokens_to_search(shape: Shape, n_tokens: int, device: str) -> Tensor:
    """bfloat16 [n_tokens, d], as a cache holds them."""
    acts = torch.empty(n_tokens, shape.width, dtype=torch.bfloat16, device=device)
    for draw, block in enumerate(acts.split(2**15)):
        settings = {"n_directions": max(64, 2 * shape.width), "active": 16, "seed": 0, "draw": draw}
        block.copy_(planted(len(block), shape.width, device=device, **settings))
    return acts


def new_encoder(kind: str, shape: Shape, acts: Tensor) -> Encoder:
    """Random unit rows. A feature's threshold, or minus its bias, lets k / F of the tokens through."""
    dtype = torch.bfloat16 if acts.is_cuda else torch.float32
    generator = torch.Generator(device=acts.device).manual_seed(1)
    rows = torch.randn(shape.features, shape.width, generator=generator, device=acts.device)
    W = F.normalize(rows, dim=1).to(dtype)
    sample = acts[:: max(1, len(acts) // 4096)].to(dtype)
    n_above = max(1, round(len(sample) * shape.k / shape.features))
    limits = [(sample @ part.T).topk(n_above, dim=0).values[-1] for part in W.split(4096)]
    # a little below, since exactly at an activation rounding would decide whether it is above
    quantile = 0.999 * torch.cat(limits).float().clamp_min(1e-3)
    nothing = torch.zeros_like(quantile)
    return Encoder(kind, W, -quantile if kind == "relu" else nothing, quantile, shape.k)


def search(encoder: Encoder, acts: Tensor, chunk: int, *, into: Any = None, first: int = 0) -> Any:
    """Search ``acts``, the first of which is token ``first``, in chunks; continues ``into``."""
    from saelab_kernels.search.stream import FeatureSearch, SearchSettings

    device = str(acts.device)
    found = into or FeatureSearch(len(encoder.W), SearchSettings(n_top=N_TOP), device=device)
    for start in range(0, len(acts), chunk):
        features, tokens, values = firings(encoder, acts[start : start + chunk].to(encoder.W.dtype))
        found.add(features, tokens + (first + start), values)
    return found


def firings(encoder: Encoder, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Feature, token and activation of each firing."""
    from saelab_kernels import encode_above, encode_jumprelu, encode_topk

    if encoder.kind == "topk":
        top = encode_topk(x, encoder.W, encoder.b, encoder.k)
        tokens, slots = (top.top_acts > 0).nonzero(as_tuple=True)
        return top.top_indices[tokens, slots], tokens, top.top_acts[tokens, slots]
    if encoder.kind == "relu":
        active = encode_above(x, encoder.W, encoder.b, torch.zeros_like(encoder.b))
    else:
        active = encode_jumprelu(x, encoder.W, encoder.b, encoder.threshold).active
    return active.features, active.tokens, active.acts


def check(encoder: Encoder, acts: Tensor, shape: Shape) -> None:
    """Three chunkings, one of them backwards, give the same bits; the top activations are those of float64.

    Raises:
        GateError: they do not.
    """
    whole = _tensors(search(encoder, acts, shape.tokens))
    odd = _tensors(search(encoder, acts, max(1, shape.tokens // 3 + 1)))
    backwards, half = None, len(acts) // 2
    for first, part in ((half, acts[half:]), (0, acts[:half])):
        backwards = search(encoder, part, max(1, shape.tokens // 2 - 1), into=backwards, first=first)
    for other in (odd, _tensors(backwards)):
        different = [name for name, tensor in whole.items() if not torch.equal(tensor, other[name])]
        if different:
            raise gates.GateError(f"{encoder.kind}: {', '.join(different)} depend on the chunks")
    features = torch.linspace(0, shape.features - 1, min(_N_FEATURES_CHECKED, shape.features)).long()
    best = _exact_best(encoder, acts, features.to(acts.device))
    error = gates.rms_error(whole["values"][features.to(acts.device)].double(), best)
    if not error <= _LARGEST_ERROR[acts.device.type]:
        raise gates.GateError(f"{encoder.kind}: the top activations are off by {error:.1e}")


def _exact_best(encoder: Encoder, acts: Tensor, features: Tensor) -> Tensor:
    """The N_TOP largest activations of some features in float64, 0 where there are not so many: [n, N_TOP]."""
    blocks = []
    for block in acts.split(512):
        x = block.to(encoder.W.dtype)
        if encoder.kind == "topk":  # which features survive depends on all others
            every = exact_pre_acts(x, encoder.W, encoder.b)
            top = every.topk(encoder.k, dim=1)
            values = torch.zeros_like(every).scatter_(1, top.indices, top.values.relu())[:, features]
        else:
            values = exact_pre_acts(x, encoder.W[features], encoder.b[features])
            limit = encoder.threshold[features].double() if encoder.kind == "jumprelu" else 0.0
            values = values.masked_fill(values <= limit, 0)
        blocks.append(values)
    values = torch.cat([*blocks, blocks[0].new_zeros(N_TOP, len(features))])
    return values.topk(N_TOP, dim=0).values.T


def _tensors(found: Any) -> dict[str, Tensor]:
    """What a search found, as tensors that can be compared."""
    result = found.found()
    return {
        "values": result.top.values,
        "positions": result.top.positions,
        "histogram": result.tally.counts,
        "sums": result.tally.sums,
    }


class _OurPass:
    """A search that goes on from segment to segment."""

    def __init__(self, encoder: Encoder, chunk: int) -> None:
        self.encoder, self.chunk = encoder, chunk
        self.state: Any = None
        self.n_tokens = 0

    def __call__(self, part: Tensor) -> None:
        self.state = search(self.encoder, part, self.chunk, into=self.state, first=self.n_tokens)
        self.n_tokens += len(part)


def _row(encoder: Encoder, acts: Tensor, shape: Shape) -> dict[str, Any]:
    device, chunk = acts.device.type, shape.tokens
    segments = acts.split(max(1, -(-len(acts) // _N_SEGMENTS)))
    ours = _OurPass(encoder, _OUR_CHUNKS * chunk)
    run: dict[str, Callable[[Tensor], object]] = {"saelab": ours}
    for precision in (torch.bfloat16, torch.float32):
        name = str(precision).removeprefix("torch.")
        run[f"product alone {name}"] = functools.partial(_alone, encoder, chunk, precision)
        run[f"dense + running topk {name}"] = functools.partial(_as_peers, encoder, chunk, precision)

    for name, contender in run.items():  # builds kernels, touches memory
        (_OurPass(encoder, _OUR_CHUNKS * chunk) if name == "saelab" else contender)(segments[0])
    rates: dict[str, list[float]] = {name: [] for name in run}
    for index, part in enumerate(segments):
        for name, contender in run.items():
            if name == "saelab" or index % _EVERY == 0:
                rates[name].append(timer(functools.partial(contender, part), device)() / len(part))
    last_merge_s = timer(lambda: ours.state.found(), device)()

    contenders = {name: _numbers(values, len(acts)) for name, values in rates.items()}
    contenders["saelab"]["median_ms"] = round(contenders["saelab"]["median_ms"] + 1000 * last_merge_s, 3)
    floor_ms = min(numbers["median_ms"] for name, numbers in contenders.items() if name.startswith("product"))
    sample = acts[: max(chunk, len(acts) // 10)]
    for name, numbers in contenders.items():
        contender = _OurPass(encoder, _OUR_CHUNKS * chunk) if name == "saelab" else run[name]
        numbers["peak_bytes"] = peak_bytes(functools.partial(contender, sample), device)
        numbers["over_floor"] = round(numbers["median_ms"] / floor_ms, 3)
        print(f"{shape} {len(acts):,} tokens  {encoder.kind:9} {name:30} {numbers['median_ms'] / 1000:9.2f} s")
    return {
        "op": "search",
        "what": encoder.kind,
        "shape": shape._asdict(),
        "n_tokens": len(acts),
        "n_top": N_TOP,
        "active_per_token": round(float(_tensors(ours.state)["histogram"].sum()) / len(acts), 2),
        "identical_for_chunkings": True,  # else the gate would have refused
        "floor_ms": floor_ms,
        "contenders": contenders,
        "not_timed": {},
    }


def _alone(encoder: Encoder, chunk: int, precision: torch.dtype, acts: Tensor) -> None:
    """The encoder's product, into the same memory for each chunk."""
    W = encoder.W.to(precision)
    out = torch.empty(chunk, len(W), dtype=precision, device=acts.device)
    for start in range(0, len(acts), chunk):
        x = acts[start : start + chunk].to(precision)
        torch.mm(x, W.T, out=out[: len(x)])


def _as_peers(encoder: Encoder, chunk: int, precision: torch.dtype, acts: Tensor) -> Tensor:
    """All activations of a chunk, each feature's N_TOP largest, and the largest of those and the running ones."""
    W, b = encoder.W.to(precision), encoder.b.to(precision)
    best = torch.zeros(N_TOP, len(W), dtype=precision, device=acts.device)
    where = torch.zeros(N_TOP, len(W), dtype=torch.int64, device=acts.device)
    for start in range(0, len(acts), chunk):
        values = F.linear(acts[start : start + chunk].to(precision), W, b)
        if encoder.kind == "topk":
            top = values.topk(encoder.k, dim=1, sorted=False)
            values = torch.zeros_like(values).scatter_(1, top.indices, top.values.relu())
        elif encoder.kind == "jumprelu":
            values.masked_fill_(values <= encoder.threshold.to(precision), 0)
        else:
            values.relu_()
        new = values.topk(min(N_TOP, len(values)), dim=0)
        both, places = torch.cat([best, new.values]), torch.cat([where, new.indices + start])
        best, kept = both.topk(N_TOP, dim=0)
        where = places.gather(0, kept)
    return best


def _numbers(seconds_per_token: list[float], n_tokens: int) -> dict[str, Any]:
    """Milliseconds for all tokens: from the mean rate, and from the rates of the fastest and slowest fifth."""
    fifths = statistics.quantiles(seconds_per_token, n=5, method="inclusive") if len(seconds_per_token) > 1 else None
    low, high = (fifths[0], fifths[3]) if fifths else seconds_per_token * 2
    mean = statistics.fmean(seconds_per_token)
    median_ms, low_ms, high_ms = (round(1000 * rate * n_tokens, 3) for rate in (mean, low, high))
    return {"median_ms": median_ms, "low_ms": low_ms, "high_ms": high_ms}
