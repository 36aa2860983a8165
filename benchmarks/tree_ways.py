"""The ways of the tree-attention benchmark: ours, dense duplicates, PrefixGrouper's scheme, masked attention.

Holds the prompt group, its q, k and v, and how each way lays them out and attends. Measures nothing but the set-up that
a way needs for a new tree, and imports a peer only when its way is opened: a machine without it still runs the others.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from head_ways import Absent, one_line
from torch import Tensor

from pact_kernels import PrefixTree, tree_attention
from pact_kernels.backend import INTERPRETED

SUFFIX = 4  # tokens between the user's text and the answer: end of turn and generation prompt
VOCAB = 151_936
MODES = ("sample", "mixture")
FLASH_TILES = {
    9: (128, 128),
    10: (256, 128),
}  # (query, key) block of flash-attn 4's sparse lists, by compute capability


@dataclass(frozen=True)
class Shape:
    """Heads, and the tokens of one prompt group: a prompt, its trace, and rollouts of equal length."""

    heads: int
    kv_heads: int
    head_dim: int
    prompt: int
    trace: int
    response: int
    rollouts: int

    def branches(self, mode: str) -> list[tuple[Tensor, list[Tensor]]]:
        """Random ids of (prompt, responses) for each context that the group has.

        The SFT path is one more response of the prompt-only context; ``"sample"`` has its rollouts under the trace
        alone, ``"mixture"`` under both.
        """
        generator = torch.Generator().manual_seed(0)

        def ids(n: int) -> Tensor:
            return torch.randint(VOCAB, (n,), generator=generator)

        head, suffix, context = ids(self.prompt - SUFFIX), ids(SUFFIX), ids(self.trace - SUFFIX)
        trace, rollouts = ids(self.trace), [ids(self.response) for _ in range(self.rollouts)]
        alone = rollouts if mode == "mixture" else []
        return [(torch.cat([head, suffix]), [*alone, trace]), (torch.cat([head, context, suffix]), rollouts)]

    def grown(self, name: str, factor: int) -> Shape:
        return replace(self, **{name: factor * getattr(self, name)})


class Branch(NamedTuple):
    """Tree positions of a prompt and of each of its responses."""

    prompt_at: Tensor
    response_at: list[Tensor]


@dataclass(frozen=True)
class Batch:
    """One prompt group in the tree's layout: q, dout [L, Hq, D], k, v [L, Hkv, D]."""

    tree: PrefixTree
    branches: list[Branch]
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @property
    def duplicated_pairs(self) -> int:
        """(query, key) pairs where every sequence is computed by itself."""
        return sum(path.numel() * (path.numel() + 1) // 2 for path in self.tree.index)


def make_batch(shape: Shape, mode: str, device: torch.device, dtype: torch.dtype) -> Batch:
    """Normal q, k, v and dout on the tree of a random group."""
    groups = shape.branches(mode)
    tree = PrefixTree.from_sequences([torch.cat([prompt, ids]) for prompt, responses in groups for ids in responses])
    tree = tree.to(device)
    branches, first = [], 0
    for prompt, responses in groups:
        paths = tree.index[first : first + len(responses)]
        branches.append(Branch(paths[0][: len(prompt)], [path[len(prompt) :] for path in paths]))
        first += len(responses)
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int) -> Tensor:
        size = (len(tree), heads, shape.head_dim)
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)

    q, k, v, dout = (normal(heads) for heads in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads))
    return Batch(tree, branches, q, k, v, dout)


class Operands(NamedTuple):
    """Rows of q [n, Hq, D] and of k, v [n, Hkv, D]."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Work:
    """A batch as a way takes it: some pieces of rows, and what attends over all of them.

    Args:
        attend: outputs [n_i, Hq, D], one a piece, of all pieces.
        pieces: leaf tensors, made before timing.
        at: tree position of each row of each piece; one position may have several rows.
        douts: gradients of the outputs, those of a position's rows adding up to that of the position.
        setup_s: seconds of what the way makes once a tree and is not timed with it.
        no_backward: why there are no gradients, if so.
    """

    attend: Callable[[Sequence[Operands]], list[Tensor]]
    pieces: list[Operands]
    at: list[Tensor]
    douts: list[Tensor]
    setup_s: float = 0.0
    no_backward: str = ""


Prepare = Callable[[Batch], Work]


def lay_out(batch: Batch, at: list[Tensor], attend: Callable[[Sequence[Operands]], list[Tensor]]) -> Work:
    """Pieces gathered from the tree's rows."""
    copies_L = torch.bincount(torch.cat(at), minlength=len(batch.tree)).to(batch.dout.dtype)
    dout = batch.dout / copies_L[:, None, None]
    pieces = [Operands(*(x[rows].requires_grad_() for x in (batch.q, batch.k, batch.v))) for rows in at]
    return Work(attend, pieces, at, [dout[rows] for rows in at])


