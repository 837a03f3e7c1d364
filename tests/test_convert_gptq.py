"""convert --type gptq and rtn: the calibration against the model itself, the folder against what the algorithm gave."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import backend.convert.calibration
import backend.convert.to_gptq
from backend.checkpoint.open import open_checkpoint
from backend.convert.calibration import Stream, calibration_ids
from backend.convert.output import ConvertError
from backend.convert.to_gptq import GPTQSettings, plan_gptq
from backend.weights.gptq import GPTQLayer
from tests import gptqfiles
from tests.commandline import command, peak_of
from tests.forward import float64_logits, greedy, logits
from tests.hffiles import tiny_hf
from tests.metafiles import MetaModel, write_meta
from tests.test_convert_gguf import _spm
from tests.test_convert_vocab import byte_level_folder
from tests.tiny import TinyModel, tokens, write_tiny

ALICE = Path(__file__).parent / "data" / "alice.txt"
PARTS = ("wq", "wk", "wv", "wo", "w1", "w3", "w2")
SHORT = ("--samples", "3", "--sample-tokens", "64", "--group-size", "32")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# calibration ----------------------------------------------------------------------------------------------------------


def written_source(folder: Path, kind: str) -> Path:
    if kind == "GGUF":
        return write_tiny(folder / "tiny.gguf", TinyModel(weights="Q8_0", dim=128, head_dim=32))
    if kind == "GGUF, rope_freqs":
        return write_tiny(folder / "tiny.gguf", TinyModel(weights="F16", rope_freqs=True, tied=False))
    if kind == "Meta":
        write_meta(folder / "meta", MetaModel(vocab_size=288), 2)
        _spm(folder / "meta" / "tokenizer.model", 288)
        return folder / "meta"
    options = {"sliding_window": 8} if kind == "mistral" else {}
    tiny_hf(folder / "hf", kind, vocab_size=len(tokens()), **options)
    byte_level_folder(folder / "hf", "qwen2" if kind == "qwen2" else "smollm")
    return folder / "hf"


@pytest.mark.parametrize("kind", ["GGUF", "GGUF, rope_freqs", "Meta", "llama", "mistral", "qwen2"])
def test_the_stream_goes_through_the_model(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights as they are, what comes out behind the last layer gives the model's own logits."""
    monkeypatch.setattr(backend.convert.calibration, "as_written", lambda values: values)
    source = open_checkpoint(written_source(tmp_path, kind))
    ids = calibration_ids(source, ALICE, 2, 48)
    assert ids.shape == (2, 48)
    stream = Stream(source, ids)
    for n in range(source.config.n_layers):
        stream.enter(n)
        for part in PARTS:
            stream.put(part, source.read(f"layers.{n}.{part}").float32())
        for part in ("wo", "w2"):
            assert len(list(stream.add(part))) == 2
    output = source.read("tok_embeddings" if source.config.tied_output else "output").float32()
    norm = source.read("norm").float32()
    for row, hidden in zip(ids.tolist(), stream.hidden):
        found = F.rms_norm(hidden, norm.shape, norm, source.config.norm_eps) @ output.T
        torch.testing.assert_close(found, logits(source, row), rtol=1e-4, atol=1e-4)


def test_samples_lie_evenly_in_the_text_and_end_with_it(tmp_path: Path) -> None:
    source = open_checkpoint(write_tiny(tmp_path / "tiny.gguf"))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number:04d};" for number in range(200)))  # a token per letter
    spelt = tokens()

    def said(samples: int, length: int) -> list[str]:
        return ["".join(spelt[i] for i in row) for row in calibration_ids(source, text, samples, length).tolist()]

    assert said(3, 50) == ["".join(f"{n:04d};" for n in range(at, at + 10)) for at in (0, 95, 190)]
    assert [len(part) for part in said(100, 300)] == [256] * 3  # the context, and what the text has
    text.write_text("hi " * 20)
    assert [len(part) for part in said(128, 200)] == [60]
    # Of a long text only the parts that are used are read into tokens.
    text.write_text("".join(f"{number:04d};" for number in range(20000)))
    far = said(2, 40)
    assert far[0].startswith("0000;")
    assert far[1] > "0100;"


