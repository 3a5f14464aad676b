"""LayerWorks: the attention of a model whose layers see by different windows, over one pool.

    update(plan)     host: each distinct window's lists of what it lets rows see
    launch(layer)    device: that layer's attention, over the lists of its window

One layer runs at a time, so all of them write their partial results into the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from engine.kv.pool import TORCH_DTYPES, PagedKVPool
from engine.plan import CascadePlan, Window
from engine.run.cuda.cascade.launch import CascadeWork
from engine.run.cuda.cascade.reads import Ints
from engine.run.cuda.cascade.records import CLASSES_MAX, Limits
from engine.run.cuda.cascade.tuning import AttentionShape, RotationTable, Tuning


class LayerWorks:
    """Attention over ``pool`` of layers with ``heads`` query heads and ``windows``, one a layer.

    ``limits.line`` integers are the caller's own, brought to the device by ``update``. Raises ``ValueError`` for layers
    that differ in heads or widths, and for heads the kernels do not take.
    """

    def __init__(
        self,
        pool: PagedKVPool,
        windows: Sequence[Window | None],
        *,
        heads: int,
        limits: Limits | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        layers = set(pool.layout.layers)
        if len(layers) != 1 or len(windows) != len(pool.layout.layers):
            raise ValueError(f"windows: {len(windows)} for {len(pool.layout.layers)} layers of {len(layers)} forms")
        (layer,) = layers
        dtype = TORCH_DTYPES[pool.layout.dtype]
        shape = AttentionShape(heads, layer.kv_heads, layer.k_dim, dtype, pool.page_size, layer.v_dim)
        self.pool = pool
        self.windows = tuple(dict.fromkeys(windows))
        self._work_of = tuple(self.windows.index(window) for window in windows)
        first = CascadeWork(shape, pool.device, limits, tuning, window=self.windows[0])
        others = (
            CascadeWork(
                shape, pool.device, limits, tuning, window=window, partials=first.partials, plan_lists=first.plan_lists
            )
            for window in self.windows[1:]
        )  # fmt: skip
        self.works = [first, *others]
        self.classes: tuple[int, ...] = ()

    @property
    def tuning(self) -> Tuning:
        return self.works[0].tuning

    @property
    def line(self) -> Tensor:
        """Where the caller's own integers are on the device, (limits.line,) int32."""
        return self.works[0].line

    @property
    def every_class(self) -> tuple[int, ...]:
        """All that ``update`` can return."""
        count = len(self.tuning.classes)
        return tuple(CLASSES_MAX * work + index for work in range(len(self.works)) for index in range(count))

    def layer_of(self, number: int) -> int:
        """The first layer that launches class ``number``."""
        return self._work_of.index(number // CLASSES_MAX)

    def update(self, plan: CascadePlan, line: Ints | None = None) -> tuple[int, ...]:
        """Brings the lists of every window to the device, and ``line`` (limits.line,), the caller's own integers.

        ``plan`` is what a layer without a window computes. Returns the tile classes that have items, ascending; those
        of different windows are different numbers. A captured graph can be replayed if it was captured with these, or
        more. Returns before the copies are done. Raises ``WorkTooLarge`` if the plan does not fit ``limits``.
        """
        classes: list[int] = []
        for index, work in enumerate(self.works):
            found = work.update(plan, line if index == 0 else None)
            classes += [CLASSES_MAX * index + number for number in found]
        self.classes = tuple(classes)
        return self.classes

    def launch(
        self,
        layer: int,
        q: Tensor,
        out: Tensor,
        *,
        scaling: float,
        rotation: RotationTable | None = None,
        turned: bool = False,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        classes: Sequence[int] | None = None,
    ) -> None:
        """Attention of the updated plan over one layer, into ``out``; see ``CascadeWork.launch``.

        ``classes``: launch those of them that are the layer's, not the last update's.
        """
        index = self._work_of[layer]
        wanted = self.classes if classes is None else classes
        own = tuple(number % CLASSES_MAX for number in wanted if number // CLASSES_MAX == index)
        self.works[index].launch(
            self.pool.keys[layer], self.pool.values[layer], q, out, scaling=scaling, rotation=rotation, turned=turned,
            softcap=softcap, sinks=sinks, classes=own,
        )  # fmt: skip
