"""Reward over-optimisation in miniature: a proxy is optimised, and what it stands for first rises and then falls.

Gao, Schulman and Hilton 2022, arXiv 2210.10760, on sequences small enough for exact answers. Answers are 12 tokens of
a vocabulary of 8; the reference draws them uniformly. The gold reward likes one token, dislikes another, and likes a
third, the hack, up to 3 times but no more. A proxy that is linear in the counts cannot know the "no more": the
reference shows it hardly ever. Everything depends on the counts of three tokens alone, so the 455 of them replace 8^12
answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.special import logsumexp
from torch import Tensor

from saelab.align.advantages import gae, kl_estimate, token_rewards
from saelab.align.losses.policy import ppo_policy_loss, ppo_value_loss
from saelab.align.losses.reward import bradley_terry_loss
from saelab.align.masked import whiten
from saelab.errors import ConfigError

LENGTH, VOCABULARY = 12, 8
GOOD, BAD, HACK = 0, 1, 2

#: What the proxy sees of an answer: counts, or the two pieces that the gold reward of the hack is made of.
ProxyKind = Literal["linear", "well_specified"]


@dataclass(frozen=True, kw_only=True)
class OveroptConfig:
    n_pairs: int = 300
    """Comparisons that the proxy is trained on, labelled by the gold reward with Bradley and Terry's noise."""
    proxy: ProxyKind = "linear"
    """"linear" cannot express the gold reward; "well_specified" can, and is the control that shows no hump."""
    betas: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5, 0.25, 0.12, 0.06, 0.03, 0.01)
    """KL coefficients of the policies, in units of the proxy's standard deviation under the reference."""
    best_of: tuple[int, ...] = (1, 2, 4, 16, 64, 256, 1024, 4096, 16384)
    """Numbers of answers of which the proxy picks the best."""
    ppo: bool = False
    """Also train each policy by PPO instead of only solving for it."""
    ppo_steps: int = 150
    """Steps of PPO for each coefficient, of 256 answers each."""
    seed: int = 0
    """Seed of the pairs, and of PPO's samples."""

    def __post_init__(self) -> None:
        if self.n_pairs < 2:
            raise ConfigError(f"n_pairs must be at least 2, got {self.n_pairs}; 300 is usual")
        if not self.betas or min(self.betas) <= 0:
            raise ConfigError(f"betas must be above 0, got {list(self.betas)}; 4 down to 0.01 is usual")
        if not self.best_of or min(self.best_of) < 1:
            raise ConfigError(f"best_of must be at least 1, got {list(self.best_of)}; 1 to 16384 is usual")


#: Counts of answers [answers, 3] to their proxy rewards, standardised under the reference.
Score = Callable[[Int[np.ndarray, "answers 3"]], Float[np.ndarray, " answers"]]


class Point(NamedTuple):
    """One policy. Rewards are means over its answers, KL is from the reference in nats an answer."""

    setting: float
    """beta, or the n of best-of-n."""
    kl: float
    proxy: float
    """In standard deviations of the reference's proxy rewards, 0 at the reference."""
    gold: float

    @property
    def distance(self) -> float:
        """sqrt(KL), against which the published curves are simple."""
        return math.sqrt(max(self.kl, 0.0))


class Fit(NamedTuple):
    """gold(d) - gold(0) = d (alpha - beta g(d)) with d = sqrt(KL); g(d) is d for best-of-n and log d for policies."""

    alpha: float
    beta: float
    r_squared: float


class Curve(NamedTuple):
    points: tuple[Point, ...]
    fit: Fit

    @property
    def peak(self) -> Point:
        return max(self.points, key=lambda point: point.gold)

    @property
    def drop(self) -> float:
        """Gold reward lost between the peak and the last point."""
        return self.peak.gold - self.points[-1].gold


class Overoptimisation(NamedTuple):
    """All curves of one proxy."""

    exact: Curve
    """Policies ref exp(proxy / beta) / Z, which PPO approaches."""
    best_of_n: Curve
    ppo: Curve | None
    proxy_accuracy: float
    """How often the proxy prefers what the gold reward prefers, on pairs of the reference's answers."""


class _World(NamedTuple):
    """All counts of the three tokens, with what they are worth."""

    counts: Int[np.ndarray, "states 3"]
    ref_logp: Float[np.ndarray, " states"]
    gold: Float[np.ndarray, " states"]