@dataclass(frozen=True)
class Way:
    """One way to do the work, and what it computes."""

    name: str
    note: str
    load: Callable[[torch.device], Prepare]  # imports what it needs; raises where that fails
    kind: str = "peer"  # ours | duplicates | peer
    needs_gpu: bool = False
    compiled: bool = False  # takes seconds to compile for each shape

    def open(self, device: torch.device) -> Prepare:
        """What lays a batch out for this way on ``device``.

        Raises:
            Absent: it cannot run here.
        """
        if self.needs_gpu and device.type != "cuda":
            raise Absent("needs a GPU")
        try:
            return self.load(device)
        except Absent:
            raise
        except Exception as error:  # a peer's import may raise anything
            raise Absent(one_line(error)) from None


def load_ours(device: torch.device, backend: str) -> Prepare:
    if backend == "triton" and INTERPRETED:
        raise Absent("Triton's interpreter is on: times would mean nothing")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    probe = make_batch(Shape(2, 1, 16, 8, 8, 4, 2), "sample", device, dtype)
    try:
        tree_attention(probe.q, probe.k, probe.v, probe.tree, backend=backend)
    except RuntimeError as error:  # the library's own refusal; any other error is for the gate to meet
        if str(error).startswith("tree_attention:"):
            raise Absent(str(error)) from None

    def prepare(batch: Batch) -> Work:
        def attend(pieces: Sequence[Operands]) -> list[Tensor]:
            return [tree_attention(*pieces[0], batch.tree, backend=backend)]

        return replace(lay_out(batch, [torch.arange(len(batch.tree), device=device)], attend), setup_s=planned(batch))

    def planned(batch: Batch) -> float:
        """Seconds that planning a tree takes: a first forward on a new one less a second."""
        tree = replace(batch.tree, subtree_end=batch.tree.subtree_end.clone())
        seconds = []
        for _ in range(2):
            _synchronize(device)
            begin = time.perf_counter()
            with torch.no_grad():
                tree_attention(batch.q, batch.k, batch.v, tree, backend=backend)
            _synchronize(device)
            seconds.append(time.perf_counter() - begin)
        return max(0.0, seconds[0] - seconds[1])

    return prepare


@dataclass(frozen=True)
class Lengths:
    """Sequences packed behind each other: each one's queries are the last of its keys."""

    q: tuple[int, ...]
    k: tuple[int, ...]
    device: torch.device

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Int32 [n + 1]: where each sequence's queries and keys begin, and the end."""
        both = (torch.tensor([0, *n], device=self.device).cumsum(0).int() for n in (self.q, self.k))
        q, k = both
        return q, k

    @cached_property
    def mask(self) -> Any:
        """Causal, aligned at the last query and key, for sequences of one length; None where is_causal says it."""
        q, k = self.q[0], self.k[0]
        if q == k:
            return None
        if self.device.type == "cuda":  # a lazy mask, which PyTorch hands to its flash kernel
            from torch.nn.attention.bias import causal_lower_right

            return causal_lower_right(q, k)
        return torch.ones(q, k, dtype=torch.bool, device=self.device).tril(k - q)


Dense = Callable[[Operands, Lengths], Tensor]


class Provider(NamedTuple):
    """Dense causal attention of packed sequences."""

    name: str
    note: str
    load: Callable[[torch.device], Dense]
    ragged: bool  # one call takes any lengths
    needs_gpu: bool


def load_sdpa(device: torch.device) -> Dense:
    def attend(x: Operands, lengths: Lengths) -> Tensor:
        q, k, v = (rows.unflatten(0, (len(lengths.q), -1)).transpose(1, 2) for rows in x)
        causal = lengths.mask is None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=lengths.mask, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return attend


def load_varlen(device: torch.device) -> Dense:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise Absent(f"torch {torch.__version__} has no torch.nn.attention.varlen") from None
    options: dict[str, Any] = {"window_size": (-1, 0)}  # causal, aligned at the last query and key
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # releases before take fewer key heads untold
        options["enable_gqa"] = True

    def attend(x: Operands, lengths: Lengths) -> Tensor:
        return _output(varlen_attn(*x, *lengths.bounds, max(lengths.q), max(lengths.k), **options))

    return attend


