"""Models of the hub: what a name asks for and which files of a repository it means."""

from __future__ import annotations

import subprocess
import sys

import pytest

from backend.errors import DownloadError, PresetError
from backend.hub import HubModel, choose, is_safe, parse

# names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("hub:org/repo", HubModel("org/repo")),
        ("hub:TheBloke/Llama-2-7B-GGUF:Q4_K_M", HubModel("TheBloke/Llama-2-7B-GGUF", "Q4_K_M")),
        ("hub:a/b.c_d-e1:sub/model.gguf", HubModel("a/b.c_d-e1", "sub/model.gguf")),
        ("hub:a/b@v1.0:model.gguf", HubModel("a/b", "model.gguf", "v1.0")),
        ("hub:a/b@0123abc", HubModel("a/b", None, "0123abc")),
        ("hub:a/b:a file with spaces.gguf", HubModel("a/b", "a file with spaces.gguf")),
    ],
)
def test_names(text: str, model: HubModel) -> None:
    assert parse(text) == model
    assert str(model) == text


@pytest.mark.parametrize(
    "text",
    [
        "hub:", "hub:repo", "hub:a/b/c", "hub:/b", "hub:a/", "hub:../b", "hub:a/..", "hub:a/b..c", "hub:.a/b",
        "hub:a/b.",
        "hub:-a/b", "hub:a/b--c", "hub:a b/c", "hub:a/b\n", "hub:a/b:", "hub:a/b@", "hub:a/b@../x", "hub:a/b@x/y",
        "hub:a/b:/etc/passwd", "hub:a/b:../x", "hub:a/b:x/../../y", "hub:a/b:x//y", "hub:a/b:./x", "hub:a/b:C:\\x",
        "hub:a/b:x\\y", "hub:a/b:x\0y", "hub:a/b:x\ny", "hub:https://huggingface.co/a/b", "hub:a/b.git",
        "hub:" + "a" * 200 + "/b", "hub:a/b:" + "x" * 600, "hub:ä/b",
    ],
)  # fmt: skip
def test_names_that_are_refused(text: str) -> None:
    with pytest.raises(PresetError, match=r"hub:ORG/REPO|no plain path"):
        parse(text)


@pytest.mark.parametrize(
    "name",
    ["../x", "/x", "a/../x", "a//x", "", ".", "..", "a/.", "C:/x", "a\\b", "a\nb", "a\0b", "a/ b", "a/...", "a\u202eb"],
)
def test_unsafe_names(name: str) -> None:
    assert not is_safe(name)


# which files ----------------------------------------------------------------------------------------------------------

SIDE = ["config.json", "generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json"]  # fmt: skip
RUBBISH = [
    ".gitattributes",
    "README.md",
    "LICENSE.txt",
    "modeling_llama.py",
    "run.sh",
    "onnx/model.onnx",
    "training_args.bin",
]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = ["model.safetensors.index.json"]
OLD_SHARDS = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
GGUFS = ["m.Q2_K.gguf", "m.Q4_K_S.gguf", "m.Q4_K_M.gguf", "m.Q8_0.gguf", "m-F16.gguf", "mmproj-Q4_K_M.gguf"]
PARTS = [f"big/m-Q6_K-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
META = ["original/consolidated.00.pth", "original/params.json", "original/tokenizer.model"]

CHOICES = {
    "safetensors, never the same as .bin": (SIDE + SHARDS + INDEX + OLD_SHARDS + RUBBISH, None,
                                            SHARDS + SIDE + INDEX, ""),
    "a single file before shards": (SIDE + ["model.safetensors"], None, [*SIDE, "model.safetensors"], ""),
    "not Mistral's second copy": (
        [*SIDE, *SHARDS, "consolidated.safetensors"], None, SIDE + SHARDS, ""
    ),
    "not other variants": ([*SIDE, "model.safetensors", "model.fp16.safetensors"], None,
                           [*SIDE, "model.safetensors"], ""),
    "any safetensors": ([*SIDE, "gptq_model-4bit-128g.safetensors", "quantize_config.json"], None,
                        [*SIDE, "gptq_model-4bit-128g.safetensors", "quantize_config.json"], ""),
    "an adapter": (["adapter_config.json", "adapter_model.safetensors"], None,
                   ["adapter_config.json", "adapter_model.safetensors"], ""),
    "old .bin": (SIDE + OLD_SHARDS + RUBBISH, None, SIDE + OLD_SHARDS, ""),
    "Q4_K_M of GGUFs": (GGUFS + ["config.json"], None, ["m.Q4_K_M.gguf"], "m.Q4_K_M.gguf"),
    "Q8_0 when there is no Q4_K_M": (["m.Q2_K.gguf", "m.Q8_0.gguf"], None, ["m.Q8_0.gguf"], "m.Q8_0.gguf"),
    "the only GGUF": (["strange.gguf", "mmproj-F16.gguf"], None, ["strange.gguf"], "strange.gguf"),
    "safetensors before GGUF": ([*GGUFS, *SIDE, "model.safetensors"], None, [*SIDE, "model.safetensors"], ""),
    "a quantization": (GGUFS, "q2_k", ["m.Q2_K.gguf"], "m.Q2_K.gguf"),
    "not the longer one": (["m-Q4_K_M.gguf", "m-other-Q4_K.gguf"], "Q4_K", ["m-other-Q4_K.gguf"], "m-other-Q4_K.gguf"),
    "all parts": (PARTS + GGUFS, "Q6_K", PARTS, PARTS[0]),
    "all parts from one name": (PARTS + GGUFS, PARTS[1], PARTS, PARTS[0]),
    "a file": (GGUFS, "mmproj-Q4_K_M.gguf", ["mmproj-Q4_K_M.gguf"], "mmproj-Q4_K_M.gguf"),
    "a file that is no GGUF": (["a.pt", "b.pt", "config.json", "x/c.json"], "b.pt", ["b.pt", "config.json"], "b.pt"),
    "Meta's own": ([*META, "README.md"], None, META, "original"),
    "a folder": ([*META, *SIDE, *SHARDS], "original", META, "original"),
    "the only old file": (["ggml-model-q4_0.bin", "README.md"], None, ["ggml-model-q4_0.bin"], "ggml-model-q4_0.bin"),
}  # fmt: skip


@pytest.mark.parametrize(("names", "file", "expected", "path"), CHOICES.values(), ids=CHOICES.keys())
def test_which_files(names: list[str], file: str | None, expected: list[str], path: str) -> None:
    choice = choose(names, HubModel("a/b", file))
    assert sorted(choice.names) == sorted(expected)
    assert len(set(choice.names)) == len(choice.names)
    assert choice.path == path


REFUSED = {
    "not there": (GGUFS, "m.Q4_K_X.gguf", "did you mean 'm.Q4_K_"),
    "nothing alike": (GGUFS, "zzzz", "it has m-F16.gguf"),
    "no model": (["README.md"], None, "README.md"),
    "nothing at all": ([], None, "no files"),
    "a hidden file": ([".hub.json", "m.gguf"], ".hub.json", "no file '.hub.json'"),
    "several": (["a.pt", "b.pt"], None, "hub:a/b:a.pt"),
    "a part is missing": (PARTS[:2], "Q6_K", "00003-of-00003"),
}


@pytest.mark.parametrize(("names", "file", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_no_choice(names: list[str], file: str | None, words: str) -> None:
    with pytest.raises(DownloadError, match=words):
        choose(names, HubModel("a/b", file))


def test_the_library_is_not_imported_before_it_is_needed() -> None:
    program = "import sys, backend.models; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
