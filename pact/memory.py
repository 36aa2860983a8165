"""Bytes that one process needs for a training step, found by running the step on tensors that hold no data.

Reads no weights, trains nothing and does not know tasks (`pact.workload`). What libraries allocate inside one operator
is not seen; `benchmarks/memory_estimate.py` compares with real steps.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel, Trainer, TrainingArguments

from pact.groups import Group, PactConfig, Rollout
from pact.modeling import attach_tree_attention, causal_lm, vocabulary_size
from pact.objective import PactObjective
from pact_kernels.linear_logprob.chunked import BUDGET

GIB = 2**30
RESERVE = 0.1  # share of the free memory that is left alone: fragmentation, work space of libraries, the CUDA context
MOST_TOKENS = 2**20  # of an automatic budget
STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")

# Bytes a trainable parameter of optimisers whose libraries need not be installed here: (states) x (1, 0.5 or 4 bytes
# and one float32 scale a block of 256, or 128 for 4 bits). bitsandbytes and torchao document these block sizes.
_PACKED = {
    "adamw_bnb_8bit": 2 * (1 + 4 / 256),
    "adamw_8bit": 2 * (1 + 4 / 256),
    "paged_adamw_8bit": 2 * (1 + 4 / 256),
    "ademamix_8bit": 3 * (1 + 4 / 256),
    "paged_ademamix_8bit": 3 * (1 + 4 / 256),
    "lion_8bit": 1 + 4 / 256,
    "paged_lion_8bit": 1 + 4 / 256,
    "rmsprop_bnb_8bit": 1 + 4 / 256,
    "adamw_torch_8bit": 2 * (1 + 4 / 256),
    "adamw_torch_4bit": 2 * (0.5 + 4 / 128),
    "paged_adamw_32bit": 8.0,
    "paged_adamw": 8.0,
    "paged_lion_32bit": 4.0,
    "lion_32bit": 4.0,
}


class NoEstimate(RuntimeError):
    """A model or an optimiser whose memory cannot be found without running it."""


class PeakMemory(TorchDispatchMode):
    """While active: bytes of the storages that operators have made and that are alive, their peak, and matmul flops.

    Works on real tensors and on those of a ``FakeTensorMode`` below it. A question about a value (``item``) is answered
    with 1 there, which reads as: every row is live, every check passes.

    Args:
        known: tensors that were there before; their storages do not count.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.alive = self.peak = self.flops = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


@dataclass(frozen=True)
class StepCost:
    """Of forward and backward of one tree: ``peak`` bytes above the weights, gradients included, and ``flops`` of
    matmuls without attention and head."""

    peak: int
    flops: float


