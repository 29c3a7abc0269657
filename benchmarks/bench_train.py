"""One training step of a TopK SAE on the CPU: the sparse path against dense torch, after checking that they agree.

usage: python -m benchmarks.bench_train [--rounds N]
"""

from __future__ import annotations

import argparse
import os

import torch

from benchmarks.timing import publish, side_by_side

#: tokens, width, features, active features
SHAPES = ((2048, 576, 4608, 32), (1024, 768, 16384, 64))


def step_of(path: str, acts: torch.Tensor, d_sae: int, k: int):
    """A function that makes one whole step (forward, backward, clip, Adam, unit norm) on a path, and its SAE."""
    from saelab.sae.architectures import new_sae
    from saelab.sae.topk import TopKConfig
    from saelab.train.optim import OptimConfig, adam

    sae = new_sae(TopKConfig(d_sae=d_sae, k=k), d_in=acts.shape[1], generator=torch.Generator().manual_seed(0))
    optimizer = adam(sae, OptimConfig(lr=1e-3))
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    dead = torch.zeros(d_sae, dtype=torch.bool)

    def step() -> None:
        os.environ["SAELAB_KERNELS"] = path
        losses = sae.training_loss(acts, dead=dead)
        losses.total.backward()
        sae.project_decoder_grad_()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sae.normalise_decoder_()

    return step, sae


def check_agreement(acts: torch.Tensor, d_sae: int, k: int) -> float:
    """Relative difference of the weights after one step on either path; refuse to time if it is not rounding."""
    results = []
    for path in ("cpu", "reference"):
        step, sae = step_of(path, acts, d_sae, k)
        step()
        results.append(torch.cat([p.detach().flatten() for p in sae.parameters()]))
    difference = float((results[0] - results[1]).norm() / results[1].norm())
    if not difference < 1e-4:
        raise SystemExit(f"the two paths differ by {difference:.1e} after one step, so their speed means nothing")
    return difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    rows = []
    for n, d_in, d_sae, k in SHAPES:
        acts = torch.randn(n, d_in, generator=torch.Generator().manual_seed(1))
        difference = check_agreement(acts, d_sae, k)
        steps = {path: step_of(path, acts, d_sae, k)[0] for path in ("cpu", "reference")}
        timings = side_by_side(steps, rounds=rounds)
        ratio = timings["reference"].median_ms / timings["cpu"].median_ms
        rows.append(
            {
                "tokens": n,
                "d_in": d_in,
                "d_sae": d_sae,
                "k": k,
                "relative_difference": difference,
                "speedup": round(ratio, 2),
                **{path: timing._asdict() for path, timing in timings.items()},
            }
        )
        print(
            f"{n} x {d_in} x {d_sae}, k={k}: sparse {timings['cpu'].median_ms:.0f} ms, "
            f"dense {timings['reference'].median_ms:.0f} ms, {ratio:.1f}x"
        )
    print(f"written to {publish('train_step_cpu', rows)}")


if __name__ == "__main__":
    main()
