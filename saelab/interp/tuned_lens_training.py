"""Training the tuned lens: one forward pass of the model gives the residual streams that all translators learn from.

    loss_l = mean over tokens of KL( model's next-token distribution || lens_l )     (Belrose et al. 2023, section 3)

The translators share nothing, so one optimiser step serves all. The distribution to meet is the model's own, unembedded
in the model's precision like the lens. BOS is left out: its residual stream is another order of magnitude.

From the identity this takes tens of millions of tokens. Least squares is a better place to begin: the affine map that
brings a layer's residual stream nearest to the last one, in closed form and shrunk towards the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor, nn

from saelab import config as configs
from saelab import schedules
from saelab.activations.permutation import mixed_key, permuted
from saelab.activations.rows import Rows, rows_of, stacked
from saelab.activations.settings import CacheConfig
from saelab.activations.text import TextConfig, open_text
from saelab.adam import restore_state_, state_tensors
from saelab.checkpoint import Checkpoints
from saelab.errors import ConfigError, Interrupted, TextError, TrainingError
from saelab.interp.tuned_lens import Translator, TunedLens, save_tuned_lens
from saelab.interp.unembedding import Unembedding, lens_kl, residual_hooks, token_blocks
from saelab.interrupts import deferred
from saelab.models.load import Model
from saelab.rundir import StageWriter
from saelab.stats import Interval, bootstrap, bootstrap_difference, ratio

Progress = Callable[[int, int, str], None]
DtypeName = Literal["float32", "bfloat16", "float16"]

#: Weight of the pull to the identity in least squares, as a share of the mean square of the residual stream's entries.
_RIDGE = 1e-3

#: Rows in a forward pass where no gradient is taken.
_READ_ROWS = 8

#: More than any text has: reading stops when both splits are full.
_ALL_TOKENS = 1 << 60


@dataclass(frozen=True, kw_only=True)
class TunedLensConfig:
    """On what text the translators are trained, and how."""

    model: str = "demo"
    """"demo", a local directory, or a model of the Hugging Face hub."""
    dtype: DtypeName | None = None
    """Precision of the model. Off: the checkpoint's own."""
    text: TextConfig = field(default_factory=lambda: TextConfig(max_tokens_per_document=512))
    """Of what text; the beginnings of many documents teach more than all of a few."""
    tokens: int = 16_384
    """Training tokens, repetitions counted where the text has fewer; BOS not counted."""
    held_out_tokens: int = 4_096
    """At most this many tokens of held-out documents to measure on; BOS not counted."""
    held_out: float = 0.12
    """Share of the documents, chosen by a hash of their text, that training never sees."""
    context: int = 128
    """Tokens in a row, BOS counted."""
    batch_rows: int = 2
    """Rows in a step."""
    start: Literal["least_squares", "identity"] = "least_squares"
    """Where the translators begin: at the map that brings residual streams nearest to the last one, or at doing
    nothing, which is the logit lens and needs far more training."""
    lr: float = 1e-3
    """Peak learning rate of Adam for the matrices."""
    bias_lr: float = 1e-2
    """The same for the biases, as a share of the root mean square of the layer's residual stream."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of the gradient's mean and square."""
    warmup_share: float = 0.05
    """Share of the steps over which the learning rate rises from 0; afterwards it falls to 0."""
    seed: int = 0
    """Seed of the order of the rows."""
    log_every: int = 1
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = 25
    """Steps between two checkpoints."""

    def __post_init__(self) -> None:
        for name in ("tokens", "held_out_tokens", "batch_rows", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")
        for name in ("lr", "bias_lr"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} must be between 0 and 1, got {getattr(self, name)}; leave it out")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out must be between 0 and 1, got {self.held_out}; 0.1 is usual")
        if not 0 <= self.warmup_share < 1:
            raise ConfigError(f"warmup_share is a share of the steps below 1, got {self.warmup_share}; lower it")
        if self.context < 2:
            raise ConfigError(f"context must be at least 2 (BOS and a token), got {self.context}; 128 is usual")

    @property
    def n_steps(self) -> int:
        return math.ceil(self.tokens / self.step_tokens)

    @property
    def step_tokens(self) -> int:
        """Training tokens in a step."""
        return self.batch_rows * (self.context - 1)


class LayerKL(NamedTuple):
    """KL(model || lens) at one hook, nats a token, with intervals over documents."""

    hook_name: str
    logit: Interval
    tuned: Interval
    difference: Interval
    """Tuned minus logit; below 0 where training helped."""


class HeldOut(NamedTuple):
    """What the lenses are worth on text that training did not see."""

    layers: tuple[LayerKL, ...]
    constant: Interval
    """KL(model || the mean distribution of the training text): a lens that reads nothing at all."""
    n_tokens: int
    n_documents: int


