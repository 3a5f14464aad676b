"""CascadeWork: the device side of a step's work lists, and the launches that read them.

    update(plan)   host: lists as NumPy, one asynchronous copy each for what changed   (before a step or a replay)
    launch(...)    device: one attend launch a tile class, one merge; no allocation, no synchronisation

Everything a launch reads lies in buffers allocated once, so a captured launch replays with whatever the last
``update`` brought. It needs a CUDA device and Triton.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.plan import CascadePlan, Window
from engine.run.cuda.cascade.lists import PlanLists
from engine.run.cuda.cascade.reads import Ints
from engine.run.cuda.cascade.records import AT_COUNTS, Limits
from engine.run.cuda.cascade.shared import SharedLists
from engine.run.cuda.cascade.tuning import SHARED_BYTES, AttentionShape, RotationTable, TileClass, Tuning, tuning_for

LOG2_E = 1.4426950408889634
STAGING_BUFFERS = 4  # steps whose copies may still be in flight when the next one is prepared


@dataclass(frozen=True)
class Partials:
    """Memory of partial results: (results, heads, v_dim), and their base-2 log-sum-exp (results, heads) fp32."""

    out: Tensor
    lse: Tensor


@dataclass(frozen=True)
class _Scores:
    """How a launch makes scores of queries and keys. ``scale`` and ``squeeze`` as the kernels take them."""

    scale: float
    squeeze: float
    softcap: bool
    rotation: RotationTable | None
    turn: int

    @classmethod
    def of(cls, scaling: float, softcap: float | None, rotation: RotationTable | None, turn: int) -> _Scores:
        if softcap is None:
            return cls(scaling * LOG2_E, 0.0, False, rotation, turn)
        return cls(softcap * LOG2_E, 2 * LOG2_E * scaling / softcap, True, rotation, turn)


class CascadeWork:
    """Work lists of one step at a time in fixed device buffers, and the launches over them.

    One thread, one current stream: ``update`` copies on the stream that is current and ``launch`` launches there.
    Without ``tuning``, device and shape decide (``tuning_for``). ``window``: what the layers let rows see. ``partials``
    and ``plan_lists``: those of another one of the same shape, limits and tuning that launches at other times.
    """

    def __init__(
        self,
        shape: AttentionShape,
        device: torch.device | str,
        limits: Limits | None = None,
        tuning: Tuning | None = None,
        *,
        window: Window | None = None,
        partials: Partials | None = None,
        plan_lists: PlanLists | None = None,
    ) -> None:
        self.shape = shape
        self.window = window
        self.device = torch.device(device)
        self._on_cuda = self.device.type == "cuda"
        self.limits = limits or Limits()
        self.tuning = tuning or tuning_for(shape, *_device_of(self.device))
        self.tuning.check(shape)
        self._plan_lists = plan_lists or PlanLists(shape, self.tuning, self.limits)
        self.classes: tuple[int, ...] = ()
        self._static_ints = self.limits.static_ints
        ints = self._static_ints + self.limits.dynamic_ints
        self.lists = torch.zeros(ints, dtype=torch.int32, device=self.device)
        self.partials = partials or self._make_partials()
        self._staging = deque(_Staging(ints, self._on_cuda) for _ in range(STAGING_BUFFERS))
        self._shared: SharedLists | None = None  # on the device
        self._processors = torch.cuda.get_device_properties(self.device).multi_processor_count if self._on_cuda else 2
        self._blocks: dict[tuple[int, int, int, bool], Any] = {}

    def _make_partials(self) -> Partials:
        slots, shape = 2 * self.limits.partials, self.shape
        out = torch.zeros(slots, shape.heads, shape.v_dim, dtype=self.tuning.partial_dtype, device=self.device)
        return Partials(out, torch.zeros(slots, shape.heads, dtype=torch.float32, device=self.device))

    @property
    def plan_lists(self) -> PlanLists:
        """Where lists of plans are made, for another one."""
        return self._plan_lists

    @property
    def line(self) -> Tensor:
        """Where the caller's own integers are on the device, (limits.line,) int32."""
        return self.lists[self._static_ints - self.limits.line : self._static_ints]

    def update(self, plan: CascadePlan, line: Ints | None = None) -> tuple[int, ...]:
        """Brings the lists of what rows see of the plan to the device; the shared part only if it changed.

        With ``line`` (limits.line,) the caller's own integers too.

        Returns the tile classes that have items, which ``launch`` launches unless told otherwise: a captured graph
        can be replayed if it was captured with these. Returns before the copies are done. Raises ``WorkTooLarge``
        if the plan does not fit ``limits``.
        """
        shared, tails = self._plan_lists.of(plan, self.window)
        staging = self._staging[0]
        self._staging.rotate(-1)
        staging.wait()
        if shared is not self._shared:
            staging.copy(shared.blob, self.lists, 0)
            self._shared = shared
        if line is None:
            staging.copy(tails, self.lists, self._static_ints)
        else:
            staging.copy(np.concatenate((line, tails)), self.lists, self._static_ints - len(line))
        staging.sent()
        count = len(self.tuning.classes)
        items = shared.blob[AT_COUNTS : AT_COUNTS + count] + tails[AT_COUNTS : AT_COUNTS + count]
        self.classes = tuple(index for index in range(count) if items[index])
        return self.classes

    def launch(
        self,
        keys: Tensor,
        values: Tensor,
        q: Tensor,
        out: Tensor,
        *,
        scaling: float,
        rotation: RotationTable | None = None,
        turned: bool = False,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        classes: tuple[int, ...] | None = None,
    ) -> None:
        """Attention of the updated plan over one layer's pool, into ``out``.

        ``keys`` and ``values`` are (slots, kv_heads, k_dim or v_dim) contiguous; ``q`` and ``out`` (rows, heads, k_dim
        or v_dim), contiguous in the last two dimensions. With ``rotation`` and not ``turned``, q is raw and each pair
        is turned by its row's position minus the chunk's offset; if ``turned``, q already stands at its position and
        is turned back by the offset; without ``rotation`` nothing is turned. ``softcap`` and ``sinks`` (heads,) fp32
        are those of ``Scores``. ``classes``: launch these, not the last update's.
        """
        from engine.run.cuda.cascade import kernel

        turn = kernel.AS_IS if rotation is None else kernel.BACK if turned else kernel.FORWARD
        scores = _Scores.of(scaling, softcap, rotation, turn)
        for index in self.classes if classes is None else classes:
            run = self._stream if self.tuning.classes[index].stream else self._attend
            run(index, keys, values, q, scores)
        self._merge(kernel, out, sinks)

    def _stream(self, index: int, keys: Tensor, values: Tensor, q: Tensor, scores: _Scores) -> None:
        from engine.run.cuda.cascade.stream.kernel import stream

        tile = self.tuning.classes[index]
        both = tuple(zip((keys, values), self.shape.blocks, strict=True))
        sizes = (tile.tokens, self.shape.page_size)
        blocks = [self._blocks_of(x, tokens, width, True) for tokens in sizes for x, width in both]
        stream[(self._processors * tile.programs_per_sm,)](
            q, q.stride(0), *blocks, self.lists, self._static_ints, index, *self._angles(scores),
            self.partials.out, self.partials.lse, scores.scale, scores.squeeze, **self._constants(tile, scores),
            GROUPS=tile.rows // 64, STAGES=tile.stages, BACKWARDS=self.tuning.backwards, CAUSAL=tile.causal,
            num_warps=4, maxnreg=128 if tile.programs_per_sm > 1 else None,
        )  # fmt: skip

    def _attend(self, index: int, keys: Tensor, values: Tensor, q: Tensor, scores: _Scores) -> None:
        from engine.run.cuda.cascade import kernel as cascade_kernel

        tile = self.tuning.classes[index]
        both = zip((keys, values), self.shape.blocks, strict=True)
        blocks = (self._blocks_of(x, tile.tokens, width, False) if tile.tensor else x for x, width in both)
        cascade_kernel.attend[(self._processors * tile.programs_per_sm,)](
            q, q.stride(0), keys, values, *blocks, keys.stride(0), values.stride(0), self.lists, self._static_ints,
            index, *self._angles(scores), self.partials.out, self.partials.lse, scores.scale, scores.squeeze,
            **self._constants(tile, scores), M=tile.rows, TENSOR=tile.tensor, SPLIT_LOOP=tile.split_loop,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def _constants(self, tile: TileClass, scores: _Scores) -> dict[str, Any]:
        """What both kernels are compiled for."""
        shape, rotation = self.shape, scores.rotation
        k_block, v_block = shape.blocks
        return {
            "TURN": scores.turn, "RATIO": shape.ratio, "KV_HEADS": shape.kv_heads, "K_DIM": shape.k_dim,
            "V_DIM": shape.v_dim, "K_BLOCK": k_block, "V_BLOCK": v_block,
            "FIRST": 0 if rotation is None else rotation.first_dim,
            "TURN_PAIRS": 1 if rotation is None else rotation.pairs,
            "INTERLEAVED": rotation is not None and rotation.interleaved,
            "N": tile.tokens, "PAGE": shape.page_size, "WINDOW": self.window is not None, "SOFTCAP": scores.softcap,
            "OVERLAP": self.tuning.overlap, **_dependent(self.tuning.overlap),
        }  # fmt: skip

    def _angles(self, scores: _Scores) -> tuple[Tensor, Tensor]:
        """cos and sin; something to point at where nothing turns."""
        rotation = scores.rotation
        return (self.partials.lse, self.partials.lse) if rotation is None else (rotation.cos, rotation.sin)

    def _merge(self, kernel: Any, out: Tensor, sinks: Tensor | None) -> None:
        overlap, (_, v_block) = self.tuning.overlap, self.shape.blocks
        kernel.merge[(out.shape[0], self.shape.heads)](
            self.partials.out, self.partials.lse, self.lists, self._static_ints, out, out.stride(0),
            self.partials.lse if sinks is None else sinks, HEADS=self.shape.heads, V_DIM=self.shape.v_dim,
            V_BLOCK=v_block, PARTS=self.tuning.merge_parts, SINKS=sinks is not None,
            OVERLAP=overlap, num_warps=self.tuning.merge_warps, **_dependent(overlap),
        )  # fmt: skip

    def _blocks_of(self, pool: Tensor, tokens: int, width: int, stream: bool) -> Any:
        """A tensor descriptor of one layer's keys or values in blocks of (tokens, width); made once."""
        key = (pool.data_ptr(), pool.shape[0], tokens, stream)
        if key not in self._blocks:
            flat, block = pool.view(pool.shape[0], -1), [tokens, width]
            self._blocks[key] = _streamed(flat, block) if stream else _described(flat, block)
        return self._blocks[key]


def _device_of(device: torch.device) -> tuple[bool, int]:
    """Whether the device has compute capability 9, and how many bytes of shared memory a program can have."""
    if device.type != "cuda":
        return False, SHARED_BYTES
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    shared = driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return torch.cuda.get_device_capability(device)[0] == 9, int(shared)


def _dependent(overlap: bool) -> dict[str, bool]:
    """The launch option of programmatic dependent launch; the interpreter does not know it."""
    return {"launch_pdl": True} if overlap else {}


def _described(flat: Tensor, block: list[int]) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(flat, block)


def _streamed(flat: Tensor, block: list[int]) -> Any:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    dtype = gl.bfloat16 if flat.dtype == torch.bfloat16 else gl.float16
    return TensorDescriptor.from_tensor(flat, block, gl.NVMMASharedLayout.get_default_for(block, dtype))


class _Staging:
    """A pinned copy of the lists, and when its last copy to the device was done."""

    def __init__(self, ints: int, pinned: bool) -> None:
        self._tensor = torch.zeros(ints, dtype=torch.int32, pin_memory=pinned)
        self._ints = self._tensor.numpy()
        self._done = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        if self._done is not None and not self._done.query():  # type: ignore[no-untyped-call]
            self._done.synchronize()

    def copy(self, values: Ints, target: Tensor, at: int) -> None:
        end = at + len(values)
        self._ints[at:end] = values
        target[at:end].copy_(self._tensor[at:end], non_blocking=True)

    def sent(self) -> None:
        if self._done is not None:
            self._done.record()