def test_samples_begin_as_prompts_do(tmp_path: Path) -> None:
    source = open_checkpoint(
        write_tiny(tmp_path / "tiny.gguf", TinyModel(metadata={"tokenizer.ggml.add_bos_token": True}))
    )
    ids = calibration_ids(source, ALICE, 4, 40)
    assert ids.shape == (4, 40)
    assert ids[:, 0].tolist() == [1] * 4
    assert not bool((ids[:, 1:] == 1).any())


# whole folders --------------------------------------------------------------------------------------------------------


class Spy:
    """Keeps what the algorithm was given and gave, stage by stage."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.calls: list[tuple[torch.Tensor, GPTQLayer]] = []
        real = getattr(backend.convert.to_gptq, name)

        def spied(weight: torch.Tensor, *rest) -> GPTQLayer:
            self.calls.append((weight.clone(), real(weight, *rest)))
            return self.calls[-1][1]

        monkeypatch.setattr(backend.convert.to_gptq, name, spied)

    def linears(self, config) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Canonical name -> weight as it was and as it became, rows in Hugging Face's order."""
        found = {}
        stages = [("wq", "wk", "wv"), ("wo",), ("w1", "w3"), ("w2",)]
        assert len(self.calls) == 4 * config.n_layers
        for number, (weight, layer) in enumerate(self.calls):
            at, group = 0, layer.g_idx.long()
            decoded = (layer.codes.float() - layer.zeros.float().T[:, group]) * layer.scales.float().T[:, group]
            for part in stages[number % 4]:
                heads = {"wq": config.n_heads, "wk": config.n_kv_heads, "wv": config.n_kv_heads}.get(part)
                size = heads * config.head_dim if heads else weight.shape[0] // len(stages[number % 4])
                pair = [matrix[at : at + size] for matrix in (weight, decoded)]
                if part in ("wq", "wk") and config.rope_interleaved:
                    pair = [m.view(heads, -1, 2, m.shape[1]).transpose(1, 2).reshape(m.shape) for m in pair]
                found[f"layers.{number // 4}.{part}"] = (pair[0], pair[1])
                at += size
            assert at == weight.shape[0]
        return found