class Shadow:
    """A model without data that takes training steps: their memory is counted, nothing is computed.

    Args:
        build: makes the model (a causal LM, or a PEFT model around one), called with the meta device as default.
        config: settings of the objective.
        args: precision, gradient checkpointing and optimiser are read.

    Raises:
        ValueError: what ``attach_tree_attention`` refuses.
    """

    def __init__(self, build: Callable[[], PreTrainedModel], config: PactConfig, args: TrainingArguments) -> None:
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.device("meta"):
            self.model = build()
        self.model.train()
        attach_tree_attention(self.model)
        with self._fake:
            _onto_cpu(self.model)
        # The loss alone takes no reference and old values, which weigh nothing; kernels are torch's: others need less.
        self.config = replace(
            config, kl_coef=0.0, ratio_reference="trace", token_budget=None, anchor_mode="sample", one_pass=True,
            sft_token_weight="none", head_backend="torch", attention_backend="torch",
        )  # fmt: skip
        self._args = args
        self._costs: dict[tuple[int, bool, bool], StepCost] = {}

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def gradients(self) -> int:
        """Bytes of all gradients."""
        return size_of(self.trainable)

    @property
    def layers(self) -> nn.ModuleList:
        """The repeated layers."""
        return next(module for module in self.model.modules() if isinstance(module, nn.ModuleList))

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values of one token in the cache of rollouts."""
        lm = causal_lm(self.model)
        config = lm.config.get_text_config(decoder=True)
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return 2 * config.num_hidden_layers * heads * dim * lm.dtype.itemsize

    def step(self, tokens: int, *, checkpointing: bool | None = None, accumulates: bool = True) -> StepCost:
        """Forward and backward of one tree of ``tokens`` tokens.

        Args:
            tokens: unique tokens of the tree, at least 3.
            checkpointing: gradient checkpointing; None: as the settings say.
            accumulates: whether gradients of an earlier tree are there already.

        Raises:
            NoEstimate: the model's forward depends on values, so that it cannot be followed without them.
        """
        checkpointing = checkpoints(self._args) if checkpointing is None else checkpointing
        key = (tokens, checkpointing, accumulates)
        if key not in self._costs:
            self._set_checkpointing(checkpointing)
            self._costs[key] = self._run(tokens, accumulates)
        return self._costs[key]

    def _run(self, tokens: int, accumulates: bool) -> StepCost:
        objective = PactObjective(self.config)
        (batch,) = objective.build([self._group(tokens)], progress=0.0)
        dtype = autocast_dtype(self._args)
        self.model.zero_grad(set_to_none=True)
        try:
            with self._fake, PeakMemory([*self.model.parameters(), *self.model.buffers()]) as memory:
                for parameter in self.trainable if accumulates else ():
                    parameter.grad = torch.empty_like(parameter)
                with torch.autocast("cpu", dtype) if dtype is not None else nullcontext():
                    loss = objective.loss(self.model, batch).loss
                loss.backward()
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise NoEstimate(
                f"{type(causal_lm(self.model)).__name__} decides by values what it computes ({error.func}): its memory "
                "cannot be estimated"
            ) from None
        return StepCost(memory.peak, memory.flops)

    def _group(self, tokens: int) -> Group:
        """A prompt of two tokens and rollouts that make a tree of ``tokens`` tokens, within the context.

        Only as many of them are predicted as the head takes at a time: more cost time here and no memory.
        """
        limit = getattr(causal_lm(self.model).config.get_text_config(decoder=True), "max_position_embeddings", None)
        most = tokens - 2 if limit is None else min(tokens - 2, limit - 2)
        count = -(-(tokens - 2) // most)
        edges = [2 + (tokens - 2) * i // count for i in range(count + 1)]
        rows = max(BUDGET.rows, BUDGET.logits // (4 * vocabulary_size(self.model)))
        rollouts = []
        for i, (begin, end) in enumerate(pairwise(edges)):
            size = end - begin + 1  # the last token is predicted, not computed
            predicted = min(size, max(1, rows // count))
            sampled = [0] * (size - predicted) + [1] * predicted
            rollouts.append(Rollout([i, *[0] * (size - 1)], sampled, [1.0] * size))
        return Group([0], [0], rollouts=rollouts)

    def _set_checkpointing(self, on: bool) -> None:
        lm, verb = causal_lm(self.model), "enable" if on else "disable"
        # transformers renamed it; the old name warns.
        name = next(n for n in (f"activation_checkpointing_{verb}", f"gradient_checkpointing_{verb}") if hasattr(lm, n))
        getattr(lm, name)(*([_checkpointing_options(self._args)] if on else []))


def _onto_cpu(model: nn.Module) -> None:
    """Tensors of the CPU in place of those of the meta device; what was tied stays tied.

    ``Module.to_empty`` would untie, and operators of the meta device know neither autocast nor the CPU's kernels.
    """
    moved: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None and old not in moved:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    moved[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                tensors[name] = None if old is None else moved[old]  # type: ignore[assignment]


@dataclass(frozen=True)
class Strategy:
    """How a model lies over ``processes``: one of STRATEGIES. ``offload``: weights, gradients and optimiser states stay
    in the host's memory."""

    name: str = "single"
    processes: int = 1
    offload: bool = False

    def __post_init__(self) -> None:
        if self.name not in STRATEGIES:
            raise ValueError(f"unknown strategy {self.name!r}: choose {', '.join(STRATEGIES)}")
        if self.processes < 1:
            raise ValueError(f"processes is {self.processes}, set it to at least 1")

    @classmethod
    def of(cls, args: TrainingArguments) -> Strategy:
        """That of this process, as accelerate was launched."""
        if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
            stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
            offload = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none") == "cpu"
            return cls(f"zero{stage}" if stage in "123" else "ddp", args.world_size, offload)
        if args.world_size == 1:
            return cls()
        if parse_flag_from_env("ACCELERATE_USE_FSDP"):
            return cls("fsdp2", args.world_size, parse_flag_from_env("FSDP_OFFLOAD_PARAMS"))
        return cls("ddp", args.world_size)

    def share(self, part: str) -> int:
        """Into how many pieces ``part`` (weights, gradients, optimizer) is cut."""
        cut = {
            "zero1": ("optimizer",),
            "zero2": ("optimizer", "gradients"),
            "zero3": ("optimizer", "gradients", "weights"),
            "fsdp2": ("optimizer", "gradients", "weights"),
        }
        return self.processes if part in cut.get(self.name, ()) else 1


