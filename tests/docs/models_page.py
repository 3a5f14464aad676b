"""docs/models.md: what is served of the models in ``tests/published.py``, as the code that serves them finds out.

``python -m tests.docs.models_page`` writes it. No row is written by hand: a model is built narrow and given to
``serve``; what a card would run it on is what ``decide`` says of a device that is not there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from chunk_store.layout import KVLayout
from decode_service.options import DecodeOptions
from decode_service.same_bits import same_bits
from engine.check.company import has_experts
from engine.model.borrowed import BorrowedModel, ModelRefused
from engine.model.probe import Findings
from engine.reuse import ReuseMode
from engine.run.backends import AUTO, FLASHINFER, TORCH, Decision, DeviceFacts
from engine.run.choice import EAGER, FUSED, decide
from engine.run.cuda.weights import FAMILIES, fused_refusal
from engine.served import ServedModel, serve
from tests.published import PUBLISHED, Published, narrow

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
REFRESH = "python -m tests.docs.models_page"
HOPPER = DeviceFacts(cuda=True, hopper=True)
OTHER = DeviceFacts(cuda=True, hopper=False)


STRICT = DecodeOptions(model="m", store="memory://", prefill="p:1", strict=True, threads=1)
HEAD = f"""# Models

What is served of the text decoders that transformers {transformers.__version__} knows, found out by the code that
serves them: `{REFRESH}` writes this page and a test compares it. Each row is the default configuration of its class
(that of a published model, or with the settings named) with fewer and narrower layers, random weights, and lengths,
windows, rotations, widths of heads and heads per KV head as they are. A checkpoint is examined in the same way when a
service starts; what does not hold for it is refused with the reason.

- **modes**: of `exact`, `anchored` and `independent` (README.md), those whose answers agree with the model's own; all:
  every one.
- **context**: most tokens of prompt and answer together; less in the modes that move chunks where there is a second
  number.
- **CPU**, **Hopper**, **other cards**: what runs it, and which attention. On the CPU in its own dtype, on cards in
  bfloat16. Fused: our own layers in CUDA graphs ({", ".join(FAMILIES)}); captured: transformers' layers in CUDA graphs,
  where a trial at the start works; eager: transformers' layers, one launch after the other. FlashInfer is taken where
  it is installed and has kernels for the model.
- **bits**: whether a row's bits depend on that row alone, whatever else is computed in its step. "checked": yes, and
  what computes them is tried with few and many rows at every start to find out, and said in the ready line; "strict":
  with `--strict` ("if found": if rows do not depend on one another, which is looked at at every start); no: not even
  with it. On the CPU in float32 with one thread.
"""


@dataclass(frozen=True)
class Row:
    """What the page says of a model: ``cells`` behind its names, and ``notes``: (what, why) of what is missing."""

    published: Published
    cells: tuple[str, ...] = ()
    notes: tuple[tuple[str, str], ...] = ()
    refused: str = ""


def look_at(published: Published) -> Row:
    """The row of a model."""
    config = AutoConfig.for_model(published.model_type, **narrow(published))
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
    try:
        return _served(published, serve(BorrowedModel(module, name=published.model_type)))
    except ModelRefused as refused:
        return Row(published, refused=_reason(str(refused), published))


def _served(published: Published, served: ServedModel) -> Row:
    notes: list[tuple[str, str]] = []
    modes = [mode.value for mode in ReuseMode if not served.refusals[mode]]
    said = "all" if len(modes) == len(ReuseMode) else ", ".join(modes)
    notes += [(f"not {mode.value}", _reason(why, published)) for mode, why in served.refusals.items() if why]
    exact, moved = served.limit(), served.limit(ReuseMode.INDEPENDENT)
    context = str(exact.tokens)
    if exact.because:
        notes.append((f"context {exact.tokens} of {exact.declared}", exact.because))
    if moved.tokens < exact.tokens and len(modes) > 1:
        context += f" ({moved.tokens})"
        notes.append((f"context {moved.tokens} where chunks move", moved.because))
    findings = in_bfloat16(served.findings)
    hopper, other = (decide(served.borrowed, findings, AUTO, device) for device in (HOPPER, OTHER))
    why_not_fused = fused_refusal(served.borrowed, findings)
    if hopper.runner != FUSED and why_not_fused and published.model_type in FAMILIES:
        notes.append(("not fused", why_not_fused))
    if hopper.runner == EAGER:
        notes.append((f"{hopper.runner}, {hopper.attention} on Hopper", hopper.reason))
    cpu = f"{served.decision.runner}, {served.decision.attention}"
    cells = (said, context, cpu, *(f"{each.runner}, {each.attention}" for each in (hopper, other)))
    return Row(published, (*cells, _bits_cpu(served), _bits_card(served, hopper)), tuple(notes))


def in_bfloat16(findings: Findings) -> Findings:
    """The findings as a card would have them of the same model in bfloat16."""
    return replace(findings, layout=KVLayout("bfloat16", findings.layout.layers), deferred=False)


def _bits_cpu(served: ServedModel) -> str:
    return "strict" if same_bits(STRICT, None, TORCH, served.rows_stand_alone).always else "no"


def _bits_card(served: ServedModel, decision: Decision) -> str:
    if decision.runner != EAGER:
        return "checked"
    if decision.attention != FLASHINFER and has_experts(served.borrowed.module):
        return "strict, if found"
    always = same_bits(replace(STRICT, device="cuda"), None, decision.attention, True).always
    return "strict" if always else "no"


def _reason(text: str, published: Published) -> str:
    """What a refusal says, without the model's name, which layer it was, and what was measured."""
    text = re.sub(rf"^model {re.escape(published.model_type)}:? ?", "", text)
    text = re.sub(r" \([^()]*standard deviations[^()]*\)", "", text)
    text = re.sub(r"\d+ attention calls for \d+ layers", "other than one attention call a layer", text)
    text = re.sub(rf"model type '{re.escape(published.model_type)}'", "its model type", text)
    return re.sub(r"layer \d+: ", "", text)


def page(rows: Sequence[Row]) -> str:
    """The whole page."""
    served, refused = [row for row in rows if not row.refused], [row for row in rows if row.refused]
    names = ("model type", "families", "modes", "context", "CPU", "Hopper", "other cards", "bits: CPU", "bits: card")
    parts = [HEAD, f"## Served: {len(served)}\n", _table(names, [(*_names(row), *row.cells) for row in served])]
    parts += ["## Why\n", *(f"- {line}" for line in _why(served)), ""]
    parts += [f"## Refused: {len(refused)}\n"]
    parts += [_table(("model type", "families", "why"), [(*_names(row), row.refused) for row in refused])]
    return "\n".join(parts)


def _why(rows: Sequence[Row]) -> list[str]:
    """A line for each reason, with the models it is true of."""
    by_reason: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for what, why in row.notes:
            by_reason.setdefault(why, {}).setdefault(_names(row)[0], []).append(what)
    lines = []
    for why, models in by_reason.items():
        whats = list(dict.fromkeys("; ".join(each) for each in models.values()))
        lines += [
            f"{what}: {why} ({', '.join(model for model, each in models.items() if '; '.join(each) == what)})"
            for what in whats
        ]
    return sorted(lines)


def _names(row: Row) -> tuple[str, str]:
    variant = f", {row.published.variant}" if row.published.variant else ""
    return f"`{row.published.model_type}`{variant}", row.published.families


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(page([look_at(each) for each in PUBLISHED]))