def load_flash2(device: torch.device) -> Dense:
    from flash_attn import flash_attn_varlen_func

    def attend(x: Operands, lengths: Lengths) -> Tensor:
        return flash_attn_varlen_func(*x, *lengths.bounds, max(lengths.q), max(lengths.k), causal=True)

    return attend


def load_flash4(device: torch.device) -> Dense:
    _flash4_tile(device)
    from flash_attn.cute import flash_attn_varlen_func

    def attend(x: Operands, lengths: Lengths) -> Tensor:
        (bounds_q, bounds_k), sizes = lengths.bounds, {"max_seqlen_q": max(lengths.q), "max_seqlen_k": max(lengths.k)}
        return _output(flash_attn_varlen_func(*x, cu_seqlens_q=bounds_q, cu_seqlens_k=bounds_k, **sizes, causal=True))

    return attend


def _flash4_tile(device: torch.device) -> tuple[int, int]:
    major, minor = torch.cuda.get_device_capability(device)
    if major not in FLASH_TILES:
        raise Absent(f"needs compute capability 9.0 or 10.x, this GPU has {major}.{minor}")
    return FLASH_TILES[major]


def _output(result: Any) -> Tensor:
    """Some releases return the output alone, others beside the log-sum-exp."""
    return result[0] if isinstance(result, tuple) else result


def load_duplicates(device: torch.device, provider: Provider) -> Prepare:
    dense = provider.load(device)

    def prepare(batch: Batch) -> Work:
        calls = [batch.tree.index] if provider.ragged else _by_length(batch.tree.index)
        lengths = [Lengths(n, n, device) for n in (tuple(map(len, paths)) for paths in calls)]

        def attend(pieces: Sequence[Operands]) -> list[Tensor]:
            return [dense(piece, n) for piece, n in zip(pieces, lengths)]

        return lay_out(batch, [torch.cat(paths) for paths in calls], attend)

    return prepare


def load_grouper(device: torch.device, provider: Provider) -> Prepare:
    """Pieces: of each branch the prompt, then its responses, those of one length together."""
    dense = provider.load(device)

    def prepare(batch: Batch) -> Work:
        at, plan = [], []
        for branch in batch.branches:
            prompt, sets = len(branch.prompt_at), _by_length(branch.response_at)
            at += [branch.prompt_at, *(torch.cat(rows) for rows in sets)]
            alone = Lengths((prompt,), (prompt,), device)
            own = [(len(rows), len(rows[0])) for rows in sets]
            plan.append((alone, [Lengths((n,) * copies, (prompt + n,) * copies, device) for copies, n in own]))

        def attend(pieces: Sequence[Operands]) -> list[Tensor]:
            rest, outputs = iter(pieces), []
            for alone, responses in plan:
                prompt = next(rest)
                outputs.append(dense(prompt, alone))
                for lengths in responses:
                    own = next(rest)
                    k, v = (_behind(prefix, x, len(lengths.q)) for prefix, x in zip(prompt[1:], own[1:]))
                    outputs.append(dense(Operands(own.q, k, v), lengths))
            return outputs

        return lay_out(batch, at, attend)

    return prepare


def _behind(prefix_PHD: Tensor, own_NHD: Tensor, copies: int) -> Tensor:
    """[prefix ; own] for each response, packed: the copy of the prefix that the scheme pays for."""
    own = own_NHD.unflatten(0, (copies, -1))
    return torch.cat([prefix_PHD.expand(copies, -1, -1, -1), own], dim=1).flatten(0, 1)


def _by_length(rows: Sequence[Tensor]) -> list[list[Tensor]]:
    sets: dict[int, list[Tensor]] = {}
    for x in rows:
        sets.setdefault(len(x), []).append(x)
    return list(sets.values())


def _block_mask(batch: Batch, block: int | tuple[int, int]) -> Any:
    """FlexAttention's list of blocks that hold a visible pair, and of those that hold nothing else."""
    from torch.nn.attention.flex_attention import create_block_mask

    end, length = batch.tree.subtree_end, len(batch.tree)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < end[k])

    return create_block_mask(visible, None, None, length, length, device=end.device, BLOCK_SIZE=block)


