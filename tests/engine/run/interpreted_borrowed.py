"""``python -m tests.engine.run.interpreted_borrowed``, with TRITON_INTERPRET=1: our kernels of borrowed forwards.

A process of its own, since what Triton's kernels become is settled when Triton is imported. Half precision is float16:
the interpreter cuts off where bfloat16 is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.cohere2 import modeling_cohere2
from transformers.models.glm import modeling_glm
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen3 import modeling_qwen3

from engine.run.cuda import borrowed_kernels
from engine.run.cuda.joined import launched
from engine.run.cuda.norms import FORMS, ULPS, _launched, computed
from engine.run.cuda.single import BLOCKS, multiplied
from engine.run.cuda.turning import TurnForm, form_of, turn


def check_norms() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    for form in FORMS:
        for dtype in (torch.float16, torch.float32):
            for shape, lines, eps in (((1, 5, 48), 1, 1e-6), ((1, 3, 4, 16), 4, 1e-5), ((1, 2, 2000), 1, 1e-2)):
                x = (draw(*shape) + 0.3).to(dtype)
                weight = draw(lines, shape[-1]).to(dtype) if lines > 1 else draw(shape[-1]).to(dtype)
                for given in (x, x.transpose(1, 2) if lines == 1 and len(shape) == 4 else x):
                    for w in (weight, None):
                        ours, theirs = _launched(given, w, eps, form), computed(given, w, eps, form)
                        apart = (ours.float() - theirs.float()).abs()
                        assert ours.shape == theirs.shape and ours.dtype == dtype
                        assert bool((apart <= 2 * ULPS[dtype] * theirs.float().abs() + 1e-5).all()), (
                            form,
                            dtype,
                            shape,
                        )
                few = _launched(x[:, :1].contiguous(), weight, eps, form)
                assert torch.equal(few, _launched(x, weight, eps, form)[:, :1]), "a row as it would be alone"
                wide = draw(*shape[:-1], 2 * shape[-1]).to(dtype)[..., : shape[-1]]  # rows that do not lie together
                assert torch.equal(_launched(wide, weight, eps, form), _launched(wide.contiguous(), weight, eps, form))


def check_store() -> None:
    for heads, k_dim, v_dim in ((2, 16, 16), (3, 24, 16), (1, 80, 128)):
        k = torch.randn(5, heads, 2 * k_dim)[..., :k_dim]
        v = torch.randn(heads, 5, v_dim).transpose(0, 1)
        slots = torch.tensor([7, 0, 31, 4, 12], dtype=torch.int32)
        keys, values = torch.zeros(32, heads, k_dim), torch.zeros(32, heads, v_dim)
        blocks = {name: 1 << (size - 1).bit_length() for name, size in (("K", k_dim), ("V", v_dim), ("HEADS", heads))}
        borrowed_kernels.store[(5,)](
            k, k.stride(0), k.stride(1), v, v.stride(0), v.stride(1), slots, keys, values,
            HEADS=heads, K_DIM=k_dim, V_DIM=v_dim, K_BLOCK=blocks["K"], V_BLOCK=blocks["V"],
            HEADS_BLOCK=blocks["HEADS"], OVERLAP=False,
        )  # fmt: skip
        at = slots.long()
        assert torch.equal(keys[at], k) and torch.equal(values[at], v)
        assert int((keys.abs().sum((1, 2)) > 0).sum()) == 5


def check_turns() -> None:
    """The forms that modelling code has, whole and in part, and the kernel on queries that lie in wider rows."""
    cases = (
        (modeling_qwen3, 8, 2, TurnForm(8)),
        (modeling_gpt_oss, 8, 1, TurnForm(8)),
        (modeling_phi3, 4, 2, TurnForm(4)),
        (modeling_cohere2, 8, 2, TurnForm(8, interleaved=True, step=2, wide=True)),
        (modeling_glm, 4, 2, TurnForm(4, interleaved=True)),
    )
    angles = torch.tensor([0.0, 1.0, 2.0, 40.0])[:, None]
    for file, pairs, repeats, expected in cases:
        frequencies = angles * torch.logspace(0, -2, pairs)[None]
        table = frequencies.repeat_interleave(2, -1) if file is modeling_cohere2 else frequencies.repeat(1, repeats)
        cos, sin = table.cos()[None].half(), table.sin()[None].half()
        wide = torch.randn(1, 4, 3 + 1, 16).half()
        q, k = wide[:, :, :3].transpose(1, 2), wide[:, :, 3:].transpose(1, 2)
        form = form_of(file.apply_rotary_pos_emb, q, k, cos, sin)
        assert form == expected, (file.__name__, form)
        for ours, theirs in zip(turn(q, k, cos, sin, form), file.apply_rotary_pos_emb(q, k, cos, sin), strict=True):
            assert ours.shape == theirs.shape and ours.transpose(1, 2).is_contiguous()
            torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
            assert form.wide or torch.equal(ours, theirs), "rounded where modelling code rounds"
    assert form_of(lambda q, k, cos, sin: (q, 2 * k), q, k, cos, sin) is None


def check_gated() -> None:
    both = 3 * torch.randn(3, 2 * 1500).half()
    gate, up = both[:, :1500], both[:, 1500:]
    for tanh in (False, True):
        activated = torch.nn.functional.gelu(gate, approximate="tanh") if tanh else torch.nn.functional.silu(gate)
        torch.testing.assert_close(launched(both, 1500, tanh), activated * up, atol=2e-3, rtol=2e-3)


def check_single_precision() -> None:
    """Within what fp32 sums of so many numbers may be apart, and a row by itself as among others."""
    for rows, columns, width in ((1, 3, 16), (5, 64, 600), (9, 13, 257)):
        x, weight = torch.randn(rows, 2 * width)[:, :width], torch.randn(width, columns).T
        bias = torch.randn(columns)
        ours = multiplied(x[None], weight, bias)[0]
        added = width / BLOCKS["BLOCK_K"] + BLOCKS["BLOCK_K"] + 3  # numbers one after another, at most
        allowed = added * 2.0**-24 * (x.abs().double() @ weight.T.abs().double() + bias.abs())
        assert bool(((ours.double() - (x.double() @ weight.T.double() + bias)).abs() <= allowed).all())
        assert all(torch.equal(multiplied(x[row : row + 1], weight, bias)[0], ours[row]) for row in range(rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_norms()
    check_store()
    check_turns()
    check_gated()
    check_single_precision()
    print("alike")