@pytest.mark.parametrize(
    ("kind", "options", "label"),
    [
        ("GGUF", (), "GPTQ 4-bit g32"),
        ("Meta", ("--act-order", "--sym", "--bits", "8"), "GPTQ 8-bit g32 act-order"),
        ("qwen2", ("--bits", "3"), "GPTQ 3-bit g32"),
        ("mistral", ("--bits", "2", "--group-size", "-1"), "GPTQ 2-bit"),
    ],
)
def test_a_folder_holds_what_the_algorithm_gave(
    tmp_path: Path, kind: str, options: tuple[str, ...], label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(written_source(tmp_path, kind))
    spy = Spy(monkeypatch, "gptq_quantize")
    done = command("convert", source.path, tmp_path / "out", "--to", "hf", "--type", "gptq", "--calibration", ALICE,
                   *SHORT, *options)  # fmt: skip
    assert done == 0
    opened = open_checkpoint(tmp_path / "out")
    assert opened.format.endswith(label)
    linears = spy.linears(source.config)
    for name, (weight, decoded) in linears.items():
        assert torch.equal(opened.read(name).float32(), decoded), name
        held = source.read(name).float32()
        if name.endswith(("wq", "wk")) and source.config.rope_interleaved:
            held = held.view(-1, source.config.head_dim // 2, 2, held.shape[1]).transpose(1, 2).reshape(held.shape)
        assert torch.equal(weight, held), name
    for name in set(opened.tensors) - set(linears):
        assert torch.equal(opened.read(name).float32(), source.read(name).float32().half().float()), name
    ids = [5, 77, 130, 2, 9, 41]
    if "8-bit" in label:
        reference, found = (logits(checkpoint, ids) for checkpoint in (source, opened))
        assert float((reference - found).norm() / reference.norm()) < 0.1
    assert len(greedy(opened, ids, 8, "original" if kind == "GGUF" else "f32")) == 8


def test_what_the_folder_says_of_itself(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "tiny.gguf")
    done = command("convert", source, tmp_path / "out", "--type", "gptq", "--calibration", ALICE, "--sym",
                   "--act-order", *SHORT)  # fmt: skip
    assert done == 0
    told = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert told == json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    expected = {"bits": 4, "group_size": 32, "desc_act": True, "sym": True, "damp_percent": 0.01,
                "quant_method": "gptq", "checkpoint_format": "gptq", "true_sequential": True,
                "static_groups": False}  # fmt: skip
    assert {key: told[key] for key in expected} == expected
    state = load_file(tmp_path / "out" / "model.safetensors")
    down = {name.rpartition(".")[2]: value for name, value in state.items() if ".0.mlp.down_proj" in name}
    described = {name: (tuple(value.shape), value.dtype) for name, value in down.items()}
    assert described == {
        "qweight": ((96 // 8, 64), torch.int32), "qzeros": ((3, 64 // 8), torch.int32),
        "scales": ((3, 64), torch.float16), "g_idx": ((96,), torch.int32),
    }  # fmt: skip
    assert set(down["qzeros"].flatten().tolist()) == {0x77777777}  # 8, stored minus one
    assert state["model.embed_tokens.weight"].dtype == torch.float16
    assert {name for name in os.listdir(tmp_path / "out") if name.startswith("token")} == {
        "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    # A plain conversion over it takes the quantiser's file away, which would make the weights something else.
    assert command("convert", source, tmp_path / "out", "--type", "f32", "--force") == 0
    assert "quantize_config.json" not in os.listdir(tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").format == "Hugging Face safetensors"


def test_rounding_to_nearest_needs_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_checkpoint(write_tiny(tmp_path / "tiny.gguf"))
    spy = Spy(monkeypatch, "rtn_quantize")
    assert command("convert", source.path, tmp_path / "out", "--type", "rtn", "--group-size", 32) == 0
    opened = open_checkpoint(tmp_path / "out")
    for name, (weight, decoded) in spy.linears(source.config).items():
        assert torch.equal(opened.read(name).float32(), decoded), name
        layer = gptqfiles.quantise(weight.numpy(), 4, 32)
        assert float((torch.from_numpy(layer.values()) - decoded).abs().max()) < 1e-6, name
        assert float((weight - decoded).abs().max()) < 0.51 * float(layer.scales.max())


def test_a_quantised_layer_gives_the_next_ones_their_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """True sequential: the Hessian of every linear is that of the inputs it gets in the folder that is written."""
    path = write_tiny(tmp_path / "tiny.gguf", TinyModel(tied=False))
    seen: list[torch.Tensor] = []
    real = backend.convert.to_gptq.gptq_quantize

    def spied(weight: torch.Tensor, hessian: torch.Tensor, *rest) -> GPTQLayer:
        seen.append(hessian)
        return real(weight, hessian, *rest)

    monkeypatch.setattr(backend.convert.to_gptq, "gptq_quantize", spied)
    done = command("convert", path, tmp_path / "out", "--type", "gptq", "--calibration", ALICE, "--bits", 2, *SHORT)
    assert done == 0
    written = open_checkpoint(tmp_path / "out")
    ids = calibration_ids(open_checkpoint(path), ALICE, 3, 64)
    values = {name: written.read(name).float32() for name in written.tensors}
    for name, value in values.items():  # the float64 pass wants Meta's order of rows
        if name.endswith((".wq", ".wk")):
            values[name] = value.view(-1, 2, 8, 64).transpose(1, 2).reshape(value.shape)
    expected = torch.zeros(96, 96, dtype=torch.float64)
    for row in ids.tolist():
        gated = last_gated(values, written.config, row)
        expected += 2 / 3 * gated.T @ gated
    assert float((seen[-1].double() - expected).abs().max() / expected.abs().max()) < 1e-4


def last_gated(values: dict[str, torch.Tensor], config, ids: list[int]) -> torch.Tensor:
    """float64 (tokens, ffn): what w2 of the last layer is given, by the independent forward pass.

    Without the last feed-forward, with its norm at the end and the identity as output, the logits are what w1 and w3
    are given.
    """
    last = f"layers.{config.n_layers - 1}."
    changed = dict(values)
    changed[last + "w2"] = torch.zeros_like(values[last + "w2"])
    changed["norm"] = values[last + "ffn_norm"]
    changed["output"] = torch.eye(config.dim)
    given = float64_logits(changed, config, ids)
    gate = given @ values[last + "w1"].double().T
    return gate * torch.sigmoid(gate) * (given @ values[last + "w3"].double().T)


# what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--type", "gptq"), "needs --calibration"),
        (("--type", "rtn", "--act-order"), "--act-order is for --type gptq"),
        (("--type", "rtn", "--samples", "3"), "--samples is for --type gptq"),
        (("--type", "f16", "--bits", "4"), "--bits is for --type gptq or rtn"),
        (("--calibration", ALICE), "--calibration is for --type gptq"),
        (("--type", "rtn", "--group-size", "4"), "expected at least 8"),
        (("--type", "rtn", "--bits", "3", "--vocab-only"), "--vocab-only"),
        (("--type", "gptq", "--to", "gguf", "--calibration", ALICE), "--type gptq"),
        (("--type", "gptq", "--calibration", "nowhere.txt"), "nowhere.txt: cannot be read"),
        (("--type", "gptq", "--calibration", "short.txt"), "has 5 tokens; calibration needs 32"),
        (("--type", "gptq", "--calibration", "latin.txt"), "is no text in UTF-8"),
        (("--type", "gptq", "--calibration", ALICE, "--samples", "0"), "0 samples of 2048 tokens"),
        (("--type", "gptq", "--calibration", ALICE, "--sample-tokens", "1"), "samples of 1 tokens"),
    ],
)
def test_what_is_refused_in_one_sentence(
    tmp_path: Path, arguments: tuple, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_tiny(tmp_path / "tiny.gguf")
    (tmp_path / "short.txt").write_text("abcde")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 50)
    before = sorted(os.listdir(tmp_path))
    assert command("convert", source, tmp_path / "out", *arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("suri: ")
    assert words in said
    assert sorted(os.listdir(tmp_path)) == before


def test_words_that_would_not_be_whole(tmp_path: Path) -> None:
    source = open_checkpoint(write_tiny(tmp_path / "tiny.gguf", TinyModel(ffn_dim=80)))
    assert plan_gptq(source, GPTQSettings(None, bits=4), 1 << 30).tensors["layers.0.w2.qweight"].shape == (10, 64)
    with pytest.raises(ConvertError, match="gate_proj' has 80 outputs and 64 inputs"):
        plan_gptq(source, GPTQSettings(None, bits=3), 1 << 30)


def test_a_model_that_does_not_compute_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tiny(tmp_path / "tiny.gguf")
    monkeypatch.setattr(backend.convert.calibration, "as_written", lambda values: values * float("inf"))
    assert command("convert", source, tmp_path / "out", "--type", "gptq", "--calibration", ALICE, *SHORT) == 2
    assert "layers.0.self_attn.q_proj.weight' cannot be quantised: the inputs" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["tiny.gguf"]


def test_no_more_than_a_layer_is_in_memory(tmp_path: Path) -> None:
    model = TinyModel(weights="F16", dim=384, n_heads=6, n_kv_heads=6, head_dim=64, ffn_dim=1024, n_layers=10)
    source = write_tiny(tmp_path / "model.gguf", model)
    before, peak = peak_of("convert", source, tmp_path / "out", "--type", "gptq", "--calibration", ALICE,
                           "--sample-tokens", "64")  # fmt: skip
    # About 80 MB, most of it libraries that are used for the first time; all layers as float32 would add 71 MB.
    assert peak - before < 120e6, (peak - before) / 1e6
