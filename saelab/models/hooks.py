"""Names of hook points, spelled as TransformerLens users know them: ``blocks.10.hook_resid_post``."""

from __future__ import annotations

import re

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")

#: Within a block: the bridge's own name, or the short one of papers, -> the name in use since HookedTransformer.
_KNOWN_AS = {
    "hook_in": "hook_resid_pre",
    "hook_out": "hook_resid_post",
    "attn.hook_out": "hook_attn_out",
    "mlp.hook_out": "hook_mlp_out",
    "attn.o.hook_in": "attn.hook_z",
    "attn.q.hook_out": "attn.hook_q",
    "attn.k.hook_out": "attn.hook_k",
    "attn.v.hook_out": "attn.hook_v",
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
}


def canonical_hook_name(name: str) -> str:
    """The one spelling that files and errors use: ``blocks.10.hook_resid_post`` also for ``blocks.10.resid_post``.

    Unknown names come back unchanged; whether a model has the hook is the matter of `Model.check_hook`.
    """
    match = _BLOCK.fullmatch(name)
    if not match:
        return {"embed.hook_out": "hook_embed"}.get(name, name)
    layer, place = match.groups()
    return f"blocks.{int(layer)}.{_KNOWN_AS.get(place, place)}"


def layer_of(hook_name: str) -> int | None:
    """Index of the block that the hook is in, or None for a hook outside the blocks such as ``hook_embed``."""
    match = _BLOCK.fullmatch(hook_name)
    return int(match[1]) if match else None
