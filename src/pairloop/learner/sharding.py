"""FSDP2: weights, gradients and optimizer state divided among the workers; and tensors that are whole wherever they came from.

On disk everything is whole, so that a checkpoint goes on with any number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from pairloop.learner.data import TokenGroup
from pairloop.policy.scoring import bare

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

GroupPass = Callable[[nn.Module, Sequence[TokenGroup]], tuple[Tensor, Tensor]]


class Sharded(nn.Module):
    """A model whose one forward pass goes from groups to log-probs, so that FSDP2's hooks stand around all of it.

    Packed rows run the model without its head and then the head alone: of those two no module's forward is the whole.
    """

    def __init__(self, model: nn.Module, group_pass: GroupPass) -> None:
        super().__init__()
        self.model = model
        self._pass = group_pass

    def forward(self, groups: Sequence[TokenGroup]) -> tuple[Tensor, Tensor]:
        """What the group pass gives of the model while its weights are whole."""
        logp_BGT, mask_BGT = self._pass(self.model, groups)
        return logp_BGT.clone(), mask_BGT  # no view, on which FSDP2's hook could be lost


def shard(model: nn.Module, device: torch.device, group_pass: GroupPass) -> Sharded:
    """Divide the model's weights among all workers, layer by layer, and put each worker's part on its ``device``.

    ``model`` keeps its names, with DTensors as parameters. Embeddings, head and last norm are one unit, gathered for a whole
    pass: the head is called several times in one.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    inner: Any = bare(model)
    units = set(inner._no_split_modules or ())
    # What lies inside a unit and is one itself comes first.
    for layer in reversed([module for module in inner.modules() if type(module).__name__ in units]):
        fully_shard(layer, mesh=mesh)
    root = Sharded(model, group_pass)
    fully_shard(root, mesh=mesh, reshard_after_forward=False)
    return root


def undivided(model: nn.Module) -> nn.Module:
    """The model itself, or the one that FSDP2's root stands around."""
    return model.model if isinstance(model, Sharded) else model


def free(model: nn.Module) -> None:
    """Drop the whole weights that a pass without gradient leaves in memory; they would outlive a change of the weights."""
    if isinstance(model, Sharded):
        root: Any = model
        root.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of one that is divided; then every worker has to ask for it."""
    return tensor.full_tensor() if _is_divided(tensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """The tensor itself, or this worker's part of one that is divided."""
    return tensor.to_local() if _is_divided(tensor) else tensor


def divided(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, divided as ``like`` is."""
    if not _is_divided(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # Every worker has read the whole from the same file: nothing need be sent.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def joined_parts(part: Tensor, like: Tensor) -> Tensor:
    """The whole of which every worker has a part, as of ``like``; every worker has to ask for it."""
    if not _is_divided(like):
        return part
    from torch.distributed.tensor import DTensor

    tensor = DTensor.from_local(
        part.to(like.device), like.device_mesh, like.placements, shape=like.shape, stride=like.stride(), run_check=False
    )
    return tensor.full_tensor()


def _is_divided(tensor: Tensor) -> TypeGuard[DTensor]:
    return hasattr(tensor, "device_mesh")
