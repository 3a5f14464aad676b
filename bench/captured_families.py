"""Which families' transformers code can be captured, and whether its rows have the same bits at any number of rows.

``python -m bench.captured_families`` on a card: small random models, a line each. Attention is of each row to itself
alone, so that what is left is the model's own code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.attention import Scores
from engine.model.borrowed import BorrowedModel
from engine.run.cuda.products import use_stable_products
from tests.architectures import ARCHITECTURES, build

WIDE = {"hidden_size": 1024, "intermediate_size": 2048, "vocab_size": 4096}
ROWS = (1, 2, 3, 8, 16, 64, 96, 256, 512, 1024)


def own_values(layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)


def captured(borrowed: BorrowedModel, ids: Tensor, positions: Tensor, rows: Tensor) -> str:
    """ "captured", or why not."""
    other = ids.clone()

    def run() -> Tensor:
        return borrowed.forward(ids, positions, own_values, rows)

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        return f"waits for the device: {str(error).splitlines()[0]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                out = run()
            finally:
                graph.capture_end()
    except Exception as error:
        return f"capture fails: {type(error).__name__}: {str(error).splitlines()[0]}"
    ids.copy_(ids.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    again = run()
    same = "same bits as uncaptured" if torch.equal(out, again) else "OTHER BITS than uncaptured"
    ids.copy_(other)
    return f"captured, {same}"


def apart(borrowed: BorrowedModel) -> list[int]:
    """Numbers of rows at which some row has other logits than among 1024."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 200, (1024,), generator=generator).cuda()
    positions = (torch.arange(1024) % 300).cuda()

    def logits(first: int, rows: int) -> Tensor:
        part = slice(first, first + rows)
        return borrowed.forward(ids[part], positions[part], own_values, torch.arange(rows, device="cuda"))

    whole = logits(0, 1024)
    return [
        rows
        for rows in ROWS
        if any(not torch.equal(logits(at, rows), whole[at : at + rows]) for at in (0, (1024 - rows) // 2, 1024 - rows))
    ]


def main() -> None:
    use_stable_products()
    for name, (kind, settings) in ARCHITECTURES.items():
        try:
            wide = {key: value for key, value in WIDE.items() if key != "hidden_size" or key not in settings}
            model = build(kind, {**settings, **wide})
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.mul_(0.25)
            borrowed = BorrowedModel(model.to("cuda", torch.bfloat16), name=name)
            ids, positions = torch.randint(0, 200, (64,)).cuda(), (torch.arange(64) * 3).cuda()
            how = captured(borrowed, ids, positions, torch.arange(0, 64, 8).cuda())
            norms = sorted({type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__})
            print(f"{name}: {how}; rows differ at {apart(borrowed)}; {norms}", flush=True)
        except Exception as error:
            print(f"{name}: FAILED {type(error).__name__}: {str(error)[:300]}", flush=True)


if __name__ == "__main__":
    main()
