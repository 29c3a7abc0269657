"""Constitutional AI with critics that can be foreseen: a script, a tiny model, and a server in the next thread."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from saelab.align.constitution import (
    ConstitutionSettings,
    Judged,
    apply_corrections,
    judge,
    preference_rows,
    read_constitution,
    review_queue,
    revise,
    write_rows,
)
from saelab.align.critics import Critic, LocalCritic, ServerCritic
from saelab.align.policy import PolicyConfig, load_policy
from saelab.align.records import Message, read_preferences
from saelab.errors import AssetError, ConfigError, TextError
from saelab.models.tiny import write_tiny_model


class Scripted:
    """Answers with the number of the call; likes the longer answer, and the letter A by ``bias`` nats."""

    name = "scripted"

    def __init__(self, bias=0.0):
        self.bias, self.seen = bias, []

    def reply(self, conversations, *, max_new_tokens, seed):
        self.seen.append((list(conversations), seed))
        return [f"text {len(self.seen)}.{row}" for row in range(len(conversations))]

    def log_probabilities(self, conversation, options):
        question = conversation[-1].content
        a, b = question.split('Answer A: "')[1].split('"\n\nAnswer B: "')
        return [self.bias + len(a), float(len(b.split('"')[0]))]


PRINCIPLES = read_constitution(None)


def test_the_constitution_that_ships_has_twelve_principles_of_different_names():
    assert len({principle.name for principle in PRINCIPLES}) == 12
    assert all(all(part.strip() for part in principle) for principle in PRINCIPLES)


def test_every_round_criticises_the_latest_answer_by_a_principle_that_is_written_down():
    critic = Scripted()
    settings = ConstitutionSettings(rounds=2, seed=4)
    first, second = revise(critic, ["Why?", "How?"], PRINCIPLES, settings)
    assert isinstance(critic, Critic)
    assert len(critic.seen) == 5  # answers, and critiques and revisions of two rounds, each in one batch
    assert first.answer == "text 1.0"
    assert [r.revision for r in first.rounds] == ["text 3.0", "text 5.0"]
    assert second.final == "text 5.1"
    for number, answer in ((1, "text 1.0"), (3, "text 3.0")):
        request = critic.seen[number][0][0][0].content
        assert answer in request
        assert "Why?" in request
        principle = next(p for p in PRINCIPLES if p.name == first.rounds[number // 2].principle)
        assert principle.critique in request
        assert critic.seen[number + 1][0][0][1] == Message("assistant", first.rounds[number // 2].critique)
        assert principle.revision in critic.seen[number + 1][0][0][2].content
    assert len({seed for _, seed in critic.seen}) == 5
    assert revise(Scripted(), ["Why?", "How?"], PRINCIPLES, settings) == [first, second]


def test_a_fondness_for_the_letter_a_cancels():
    cases = [("Why?", "long answer", "short"), ("Why?", "short", "long answer"), ("Why?", "equal", "equal")]
    fair, biased = judge(Scripted(), cases, PRINCIPLES, seed=0), judge(Scripted(bias=2.0), cases, PRINCIPLES, seed=0)
    assert fair[0].probability > 0.9
    assert fair[1].probability == pytest.approx(1 - fair[0].probability)
    assert fair[2].probability == biased[2].probability == pytest.approx(0.5)
    assert biased[2].order_gap == pytest.approx(2 / (1 + math.exp(-2.0)) - 1)
    assert biased[1].probability < 0.5 < biased[0].probability


def case(probability, *, gap=0.0, prompt="Why?"):
    return Judged(prompt, "first", "second", "harm", probability, gap)


def test_a_person_sees_what_a_rule_disputes_then_what_the_order_decided_then_what_is_unsure():
    judged = [case(0.9), case(0.55), case(0.6, gap=0.5), case(0.8, prompt="disputed")]
    queue = review_queue(judged, n=4, rule=lambda prompt, *_: -1.0 if prompt == "disputed" else 0.0)
    assert [(review.id, review.why) for review in queue] == [
        (3, "rule disagrees"),
        (2, "order decides"),
        (1, "unsure"),
        (0, "unsure"),
    ]
    assert len(review_queue(judged, n=2)) == 2


def test_a_persons_decisions_replace_the_judgement(tmp_path):
    judged = [case(0.9), case(0.4), case(0.55)]
    corrected = apply_corrections(judged, {0: "second", 2: "drop"})
    assert [c.probability for c in corrected] == [0.0, 0.4]
    rows = preference_rows(corrected)
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("second", "first")] * 2
    assert [row["probability"] for row in rows] == [1.0, 0.6]
    assert preference_rows(corrected, min_confidence=0.7) == rows[:1]
    write_rows(tmp_path / "pairs.jsonl", rows)
    assert len(read_preferences(tmp_path / "pairs.jsonl").required()) == 2
    with pytest.raises(TextError, match="about case 3, but cases are 0 to 2"):
        apply_corrections(judged, {3: "first"})
    with pytest.raises(TextError, match='write "first", "second" or "drop"'):
        apply_corrections(judged, {0: "both"})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[[principle]]\nname = 'a'", "principle 1 of .* lacks critique, revision, preference"),
        ("[[principle]]\nname='a'\ncritique='b'\nrevision='c'\npreference='d'\nweight='e'", "has weight"),
        ("", "has no"),
        ("[[", "not readable"),
    ],
)
def test_constitutions_of_no_use_are_refused(text, complaint, tmp_path):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        read_constitution(tmp_path / "c.toml")


def test_a_local_model_criticises_and_judges(tmp_path):
    write_tiny_model(tmp_path / "tiny", n_layers=2, context=700)
    policy = load_policy(PolicyConfig(model=str(tmp_path / "tiny"), dtype="float32", context=700), trainable=False)
    critic = LocalCritic(policy, batch_size=2)
    settings = ConstitutionSettings(max_new_tokens=5)
    results = revise(critic, ["the tower", "one river", "the sea"], PRINCIPLES, settings)
    assert results == revise(
        LocalCritic(policy, batch_size=2), ["the tower", "one river", "the sea"], PRINCIPLES, settings
    )
    [judged] = judge(critic, [("the tower", "of the people", "was not")], PRINCIPLES, seed=0)
    assert 0 < judged.probability < 1
    with pytest.raises(ConfigError, match="there is room for"):
        critic.reply([(Message("user", "the tower " * 300),)], max_new_tokens=100, seed=0)


class Server(BaseHTTPRequestHandler):
    requests: list = []  # noqa: RUF012
    answer: dict = {}  # noqa: RUF012

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append((self.path, self.headers.get("Authorization"), body))
        reply = json.dumps(type(self).answer).encode()
        self.send_response(500 if type(self).answer == {} else 200)
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    http = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    Server.requests = []
    yield ServerCritic(f"http://127.0.0.1:{http.server_port}/v1/", "some-model", api_key="secret")
    http.shutdown()
    http.server_close()
    thread.join()


def test_a_server_is_asked_by_the_protocol(server):
    likely = [{"token": " A", "logprob": -0.1}, {"token": "B", "logprob": -2.5}]
    Server.answer = {
        "choices": [{"message": {"content": " hello "}, "logprobs": {"content": [{"top_logprobs": likely}]}}]
    }
    conversation = (Message("user", "Hi"),)
    assert server.reply([conversation] * 2, max_new_tokens=7, seed=3) == ["hello", "hello"]
    path, key, body = Server.requests[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body["messages"] == [{"role": "user", "content": "Hi"}]
    assert (body["max_tokens"], body["seed"], Server.requests[1][2]["seed"]) == (7, 3, 4)
    assert server.log_probabilities(conversation, ("A", "B")) == [-0.1, -2.5]
    with pytest.raises(AssetError, match="none of C, D"):
        server.log_probabilities(conversation, ("C", "D"))


def test_a_server_that_fails_is_named_with_its_reason(server):
    Server.answer = {}
    with pytest.raises(AssetError, match="answers with error 500"):
        server.reply([(Message("user", "Hi"),)], max_new_tokens=1, seed=0)
    Server.answer = {"choices": [{"message": {"content": "A"}}]}
    with pytest.raises(AssetError, match="no log-probabilities"):
        server.log_probabilities((Message("user", "Hi"),), ("A", "B"))
    Server.answer = {"nothing": 1}
    with pytest.raises(AssetError, match="does not speak the protocol"):
        server.reply([(Message("user", "Hi"),)], max_new_tokens=1, seed=0)
    with pytest.raises(AssetError, match="does not answer"):
        ServerCritic("http://127.0.0.1:9/v1", "m").reply([(Message("user", "Hi"),)], max_new_tokens=1, seed=0)
    with pytest.raises(ConfigError, match="must begin with http"):
        ServerCritic("localhost:8000", "m")
