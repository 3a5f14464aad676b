"""``cairn plan``: the geometry that a configuration tells is the one a service sees, and the arithmetic is right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig

from cairn.cli import main as cli
from cairn.local.geometry import GeometryUnknown, layout_from_config
from engine.kv.pool import TORCH_DTYPES
from engine.model.borrowed import BorrowedModel
from engine.model.probe import examine
from tests.architectures import ARCHITECTURES, EXACT_ONLY, REFUSED, build

Run = Callable[..., tuple[int, str, str]]
# Llama 3.1 8B: 32 layers of 8 KV heads, 128 wide
LLAMA = {
    **{"model_type": "llama", "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"hidden_size": 4096, "torch_dtype": "bfloat16"},
}


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*argv: str) -> tuple[int, str, str]:
        code = cli.main(("plan", *argv))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def llama(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return str(tmp_path)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *EXACT_ONLY])
def test_the_configuration_tells_what_watching_the_model_shows(name: str) -> None:
    model_type, settings = {**ARCHITECTURES, **EXACT_ONLY}[name]
    model = build(model_type, settings, seed=0)
    assert layout_from_config(model.config, "float32") == examine(BorrowedModel(model, name=name)).layout


@pytest.mark.parametrize("name", ["mamba", "minimax-linear-attention"])
def test_models_that_keep_other_state_are_refused(name: str) -> None:
    model_type, settings = REFUSED[name]
    with pytest.raises(GeometryUnknown):
        layout_from_config(AutoConfig.for_model(model_type, **settings))


def test_numbers_of_a_known_model(plan: Run, llama: str) -> None:
    code, out, err = plan(
        *(llama, "--chunks", "4", "--tokens", "1000", "--ttft-ms", "250", "--forward-ms", "50", "--json"),
        *("--bandwidth", "10Gbit/s", "--requests-per-s", "3", "--prefill-tokens-per-s", "10000"),
        *("--documents", "10", "--contexts", "2", "--capacity", "10GiB", "--device", "cuda"),
    )
    assert (code, err) == (0, "")
    said = json.loads(out)
    token = 2 * 32 * 8 * 128 * 2
    assert (said["model_type"], said["dtype"], said["layers"]) == ("llama", "bfloat16", 32)
    assert said["token_nbytes"] == token == 131072
    assert said["request_nbytes"] == 4 * 1000 * token
    assert said["rate_for_ttft"] == pytest.approx(4000 * token / 0.2)
    assert said["rate_sustained"] == pytest.approx(3 * 4000 * token)
    assert said["ttft_ms_reached"] == pytest.approx(50 + 1e3 * 4000 * token / 1.25e9)
    assert said["rate_break_even"] == pytest.approx(10000 * token)
    assert 0 < said["chunk_nbytes"] - 1000 * token < 64 * 1024, "the header is small"
    assert said["store_nbytes"] == 20 * said["chunk_nbytes"]
    assert said["chunks_that_fit"] == 10 * 2**30 // said["chunk_nbytes"]


def test_a_table_for_people(plan: Run, llama: str) -> None:
    code, out, _ = plan(f"{llama}/config.json", "--dtype", "float32", "--ttft-ms", "100")
    assert code == 0
    assert "256.0 KiB (262144 B)" in out and "network for a TTFT of 100 ms" in out and "Gbit/s" in out
    assert "TTFT over" not in out and "requests a second" not in out, "only what was asked for"


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_the_dtype_is_the_one_that_a_service_takes(plan: Run, tmp_path: Path, stored: str) -> None:
    model = build(*ARCHITECTURES["qwen3-ratio2"], seed=0).to(TORCH_DTYPES[stored])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    unsaid = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
    for fields in (config, unsaid):  # the weights' headers say it too
        (tmp_path / "config.json").write_text(json.dumps(fields))
        served = BorrowedModel.load(str(tmp_path))
        code, out, _ = plan(str(tmp_path), "--json")
        said = json.loads(out)
        assert (code, said["dtype"], said["dtype_reason"]) == (0, served.dtype_name, served.dtype_reason)
        assert said["token_nbytes"] == examine(served).layout.nbytes(1)
        assert json.loads(plan(str(tmp_path), "--device", "cuda:1", "--json")[1])["dtype"] == stored
        assert json.loads(plan(str(tmp_path), "--dtype", "bfloat16", "--json")[1])["dtype"] == "bfloat16"


def test_fable_takes_twice_its_checkpoints_bytes_on_the_cpu(plan: Run) -> None:
    fable = str(Path(__file__).parents[4] / "models" / "fable")
    assert json.loads(plan(fable, "--json")[1])["token_nbytes"] == 6144
    assert json.loads(plan(fable, "--device", "cuda", "--json")[1])["token_nbytes"] == 3072
    _, _, words = plan(fable)
    assert "float32 on cpu: the model has 5.25 M parameters, fewer than 100 M" in words


@pytest.mark.parametrize(
    ("rate", "expected"), [("8Gbit", 1e9), ("3GB/s", 3e9), ("800MiB/s", 800 * 2**20), ("1.5TB", 1.5e12)]
)
def test_bandwidths(plan: Run, llama: str, rate: str, expected: float) -> None:
    _, out, _ = plan(llama, "--bandwidth", rate, "--json", "--dtype", "float32")
    assert json.loads(out)["bandwidth"] == expected


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["/nowhere"], "/nowhere does not exist; name a model directory or a config.json"),
        (["LLAMA", "--ttft-ms", "5", "--forward-ms", "5", "--dtype", "float32"], "leaves nothing of a TTFT of 5 ms"),
        (["LLAMA", "--bandwidth", "25Gb"], "is not a bandwidth; write for example 25Gbit/s or 3GB/s"),
        (["LLAMA", "--ttft-ms", "0"], "0 is not a positive number"),
        (["LLAMA", "--bandwidth", "25"], "is not a bandwidth"),
        (["LLAMA", "--capacity", "25Gbit"], "is not a size; write for example 10GiB"),
        (["LLAMA", "--capacity", "0GiB"], "is not a size"),
        (["LLAMA", "--chunks", "0"], "0 is not at least 1"),
        (["LLAMA", "--device", "tpu"], "--device: 'tpu' is not cpu, cuda or cuda:N"),
        (["BROKEN"], "is not a configuration that transformers reads"),
    ],
)
def test_a_wrong_command_line_exits_with_2(plan: Run, llama: str, tmp_path: Path, argv: list[str], words: str) -> None:
    (tmp_path / "broken.json").write_text("{")
    code, out, err = plan(*(w.replace("LLAMA", llama).replace("BROKEN", f"{tmp_path}/broken.json") for w in argv))
    assert (code, out) == (2, "")
    assert words in err and "Traceback" not in err