def _timed_block_mask(batch: Batch, block: int | tuple[int, int]) -> tuple[Any, float]:
    """And the seconds that one takes: the second, since the first loads code and fills the allocator."""
    _block_mask(batch, block)
    _synchronize(batch.q.device)
    begin = time.perf_counter()
    mask = _block_mask(batch, block)
    _synchronize(batch.q.device)
    return mask, time.perf_counter() - begin


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def load_flex(device: torch.device, flash: bool) -> Prepare:
    from torch.nn.attention.flex_attention import flex_attention

    tile: int | tuple[int, int] = 128
    if flash:
        import flash_attn.cute  # noqa: F401  the backend it names

        tile = _flash4_tile(device)
    compiled = torch.compile(flex_attention, dynamic=False)
    options: Any = {"BACKEND": "FLASH"} if flash else None

    def prepare(batch: Batch) -> Work:
        mask, setup_s = _timed_block_mask(batch, tile)

        def attend(pieces: Sequence[Operands]) -> list[Tensor]:
            q, k, v = (x.transpose(0, 1)[None] for x in pieces[0])
            return [compiled(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=options)[0].transpose(0, 1)]

        work = lay_out(batch, [torch.arange(len(batch.tree), device=device)], attend)
        reason = "" if device.type == "cuda" else "FlexAttention has no backward on CPU"
        return replace(work, setup_s=setup_s, no_backward=reason)

    return prepare


def load_flash4_mask(device: torch.device) -> Prepare:
    tile = _flash4_tile(device)
    import cutlass
    from cutlass import cute
    from flash_attn.cute import flash_attn_func, utils
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    @cute.jit
    def visible(b, h, q, k, lengths, tensors):
        end = utils.scalar_to_ssa(tensors[0][k[0]], cutlass.Int32)
        return (k <= q) & (q < end)

    def prepare(batch: Batch) -> Work:
        mask, setup_s = _timed_block_mask(batch, tile)
        # The mask function is also asked about the columns that fill the last tile.
        end = F.pad(batch.tree.subtree_end, (0, -len(batch.tree) % tile[1]))
        by_query = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
        by_key = (mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices)
        forward, backward = (BlockSparseTensorsTorch(*lists, block_size=tile) for lists in (by_query, by_key))
        options = {"block_sparse_tensors": forward, "block_sparse_tensors_bwd": backward, "pack_gqa": False}

        def attend(pieces: Sequence[Operands]) -> list[Tensor]:
            q, k, v = (x[None] for x in pieces[0])
            return [_output(flash_attn_func(q, k, v, mask_mod=visible, aux_tensors=[end], **options))[0]]

        work = lay_out(batch, [torch.arange(len(batch.tree), device=device)], attend)
        return replace(work, setup_s=setup_s)

    return prepare


PROVIDERS = (
    Provider("SDPA", "F.scaled_dot_product_attention, enable_gqa, one call a length", load_sdpa, False, False),
    Provider("torch varlen", "torch.nn.attention.varlen (flash-attn 2 in PyTorch), GQA", load_varlen, True, True),
    Provider("flash-attn 2", "flash_attn_varlen_func of the package, GQA", load_flash2, True, True),
    Provider("flash-attn 4", "flash_attn_varlen_func of flash_attn.cute, GQA", load_flash4, True, True),
)


def _ours() -> list[Way]:
    note = "tree_attention: every token once, visible tiles only; plans made once a tree, before timing"
    return [
        Way(f"ours {backend}", note, partial(load_ours, backend=backend), "ours", backend == "triton")
        for backend in ("triton", "flash", "torch")
    ]


def _dense() -> list[Way]:
    duplicates = "every sequence by itself, causal, no padding"
    grouper = (
        "PrefixGrouper's scheme, written here: a branch's prompt attends to itself once, then each response to a copy "
        "of the prompt's keys and values and its own"
    )
    ways = []
    for provider in PROVIDERS:
        name, gpu = provider.name, provider.needs_gpu
        load = partial(load_duplicates, provider=provider)
        ways.append(Way(f"duplicates {name}", f"{duplicates}; {provider.note}", load, "duplicates", gpu))
    for provider in PROVIDERS:
        load = partial(load_grouper, provider=provider)
        ways.append(
            Way(f"PrefixGrouper {provider.name}", f"{grouper}; {provider.note}", load, needs_gpu=provider.needs_gpu)
        )
    return ways


def _masked() -> list[Way]:
    mask = "mask function (k <= q) & (q < end[k]) on the tree's layout, block lists made before timing (set-up)"
    flex, flex_flash = partial(load_flex, flash=False), partial(load_flex, flash=True)
    flash4 = f"{mask}; flash_attn.cute with block-sparse lists both ways, pack_gqa off"
    return [
        Way("FlexAttention", f"{mask}; compiled for each shape, default kernel options, GQA", flex, compiled=True),
        Way("FlexAttention flash", f"{mask}; compiled, BACKEND=FLASH: flash-attn 4", flex_flash, "peer", True, True),
        Way("flash-attn 4 mask", flash4, load_flash4_mask, needs_gpu=True, compiled=True),
    ]


WAYS: tuple[Way, ...] = (*_ours(), *_dense(), *_masked())
