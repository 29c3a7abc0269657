"""How well gradients stand in for patching on the demo model: all layers and positions of five prompt pairs."""

from __future__ import annotations

from typing import Any

import pytest

from saelab.interp.patch_agreement import Agreement, agreement
from saelab.interp.patch_metrics import logit_difference, one_token
from saelab.interp.patching import PatchGrid, patch

#: Clean prompt, corrupt prompt, and the token that each leads to.
PAIRS = (
    ("The Eiffel Tower is in the city of", "The Colosseum is in the city of", " Paris", " Rome"),
    (
        "When Mary and John went to the store, John gave a drink to",
        "When Mary and John went to the store, Mary gave a drink to",
        " Mary",
        " John",
    ),
    (
        "My sister forgot her umbrella, so I lent mine to",
        "My brother forgot his umbrella, so I lent mine to",
        " her",
        " him",
    ),
    (
        "The official language spoken by the people of Spain is",
        "The official language spoken by the people of Germany is",
        " Spanish",
        " German",
    ),
    (
        "She put the milk and the butter back into the",
        "She put the shirt and the trousers back into the",
        " fridge",
        " closet",
    ),
)


@pytest.fixture(scope="module")
def float32_model(demo_model):
    from saelab.models.load import load_model

    return load_model("demo", device="cpu", dtype="float32")


def grids(model: Any, **how: Any) -> list[PatchGrid]:
    found = []
    for clean, corrupt, right, wrong in PAIRS:
        metric = logit_difference(one_token(model, right), one_token(model, wrong))
        found.append(patch(model, clean, corrupt, metric=metric, **how))
    return found


def shown(name: str, found: Agreement) -> str:
    pairs = " ".join(f"{r:.3f}" for r in found.by_pair)
    low, high = found.pooled.low, found.pooled.high
    return f"{name:24} {found.pooled.value:.3f} ({low:.3f} to {high:.3f}) {found.slope:.2f} {pairs} {found.n_cells}"


@pytest.mark.demo
@pytest.mark.slow
def test_the_model_prefers_each_answer_after_its_own_prompt(float32_model):
    """Otherwise there would be no effect to trace. One layer is enough to see both ends."""
    for grid in grids(float32_model, layers=[29], positions=[1]):
        assert grid.base < -1 < 1 < grid.target


@pytest.mark.demo
@pytest.mark.slow
def test_integrated_gradients_agree_with_exact_patching(float32_model):
    exact = grids(float32_model, method="exact")
    found = {m: agreement(exact, grids(float32_model, method=m)) for m in ("attribution", "ig", "ig_inputs")}
    for method, measured in found.items():
        print(shown(f"resid_post {method}", measured))
    assert found["ig"].n_cells == sum(30 * (len(grid.tokens) - 1) for grid in exact)
    assert found["ig"].pooled.value >= 0.95
    assert min(found["ig"].by_pair) >= 0.9
    assert found["ig"].pooled.value > found["attribution"].pooled.value
