"""Several processes as one: groups balanced over them, equal counts of collective work, whole weights where they are
sharded. Wrapping and sharding themselves are accelerate's."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from pact.groups import Group
from pact.modeling import causal_lm


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether weights are sharded (FSDP2, ZeRO-3), so that every forward and backward is collective work."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP


def check_strategy(accelerator: Accelerator) -> None:
    """Refuse what accelerate was asked for and leaves off, and what PACT does not run on.

    Raises:
        ValueError: FSDP asked for and left off (accelerate does so on a CPU and with one process); FSDP of the first
            version; a strategy that splits sequences or layers.
    """
    kind, plugin = accelerator.distributed_type, getattr(accelerator.state, "fsdp_plugin", None)
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and kind != DistributedType.FSDP:
        raise ValueError(
            f"FSDP was asked for, but accelerate runs {kind.value} here and leaves it off without a word (it shards "
            "over several accelerators only): take a configuration without fsdp_config"
        )
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError("FSDP version 1 is not supported: set fsdp_version: 2 in the accelerate configuration")
    if plugin is not None and plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "every process samples from the whole model before it is sharded, so every process must load it: set "
            "fsdp_cpu_ram_efficient_loading: false in the accelerate configuration"
        )
    if kind not in _STRATEGIES:
        raise ValueError(
            f"distributed training of type {kind.value} is not supported: use DDP, FSDP2 or DeepSpeed ZeRO"
        )


_STRATEGIES = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_XPU,
    DistributedType.FSDP,
    DistributedType.DEEPSPEED,
)


def set_precision(accelerator: Accelerator) -> None:
    """Let FSDP2 compute in the mixed precision asked for, but add up gradients and return outputs in float32.

    accelerate's own choice rounds both, and with them the loss, to 16 bits.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if plugin is not None and accelerator.mixed_precision in dtypes:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=dtypes[accelerator.mixed_precision], reduce_dtype=torch.float32
        )


def most(accelerator: Accelerator, count: int) -> int:
    """The largest ``count`` of any process."""
    counts = accelerator.gather(torch.tensor([count], device=accelerator.device))
    return int(counts.max())


def assign(costs: Sequence[int], shares: int) -> list[list[int]]:
    """Items to ``shares`` of nearly equal cost: longest first, each to the least loaded; indices ascending."""
    loads = [(0, share) for share in range(shares)]
    members: list[list[int]] = [[] for _ in range(shares)]
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        load, share = heapq.heappop(loads)
        members[share].append(item)
        heapq.heappush(loads, (load + costs[item], share))
    return [sorted(share) for share in members]


def balance(accelerator: Accelerator, groups: Sequence[Group], costs: Sequence[int]) -> list[Group]:
    """This process's share of the groups of all processes, dealt out so that costs (tokens) are nearly equal.

    Only groups that change hands are sent. Every process must call this; a share may be empty.
    """
    rank = accelerator.process_index
    every = gather_object([list(costs)])
    places = [(process, i) for process, of_process in enumerate(every) for i in range(len(of_process))]
    shares = assign([cost for of_process in every for cost in of_process], accelerator.num_processes)
    owner = {item: share for share, items in enumerate(shares) for item in items}
    leaving = {k: groups[i] for k, (process, i) in enumerate(places) if process == rank and owner[k] != rank}
    moved: dict[int, Group] = {}
    for part in gather_object([leaving]):
        moved |= part
    return [moved[k] if k in moved else groups[places[k][1]] for k in shares[rank]]


@contextmanager
def reduction(accelerator: Accelerator, model: nn.Module, last: bool) -> Iterator[None]:
    """A forward and backward whose gradients are reduced over the processes only where it is the ``last`` of a
    micro-batch.

    Sharded gradients are reduced after every backward: until then each process would hold those of the whole model.
    """
    state, step_ends = accelerator.gradient_state, accelerator.sync_gradients
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        state._set_sync_gradients(step_ends and last)  # with True, DeepSpeed takes the optimiser's step in backward
    try:
        with nullcontext() if last or is_sharded(accelerator) else accelerator.no_sync(model):
            yield
    finally:
        state._set_sync_gradients(step_ends)


def backward_options(accelerator: Accelerator) -> dict[str, Any]:
    """Of ``accelerator.backward``: DeepSpeed would divide by the accumulation steps, which the global denominators
    have done."""
    return {"scale_wrt_gas": False} if accelerator.distributed_type == DistributedType.DEEPSPEED else {}


