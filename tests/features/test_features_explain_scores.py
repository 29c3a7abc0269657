from __future__ import annotations

import json
import math
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import numpy as np
import pytest
import torch

from saelab.align.critics import ServerCritic
from saelab.errors import AssetError, ConfigError, ShapeError, TextError
from saelab.features import judge, planted
from saelab.features.contexts import Contexts, Drawn, draw_contexts
from saelab.features.decoder_map import decoder_map, map_svg, neighbours_kept
from saelab.features.encoders import Encoder, ModelEncoder, SentenceEncoder
from saelab.features.explainers.interface import Fired
from saelab.features.explainers.text import text_of
from saelab.features.score_causal import causal_effect
from saelab.features.score_texts import example_embedding_score, losses_behind, surprisal_score
from saelab.features.search import search_by_meaning
from saelab.features.similar import by_direction, by_use
from saelab.sae.base import Metadata
from saelab.sae.topk import TopK, TopKConfig
from saelab.stats import superiority

HOOK = "blocks.1.hook_resid_post"


class LetterEncoder:
    """Similar is what has the same letters: enough to tell whether the right texts reach an encoder."""

    name = "letters"

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        counts = np.array([[text.casefold().count(chr(97 + i)) for i in range(26)] for text in texts], np.float32)
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


@pytest.fixture(scope="module")
def text():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 5, (40, 50)).astype(np.int32)
    docs = np.repeat(np.arange(40), 50).reshape(40, 50)
    return text_of(tokens, docs, ("a", "b", "c", "d", "e"), seed=0)


