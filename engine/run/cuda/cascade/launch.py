"""CascadeWork: the device side of a step's work lists, and the launches that read them.

    update(plan)   host: lists as NumPy, one asynchronous copy each for what changed   (before a step or a replay)
    launch(...)    device: one attend launch a tile class, one merge; no allocation, no synchronisation

Everything a launch reads lies in buffers allocated once, so a captured launch replays with whatever the last
``update`` brought. It needs a CUDA device and Triton.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.plan import CascadePlan, Levels
from engine.run.cuda.cascade.tuning import (
    CHUNKS,
    LONG_TAILS,
    PORTABLE,
    ROW_TAILS,
    AttentionShape,
    RotationTable,
    TileClass,
    Tuning,
)
from engine.run.cuda.cascade.work import AT_COUNTS, Ints, Limits, ListShape, SharedLists, shared_lists, tail_lists

LOG2_E = 1.4426950408889634
STAGING_BUFFERS = 4  # steps whose copies may still be in flight when the next one is prepared


class CascadeWork:
    """Work lists of one step at a time in fixed device buffers, and the launches over them.

    One thread, one current stream: ``update`` copies on the stream that is current and ``launch`` launches there.
    Without ``tuning``, the device decides: ``Tuning()`` on compute capability 9, ``PORTABLE`` elsewhere.
    """

    def __init__(
        self,
        shape: AttentionShape,
        device: torch.device | str,
        limits: Limits | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        self.shape = shape
        self.device = torch.device(device)
        self._on_cuda = self.device.type == "cuda"
        self.limits = limits or Limits()
        self.tuning = tuning or self._default_tuning()
        for tile in self.tuning.classes:
            if tile.stream and (shape.page_size % 8 or tile.tokens % shape.page_size):
                raise ValueError(f"page_size: {shape.page_size} is no multiple of 8 that divides {tile.tokens}")
        self._narrow, self._wide = (self._lists_of(members) for members in (self.tuning.narrow, self.tuning.wide))
        self.classes: tuple[int, ...] = ()
        self._static_ints = self.limits.static_ints
        ints = self._static_ints + self.limits.dynamic_ints
        self.lists = torch.zeros(ints, dtype=torch.int32, device=self.device)
        slots = 2 * self.limits.partials
        self.partial_out = torch.zeros(
            slots, shape.heads, shape.head_dim, dtype=self.tuning.partial_dtype, device=self.device
        )
        self.partial_lse = torch.zeros(slots, shape.heads, dtype=torch.float32, device=self.device)
        self._staging = deque(_Staging(ints, self._on_cuda) for _ in range(STAGING_BUFFERS))
        self._shared: tuple[Levels, int, ListShape, SharedLists] | None = None
        self._processors = torch.cuda.get_device_properties(self.device).multi_processor_count if self._on_cuda else 2
        self._blocks: dict[tuple[int, int, int, bool], Any] = {}

    def _default_tuning(self) -> Tuning:
        hopper = self._on_cuda and torch.cuda.get_device_capability(self.device)[0] == 9
        return Tuning() if hopper else PORTABLE

    def _lists_of(self, members: tuple[TileClass, ...]) -> ListShape:
        chunks, row_tails, long_tails = (self.tuning.tiles(members, what) for what in (CHUNKS, ROW_TAILS, LONG_TAILS))
        return ListShape(self.shape.ratio, chunks, row_tails, long_tails, self.tuning.splits, self.limits)

    @property
    def line(self) -> Tensor:
        """Where the caller's own integers are on the device, (limits.line,) int32."""
        return self.lists[self._static_ints - self.limits.line : self._static_ints]

    def update(self, plan: CascadePlan, line: Ints | None = None) -> tuple[int, ...]:
        """Brings the plan's lists to the device; the shared part only if compositions or row count changed.

        With ``line`` (limits.line,) the caller's own integers too.

        Returns the tile classes that have items, which ``launch`` launches unless told otherwise: a captured graph
        can be replayed if it was captured with these. Returns before the copies are done. Raises ``WorkTooLarge``
        if the plan does not fit ``limits``.
        """
        rows, last = len(plan.slots), self._shared
        fresh = last is None or last[0] is not plan.levels or last[1] != rows
        if fresh:
            shape = self._wide if self._is_wide(plan) else self._narrow
            self._shared = last = plan.levels, rows, shape, shared_lists(plan.levels, rows, shape)
        assert last is not None
        _, _, shape, shared = last
        tails = tail_lists(plan, shared, shape, self.shape.page_size)
        staging = self._staging[0]
        self._staging.rotate(-1)
        staging.wait()
        if fresh:
            staging.copy(shared.blob, self.lists, 0)
        if line is None:
            staging.copy(tails, self.lists, self._static_ints)
        else:
            staging.copy(np.concatenate((line, tails)), self.lists, self._static_ints - len(line))
        staging.sent()
        count = len(self.tuning.classes)
        items = shared.blob[AT_COUNTS : AT_COUNTS + count] + tails[AT_COUNTS : AT_COUNTS + count]
        self.classes = tuple(index for index in range(count) if items[index])
        return self.classes

    def _is_wide(self, plan: CascadePlan) -> bool:
        most = self._narrow.chunk_tiles[-1][0] // self.shape.ratio
        wide = sum(read.tokens for read in plan.reads if len(read.rows) > most)
        wide += sum(tail.tokens_before + tail.rows for tail in plan.tails if tail.rows > most)
        return wide >= self.tuning.wide_share * plan.tokens_read

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
        classes: tuple[int, ...] | None = None,
    ) -> None:
        """Attention of the updated plan over one layer's pool, into ``out``.

        ``keys`` and ``values`` are (slots, kv_heads, head_dim) contiguous; ``q`` and ``out`` (rows, heads, head_dim),
        contiguous in the last two dimensions. With ``rotation`` and not ``turned``, q is raw and each pair is turned
        by its row's position minus the chunk's offset; if ``turned``, q already stands at its position and is turned
        back by the offset; without ``rotation`` nothing is turned. ``classes``: launch these, not the last update's.
        """
        from engine.run.cuda.cascade import kernel

        turn = kernel.AS_IS if rotation is None else kernel.BACK if turned else kernel.FORWARD
        for index in self.classes if classes is None else classes:
            run = self._stream if self.tuning.classes[index].stream else self._attend
            run(index, keys, values, q, scaling, rotation, turn)
        self._merge(kernel, out)

    def _stream(
        self, index: int, keys: Tensor, values: Tensor, q: Tensor, scaling: float,
        rotation: RotationTable | None, turn: int,
    ) -> None:  # fmt: skip
        from engine.run.cuda.cascade import stream as cascade_stream

        tile, shape, overlap = self.tuning.classes[index], self.shape, self.tuning.overlap
        cos, sin, turn_pairs = self._table(rotation)
        sizes = (tile.tokens, shape.page_size)
        cascade_stream.stream[(self._processors * tile.programs_per_sm,)](
            q, q.stride(0), *(self._blocks_of(x, n, True) for n in sizes for x in (keys, values)),
            self.lists, self._static_ints, index, cos, sin, self.partial_out, self.partial_lse, scaling * LOG2_E,
            TURN=turn, RATIO=shape.ratio, KV_HEADS=shape.kv_heads, D=shape.head_dim, TURN_PAIRS=turn_pairs,
            GROUPS=tile.rows // 64, N=tile.tokens, PAGE=shape.page_size, STAGES=tile.stages,
            OVERLAP=overlap, BACKWARDS=self.tuning.backwards, CAUSAL=tile.causal, num_warps=4,
            maxnreg=128 if tile.programs_per_sm > 1 else None, **_dependent(overlap),
        )  # fmt: skip

    def _attend(
        self, index: int, keys: Tensor, values: Tensor, q: Tensor, scaling: float,
        rotation: RotationTable | None, turn: int,
    ) -> None:  # fmt: skip
        from engine.run.cuda.cascade import kernel as cascade_kernel

        tile, shape, overlap = self.tuning.classes[index], self.shape, self.tuning.overlap
        cos, sin, turn_pairs = self._table(rotation)
        blocks = (self._blocks_of(x, tile.tokens, False) if tile.tensor else x for x in (keys, values))
        cascade_kernel.attend[(self._processors * tile.programs_per_sm,)](
            q, q.stride(0), keys, values, *blocks, keys.stride(0), self.lists, self._static_ints,
            index, cos, sin, self.partial_out, self.partial_lse, scaling * LOG2_E,
            TURN=turn, RATIO=shape.ratio, KV_HEADS=shape.kv_heads, D=shape.head_dim, TURN_PAIRS=turn_pairs,
            M=tile.rows, N=tile.tokens, PAGE=shape.page_size, TENSOR=tile.tensor, SPLIT_LOOP=tile.split_loop,
            OVERLAP=overlap, num_warps=tile.warps, num_stages=tile.stages, **_dependent(overlap),
        )  # fmt: skip

    def _table(self, rotation: RotationTable | None) -> tuple[Tensor, Tensor, int]:
        """cos, sin and how many pairs turn; something to point at where nothing does."""
        if rotation is None:
            return self.partial_lse, self.partial_lse, 1
        return rotation.cos, rotation.sin, rotation.cos.shape[1]

    def _merge(self, kernel: Any, out: Tensor) -> None:
        kernel.merge[(out.shape[0], self.shape.heads)](
            self.partial_out, self.partial_lse, self.lists, self._static_ints, self.lists, out, out.stride(0),
            HEADS=self.shape.heads, D=self.shape.head_dim, PARTS=self.tuning.merge_parts, ORDERED=False,
            OVERLAP=self.tuning.overlap, num_warps=self.tuning.merge_warps, **_dependent(self.tuning.overlap),
        )  # fmt: skip

    def _blocks_of(self, pool: Tensor, tokens: int, stream: bool) -> Any:
        """A tensor descriptor of one layer's keys or values in blocks of ``tokens``; made once."""
        key = (pool.data_ptr(), pool.shape[0], tokens, stream)
        if key not in self._blocks:
            flat, block = pool.view(pool.shape[0], -1), [tokens, self.shape.head_dim]
            self._blocks[key] = _streamed(flat, block) if stream else _described(flat, block)
        return self._blocks[key]


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