def overoptimise(config: OveroptConfig) -> Overoptimisation:
    """Train a proxy on comparisons and follow gold and proxy reward as optimisation grows stronger."""
    world = _world()
    weights = _fitted_proxy(world, config)
    proxy = _standardised(_features(world.counts, config.proxy) @ weights, world)
    exact = tuple(_point(world, proxy, beta, _tilted(world, proxy, beta)) for beta in config.betas)
    best = tuple(_best_of(world, proxy, n) for n in config.best_of)
    ppo = None
    if config.ppo:
        points = tuple(_ppo_point(world, weights, proxy, beta, config) for beta in config.betas)
        ppo = Curve(points, _fit(points, world, logarithmic=True))
    return Overoptimisation(
        Curve(exact, _fit(exact, world, logarithmic=True)),
        Curve(best, _fit(best, world, logarithmic=False)),
        ppo,
        _accuracy(world, proxy),
    )


def gold_reward(counts: Int[np.ndarray, "states 3"]) -> Float[np.ndarray, " states"]:
    """0.3 good - 0.3 bad + min(hack, 3) - max(0, hack - 3)."""
    good, bad, hack = counts.T
    return 0.3 * good - 0.3 * bad + np.minimum(hack, 3) - np.maximum(0, hack - 3)


def _world() -> _World:
    counts = np.array(
        [
            (good, bad, hack)
            for good in range(LENGTH + 1)
            for bad in range(LENGTH + 1 - good)
            for hack in range(LENGTH + 1 - good - bad)
        ]
    )
    return _World(counts, _logp_of_counts(counts, np.full(VOCABULARY, 1 / VOCABULARY)), gold_reward(counts))


def _logp_of_counts(
    counts: Int[np.ndarray, "states 3"], token_probs: Float[np.ndarray, " vocabulary"]
) -> Float[np.ndarray, " states"]:
    """Multinomial log-probability of the counts where tokens are independent."""
    others = LENGTH - counts.sum(1, keepdims=True)
    full = np.concatenate([counts, others], 1)
    probs = np.array([*token_probs[:3], token_probs[3:].sum()])
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, LENGTH + 1)))])
    return log_factorial[LENGTH] - log_factorial[full].sum(1) + (full * np.log(probs)).sum(1)


def _features(counts: Int[np.ndarray, "states 3"], kind: ProxyKind) -> Float[np.ndarray, "states features"]:
    good, bad, hack = counts.T.astype(float)
    pieces = [hack] if kind == "linear" else [np.minimum(hack, 3), np.maximum(0, hack - 3)]
    return np.stack([good, bad, *pieces], 1)


def _fitted_proxy(world: _World, config: OveroptConfig) -> Float[np.ndarray, " features"]:
    """Bradley-Terry weights from noisy comparisons of the reference's answers, with a ridge of one pseudo-pair."""
    rng = np.random.default_rng(config.seed)
    first, second = rng.choice(len(world.gold), size=(2, config.n_pairs), p=np.exp(world.ref_logp))
    wins = rng.random(config.n_pairs) < 1 / (1 + np.exp(world.gold[second] - world.gold[first]))
    features = torch.from_numpy(_features(world.counts, config.proxy))
    chosen = features[torch.from_numpy(np.where(wins, first, second))]
    rejected = features[torch.from_numpy(np.where(wins, second, first))]
    weights = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = bradley_terry_loss(chosen @ weights, rejected @ weights).loss.mean()
        loss = loss + weights.square().sum() / (2 * config.n_pairs)
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach().numpy()


def _standardised(rewards: Float[np.ndarray, " states"], world: _World) -> Float[np.ndarray, " states"]:
    """Mean 0 and deviation 1 under the reference."""
    probs = np.exp(world.ref_logp)
    mean = probs @ rewards
    return (rewards - mean) / math.sqrt(probs @ (rewards - mean) ** 2)


def _tilted(world: _World, proxy: Float[np.ndarray, " states"], beta: float) -> Float[np.ndarray, " states"]:
    """log(ref exp(proxy / beta) / Z), the policy of largest proxy reward less beta KL."""
    logits = world.ref_logp + proxy / beta
    return logits - logsumexp(logits)


def _point(
    world: _World, proxy: Float[np.ndarray, " states"], setting: float, logp: Float[np.ndarray, " states"]
) -> Point:
    probs = np.exp(logp)
    return Point(setting, float(probs @ (logp - world.ref_logp)), float(probs @ proxy), float(probs @ world.gold))


