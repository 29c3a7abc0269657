"""Where metrics go: always into the run's metrics.jsonl, and to TensorBoard or Weights & Biases when asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from saelab.errors import ConfigError
from saelab.rundir import StageWriter

SinkName = Literal["tensorboard", "wandb"]


@runtime_checkable
class Sink(Protocol):
    def write(self, record: Mapping[str, float | int]) -> None: ...

    def close(self) -> None: ...


class _Lines:
    def __init__(self, run: StageWriter) -> None:
        self._run = run

    def write(self, record: Mapping[str, float | int]) -> None:
        self._run.log(record)

    def close(self) -> None:
        pass


class _TensorBoard:
    def __init__(self, run: StageWriter) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.path / "tensorboard"))

    def write(self, record: Mapping[str, float | int]) -> None:
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(record["step"]))

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, run: StageWriter, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project="saelab", name=run.path.resolve().parent.name, dir=str(run.path), config=dict(config)
        )

    def write(self, record: Mapping[str, float | int]) -> None:
        self._run.log(dict(record), step=int(record["step"]))

    def close(self) -> None:
        self._run.finish()


class Sinks:
    """All sinks of a run behind one ``write``."""

    def __init__(self, run: StageWriter, extra: Sequence[SinkName], config: Mapping[str, Any]) -> None:
        self._sinks: list[Sink] = [_Lines(run)]
        for name in extra:
            try:
                self._sinks.append(_TensorBoard(run) if name == "tensorboard" else _WandB(run, config))
            except ImportError as error:
                raise ConfigError(
                    f"log_to has {name!r}, which is not installed; pip install 'saelab[logging]'"
                ) from error

    def write(self, record: Mapping[str, float | int]) -> None:
        for sink in self._sinks:
            sink.write(record)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