@dataclass(frozen=True)
class Estimate:
    """Bytes that one process needs, by what they are for.

    ``communication``: DDP's buckets; the layers that sharded weights are gathered into and their gradients.
    ``activations``: of the tree of ``tokens`` tokens, everything that forward and backward hold above the gradients.
    ``rollouts``: KV cache, and whole weights where they are sharded; while it is there, activations are not.
    """

    weights: int
    gradients: int
    optimizer: int
    reference: int
    communication: int
    activations: int
    rollouts: int
    tokens: int

    @property
    def fixed(self) -> int:
        """What is needed whatever the tokens are."""
        return self.weights + self.gradients + self.optimizer + self.reference + self.communication

    @property
    def training(self) -> int:
        return self.fixed + self.activations

    @property
    def sampling(self) -> int:
        """While episodes are played: gradients are gone."""
        return self.weights + self.optimizer + self.reference + self.rollouts

    @property
    def total(self) -> int:
        return max(self.training, self.sampling)


def estimate(
    shadow: Shadow,
    args: TrainingArguments,
    strategy: Strategy,
    tokens: int,
    *,
    cached_tokens: int = 0,
    with_reference: bool = False,
    accumulates: bool = True,
) -> Estimate:
    """The memory of one process.

    Args:
        tokens: unique tokens of the largest tree; 0: only what does not depend on tokens.
        cached_tokens: tokens that rollouts hold in the KV cache at a time.
        with_reference: whether a copy of the trainable weights is kept for the KL term.
        accumulates: whether an optimiser step has more than one tree.
    """
    trainable, dtype = shadow.trainable, autocast_dtype(args)
    # DeepSpeed keeps 16-bit weights and gradients, and a float32 master copy beside the states (arXiv 1910.02054, 3.1).
    halved = dtype is not None and strategy.name.startswith("zero")
    weights = 2 * count(shadow.parameters) if halved else size_of(shadow.parameters)
    gradients = 2 * count(trainable) if halved else size_of(trainable)
    states = optimizer_bytes(trainable, args, torch.float32 if halved else None) + 4 * count(trainable) * halved
    persistent = {
        "weights": weights // strategy.share("weights"),
        "gradients": gradients // strategy.share("gradients"),
        "optimizer": states // strategy.share("optimizer"),
        "reference": gradients // strategy.share("weights") * with_reference,
    }
    sharded = strategy.share("weights") > 1
    peak = shadow.gradients
    if tokens:
        peak = shadow.step(tokens, accumulates=accumulates or strategy.processes > 1).peak
    return Estimate(
        **dict.fromkeys(persistent, 0) if strategy.offload else persistent,
        communication=_gathered_layers(shadow, dtype) if sharded else gradients * (strategy.name == "ddp"),
        activations=peak - shadow.gradients,
        rollouts=cached_tokens * shadow.cache_bytes + (size_of(shadow.parameters, dtype) if sharded else 0),
        tokens=tokens,
    )


def _gathered_layers(shadow: Shadow, dtype: torch.dtype | None) -> int:
    """Sharded weights that are whole at a time: the layer at work and the next one, what is in no layer (embeddings,
    head), and the gradients of one layer and of that."""
    layers = shadow.layers
    outside = {id(p) for p in shadow.parameters} - {id(p) for layer in layers for p in layer.parameters()}
    rest = [p for p in shadow.parameters if id(p) in outside]
    layer = max((list(layer.parameters()) for layer in layers), key=size_of)
    trained = [p for p in [*layer, *rest] if p.requires_grad]
    return 2 * size_of(layer, dtype) + size_of(rest, dtype) + size_of(trained, dtype)


def count(parameters: Sequence[Tensor]) -> int:
    """Number of values."""
    return sum(parameter.numel() for parameter in parameters)


def size_of(parameters: Sequence[Tensor], dtype: torch.dtype | None = None) -> int:
    """Bytes, of copies in ``dtype`` where it is given."""
    return sum(parameter.numel() * (dtype or parameter.dtype).itemsize for parameter in parameters)


