"""Several processes on one run: each takes its share of the records, and their sums are those of one.

A loss is divided by what the *whole* batch holds, tokens or records, before its gradient is taken; the gradients of the
processes are then added, never averaged, so that answers of unlike length weigh as they do in one process. The weights
are the same on all, or each layer's are spread over them (FSDP2), with their gradients and Adam's moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from saelab import dist
from saelab.errors import ConfigError

T = TypeVar("T")


def share(items: Sequence[T], group: dist.Group) -> Sequence[T]:
    """Those of ``items`` that this process works on: every ``size``-th, so that an order by length is shared evenly."""
    return items[group.rank :: group.size]


def check_shares(batch_size: int, mesh: dist.Mesh, *, sharded: bool) -> None:
    """Raise ConfigError where a process would get nothing to do, or, with spread weights, less than another.

    Processes that spread a layer must go through it equally often, or the last would wait for ever.
    """
    size = mesh.world.size
    if sharded and size == 1:
        raise ConfigError(
            "training.shard spreads the layers over processes, but there is one; start with torchrun --nproc-per-node 2"
        )
    if batch_size < size or (sharded and batch_size % size):
        wanted = f"a multiple of {size}" if sharded else f"at least {size}"
        raise ConfigError(
            f"a batch of {batch_size} records cannot be shared among {size} processes; set training.batch_size to "
            f"{wanted}"
        )


def rows_of(
    items: Sequence[T],
    compute: Callable[[Sequence[T]], Float[Tensor, "part columns"]],
    *,
    batch_size: int,
    group: dist.Group,
) -> Float[Tensor, "items columns"]:
    """``compute`` of all ``items``, a batch at a time, the batches shared among processes; known to all, in float64.

    All take part equally often: where the batches run out, a process repeats its last and its result is not used.
    """
    starts = range(0, len(items), batch_size)
    n_rounds = -(-len(starts) // group.size)
    found: Tensor | None = None
    for number in range(n_rounds):
        place = number * group.size + group.rank
        start = starts[min(place, len(starts) - 1)]
        part = compute(items[start : start + batch_size]).detach().double().cpu()
        found = torch.zeros(len(items), part.shape[1], dtype=torch.float64) if found is None else found
        if place < len(starts):
            found[start : start + batch_size] = part
    assert found is not None, "there are no items"
    return group.sum(found)


def sum_gradients_(parameters: Iterable[nn.Parameter], group: dist.Group) -> None:
    """Replace each gradient by its sum over the processes; those of spread layers are summed already."""
    if group.size == 1:
        return
    for parameter in parameters:
        # what no process's loss reads has no gradient on any: a reward model's body still holds the language head
        if not isinstance(parameter, DTensor) and parameter.grad is not None:
            parameter.grad.copy_(group.sum(parameter.grad))


def clip_gradients_(parameters: Sequence[nn.Parameter], limit: float, group: dist.Group) -> float:
    """Scale the gradients down to the norm ``limit``, taken over all of them wherever they are; returns it before."""
    spread = [p for p in parameters if isinstance(p, DTensor)]
    here = [p for p in parameters if not isinstance(p, DTensor)]
    norm = torch.nn.utils.get_total_norm([p.grad for p in here if p.grad is not None])
    if spread:
        gradients = [p.grad for p in spread if isinstance(p.grad, DTensor)]
        mine = torch.stack([gradient.to_local().square().sum() for gradient in gradients])
        norm = (norm.square() + group.sum(mine.sum())).sqrt()
    for some in (here, spread):
        torch.nn.utils.clip_grads_with_norm_(some, limit, norm)
    return float(norm)


def by_placement(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters in groups that one call of an optimiser's kernel can take: those held whole, those spread."""
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in parameters:
        groups[isinstance(parameter, DTensor)].append(parameter)
    return [group for group in groups if group]


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` with all of its parts; where it is spread, every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole ``tensor``, where ``like`` is spread and of its shape; else the tensor itself."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def shard_layers_(model: Any, mesh: dist.Mesh) -> None:
    """Spread the weights of each layer of a Hugging Face model over the processes (FSDP2, ``fully_shard``).

    A layer's weights come together while it computes, forward and backward, and its gradient is summed where it is
    kept. Embedding, last norm and head stay whole, because the log-probabilities read the head's matrix themselves.

    Raises:
        ConfigError: an adapter is trained, whose frozen layers are of another precision.
    """
    from torch.distributed.fsdp import fully_shard

    if hasattr(model, "disable_adapter"):
        raise ConfigError(
            "training.shard spreads layers that are trained whole, but an adapter is trained; set --rank 0, or leave "
            "training.shard out: the adapter's gradients are small"
        )
    assert mesh.devices is not None
    for layer in layers_of(model):
        unit = fully_shard(layer, mesh=mesh.devices["data"], reshard_after_forward=True)
        # losses are divided by what the whole batch holds, so gradients add up; by plain sums, which gloo has too
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_gradient_divide_factor(1.0)


def layers_of(model: Any) -> nn.ModuleList:
    """The layers of a Hugging Face model, in their order."""
    n_layers = model.config.num_hidden_layers
    lists = (m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers)
    return next(lists)


def whole_state(model: nn.Module) -> Mapping[str, Tensor] | None:
    """The state of a model whose layers are spread, put together; None for one that is whole. All must ask."""
    state = model.state_dict()
    if not any(isinstance(value, DTensor) for value in state.values()):
        return None
    return {name: whole(value) for name, value in state.items()}