def train_tuned_lens(
    config: TunedLensConfig, model: Model, run: StageWriter, *, progress: Progress | None = None
) -> tuple[TunedLens, HeldOut]:
    """Train translators, measure them beside the logit lens, and publish both in the stage directory of ``run``.

    Continues from the latest checkpoint; an uninterrupted run and one that was stopped end with the same bytes.

    Raises:
        TextError: the text gives no row of one of the splits.
        ConfigError: a context longer than the model's, or an architecture that lenses cannot read.
        TrainingError: the loss stopped being a finite number.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint of the last whole step has been written.
    """
    if config.context > model.context:
        raise ConfigError(f"{model.name} takes {model.context} tokens, context is {config.context}; lower it")
    unembedding = Unembedding(model)
    train, held_out = _split(config, model)
    session = _Session(config, unembedding, train, run)
    session.run_to_end(progress)
    lens = session.trained()
    constant = (session.mean_probs / session.step).clamp_min(torch.finfo(torch.float32).tiny).log()
    found = measure(lens, unembedding, held_out, constant, batch_rows=_READ_ROWS)
    n_tokens = config.n_steps * config.step_tokens
    about = {"n_training_tokens": n_tokens, "n_distinct_training_tokens": _distinct(config, train), **plain(found)}
    save_tuned_lens(lens, run.path, about)
    run.finish()
    return lens, found


@torch.no_grad()
def least_squares(lens: TunedLens, unembedding: Unembedding, rows: Rows) -> TunedLens:
    """Translators that minimise |x + x A + b - y|^2 + ridge |A|^2 over the tokens of ``rows``, y the last residual.

    The translators of ``lens`` say for which hooks.
    """
    hooks, last = list(lens.translators), unembedding.last_hook
    fits = {hook: _Fit(translator) for hook, translator in lens.translators.items()}
    for start in range(0, len(rows.tokens), _READ_ROWS):
        resid = _residuals(unembedding.model, rows.tokens[start : start + _READ_ROWS], [*hooks, last])
        for hook in hooks:
            fits[hook].add(resid[hook].float(), resid[last].float())
    return replace(lens, translators={hook: fit.solved() for hook, fit in fits.items()})


class _Fit:
    """Ridge regression of y - x on x, from sums over batches taken about the first batch's means."""

    def __init__(self, like: Translator) -> None:
        self._origin: tuple[Tensor, Tensor] | None = None
        self._n = 0
        self._squares, self._products = torch.zeros_like(like.weight), torch.zeros_like(like.weight)
        self._sums = torch.zeros(2, len(like.bias), dtype=torch.float64, device=like.bias.device)

    def add(self, x: Float[Tensor, "tokens d_model"], y: Float[Tensor, "tokens d_model"]) -> None:
        change = y - x
        if self._origin is None:
            self._origin = x.mean(0), change.mean(0)
        x, change = x - self._origin[0], change - self._origin[1]
        self._n += len(x)
        self._squares += x.T @ x
        self._products += x.T @ change
        self._sums += torch.stack([x.sum(0), change.sum(0)])

    def solved(self) -> Translator:
        assert self._origin is not None
        mean_x, mean_change = self._sums / self._n
        squares = self._squares.double() / self._n - mean_x.outer(mean_x)
        products = self._products.double() / self._n - mean_x.outer(mean_change)
        squares += _RIDGE * squares.diagonal().mean() * torch.eye(len(squares), device=squares.device)
        weight = torch.linalg.solve(squares, products)
        origin_x, origin_change = (origin.double() for origin in self._origin)
        bias = origin_change + mean_change - (origin_x + mean_x) @ weight
        return Translator(weight.float().contiguous(), bias.float())


@torch.no_grad()
def measure(
    lens: TunedLens,
    unembedding: Unembedding,
    rows: Rows,
    constant_logps: Float[Tensor, " d_vocab"],
    *,
    batch_rows: int,
) -> HeldOut:
    """Held-out KL of logit lens and tuned lens at every hook of the residual stream.

    Tokens of one document are not independent, so the bootstrap resamples documents; the difference is paired.
    """
    hooks = residual_hooks(unembedding.model)
    documents, cluster = np.unique(rows.doc[:, 1:], return_inverse=True)
    sums = np.zeros((len(hooks), 2, len(documents), 2))  # [hook, (logit, tuned), document, (nats, tokens)]
    constant = np.zeros((len(documents), 2))
    for start in range(0, len(rows.tokens), batch_rows):
        block = slice(start, start + batch_rows)
        own = torch.from_numpy(cluster.reshape(rows.doc[:, 1:].shape)[block].reshape(-1))
        resid = _residuals(unembedding.model, rows.tokens[block], hooks)
        for part in token_blocks(len(own), unembedding.model.d_vocab):
            logps = unembedding.logits(resid[hooks[-1]][part]).log_softmax(-1)
            _add(constant, own[part], lens_kl(logps, constant_logps.to(logps).expand_as(logps)))
            for i, hook in enumerate(hooks):
                x = resid[hook][part].float()
                translated = x if hook == hooks[-1] else lens.translator(hook)(x)
                for kind, read in enumerate((x, translated)):
                    _add(sums[i, kind], own[part], lens_kl(logps, unembedding.logits(read)))
    layers = tuple(
        LayerKL(hook, bootstrap(ratio, logit), bootstrap(ratio, tuned), _difference(tuned, logit))
        for hook, (logit, tuned) in zip(hooks, sums, strict=True)
    )
    return HeldOut(layers, bootstrap(ratio, constant), rows.doc[:, 1:].size, len(documents))