def test_the_area_under_the_curve_counts_pairs():
    assert superiority(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1
    assert superiority(np.array([1.0, 1.0]), np.array([1.0])) == 0.5
    assert superiority(np.array([0.0, 2.0]), np.array([1.0])) == 0.5
    assert superiority(np.array([math.inf, 0.0]), np.array([-math.inf, 0.0])) == pytest.approx(0.875)
    with pytest.raises(ValueError, match="both sides"):
        superiority(np.array([]), np.array([1.0]))


def test_contexts_hold_what_they_say(text):
    fires = np.zeros(text.n_positions, bool)
    fires[::40] = True
    fires[:: text.context] = False
    positions = np.flatnonzero(fires)
    drawn = draw_contexts(Fired(positions[::2], positions[1::2]), text, text.parts.score, n=6, seed=3)
    assert 0 < len(drawn.active) <= 6
    assert drawn.active.fires.any(1).all()
    assert not drawn.silent.fires.any()
    again = draw_contexts(Fired(positions[::2], positions[1::2]), text, text.parts.score, n=6, seed=3)
    assert (again.active.tokens == drawn.active.tokens).all()
    flat = text.tokens.reshape(-1)
    scoring = flat[text.parts.score]
    for piece in drawn.active.tokens:
        assert any((scoring[i : i + len(piece)] == piece).all() for i in range(len(scoring)))


def test_a_feature_whose_texts_look_like_its_examples_has_a_high_embedding_score(tiny_model):
    def contexts(words: list[str], n: int) -> Contexts:
        ids = [tiny_model.encode((word * 20)[:20]) for word in words * n]
        tokens = np.array([row[:20] for row in ids])
        return Contexts(tokens, np.zeros(tokens.shape, bool))

    mine, others = contexts(["zebra"], 3), contexts(["lyon", "dust"], 2)
    assert example_embedding_score(LetterEncoder(), mine, Drawn(mine, others), tiny_model) == 1
    assert example_embedding_score(LetterEncoder(), others, Drawn(mine, others), tiny_model) == 0


def test_losses_behind_a_prompt_are_those_of_the_model(tiny_model):
    tokens = np.array([(tiny_model.encode(text) * 4)[:8] for text in ("hello world", "other text here")])
    prompt = tiny_model.encode("said:")
    found = losses_behind(tiny_model, prompt, tokens, batch_size=1)
    for row, loss in zip(tokens, found, strict=True):
        ids = torch.tensor([[tiny_model.bos_id, *prompt, *row.tolist()]])
        logps = tiny_model.logits(ids).log_softmax(-1)[0]
        expected = -np.mean([float(logps[len(prompt) + i, t]) for i, t in enumerate(row)])
        assert loss == pytest.approx(expected, rel=1e-5)


def test_surprisal_of_two_kinds_of_equal_texts_is_at_chance(tiny_model):
    tokens = np.array([tiny_model.encode("hello world")] * 3)
    same = Contexts(tokens, np.zeros(tokens.shape, bool))
    assert surprisal_score(tiny_model, "greetings", Drawn(same, same)) == 0.5


@pytest.fixture(scope="module")
def sae(tiny_model) -> TopK:
    sae = TopK(TopKConfig(d_sae=24, k=4), tiny_model.d_model, generator=torch.Generator().manual_seed(0))
    sae.metadata = Metadata(hook_name=HOOK, mean_norm=5.0)
    return sae


def test_a_feature_that_writes_a_token_raises_it_more_than_a_random_direction(tiny_model, sae):
    token = 65
    gain = tiny_model.final_norm_scale()
    direction = tiny_model.unembed[:, token] * (1 if gain is None else gain)
    before = sae.W_dec.detach()[0].clone()
    sae.W_dec.data[0] = direction / direction.norm()
    try:
        tokens = np.array([tiny_model.encode("hello world")] * 2)
        effect = causal_effect(tiny_model, sae.feature(0), [token], tokens, strength=2.0)
        opposite = causal_effect(tiny_model, sae.feature(0), [token], tokens, strength=-2.0)
    finally:
        sae.W_dec.data[0] = before
    assert effect.advantage > 0.1
    assert opposite.feature < 0 < effect.feature
    assert tiny_model.active_hooks() == []


def test_a_causal_effect_needs_something_named(tiny_model, sae):
    with pytest.raises(ValueError, match="named"):
        causal_effect(tiny_model, sae.feature(0), [], np.ones((1, 4), np.int64))


# --- a judge


class Judge(BaseHTTPRequestHandler):
    """Says Yes where the text, or a marked token of it, holds a "z"; explains with a phrase."""

    broken = False

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        if "one short phrase" in prompt:
            choice = {"message": {"content": "\n  words with a z\nand more" if not self.broken else " \n "}}
        else:
            if "Are these the right tokens" in prompt:
                yes = any("z" in piece.partition(">>")[0] for piece in prompt.split("<<")[2:])
            else:
                yes = "z" in prompt.partition("Text:\n")[2].partition("\n\nDoes")[0]
            likely = [("Yes", -0.1 if yes else -3.0), ("No", -3.0 if yes else -0.1)]
            logprobs = [{"token": t, "logprob": p} for t, p in likely]
            choice = {"message": {"content": ""}, "logprobs": {"content": [{"top_logprobs": logprobs}]}}
        answer = json.dumps({"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def critic():
    server = HTTPServer(("127.0.0.1", 0), Judge)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield ServerCritic(f"http://127.0.0.1:{server.server_port}/v1", "judge", temperature=0.0)
    server.shutdown()
    server.server_close()
    thread.join()
    Judge.broken = False


@pytest.fixture(scope="module")
def drawn(tiny_model):
    def contexts(word: str) -> Contexts:
        tokens = np.array([tiny_model.encode(f"{c}b {word} cd e")[:9] for c in "hijk"])
        fires = np.array([["z" in tiny_model.str_tokens([t])[0] for t in row] for row in tokens.tolist()])
        return Contexts(tokens, fires)

    return Drawn(contexts("azzo"), contexts("alto"))


def test_a_judge_that_knows_detects_and_tells_right_marks_from_wrong(critic, drawn, tiny_model):
    assert drawn.active.fires.any(1).all()
    assert judge.ask_for_explanation(critic, drawn.active, tiny_model) == "words with a z"
    assert judge.detection_score(critic, "the letter z", drawn, tiny_model) == 1
    assert judge.fuzzing_score(critic, "the letter z", drawn.active, tiny_model) == 1


def test_a_judge_that_says_nothing_or_does_not_answer_is_an_error_and_no_score(critic, drawn, tiny_model):
    Judge.broken = True
    with pytest.raises(TextError, match="answers nothing"):
        judge.ask_for_explanation(critic, drawn.active, tiny_model)
    with pytest.raises(AssetError):
        judge.detection_score(ServerCritic("http://127.0.0.1:9/v1", "m"), "x", drawn, tiny_model)


def test_wrong_marks_are_as_many_and_never_right():
    fires = np.zeros((5, 12), bool)
    for row, n in enumerate((1, 3, 6, 11, 12)):
        fires[row, :n] = True
    wrong = judge.wrong_marks(fires, seed=0)
    assert not (wrong & fires).any()
    assert wrong.sum(1).tolist() == [1, 3, 6, 1, 0]


# --- search, similarity, map


def test_an_encoder_finds_features_by_what_they_are_about(tmp_path):
    index = planted.plant_index(tmp_path)
    hits = search_by_meaning(index, LetterEncoder(), "zanzibar", n=3)
    assert hits[0].feature == 6
    assert 5 not in [hit.feature for hit in search_by_meaning(index, LetterEncoder(), "feet", n=99)]  # dead
    with pytest.raises(TextError, match="nothing to look for"):
        search_by_meaning(index, LetterEncoder(), "  ")


def test_without_the_package_a_sentence_encoder_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match="pip install sentence-transformers"):
        SentenceEncoder("all-MiniLM-L6-v2")


def test_the_model_itself_is_an_encoder_whatever_the_batches(tiny_model):
    texts = ["hello world", "a", "something else entirely", "hello word"]
    whole, single = ModelEncoder(tiny_model), ModelEncoder(tiny_model, batch_size=1)
    assert isinstance(whole, Encoder)
    np.testing.assert_allclose(whole.embed(texts), single.embed(texts), atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(whole.embed(texts), axis=1), 1, atol=1e-5)


def test_a_feature_is_most_like_its_own_copy_in_another_sae(sae, tiny_model):
    other = TopK(TopKConfig(d_sae=24, k=4), tiny_model.d_model, generator=torch.Generator().manual_seed(0))
    other.metadata = sae.metadata
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    shuffled = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    for name, tensor in shuffled.items():
        if tensor.ndim and tensor.shape[0] == 24:
            shuffled[name] = tensor[order]
    other.load_state_dict(shuffled)
    found = by_direction(sae, 5, other, n=3)
    assert order[found.features[0]] == 5
    assert found.scores[0] == pytest.approx(1, abs=1e-5)
    assert found.chance < 0.9
    tokens = np.random.default_rng(0).integers(1, 200, (8, 30)).astype(np.int32)
    firing = next(f for f in range(24) if _fires(sae, f, tiny_model, tokens) >= 5)
    used = by_use(sae, firing, other, tiny_model, tokens, n=3)
    assert order[used.features[0]] == firing
    assert used.scores[0] == 1


def _fires(sae, feature, model, tokens) -> int:
    acts = model.capture(torch.from_numpy(tokens).long(), [HOOK])[HOOK][:, 1:].float()
    return int((sae.encode(acts)[..., feature] > 0).sum())


def test_similarity_refuses_what_cannot_be_compared(sae):
    with pytest.raises(ShapeError, match="no cosine"):
        by_direction(sae, 0, TopK(TopKConfig(d_sae=8, k=2), 5))
    with pytest.raises(ShapeError, match="no feature 99"):
        by_direction(sae, 99, sae)


def test_a_map_of_points_on_a_plane_is_that_plane():
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(20, 3)))[0].T
    angle = rng.uniform(0, 2 * np.pi, 200)
    flat = np.stack([np.cos(angle), np.sin(angle)], 1)
    found = decoder_map((flat @ axes[:2] + 2 * axes[2]).astype(np.float32), method="pca")
    assert found.kept > 0.95
    assert found.kept_at_random < 0.2
    pairwise = [
        np.linalg.norm(of[:50, None] - of[None, :50], axis=2) * scale
        for of, scale in ((flat, 1 / 5**0.5), (found.places, 1))
    ]
    np.testing.assert_allclose(*pairwise, atol=1e-4)


def test_neighbours_kept_is_one_for_the_same_order():
    angle = np.linspace(0, np.pi / 2, 60)
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)
    assert neighbours_kept(circle, circle) == 1


def test_a_map_refuses_what_it_cannot_do(monkeypatch):
    rows = np.eye(8, dtype=np.float32)
    with pytest.raises(ConfigError, match="pca or umap"):
        decoder_map(rows, method="tsne")
    with pytest.raises(ConfigError, match="at least 4"):
        decoder_map(rows[:3])
    monkeypatch.setitem(__import__("sys").modules, "umap", None)
    with pytest.raises(ConfigError, match="umap-learn"):
        decoder_map(rows, method="umap")


def test_a_map_names_its_features_and_lets_no_label_become_markup(tmp_path):
    index = planted.plant_index(tmp_path)
    index._columns["label"] = np.array(["<script>alert(1)</script>"] * index.n_features, object)
    rows = np.random.default_rng(0).normal(size=(index.n_features, 6)).astype(np.float32)
    svg = map_svg(decoder_map(rows, method="pca"), index)
    assert svg.count("<circle") == index.n_features
    assert "<script>" not in svg
