"""Preference training takes probability from the chosen answers too, where chosen and rejected are alike."""

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from saelab.align.losses.pairwise import PairLogps, dpop_loss, nll_loss, sigmoid_loss

N_PROMPTS, N_TOKENS, LENGTH, BETA = 64, 24, 8, 0.1


class Writer(nn.Module):
    """A recurrent model of short answers to numbered prompts."""

    def __init__(self, width=48):
        super().__init__()
        self.prompt = nn.Embedding(N_PROMPTS, width)
        self.cell = nn.GRU(N_TOKENS, width, batch_first=True)
        self.head = nn.Linear(width, N_TOKENS)

    def logps(self, answers):
        """log p(answer | prompt), summed over its tokens."""
        before = one_hot(answers[:, :-1], N_TOKENS).float()
        inputs = torch.cat([torch.zeros(len(answers), 1, N_TOKENS), before], 1)
        hidden, _ = self.cell(inputs, self.prompt.weight[None])
        return self.head(hidden).log_softmax(-1).gather(2, answers[..., None])[..., 0].sum(1)


@pytest.fixture(scope="module")
def imitated():
    """A model that knows both answers to each prompt, which differ in one token."""
    torch.manual_seed(0)
    chosen = torch.randint(N_TOKENS, (N_PROMPTS, LENGTH))
    rejected = chosen.clone()
    place = torch.randint(LENGTH, (N_PROMPTS,))
    rejected[torch.arange(N_PROMPTS), place] = (chosen[torch.arange(N_PROMPTS), place] + 1) % N_TOKENS
    model = Writer()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        (-(model.logps(chosen) + model.logps(rejected)).mean() / LENGTH).backward()
        optimizer.step()
    return model, chosen, rejected


def shifts(imitated, loss):
    """Mean change of the chosen's and the rejected's log-probability, accuracy, share of chosen that fell."""
    start, chosen, rejected = imitated
    model = Writer()
    model.load_state_dict(start.state_dict())
    with torch.no_grad():
        ref = start.logps(chosen), start.logps(rejected)
    n = torch.full((N_PROMPTS,), LENGTH)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss(PairLogps(model.logps(chosen), model.logps(rejected), *ref, n, n)).mean().backward()
        optimizer.step()
    with torch.no_grad():
        a, b = model.logps(chosen) - ref[0], model.logps(rejected) - ref[1]
    return a.mean().item(), b.mean().item(), (a > b).float().mean().item(), (a < 0).float().mean().item()


def test_dpo_on_pairs_that_differ_in_one_token_lowers_the_chosen_and_accuracy_does_not_show_it(imitated):
    chosen, rejected, accuracy, fallen = shifts(imitated, lambda pairs: sigmoid_loss(pairs, beta=BETA).loss)
    assert chosen < -2
    assert rejected < chosen - 10
    assert accuracy == 1.0
    assert fallen > 0.5


def test_dpop_and_a_likelihood_keep_the_chosen_probable(imitated):
    def with_likelihood(pairs):
        return sigmoid_loss(pairs, beta=BETA).loss + 0.1 * nll_loss(pairs, beta=BETA).loss

    for loss in (lambda pairs: dpop_loss(pairs, beta=BETA).loss, with_likelihood):
        chosen, rejected, accuracy, _ = shifts(imitated, loss)
        assert chosen > -0.5
        assert rejected < -10
        assert accuracy == 1.0
