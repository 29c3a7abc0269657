from __future__ import annotations

import json

import pytest
import torch
from test_interp_attribution import CORRUPT, METRIC, TEXT, perfect_sae, random_sae

from saelab.errors import ConfigError
from saelab.interp.attribution_graph import METRIC as GOAL
from saelab.interp.attribution_graph import attribution_graph

RESID = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
MLP = [f"blocks.{layer}.hook_mlp_out" for layer in range(3)]
ALL = 10**6
#: They differ at the last token alone, so a layer has few nodes.
SHORT, SHORT_CORRUPT = "the old river", "the old music"


def node_sums(graph, hook_name: str) -> dict[str, float]:
    """Sum of the edges into each node of a layer."""
    sums = {node.name: 0.0 for node in graph.nodes if node.hook_name == hook_name}
    for edge in graph.edges:
        if edge.target in sums:
            sums[edge.target] += edge.weight
    return sums


@pytest.mark.parametrize("make", [perfect_sae, random_sae])
def test_edges_into_a_node_add_up_to_its_attribution(tiny_model, make):
    """On the residual stream, with activation functions that do not jump and a corrupt text as the baseline."""
    saes = [make(tiny_model, hook) for hook in RESID[:2]]
    graph = attribution_graph(tiny_model, saes, TEXT, METRIC, corrupt=CORRUPT, n_nodes=8, n_edges=ALL, steps=128)
    later = [node for node in graph.nodes if node.hook_name == RESID[1]]
    assert len(later) == 8
    for node in later:
        assert node.inflow == pytest.approx(node.part.attribution, rel=0.03, abs=5e-3)


def test_with_every_node_the_edges_are_all_of_the_inflow(tiny_model):
    saes = [random_sae(tiny_model, hook, k=4) for hook in RESID[:2]]
    graph = attribution_graph(tiny_model, saes, SHORT, METRIC, corrupt=SHORT_CORRUPT, n_nodes=ALL, n_edges=ALL, steps=4)
    assert len(graph.nodes) > 8
    sums = node_sums(graph, RESID[1])
    for node in graph.nodes:
        if node.hook_name == RESID[1]:
            assert node.inflow == pytest.approx(sums[node.name], abs=1e-4)
        else:
            assert node.inflow is None


def test_on_the_residual_stream_edges_join_neighbouring_layers_only(tiny_model):
    saes = [random_sae(tiny_model, hook, k=4) for hook in reversed(RESID)]
    graph = attribution_graph(tiny_model, saes, TEXT, METRIC, corrupt=CORRUPT, n_nodes=4, steps=4)
    assert [layer.hook_name for layer in graph.layers] == RESID  # in the order of the forward pass
    layers = [(edge.source.split(":")[0], edge.target.split(":")[0]) for edge in graph.edges]
    assert set(layers) == {(RESID[0], RESID[1]), (RESID[1], RESID[2]), (RESID[2], GOAL)}


def test_beside_the_residual_stream_edges_skip_layers_and_count_direct_effects_alone(tiny_model):
    """The edges of a layer to the metric add up to the effect of its baseline while the later layers are held."""
    saes = [random_sae(tiny_model, hook, k=4) for hook in MLP]
    graph = attribution_graph(
        tiny_model, saes, SHORT, METRIC, corrupt=SHORT_CORRUPT, n_nodes=ALL, n_edges=ALL, steps=64
    )
    ids = tiny_model.to_tokens(SHORT).ids
    held = tiny_model.capture(ids, MLP)
    theirs = tiny_model.capture(tiny_model.to_tokens(SHORT_CORRUPT).ids, MLP)
    for number, hook in enumerate(MLP):
        edits = {name: (lambda old, keep, name=name: held[name]) for name in MLP[number + 1 :]}
        with tiny_model.edits(edits | {hook: lambda old, keep, hook=hook: theirs[hook]}):
            without = float(METRIC(tiny_model.logits(ids)))
        direct = sum(e.weight for e in graph.edges if e.target == GOAL and e.source.startswith(hook))
        assert direct == pytest.approx(graph.layers[number].clean_value - without, rel=0.01, abs=5e-3)
    assert any(e.source.startswith(MLP[0]) and e.target.startswith(MLP[2]) for e in graph.edges)


def test_the_json_says_what_it_leaves_out(tiny_model):
    saes = [random_sae(tiny_model, hook, k=4) for hook in RESID[:2]]
    graph = attribution_graph(tiny_model, saes, TEXT, METRIC, corrupt=CORRUPT, n_nodes=5, n_edges=12, steps=8)
    plain = json.loads(json.dumps(graph.as_json(), allow_nan=False))
    assert plain == graph.as_json()
    names = {node["name"] for node in plain["nodes"]}
    assert len(names) == len(plain["nodes"]) == 10
    assert len(plain["edges"]) <= 12
    assert {edge["source"] for edge in plain["edges"]} <= names
    assert {edge["target"] for edge in plain["edges"]} <= names | {GOAL}
    for layer in plain["layers"]:
        shown = sum(node["attribution"] for node in plain["nodes"] if node["hook_name"] == layer["hook_name"])
        assert shown + layer["not_shown"] + layer["gap"] == pytest.approx(layer["effect"], abs=1e-5)
    sizes = [abs(edge["weight"]) for edge in plain["edges"]]
    assert sizes == sorted(sizes, reverse=True)


def test_gradients_leave_no_trace_in_the_saes(tiny_model):
    saes = [random_sae(tiny_model, hook) for hook in RESID[:2]]
    attribution_graph(tiny_model, saes, TEXT, METRIC, n_nodes=2, steps=2)
    assert all(parameter.grad is None for sae in saes for parameter in sae.parameters())
    assert tiny_model.active_hooks() == []


def test_two_saes_at_one_hook_are_refused(tiny_model):
    sae = random_sae(tiny_model, RESID[0])
    for saes in ([sae, random_sae(tiny_model, RESID[0], seed=1)], []):
        with pytest.raises(ConfigError, match="different hooks"):
            attribution_graph(tiny_model, saes, TEXT, METRIC)
    with pytest.raises(ConfigError, match="at least 1 node"):
        attribution_graph(tiny_model, [sae], TEXT, METRIC, n_nodes=0)
    assert torch.is_grad_enabled()