def plain(found: HeldOut) -> dict[str, Any]:
    """``found`` as JSON."""
    return {
        "n_held_out_tokens": found.n_tokens,
        "n_held_out_documents": found.n_documents,
        "constant_kl": found.constant._asdict(),
        "layers": [
            {
                "hook_name": layer.hook_name,
                "logit_kl": layer.logit._asdict(),
                "tuned_kl": layer.tuned._asdict(),
                "difference": layer.difference._asdict(),
            }
            for layer in found.layers
        ],
    }


class _Session:
    """A training at work: parameters, optimiser, checkpoints. Data is a function of the step, so it has no state."""

    def __init__(self, config: TunedLensConfig, unembedding: Unembedding, rows: Rows, run: StageWriter) -> None:
        self.config, self.unembedding, self.rows, self.run = config, unembedding, rows, run
        model = unembedding.model
        self.checkpoints = Checkpoints(run.path / "checkpoints")
        start = TunedLens.identity(model)
        if config.start == "least_squares" and not self.checkpoints.steps():
            start = least_squares(start, unembedding, rows)
        self.parameters = {
            hook: Translator(*(nn.Parameter(part) for part in translator))
            for hook, translator in start.translators.items()
        }
        self.lens = TunedLens(self.parameters, start.model_name, start.model_sha256)
        self.mean_probs = torch.zeros(model.d_vocab, device=model.device)  # a sum over the steps so far
        self.step = 0
        self.order = permuted(np.arange(len(rows.tokens)), len(rows.tokens), mixed_key(config.seed, 0))
        self.unit = self._root_mean_squares()
        self.optimizer = torch.optim.Adam(
            [{"params": [part], "peak": self._peak(hook, name)} for hook, name, part in self._named()],
            lr=0.0,
            betas=config.betas,
        )
        self._restore()

    def run_to_end(self, progress: Progress | None) -> None:
        self.run.rewind_metrics(self.step)
        n_steps = self.config.n_steps
        with deferred() as stop:
            while self.step < n_steps:
                mean_kl = self._advance()
                if progress:
                    progress(self.step, n_steps, f"mean KL {mean_kl:.3f} nats")
                stopping = bool(stop) and self.step < n_steps
                if stopping or self.step % self.config.checkpoint_every == 0 or self.step == n_steps:
                    self.run.flush_metrics()
                    self.checkpoints.save(self.step, self._tensors(), {"config": configs.to_mapping(self.config)})
                if stopping:
                    raise Interrupted(
                        f"stopped at step {self.step} of {n_steps}; continue with: saelab lens --resume {self.run.path}"
                    )

    def trained(self) -> TunedLens:
        detached = {hook: Translator(*(part.detach() for part in t)) for hook, t in self.parameters.items()}
        return replace(self.lens, translators=detached)

    def _advance(self) -> float:
        """One step of all translators; the mean of their KL."""
        model, hooks = self.unembedding.model, list(self.parameters)
        resid = _residuals(model, self._batch(), [*hooks, self.unembedding.last_hook])
        n_tokens = len(resid[hooks[0]])
        kls = dict.fromkeys(hooks, 0.0)
        for part in token_blocks(n_tokens, model.d_vocab):
            with torch.no_grad():
                logps = self.unembedding.logits(resid[self.unembedding.last_hook][part]).log_softmax(-1)
                self.mean_probs += logps.exp().sum(0) / n_tokens
            for hook in hooks:
                translated = self.parameters[hook](resid[hook][part].float())
                loss = lens_kl(logps, self.unembedding.logits(translated)).sum() / n_tokens
                loss.backward()
                kls[hook] += float(loss.detach())
        mean_kl = sum(kls.values()) / len(kls)
        if not math.isfinite(mean_kl):
            worst = next(hook for hook, kl in kls.items() if not math.isfinite(kl))
            raise TrainingError(
                f"the KL at {worst} became {kls[worst]} at step {self.step}; lower lr (now {self.config.lr:g}) with "
                "--set lr=..."
            )
        self._update()
        self.step += 1
        if self.step % self.config.log_every == 0 or self.step == self.config.n_steps:
            head = {"step": self.step, "tokens": self.step * self.config.step_tokens, "lr": self.config.lr * self._pace}
            self.run.log(head | {"lens_kl": mean_kl} | {f"lens_kl/{hook}": kl for hook, kl in kls.items()})
        return mean_kl

    def _update(self) -> None:
        n_steps = self.config.n_steps
        warmup = round(self.config.warmup_share * n_steps)
        self._pace = schedules.warmup_then_decay(
            self.step, n_steps=n_steps, warmup_steps=warmup, decay_steps=n_steps - warmup
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._pace
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _batch(self) -> Int32[np.ndarray, "rows seq"]:
        places = np.arange(self.step * self.config.batch_rows, (self.step + 1) * self.config.batch_rows)
        return self.rows.tokens[self.order[places % len(self.order)]]

    def _root_mean_squares(self) -> Mapping[str, float]:
        """Of the residual stream of each hook in the first batch: the unit of its bias."""
        resid = _residuals(self.unembedding.model, self._batch(), list(self.parameters))
        return {hook: float(x.float().square().mean().sqrt()) for hook, x in resid.items()}

    def _peak(self, hook: str, part: str) -> float:
        return self.config.lr if part == "weight" else self.config.bias_lr * self.unit[hook]

    def _named(self) -> Iterator[tuple[str, str, Tensor]]:
        for hook, translator in self.parameters.items():
            for part, value in translator._asdict().items():
                yield hook, part, value

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {f"{hook}.{part}": value for hook, part, value in self._named()}  # type: ignore[misc]

    def _tensors(self) -> dict[str, Tensor]:
        adam = state_tensors(self.optimizer, self._parameters().items())
        named = self.lens.tensors() | {f"adam.{name}": value for name, value in adam.items()}
        return {k: v.cpu().contiguous() for k, v in (named | {"mean_probs": self.mean_probs}).items()}

    def _restore(self) -> None:
        saved = self.checkpoints.latest()
        if saved is None:
            return
        with torch.no_grad():
            for name, parameter in self._parameters().items():
                parameter.copy_(saved.tensors[name])
            self.mean_probs.copy_(saved.tensors["mean_probs"])
        adam = {k.removeprefix("adam."): v for k, v in saved.tensors.items() if k.startswith("adam.")}
        restore_state_(self.optimizer, self._parameters().items(), adam)
        self.step = saved.step


def _split(config: TunedLensConfig, model: Model) -> tuple[Rows, Rows]:
    """Training rows and held-out rows, as many as asked for or as the text gives."""
    wanted = {False: config.n_steps * config.batch_rows, True: math.ceil(config.held_out_tokens / (config.context - 1))}
    rows: dict[bool, list[Any]] = {False: [], True: []}
    packing = CacheConfig(
        model=config.model, text=config.text, tokens=_ALL_TOKENS, context=config.context, held_out=config.held_out
    )
    for row in rows_of(open_text(config.text), model, packing):
        if len(rows[row.held_out]) < wanted[row.held_out]:
            rows[row.held_out].append(row)
        elif all(len(rows[split]) == wanted[split] for split in rows):
            break
    for split, name in ((False, "training"), (True, "held-out")):
        if not rows[split]:
            raise TextError(
                f"the text {config.text.source!r} gives no {name} row of {config.context} tokens; give more documents, "
                "a smaller context, or another held_out"
            )
    return stacked(rows[False]), stacked(rows[True])


def _distinct(config: TunedLensConfig, rows: Rows) -> int:
    return len(rows.tokens) * (config.context - 1)


def _residuals(
    model: Model, tokens: Int32[np.ndarray, "rows seq"], hooks: Sequence[str]
) -> dict[str, Float[Tensor, "tokens d_model"]]:
    """The residual stream at each hook, without BOS; the model computes no logits for it."""
    acts = model.capture(torch.from_numpy(tokens).long(), hooks)
    return {hook: acts[hook][:, 1:].flatten(0, 1) for hook in hooks}


def _add(
    sums: Float[np.ndarray, "documents 2"], documents: Int[Tensor, " tokens"], values: Float[Tensor, " tokens"]
) -> None:
    """Add each token's value, and the count of tokens, to its document."""
    own = documents.numpy()
    np.add.at(sums[:, 0], own, values.double().cpu().numpy())
    np.add.at(sums[:, 1], own, 1.0)


def _difference(tuned: Float[np.ndarray, "documents 2"], logit: Float[np.ndarray, "documents 2"]) -> Interval:
    return bootstrap_difference(ratio, tuned, logit, paired=True)