def autocast_dtype(args: TrainingArguments) -> torch.dtype | None:
    """What autocast computes in, or None without mixed precision."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def checkpoints(args: TrainingArguments) -> bool:
    """Whether activations are checkpointed; transformers renamed the setting."""
    return bool(getattr(args, "activation_checkpointing", False) or args.gradient_checkpointing)


def _checkpointing_options(args: TrainingArguments) -> dict[str, Any] | None:
    return cast(
        dict[str, Any] | None,
        getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs,
    )


def optimizer_bytes(parameters: Sequence[Tensor], args: TrainingArguments, dtype: torch.dtype | None = None) -> int:
    """Bytes of the states that the optimiser ``args.optim`` keeps, for copies in ``dtype`` where it is given.

    Two small matrices take a real step: what an optimiser keeps is ``a`` bytes a value and ``b`` a row and column
    (factored second moments). 8-bit optimisers, whose libraries need a GPU, go by their block sizes.

    Raises:
        NoEstimate: an optimiser that cannot be tried alone, or whose package is missing.
    """
    name = str(getattr(args.optim, "value", args.optim))
    if name in _PACKED:
        return int(_PACKED[name] * count(parameters))
    total = 0
    for kind in {dtype or parameter.dtype for parameter in parameters}:
        of_kind = [p for p in parameters if dtype is not None or p.dtype == kind]
        (small, small_edge), (large, large_edge) = ((n * n, 2 * n) for n in _TRIED)
        at_small, at_large = (_state_bytes(n, kind, name, args) for n in _TRIED)
        a = (at_large * small_edge - at_small * large_edge) / (large * small_edge - small * large_edge)
        b = (at_small - a * small) / small_edge
        total += int(a * count(of_kind) + b * sum(sum(p.shape) for p in of_kind))
    return total


_TRIED = (128, 256)  # edges of the square matrices that take a step


def _state_bytes(edge: int, dtype: torch.dtype, name: str, args: TrainingArguments) -> int:
    module = nn.Linear(edge, edge, bias=False, dtype=dtype)
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, cast(PreTrainedModel, module))
        optimizer = kind(module.parameters(), **options)
    except (ImportError, TypeError, AttributeError, ValueError) as error:
        raise NoEstimate(f"the memory of optim {name} cannot be estimated: {error}") from None
    module.weight.grad = torch.zeros_like(module.weight)
    optimizer.step()
    return size_of([value for value in tree_leaves(optimizer.state[module.weight]) if isinstance(value, Tensor)])


def free_memory(device: torch.device, gib: float | None = None) -> int:
    """Bytes that this process may take: ``gib`` where it is given, else what is free on ``device``.

    On a CPU that is the least of what the machine and the control groups above this process have left, shared equally
    among the processes of this machine.
    """
    if gib is not None:
        return int(gib * GIB)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    rooms = [psutil.virtual_memory().available, *_cgroup_rooms(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]
    return min(rooms) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _cgroup_rooms(groups: Path, root: Path) -> Iterator[int]:
    """What each control group (version 2) from this process up to the root has left; page cache can be given back."""
    lines = groups.read_text().splitlines() if groups.is_file() else []
    path = next((line.removeprefix("0::/") for line in lines if line.startswith("0::")), None)
    for folder in [] if path is None else [root / path, *(root / path).parents]:
        limit = folder / "memory.max"
        if limit.is_file() and (most := limit.read_text().strip()) != "max":
            cache = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / "memory.current").read_text())
            yield max(0, int(most) - used + int(cache.get("inactive_file", 0)))


def fit_tokens(peak: Callable[[int], int], room: int, least: int) -> int | None:
    """The most tokens of a tree for which ``peak(tokens) <= room``, to a thousandth; None where ``least`` do not fit.

    ``peak`` is the largest of several straight lines, hence convex: a chord between a point that fits and one that
    does not lies above it, so where the chord crosses ``room`` the tree fits.
    """
    fits, at_fits, over = least, peak(least), 2 * least
    if at_fits > room:
        return None
    while (at_over := peak(over)) <= room:
        if over >= MOST_TOKENS:
            return MOST_TOKENS
        slope = (at_over - at_fits) / (over - fits)
        fits, at_fits = over, at_over
        over = min(MOST_TOKENS, over + max(over // 100, int((room - at_over) / max(slope, 1.0))) + 1)
    while True:
        tokens = fits + int((room - at_fits) / (at_over - at_fits) * (over - fits))
        if tokens - fits <= fits // 1000:
            return fits
        fits, at_fits = tokens, peak(tokens)
