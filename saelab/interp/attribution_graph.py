"""A sparse graph of how features of several layers move a metric.

Nodes are the features (and the error) of largest attribution at each layer, and the metric itself. The edge from u to
a node v of a later layer is u's part in v's own attribution:

    phi_v(acts) = g . d_v f_v(acts)           g: mean gradient of the metric at v's token, d_v: v's decoder direction
    edge(u, v)  = (f_u - f'_u) * integral over a in 0..1 of d phi_v / d f_u at x' + a (x - x')

that is, gradient x difference of phi_v, integrated along the path from baseline to text at u's layer, with the
activations at all layers between the two held at the text's values (Marks et al. 2024, arXiv 2403.19647, section 3.2,
which takes one step). For a node of the error, phi is g . error(acts). All numbers are in units of the metric: the
edges into v from all parts of an earlier layer add up to phi_v(x) - phi_v(x'), which is v's attribution if every path
leads through that layer (the residual stream) and the baseline is a text. Where an activation function jumps (TopK: a
feature enters at more than 0), no gradient sees the jump, and what is lost shows as ``unexplained``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.errors import ConfigError
from saelab.interp.attribution import DEFAULT_STEPS, Attribution, Part, Shares, attribute, divided_up, path_gradient
from saelab.interp.feature_gradients import (
    Readout,
    hook_of,
    mean_readout_gradients,
    recomposed,
    straight_path,
)
from saelab.interp.patch_metrics import Metric
from saelab.models.load import Model
from saelab.sae.base import SAE

#: What is attributed to: where an edge of the last layer ends.
METRIC = "metric"

Progress = Callable[[int, int, str], None]


class GraphNode(NamedTuple):
    name: str  # as edges refer to it: hook, position and feature or "error"
    hook_name: str
    part: Part
    inflow: float | None  # edges into it from all parts of earlier layers, shown or not; None at the first layer


class GraphEdge(NamedTuple):
    source: str
    target: str  # a node's name, or `METRIC`
    weight: float  # in units of the metric


@dataclass(frozen=True)
class AttributionGraph:
    """The nodes of each layer by falling absolute attribution, and the strongest edges among them."""

    tokens: tuple[str, ...]
    layers: tuple[Attribution, ...]
    """The whole attributions, in the order of the forward pass."""
    nodes: tuple[GraphNode, ...]
    edges: tuple[GraphEdge, ...]

    def as_json(self) -> dict[str, Any]:
        """The graph for a file: plain lists and numbers, with what was left out of it.

        ``attribution`` of a layer's nodes and its ``not_shown`` add up to its ``effect`` but for its ``gap``.
        """
        shown = {layer.hook_name: 0.0 for layer in self.layers}
        for node in self.nodes:
            shown[node.hook_name] += node.part.attribution
        return {
            "tokens": list(self.tokens),
            "layers": [
                {
                    "hook_name": layer.hook_name,
                    "clean_value": layer.clean_value,
                    "baseline_value": layer.baseline_value,
                    "effect": layer.effect,
                    "gap": layer.gap,
                    "error_attribution": float(layer.error.sum()),
                    "not_shown": layer.effect - layer.gap - shown[layer.hook_name],
                }
                for layer in self.layers
            ],
            "nodes": [
                {
                    "name": node.name,
                    "hook_name": node.hook_name,
                    **node.part._asdict(),
                    "token": self.tokens[node.part.position],
                    "inflow": node.inflow,
                    "unexplained": None if node.inflow is None else node.part.attribution - node.inflow,
                }
                for node in self.nodes
            ],
            "edges": [edge._asdict() for edge in self.edges],
        }


def attribution_graph(
    model: Model,
    saes: Sequence[SAE],
    text: str,
    metric: Metric,
    *,
    corrupt: str | None = None,
    reference: Sequence[str] | None = None,
    n_nodes: int = 12,
    n_edges: int = 60,
    steps: int = DEFAULT_STEPS,
    progress: Progress | None = None,
) -> AttributionGraph:
    """The graph of ``n_nodes`` nodes a layer and at most ``n_edges`` edges; for the rest see `attribute`.

    Raises:
        ConfigError: no SAE, two at one hook, counts below 1, and see `attribute`.
        TextError, ShapeError: see `attribute`.
    """
    if n_nodes < 1 or n_edges < 1:
        raise ConfigError(f"a graph needs at least 1 node a layer and 1 edge, got {n_nodes} and {n_edges}; raise them")
    by_hook = {hook_of(model, sae): sae for sae in saes}
    if not saes or len(by_hook) < len(saes):
        raise ConfigError(
            f"a graph needs SAEs at different hooks, got {len(saes)} at {', '.join(by_hook) or 'none'}; "
            "give one for each layer"
        )
    hooks = [name for name in model.hook_names() if name in by_hook]  # in the order of the forward pass
    layers = []
    for number, name in enumerate(hooks):
        layers.append(attribute(model, by_hook[name], text, metric, corrupt=corrupt, reference=reference, steps=steps))
        if progress:
            progress(number + 1, len(hooks), f"attributed at {name}")
    chosen = [layer.top(n_nodes) for layer in layers]
    inflows: dict[str, float] = {}
    edges: list[GraphEdge] = []
    for later in range(1, len(layers)):
        for earlier in _reaching(hooks, later):
            source, target = layers[earlier], layers[later]
            gradients = mean_readout_gradients(
                model,
                torch.tensor(source.token_ids, device=model.device),
                source.hook_name,
                _path(by_hook[hooks[earlier]], source, steps=steps),
                target.hook_name,
                _readout(by_hook[hooks[later]], target, chosen[later]),
                frozen=_held(layers[earlier + 1 : later], by_hook),
            )
            for part, gradient in zip(chosen[later], gradients, strict=True):
                shares = divided_up(by_hook[hooks[earlier]], gradient, clean=source.clean, baseline=source.baseline)
                name = node_name(target.hook_name, part)
                inflows[name] = inflows.get(name, 0.0) + float(shares.features.sum() + shares.error.sum())
                edges += _edges(source.hook_name, chosen[earlier], name, shares)
            if progress:
                progress(later, len(layers), f"edges from {source.hook_name} to {target.hook_name}")
    for earlier in _reaching(hooks, len(hooks)):
        source = layers[earlier]
        shares = _shares_of_metric(
            model, by_hook[hooks[earlier]], source, metric, frozen=_held(layers[earlier + 1 :], by_hook), steps=steps
        )
        edges += _edges(source.hook_name, chosen[earlier], METRIC, shares)
    nodes = [
        GraphNode(name := node_name(hook, part), hook, part, inflows.get(name))
        for hook, parts in zip(hooks, chosen, strict=True)
        for part in parts
    ]
    strongest = sorted((e for e in edges if e.weight != 0), key=lambda e: -abs(e.weight))[:n_edges]
    return AttributionGraph(layers[0].tokens, tuple(layers), tuple(nodes), tuple(strongest))


def node_name(hook_name: str, part: Part) -> str:
    """How edges refer to a node."""
    return f"{hook_name}:{part.position}:{'error' if part.feature is None else part.feature}"


def _reaching(hooks: Sequence[str], later: int) -> list[int]:
    """The earlier hooks with a path to the later one (or to the metric) beside all hooks between: one that holds the
    residual stream lets nothing pass."""
    blocked = [i for i in range(later) if "hook_resid_" in hooks[i]]
    return list(range(blocked[-1] if blocked else 0, later))


def _held(between: Sequence[Attribution], by_hook: Mapping[str, SAE]) -> dict[str, Float[Tensor, "seq d_model"]]:
    return {layer.hook_name: recomposed(by_hook[layer.hook_name], layer.clean) for layer in between}


def _path(sae: SAE, layer: Attribution, *, steps: int) -> Float[Tensor, "steps seq d_model"]:
    return straight_path(recomposed(sae, layer.baseline), recomposed(sae, layer.clean), steps=steps)


def _readout(sae: SAE, layer: Attribution, parts: Sequence[Part]) -> Readout:
    """phi of each part, as a function of the activations at the layer's hook."""
    positions = sorted({part.position for part in parts})
    column = {position: i for i, position in enumerate(positions)}
    slopes = (layer.gradient @ sae.W_dec.T).detach()

    def phi(acts: Float[Tensor, "runs seq d_model"]) -> Float[Tensor, "runs parts"]:
        here = acts[:, positions].to(sae.dtype)
        feature_acts = sae.encode(here)
        error = here - sae.decode(feature_acts)
        values = [
            error[:, column[part.position]] @ layer.gradient[part.position]
            if part.feature is None
            else feature_acts[:, column[part.position], part.feature] * slopes[part.position, part.feature]
            for part in parts
        ]
        return torch.stack(values, 1)

    return phi


def _shares_of_metric(
    model: Model,
    sae: SAE,
    layer: Attribution,
    metric: Metric,
    *,
    frozen: Mapping[str, Float[Tensor, "seq d_model"]],
    steps: int,
) -> Shares:
    """What the parts of a layer do to the metric beside the later layers of the graph."""
    if not frozen:
        return Shares(layer.features, layer.error)
    ids = torch.tensor(layer.token_ids, device=model.device)
    path = _path(sae, layer, steps=steps)
    gradient = path_gradient(model, ids, layer.hook_name, path, metric, frozen=frozen)
    return divided_up(sae, gradient, clean=layer.clean, baseline=layer.baseline)


def _edges(hook_name: str, sources: Sequence[Part], target: str, shares: Shares) -> list[GraphEdge]:
    def weight(part: Part) -> float:
        if part.feature is None:
            return float(shares.error[part.position])
        return float(shares.features[part.position, part.feature])

    return [GraphEdge(node_name(hook_name, part), target, weight(part)) for part in sources]
