"""A borrowed model: transformers' modelling code with our function in place of its attention.

The model runs one packed row of tokens with explicit positions and no cache of its own; each attention call
is handed to a function that the caller of ``forward`` gives. This module does not know pools or plans.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from engine.attention import Scores
from engine.kv.pool import TORCH_DTYPES
from engine.model.checkpoint import dtype_name, load_checkpoint
from engine.model.masks import MaskFunction, additive, masks_of_eager
from engine.model.numbered import counting_modules, told_positions
from engine.model.quantized import Quantization
from engine.model.rotary import rotary_modules

# Called once a layer, in order: layer, q (rows, heads, k_dim), k and v (rows, kv_heads, dim), scores; returns
# (rows, heads, v_dim).
AttendFunction = Callable[[int, Tensor, Tensor, Tensor, Scores], Tensor]


@dataclass(frozen=True)
class LayerMask:
    """What hides tokens in one layer: the model's mask function, None if it makes none, and what the layer calls its
    sliding window, which kernels that make no mask would go by."""

    function: MaskFunction | None
    sliding_window: int | None


Blocks = Sequence[tuple[Tensor, Callable[[Tensor], None]]]  # rows of a forward, and who is given their logits

_names = itertools.count()


class ModelRefused(ValueError):
    """This model cannot be served exactly; the message names what stands against it."""


class BorrowedModel:
    """A causal ``transformers`` model whose attention is ours.

    ``forward`` is not re-entrant: one thread launches device work.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        dtype_reason: str = "",
        quantization: Quantization | None = None,
        adapter: str = "",
        notes: Sequence[str] = (),
    ) -> None:
        """``dtype_reason`` says why the weights have the dtype that they have, ``quantization`` how the checkpoint had
        them, ``adapter`` what was merged into them, ``notes`` what else its operator should know.
        """
        self.module = module.eval()
        self.name = name
        self.dtype_reason = dtype_reason
        self.quantization = quantization
        self.adapter = adapter
        self.notes = tuple(notes)
        self.config: Any = module.config
        self._attend: AttendFunction | None = None
        self._calls = 0
        self.defers_rotation = False  # if so, queries and keys reach ``attend`` as they are before rotation
        self._rotary = rotary_modules(module)
        self.counting = counting_modules(module)  # they take a row's number in a forward for its position
        self.tells_positions = True  # if so, they are told it
        self._takes_rows = "logits_to_keep" in inspect.signature(module.forward).parameters
        # One name a model: the interface has no other way to tell models of one process apart, and some
        # models refuse extra keyword arguments. No mask function bears the name, so no mask is built.
        self._interface = f"cairn_{next(_names)}"
        AttentionInterface.register(self._interface, self._attention)
        self.attention_modules: list[nn.Module] = []  # of the last forward, by layer

    @classmethod
    def load(
        cls, path_or_id: str, *, dtype: str = "auto", device: str = "cpu", name: str = "", lora: Path | None = None
    ) -> BorrowedModel:
        """Loads weights from a directory or hub id. ``dtype``: float32, bfloat16, float16, or auto (``choose_dtype``).

        ``lora``: the directory of an adapter that is merged into them. Raises ``ModelRefused`` if there is no causal
        model at the path, or not all of its weights, or an adapter that does not fit.
        """
        try:
            found = load_checkpoint(path_or_id, dtype=dtype, device=device, lora=lora)
        except torch.OutOfMemoryError:
            raise
        except (OSError, ValueError, KeyError) as error:
            raise ModelRefused(f"model {path_or_id!r} cannot be loaded: {error}") from error
        except Exception as error:  # whatever readers of files raise that are cut off, or say what nobody expects
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ModelRefused(
                f"model {path_or_id!r} cannot be loaded, a file of it may be broken: {reason}"
            ) from error
        return cls(
            found.module,
            name=name or path_or_id.rstrip("/").rsplit("/", 1)[-1],
            dtype_reason=found.dtype_reason,
            quantization=found.quantization,
            adapter=found.adapter,
            notes=found.notes,
        )

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype_name(self) -> str:
        """The weights' dtype by its short name, as in the layout."""
        return dtype_name(self.module)

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attend: AttendFunction,
        logit_rows: Tensor,
        blocks: Blocks = (),
    ) -> Tensor:
        """One packed forward.

        ``token_ids`` and ``positions`` are (rows,) int64; ``attend`` is called once a layer; returns logits
        (len(logit_rows), vocabulary) fp32 of the rows named. ``blocks``: more rows, and who is given their logits, one
        block after the other, so that no more than one is held.
        """
        logits, more = self.forward_rows(token_ids, positions, attend, logit_rows)
        for rows, take in blocks:
            take(more(rows).float())
        return logits.float()

    @torch.inference_mode()
    def forward_rows(
        self, token_ids: Tensor, positions: Tensor, attend: AttendFunction, logit_rows: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The same, with logits as the model gives them, and what gives those of more rows, before the next forward.

        Nothing waits for the device unless the model's own code does; no ``logit_rows``: no head.
        """
        if self.config._attn_implementation != self._interface:
            self.module.set_attn_implementation(self._interface)  # type: ignore[operator]
        self._attend, self._calls = attend, 0
        self.attention_modules = []
        # Only for this forward: outside of it the module is the model as it came.
        hooks = [m.register_forward_hook(_no_rotation) for m in self._rotary] if self.defers_rotation else []
        counting = self.counting if self.tells_positions else []
        below: list[Any] = []  # what the model gives that the head is put on
        if self._takes_rows and self._headless is not None:
            hooks.append(self._headless.register_forward_hook(lambda module, arguments, out: below.append(out)))
        given = {"input_ids": token_ids[None], "position_ids": positions[None], "use_cache": False, "return_dict": True}
        try:
            with told_positions(counting, positions):
                output = self.module(**given, **({"logits_to_keep": logit_rows} if self._takes_rows else {}))
        finally:
            self._attend = None
            for hook in hooks:
                hook.remove()
        logits: Tensor = output.logits[0]
        if self._takes_rows:
            return logits, lambda rows: self._head(given, below[0], rows)
        return logits[logit_rows], lambda rows: logits[rows]

    @property
    def _headless(self) -> nn.Module | None:
        """The model without its head; None if the module has none."""
        headless = self.module.base_model
        return headless if isinstance(headless, nn.Module) and headless is not self.module else None

    def _head(self, given: dict[str, Any], below: Any, rows: Tensor) -> Tensor:
        """Logits (len(rows), vocabulary) of a forward's rows by the model's own code, which finds what is ``below`` its
        head as it was: nothing else is computed again."""
        headless = self._headless
        assert headless is not None
        headless.forward = lambda *arguments, **options: below
        try:
            logits: Tensor = self.module(**given, logits_to_keep=rows).logits[0]
        finally:
            del headless.forward
        return logits

    @torch.inference_mode()
    def eager_forward(
        self,
        token_ids: Tensor,
        positions: Tensor | None = None,
        allowed: Tensor | None = None,
        logit_rows: Tensor | None = None,
        *,
        cache: Any = None,
    ) -> Tensor:
        """The model's own eager attention under an explicit mask: the oracle.

        ``allowed`` (rows, rows) bool, less what the layers' own mask functions hide at ``positions``; without both the
        model chooses both. An empty ``cache`` of transformers' takes K and V. Returns logits (rows, vocabulary) fp32,
        of ``logit_rows`` or of all.
        """
        self.module.set_attn_implementation("eager")  # type: ignore[operator]
        given: dict[str, Tensor] = {} if positions is None else {"position_ids": positions[None]}
        kept = logit_rows is not None and self._takes_rows
        if kept:
            given["logits_to_keep"] = logit_rows  # type: ignore[assignment]
        run = partial(self.module, input_ids=token_ids[None], past_key_values=cache, use_cache=cache is not None)
        if allowed is None or positions is None:
            output = run(**given)
        else:
            dtype, allowed = TORCH_DTYPES[self.dtype_name], allowed.to(self.device)
            counting = self.counting if self.tells_positions else []
            with told_positions(counting, positions), masks_of_eager(allowed, positions, dtype) as asked:
                # Ones: rows that stand at any positions are then no packed sequences to the model.
                output = run(**given, attention_mask=torch.ones_like(token_ids[None]))
            if not asked:  # modelling code that makes its masks itself
                output = run(**given, attention_mask=additive(allowed, dtype))
        logits: Tensor = output.logits[0]
        return (logits if kept or logit_rows is None else logits[logit_rows]).float()

    def decoder_layers(self) -> nn.ModuleList | None:
        """The list whose item i holds the attention of layer i, after a forward; None if the model has no such list."""
        seen = self.attention_modules
        for module in self.module.modules():
            if isinstance(module, nn.ModuleList) and len(module) == len(seen) and _hold(module, seen):
                return module
        return None

    @contextmanager
    def watching_layers(self, watch: Callable[[int, Tensor], None]) -> Iterator[None]:
        """``watch`` is called with what each decoder layer hands on; never where the model has no list of layers."""

        def hook(index: int) -> Callable[[nn.Module, Any, Any], None]:
            return lambda module, arguments, out: watch(index, out[0] if isinstance(out, tuple) else out)

        with ExitStack() as ends:
            for index, layer in enumerate(self.decoder_layers() or ()):
                ends.callback(layer.register_forward_hook(hook(index)).remove)
            yield

    @torch.inference_mode()
    def layer_masks(self) -> list[LayerMask]:
        """What each layer would hide besides later tokens: the mask functions that the model makes for a plain forward.

        They take indices of any length, so they can be asked about contexts that nobody runs. Which one is a layer's is
        known by the mask that its attention is given. Raises ``ModelRefused`` if that is none of those.
        """
        made: list[tuple[Tensor, MaskFunction]] = []
        masks: list[LayerMask] = []

        def make(*, mask_function: MaskFunction, **arguments: Any) -> Tensor:
            made.append((torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device), mask_function))
            return made[-1][0]

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
        ) -> tuple[Tensor, None]:
            functions = [function for mask, function in made if _same_memory(mask, attention_mask)]
            if attention_mask is not None and not functions:
                raise self._refuses_masks(module)
            masks.append(LayerMask(functions[0] if functions else None, options.get("sliding_window")))
            return _values_alone(query, value), None

        name = f"{self._interface}_masks"
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, make)
        self.module.set_attn_implementation(name)  # type: ignore[operator]
        ids = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        self.module(input_ids=ids, position_ids=torch.zeros_like(ids), use_cache=False)
        return masks

    def _refuses_masks(self, module: nn.Module) -> ModelRefused:
        return ModelRefused(
            f"model {self.name} cannot be served exactly: {type(module).__name__} makes an attention mask of its "
            "own, which may hide or weigh any token"
        )

    def _attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """transformers' attention interface: query (1, heads, rows, dim) -> ((1, rows, heads, dim), None)."""
        if self._attend is None:
            raise RuntimeError("attention called outside of BorrowedModel.forward")
        if attention_mask is not None:
            raise self._refuses_masks(module)
        self.attention_modules.append(module)
        scaling = options.get("scaling")
        scores = Scores(
            scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            softcap=options.get("softcap"),
            sinks=None if options.get("s_aux") is None else options["s_aux"].float().reshape(-1),
        )
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        out = self._attend(self._calls, q, k, v, scores)
        self._calls += 1
        return out[None], None


def _hold(layers: nn.ModuleList, attention: list[nn.Module]) -> bool:
    return all(any(part is inner for inner in layer.modules()) for layer, part in zip(layers, attention, strict=True))


def _values_alone(query: Tensor, value: Tensor) -> Tensor:
    """Attention of each token to itself alone, (1, rows, heads, dim)."""
    return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2)


def _same_memory(mask: Tensor, given: Any) -> bool:
    """Whether what an attention was given is that mask, or a part of it."""
    return isinstance(given, Tensor) and given.untyped_storage().data_ptr() == mask.untyped_storage().data_ptr()


def _no_rotation(module: nn.Module, arguments: Any, output: Any) -> Any:
    """What a rotary module gives for position 0 without its factor: it turns nothing."""
    if isinstance(output, tuple):
        cos, sin = output
        return torch.ones_like(cos), torch.zeros_like(sin)
    return torch.ones_like(output)  # cos + i sin as one complex tensor