def _best_of(world: _World, proxy: Float[np.ndarray, " states"], n: int) -> Point:
    """Best of n answers by the proxy: its value is at most v with probability F(v)^n; ties fall to any of the equal.

    The KL is log n - (n - 1)/n, exact where no two answers tie (Stiennon et al. 2020, appendix G.3).
    """
    _, group = np.unique(np.round(proxy, 9), return_inverse=True)
    ref = np.exp(world.ref_logp)
    of_value = np.bincount(group, ref)
    cumulative = np.minimum(np.cumsum(of_value), 1.0)
    chosen = cumulative**n - np.concatenate([[0.0], cumulative[:-1]]) ** n
    probs = (ref / of_value[group]) * chosen[group]
    return Point(n, math.log(n) - (n - 1) / n, float(probs @ proxy), float(probs @ world.gold))


def _ppo_point(
    world: _World,
    weights: Float[np.ndarray, " features"],
    proxy: Float[np.ndarray, " states"],
    beta: float,
    config: OveroptConfig,
) -> Point:
    """The policy that PPO finds: independent tokens, which is what the optimum of a linear proxy looks like."""
    probs = np.exp(world.ref_logp)
    raw = _features(world.counts, config.proxy) @ weights
    mean, deviation = probs @ raw, math.sqrt(probs @ (raw - probs @ raw) ** 2)
    logits = _ppo(lambda counts: (_features(counts, config.proxy) @ weights - mean) / deviation, beta, config)
    logp = _logp_of_counts(world.counts, logits.double().softmax(0).numpy())
    return _point(world, proxy, beta, logp)


def _ppo(score: Score, beta: float, config: OveroptConfig, *, n_answers: int = 256, lr: float = 0.1) -> Tensor:
    """Token logits after PPO with the per-token KL in the reward."""
    generator = torch.Generator().manual_seed(config.seed)
    logits, values = torch.zeros(VOCABULARY, requires_grad=True), torch.zeros(LENGTH, requires_grad=True)
    optimizer = torch.optim.Adam([logits, values], lr=lr)
    mask, last = torch.ones(n_answers, LENGTH, dtype=torch.bool), torch.full((n_answers,), LENGTH - 1)
    for step in range(config.ppo_steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / config.ppo_steps)
        old = logits.detach().log_softmax(0)
        answers = torch.multinomial(old.exp(), n_answers * LENGTH, replacement=True, generator=generator)
        answers = answers.view(n_answers, LENGTH)
        counts = torch.stack([(answers == token).sum(1) for token in (GOOD, BAD, HACK)], 1)
        scores = torch.from_numpy(score(counts.numpy())).float()
        old_logps, old_values = old[answers], values.detach().expand(n_answers, LENGTH)
        kl = kl_estimate(old_logps, torch.full_like(old_logps, -math.log(VOCABULARY)))
        rewards = token_rewards(kl, scores, last, mask, beta=beta)
        advantages, returns = gae(rewards, old_values, mask, lam=1.0)
        advantages = whiten(advantages, mask)
        for _ in range(4):
            policy = ppo_policy_loss(logits.log_softmax(0)[answers], old_logps, advantages, mask)
            value = ppo_value_loss(values.expand(n_answers, LENGTH), old_values, returns, mask)
            optimizer.zero_grad()
            (policy.loss + 0.1 * value.loss).backward()
            optimizer.step()
    return logits.detach()


def _fit(points: tuple[Point, ...], world: _World, *, logarithmic: bool) -> Fit:
    """Least squares of the published form through the points with KL > 0 (arXiv 2210.10760, eq. 1 and 2)."""
    start = float(np.exp(world.ref_logp) @ world.gold)
    far = [point for point in points if point.kl > 1e-9]
    if len(far) < 2:
        return Fit(math.nan, math.nan, math.nan)
    d = np.array([point.distance for point in far])
    gain = np.array([point.gold for point in far]) - start
    design = np.stack([d, -d * (np.log(d) if logarithmic else d)], 1)
    (alpha, beta), *_ = np.linalg.lstsq(design, gain, rcond=None)
    residual = gain - design @ np.array([alpha, beta])
    return Fit(float(alpha), float(beta), float(1 - residual @ residual / ((gain - gain.mean()) ** 2).sum()))


def _accuracy(world: _World, proxy: Float[np.ndarray, " states"]) -> float:
    probs = np.exp(world.ref_logp)
    agree = np.sign(proxy[:, None] - proxy) == np.sign(world.gold[:, None] - world.gold)
    differ = world.gold[:, None] != world.gold
    weight = probs[:, None] * probs
    return float((weight * (agree & differ)).sum() / (weight * differ).sum())
