"""The processes that train one version together: which groups each takes, and what they tell one another.

Every worker has the whole model's view of a batch (its groups, its totals), so what is divided is divided alike everywhere, and
parts are summed, never averaged. Worker 0 alone writes files. Torch is imported only where there is more than one worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from pairloop.errors import ConfigError, TrainingError
from pairloop.learner.data import TokenGroup

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pairloop.learner.job import TrainJob

T = TypeVar("T")

BUCKET = 2**24
"""Gradients summed by one call: 64 MiB in float32."""
GLOO, NCCL_TOO = "gloo", "cpu:gloo,cuda:nccl"
PATIENCE = timedelta(hours=1)
"""How long a worker waits for the others, which may be reading a model, or writing one; a dead one is noticed at once."""

_LOST_TYPES = {"DistBackendError", "DistNetworkError", "DistStoreError"}
_LOST_WORDS = ("gloo", "connection closed by peer", "connection reset by peer")


class WorkerLost(TrainingError):
    """Another worker is gone; why, it has written down itself, or it was killed."""


@dataclass(frozen=True, slots=True)
class Workers:
    """This process among those of its run; by default it is alone, and all of the below is what it has anyway.

    ``sharded``: weights, gradients and optimizer state are divided by FSDP2, whose collectives run within the passes, so that
    every worker has to make as many passes as every other.
    """

    rank: int = 0
    size: int = 1
    sharded: bool = False

    @property
    def leads(self) -> bool:
        """True in the one worker that writes metrics, checkpoints, result and version."""
        return self.rank == 0

    @property
    def loss_factor(self) -> int:
        """What a worker's loss is multiplied by: FSDP2 takes the mean over the workers of what is to be summed."""
        return self.size if self.sharded else 1

    def share(self, groups: Sequence[TokenGroup]) -> list[TokenGroup]:
        """This worker's groups: as many and as long as the others', by dealing them out in order of length, there and back."""
        if self.size == 1:
            return list(groups)
        ordered = sorted(groups, key=lambda group: -group.length)
        place = (self.rank, 2 * self.size - 1 - self.rank)
        return [group for i, group in enumerate(ordered) if i % (2 * self.size) in place]

    def idle_passes(self, passes: int) -> int:
        """Passes that this worker has to make beside its own ``passes``, as others have more; 0 where nobody waits for it.

        To be asked before the first pass.
        """
        return max(self.gather(passes)) - passes if self.sharded else 0

    def gather(self, part: T) -> list[T]:
        """Every worker's part, in the order of ranks."""
        if self.size == 1:
            return [part]
        import torch.distributed as dist

        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, part)
        return parts

    def broadcast(self, value: T) -> T:
        """The leading worker's value."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value if self.leads else None]
        dist.broadcast_object_list(box)
        return box[0]  # type: ignore[return-value]

    def agree(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give all workers the leading one's weights; those of a fresh adapter were drawn by each."""
        if self.size == 1:
            return
        import torch.distributed as dist

        for parameter in parameters:
            dist.broadcast(parameter.detach(), 0)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make every worker's gradients the sum of all workers' (FSDP2 has done so already).

        A parameter that only some workers have used (an expert, or a worker without groups) counts zero for the others.
        """
        if self.size == 1 or self.sharded:
            return
        import torch

        used = [any(by) for by in zip(*self.gather([p.grad is not None for p in parameters]), strict=True)]
        gradients: list[Tensor] = []
        for parameter in (p for p, is_used in zip(parameters, used, strict=True) if is_used):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            _sum(bucket)

    def sum_metrics(self, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums of all workers' metrics, by name; a worker without groups has none."""
        total: dict[str, Tensor] = {}
        for part in self.gather({name: value.cpu() for name, value in metrics.items()}):
            for name, value in part.items():
                total[name] = total[name] + value if name in total else value
        return total


ALONE = Workers()


@contextmanager
def joined(job: TrainJob) -> Iterator[Workers]:
    """Join the workers that a launcher has started, which it tells by environment variables (torchrun's names)."""
    import torch
    import torch.distributed as dist

    from pairloop.policy.scoring import resolve_device

    is_ours = not dist.is_initialized()  # Ray Train has joined them, and chosen the device
    if is_ours:
        backend = GLOO
        if resolve_device(job.device).type == "cuda":
            place, devices = dist.get_node_local_rank(fallback_rank=0), torch.cuda.device_count()
            if place >= devices:
                raise ConfigError(f"train.processes = {job.train.processes}, but there are {devices} CUDA devices for them")
            torch.cuda.set_device(place)
            backend = NCCL_TOO
        dist.init_process_group(backend, timeout=PATIENCE)
    yield Workers(dist.get_rank(), dist.get_world_size(), sharded=job.train.sharding == "fsdp2")
    if is_ours:
        dist.destroy_process_group()


def is_lost(error: BaseException) -> bool:
    """True where an error of one worker says that another one is gone."""
    if isinstance(error, WorkerLost) or type(error).__name__ in _LOST_TYPES:
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _LOST_WORDS)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in their order, those of like type and device together, at most `BUCKET` numbers where several are."""
    bucket: list[Tensor] = []
    numbers = 0
    for tensor in tensors:
        like = bool(bucket) and (bucket[0].dtype, bucket[0].device) == (tensor.dtype, tensor.device)
        if bucket and not (like and numbers + tensor.numel() <= BUCKET):
            yield bucket
            bucket, numbers = [], 0
        bucket.append(tensor)
        numbers += tensor.numel()
    if bucket:
        yield bucket


def _sum(bucket: Sequence[Tensor]) -> None:
    import torch
    import torch.distributed as dist

    flat = torch.cat([tensor.flatten() for tensor in bucket])
    dist.all_reduce(flat)
    for tensor, total in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(total.view_as(tensor))
