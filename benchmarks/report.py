"""The table of benchmarks/README.md and the plot of times over floors, written from results/*.json and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import record
from benchmarks.shapes import Shape

README = Path(__file__).parent / "README.md"

_HEAD = """\
# Benchmarks

Written by `python -m benchmarks report` from `results/*.json`; a test compares the two, so edit neither by hand.

Correct first, timed second: before anything is timed, its result is compared with the operation's reference in float64
on a sample of tokens and features. What fails gets no time, and interpreted kernels are refused. All contenders of a
row run in turn, round after round, in one session of one machine, twice each, of which the second run counts; peers in
an environment of their own time their own step and are asked for one at a time. Rows that we lose stay.

```bash
make bench-peers                      # once: sae-lens, dictionary-learning and sparsify into .venv-peer
make bench                            # everything for this machine's CPU, then this file
python -m benchmarks train --rounds 11 --shapes 2048x576x4608k32
python -m benchmarks ops --ops encode_topk,feature_step
python -m benchmarks all --device cuda    # needs torch, triton and numpy alone
bash benchmarks/gpu_run.sh            # on a rented GPU: correctness first, then all of it, within ten minutes
python -m benchmarks --help
```

- **ms** is the median, behind it the 20 and 80 % percentiles. On a GPU between two events, the L2 cache flushed before.
- **x floor**: the median over the least time possible, from the bytes and flops of `floors.py` and this device's
  measured ceilings (a copy, and the encoder's product in the faster precision).
- **peak** is memory beyond what was held before the run: torch's allocator on a GPU, resident pages on a CPU.
- **saelab is**: their median over ours; below 1 we lose.
- A shape is tokens x width x features, k active features a token.
"""

_MEANING = {
    "ops": (
        "Single operations",
        "Each against torch's natural alternatives. `forward + backward` includes the gradients that training needs; "
        "the backward pass of `decode_loss` is built in, and `feature_step` changes the weights in place.",
    ),
    "train": (
        "A whole training step",
        "TopK with AuxK, 5 % of the features dead: forward, backward, projection of the decoder's gradient, clipping, "
        "Adam, rows back to unit norm. `saelab` is the step of saelab's training, `saelab_kernels` the same from the "
        "kernels alone. `torch sparse` is topk, embedding_bag, and a sort with a bag of tokens for each feature: the "
        "honest baseline. In `bfloat16` rows the encoder's product has that precision and its values are used as they "
        "come; ours are rescored in float32. Peers run as their own trainers do; they neither project nor normalise "
        "where their trainers do not.",
    ),
    "search": (
        "Search for top activations",
        "The largest activations of every feature and its histogram, over all tokens. The floor is the encoder's "
        "product alone in the faster precision; the peers' way is a product chunk by chunk with a running torch.topk, "
        "without a histogram. Times are for all tokens; those of the others are measured on a quarter of them, in "
        "between ours. A shape's tokens are those of a chunk; peak is over a tenth of all tokens. Before, three "
        "chunkings gave the same bits.",
    ),
    "quality": (
        "Equal loss",
        "Our step and the peer's from the same weights, on the same tokens in the same order, with the same learning "
        "rates: squared error an entry of held-out tokens and variance explained of them (EV), and the time of all "
        "steps, which alternate. `ratio` is our error over theirs; at most 1.01 counts as equal.",
    ),
}


def write(results: Path = record.RESULTS, readme: Path = README) -> None:
    """Write the README and, beside it, a plot for each device that has times over floors."""
    records = record.read(results)
    readme.write_text(text(records), encoding="utf-8")
    for device in sorted({entry["device"] for entry in records}):
        if svg := plot(records, device):
            (readme.parent / f"times_over_floor_{device}.svg").write_text(svg, encoding="utf-8")
    print(f"written: {readme}")


def text(records: list[dict[str, Any]]) -> str:
    """The whole README.

    Raises:
        ValueError: a record is of a smoke run, whose times mean nothing.
    """
    for entry in records:
        if entry["smoke"]:
            raise ValueError(f"{entry['topic']}_{entry['device']}.json is of a smoke run; time it in earnest first")
    parts = [_HEAD]
    if not records:
        parts.append("No results yet.\n")
    for device in sorted({entry["device"] for entry in records}):
        if plot(records, device):
            parts.append(f"![Times over floors, {device}](times_over_floor_{device}.svg)\n")
    parts += [_section(entry) for entry in records]
    return "\n".join(parts)


def _section(entry: dict[str, Any]) -> str:
    title, meaning = _MEANING[entry["topic"]]
    machine = {name: value for name, value in entry["machine"].items() if value is not None}
    facts = ", ".join(f"{name} {value}" for name, value in machine.items() if name != "device")
    lines = [
        f"## {title}, {entry['device']}\n",
        meaning + "\n",
        f"{machine['device']}; {facts}; {entry['date']}; `{entry['command']}`\n",
    ]
    table = _quality_table if entry["topic"] == "quality" else _timing_table
    lines += table(entry["rows"])
    lines += [""] + [f"- {note}" for note in _notes(entry["rows"])] if any(_notes(entry["rows"])) else []
    return "\n".join(lines) + "\n"


def _timing_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| what | shape | floor ms | contender | ms | 20..80 % | x floor | peak MB | saelab is |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        ours = row["contenders"].get("saelab") or row["contenders"].get("saelab_kernels")
        for index, (name, numbers) in enumerate(row["contenders"].items()):
            first = index == 0
            ratio = numbers["median_ms"] / ours["median_ms"] if ours and numbers is not ours else None
            peak = numbers["peak_bytes"]
            cells = (
                _label(row) if first else "",
                str(Shape(**row["shape"])) if first else "",
                _number(row["floor_ms"]) if first else "",
                f"**{name}**" if name.startswith("saelab") else _named(name, numbers),
                _number(numbers["median_ms"]),
                f"{_number(numbers['low_ms'])}..{_number(numbers['high_ms'])}",
                _number(numbers["over_floor"]),
                "" if peak is None else _number(peak / 1e6),
                "" if ratio is None else f"{ratio:.2f}x",
            )
            yield "| " + " | ".join(cells) + " |"


def _quality_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    heads = ["shape", "tokens from", "seed", "steps", "saelab", "EV"]
    heads += ["peer", "its error", "EV", "ratio", "equal", "its time over ours"]
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for row in rows:
        ours = row["contenders"]["saelab"]
        for name, ratio in row["our_error_over_theirs"].items():
            theirs = row["contenders"][name]
            yield (
                f"| {Shape(**row['shape'])} | {row['tokens_from']} | {row['seed']} | {row['n_steps']} "
                f"| {ours['held_out_error']:.5f} | {ours['explained_variance']:.4f} | {_named(name, theirs)} "
                f"| {theirs['held_out_error']:.5f} | {theirs['explained_variance']:.4f} | {ratio:.4f} "
                f"| {'yes' if row['equal'][name] else 'no'} | {theirs['seconds'] / ours['seconds']:.1f}x |"
            )


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"{_label(row)} {Shape(**row['shape'])}, {name}: not timed, {note}".strip()
        for row in rows
        for name, note in row.get("not_timed", {}).items()
    ]


def _label(row: dict[str, Any]) -> str:
    label = f"{row.get('op', '')} {row.get('what', '')}".strip() or "step"
    return f"{label}, {row['n_tokens']:,} tokens" if "n_tokens" in row else label


def _named(name: str, numbers: dict[str, Any]) -> str:
    return f"{name} ({numbers['version']})" if numbers.get("version") else name


def _number(value: float | None) -> str:
    """Three digits that matter."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


class _Dots(NamedTuple):
    label: str
    ours: float
    others: list[float]


_LEFT, _RIGHT, _ROW_HEIGHT, _WIDTH = 360, 20, 18, 900


def plot(records: list[dict[str, Any]], device: str) -> str | None:
    """An SVG: for each row of ``device`` our time over its floor and those of the others; None if there are none."""
    timed = [entry for entry in records if entry["device"] == device and entry["topic"] != "quality"]
    found = (_dots(row) for entry in timed for row in entry["rows"])
    rows = [row for row in found if row is not None]
    if not rows:
        return None
    values = [value for row in rows for value in (row.ours, *row.others)]
    low, high = math.floor(math.log10(min(min(values), 1))), math.ceil(math.log10(max(max(values), 10)))

    def across(value: float) -> float:
        return _LEFT + (math.log10(value) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    height = 50 + _ROW_HEIGHT * len(rows)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{_LEFT}" y="14">time over floor ({device}); filled: saelab, hollow: the others</text>',
    ]
    for exponent in range(low, high + 1):
        x, value = across(10.0**exponent), 10.0**exponent
        colour = "#c33" if value == 1 else "#ccc"
        lines.append(f'<line x1="{x:.1f}" y1="32" x2="{x:.1f}" y2="{height - 8}" stroke="{colour}"/>')
        lines.append(f'<text x="{x:.1f}" y="28" text-anchor="middle">{value:g}</text>')
    for index, row in enumerate(rows):
        y = 46 + index * _ROW_HEIGHT
        lines.append(f'<text x="{_LEFT - 10}" y="{y + 4}" text-anchor="end">{escape(row.label)}</text>')
        lines += [
            f'<circle cx="{across(value):.1f}" cy="{y}" r="4" fill="none" stroke="#777"/>' for value in row.others
        ]
        lines.append(f'<circle cx="{across(row.ours):.1f}" cy="{y}" r="5" fill="#1668b8"/>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _dots(row: dict[str, Any]) -> _Dots | None:
    over = {name: numbers["over_floor"] for name, numbers in row["contenders"].items() if numbers.get("over_floor")}
    ours = next((over.pop(name) for name in ("saelab", "saelab_kernels") if name in over), None)
    if ours is None:
        return None
    return _Dots(f"{_label(row)}  {Shape(**row['shape'])}", ours, list(over.values()))