@contextmanager
def whole_weights(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Keep the weights whole on every process, so that each may run as many forwards as it likes (generation).

    It takes memory for the whole model on every process; plain and replicated models are left as they are.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if shards:
        with _unsharded(accelerator, model, shards):
            yield
    elif any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        with _gathered(accelerator, model):
            yield
    else:
        if is_sharded(accelerator):
            model.to(accelerator.device)  # before training: accelerate places it only when it shards it
        yield


@contextmanager
def _unsharded(accelerator: Accelerator, model: nn.Module, shards: list[Any]) -> Iterator[None]:
    tail = {id(parameter) for parameter in _last_used(model)}
    for shard in shards:
        shard.set_reshard_after_forward(False, recurse=False)
        shard.unshard()
    try:
        yield
    finally:
        after = getattr(accelerator.state, "fsdp_plugin", None)
        reshards = bool(after.reshard_after_forward) if after is not None else True
        for shard in shards:
            shard.reshard()
            # Used last in forward and first in backward, or the root: resharding between the two would be for nothing.
            kept = shard is model or any(id(parameter) in tail for parameter in shard.parameters(recurse=True))
            shard.set_reshard_after_forward(reshards and not kept, recurse=False)


def _last_used(model: nn.Module) -> Iterator[nn.Parameter]:
    yield from causal_lm(model).get_output_embeddings().parameters()


@contextmanager
def _gathered(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """ZeRO-3 releases weights in hooks after each module's forward, gathered or not: the hooks are off meanwhile."""
    import deepspeed

    wrapper = accelerator.deepspeed_engine_wrapped
    offload = None if wrapper is None else getattr(wrapper.engine.optimizer, "parameter_offload", None)
    if offload is not None:
        for parameter in model.parameters():
            cast(Any, parameter).ds_active_sub_modules.clear()
        for hook in [*offload.forward_hooks, *offload.backward_hooks]:
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
    try:
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            yield
    finally:
        if offload is not None:
            offload._register_deepspeed_module(offload.module)


def policy_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Whole weights under the names of the transformers model, LoRA adapters added in; one at a time.

    Every process must exhaust it where weights are sharded. The model's own weights are not touched: merging and
    unmerging at every step would wear them down by rounding.

    Raises:
        ValueError: adapters other than LoRA.
    """
    lm = causal_lm(model)
    for name, parameter in lm.named_parameters():
        if ".lora_" in name:
            continue
        whole = _whole(parameter)
        owner_name, _, leaf = name.rpartition(".")
        if owner_name.endswith(".base_layer"):
            owner_name = owner_name.removesuffix(".base_layer")
            if leaf == "weight":
                whole = whole + _lora_delta(lm.get_submodule(owner_name)).to(whole)
        yield f"{owner_name}.{leaf}" if owner_name else leaf, whole


def _lora_delta(layer: Any) -> Tensor:
    """scaling B A of the active adapters of one PEFT layer, [out, in] float32."""
    if not hasattr(layer, "lora_A") or any(layer.use_dora.get(name) for name in layer.active_adapters):
        raise ValueError(f"an adapter {type(layer).__name__} cannot be merged for another engine: use plain LoRA")
    parts = []
    for name in layer.active_adapters:
        a_RI, b_OR = _whole(layer.lora_A[name].weight).float(), _whole(layer.lora_B[name].weight).float()
        parts.append(layer.scaling[name] * (b_OR @ a_RI))
    return torch.stack(parts).sum(0)


def _whole(parameter: Tensor) -> Tensor:
    """The whole of a parameter that may be sharded, detached; collective where it is."""
    if isinstance(parameter, DTensor):
        device = parameter.device_mesh.device_type
        return cast(DTensor, parameter.detach().to(device)).full_tensor()
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


class Snapshot:
    """The trainable weights of a model as they are now: this process's shards of them, where they are sharded.

    It is the KL reference: the policy when training began. With LoRA that is the adapters alone, so that with fresh
    adapters the reference is the base model and there is no second copy of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.kept = [kept.detach().clone() for kept in _trainable(model)]

    @contextmanager
    @torch.no_grad()
    def restored(self, model: nn.Module) -> Iterator[None]:
        """Exchange the weights of ``model`` for those kept, and back at the end."""
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    def _exchange(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a whole copy left by the last forward would be stale
        for now, kept in zip(_trainable(model), self.kept, strict=True):
            before = now.detach().clone()
            now.detach().copy_(kept)
            kept.copy_(before)


def _trainable(model: nn.Module) -> Iterator[Tensor]:
    """The stored parts of every trainable parameter."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            if isinstance(parameter, DTensor):
                yield parameter.to_local()
            elif hasattr(parameter, "ds_tensor"):
                yield parameter.ds_tensor
            else:
                yield parameter
