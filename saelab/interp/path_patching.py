"""Path patching: the effect that a sender has through one receiver alone, all other ways being held as they were.

Three runs of the base prompt (Wang et al. 2022, arXiv 2211.00593, appendix B; Goldowsky-Dill et al. 2023, arXiv
2304.05969):

1. as it is, to know the output of every attention and MLP block;
2. the sender takes its value of the source prompt while all other blocks keep their outputs of run 1, so that what the
   receiver reads differs by the sender's direct contribution only;
3. the receiver reads what it read in run 2, everything else is free, and the metric is taken.

With the logits as receiver, step 3 computes them from the final residual stream of run 2: the direct effect.
"""

from __future__ import annotations

from collections.abc import Sequence

from saelab.errors import ConfigError
from saelab.interp.patch_metrics import Metric
from saelab.interp.patch_runs import Change, Progress, changing, rows_at_once, run_patched
from saelab.interp.patch_sites import Granularity, Site, cells, head_site
from saelab.interp.patching import Direction, PatchGrid, aligned, metric_name
from saelab.interp.replacements import from_run, readings
from saelab.models.hooks import layer_of
from saelab.models.load import Model
from saelab.sae.base import Feature


def path_patch(
    model: Model,
    clean: str,
    corrupt: str,
    *,
    metric: Metric,
    to: Sequence[str],
    at: Granularity = "head",
    direction: Direction = "denoise",
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    features: Sequence[Feature] = (),
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> PatchGrid:
    """Effect of each sender of the grid ``at`` on the metric by way of the receivers ``to`` only; see `patch`.

    Receivers are written ``logits``, ``mlp.9`` (the input of layer 9's MLP), ``q.9.3``, ``k.9.1`` and ``v.9.1``
    (queries of head 3 in layer 9; keys and values have the number of their group where heads share them). Several
    are patched together. ``layers`` are by default those that come before the last receiver; a sender behind all
    receivers has no effect.

    Raises:
        TextError: the prompts are not aligned.
        ConfigError: a receiver that is not there or not spelled like this, or as `patch`.
    """
    ids, source_ids = aligned(model, clean, corrupt, direction)
    tokens = tuple(model.str_tokens(ids[0]))
    receivers = [_receiver(model, name, seq=len(tokens)) for name in to]
    if not receivers:
        raise ConfigError("path patching needs at least one receiver; give to=['logits'], for example")
    last = max(layer_of(site.hook_name) or 0 for site in receivers)
    if layers is None and at != "feature":
        layers = range(last + 1)
    grid = cells(model, at, tokens, layers=layers, positions=positions, features=features)
    patches = [patched for row in grid.sites for patched in row]
    source = from_run(model, source_ids, [site for patched in patches for site in patched])
    blocks = [
        Site(name, tuple(range(1, len(tokens))))
        for layer in range(model.n_layers)
        for name in (f"blocks.{layer}.hook_attn_out", f"blocks.{layer}.hook_mlp_out")
    ]
    held = from_run(model, ids, blocks)
    rows: list[list[Change]] = []
    n_rows = rows_at_once(len(tokens), batch_size)
    for start in range(0, len(patches), n_rows):
        batch = patches[start : start + n_rows]
        sending = [
            [(site, source[site.key]) for site in patched]
            + [(block, held[block.key]) for block in blocks if not _is_within(patched, block)]
            for patched in batch
        ]
        with model.edits(changing(sending)):
            read = readings(model, ids.expand(len(batch), -1), receivers)
        rows += [[(site, read[site.key][i]) for site in receivers] for i in range(len(batch))]
        if progress:
            progress(start + len(batch), 2 * len(patches), "senders")

    def received(done: int, total: int, detail: str) -> None:
        if progress:
            progress(len(patches) + done, 2 * len(patches), "receivers")

    values = run_patched(model, ids, rows, metric, batch_size=batch_size, progress=received)
    base, target = (float(run_patched(model, prompt, [()], metric)[0]) for prompt in (ids, source_ids))
    return PatchGrid(
        effects=(values - base).reshape(len(grid.rows), len(grid.columns)).cpu(),
        rows=grid.rows,
        columns=grid.columns,
        base=base,
        target=target,
        at=f"{at} to {' and '.join(to)}",
        kind=direction,
        method="exact",
        metric=metric_name(metric),
        tokens=tokens,
        other_tokens=tuple(model.str_tokens(source_ids[0])),
    )


def _receiver(model: Model, name: str, *, seq: int) -> Site:
    """The site that a receiver's name stands for, at all positions."""
    everywhere = tuple(range(1, seq))
    match name.split("."):
        case ["logits"]:
            return Site(f"blocks.{model.n_layers - 1}.hook_resid_post", everywhere)
        case ["mlp", layer] if layer.isdecimal():
            return Site(model.check_hook(f"blocks.{layer}.mlp.hook_in"), everywhere)
        case ["q" | "k" | "v" as part, layer, head] if layer.isdecimal() and head.isdecimal():
            return head_site(model, int(layer), int(head), everywhere, part=part)
    raise ConfigError(f"a receiver is written logits, mlp.9, q.9.3, k.9.1 or v.9.1, got {name!r}; spell it like one")


def _is_within(patched: Sequence[Site], block: Site) -> bool:
    """Whether a sender is the block's output, or a part of what it is made from, so that it cannot be held."""
    made_of = block.hook_name.replace("hook_attn_out", "attn.hook_z")
    return any(site.hook_name in (block.hook_name, made_of) for site in patched)
