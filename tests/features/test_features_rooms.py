"""The index over a real store, a real SAE and a real, if tiny, model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saelab.activations.capture import CacheConfig, capture
from saelab.activations.text import TextConfig
from saelab.features.index import FeatureIndex, build_index
from saelab.features.search import encode_text, features_in_text
from saelab.sae.base import Metadata
from saelab.sae.topk import TopK, TopKConfig

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def store(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    words = ["feet", "inches", "United", "States", "the", "of", "and", "river", "ran", "long"]
    rng = np.random.default_rng(0)
    for i in range(12):
        (folder / f"{i:02d}.txt").write_text(" ".join(rng.choice(words, 150)))
    config = CacheConfig(
        model=tiny_model.name, hook_names=(HOOK,), text=TextConfig(source=str(folder)), tokens=4096, context=64
    )
    return capture(config, folder / "activations", model=tiny_model)


@pytest.fixture(scope="module")
def sae(store) -> TopK:
    sae = TopK(TopKConfig(d_sae=48, k=6), store.d_in(HOOK), generator=torch.Generator().manual_seed(0))
    sae.metadata = Metadata(hook_name=HOOK)
    return sae


@pytest.fixture(scope="module")
def index(sae, store, tiny_model, tmp_path_factory) -> FeatureIndex:
    return build_index(sae, store, tiny_model, tmp_path_factory.mktemp("index") / "index")


def test_densities_add_up_to_the_active_features_per_token(index, sae, store):
    acts = store.acts(HOOK, store.rows("all"))[:, 1:].float().flatten(0, 1)
    active = len(sae.sparse_codes(acts).values)
    assert index.column("n_fired").sum() == pytest.approx(active, abs=2)
    assert index.n_tokens == len(acts)


def test_records_show_text_of_the_store(index, store, tiny_model):
    alive = int(np.argmax(index.column("n_fired")))
    record = index.feature(alive)
    example = record.top_examples[0]
    tokens = store.tokens(np.array([example.row]))[0]
    assert example.token_ids[example.peak] == tokens[example.position]
    assert example.tokens == tuple(tiny_model.str_tokens(list(example.token_ids)))
    assert example.title == store.documents[example.doc].title
    assert record.promoted
    assert index.manifest.model_sha256 == tiny_model.weights_sha256


def test_the_features_that_fire_on_a_text_are_found(index, sae, tiny_model):
    codes = encode_text(tiny_model, sae, "the river ran 12 feet")
    assert "".join(codes.tokens) == "the river ran 12 feet"
    hits = features_in_text(tiny_model, sae, index, "the river ran 12 feet", n=48)
    assert {hit.feature for hit in hits} <= set(codes.features.tolist())
    assert len(hits) > 3
