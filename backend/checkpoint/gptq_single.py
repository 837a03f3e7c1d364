"""GPTQ models of 2023 as one file: which file of a folder it is, what its name says, and which LLaMA it holds.

Names are for finding, showing and breaking ties; what a file holds is decided by its tensors (`quantized.py`).
"""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

from backend.checkpoint.container import RawTensors
from backend.errors import CheckpointError
from backend.model.config import ModelConfig

_BITS = re.compile(r"(?<![a-z0-9])(?:([2348])[-_]?bits?|int([2348]))(?![a-z0-9])")
_GROUP = re.compile(r"(?<![a-z0-9])(?:(\d{2,5})g|gr(\d{2,5})|groupsize[-_]?(\d{2,5}))(?![a-z0-9])")
_SUFFIXES = (".safetensors", ".pt")
_USUAL_BITS = (4, 3, 2, 8)
_USUAL_GROUPS = (128, 64, 32, 1024)

# LLaMA of February 2023: dim -> (size, layers, ffn, norm_eps). Every head has 128 dimensions, the context is 2048.
_LLAMA = {
    4096: ("7B", 32, 11008, 1e-6),
    5120: ("13B", 40, 13824, 1e-6),
    6656: ("30B", 60, 17920, 1e-6),
    8192: ("65B", 80, 22016, 1e-5),
}
_LAYER = re.compile(r"model\.layers\.(\d{1,4})\..+")


def settings_from_name(name: str) -> dict[str, int]:
    """{"bits", "group_size"} as a file or folder name spells them ("llama-7b-4bit-128g"); group_size -1: one group for
    all columns. {} when the name says nothing of bits."""
    name = name.lower()
    bits, group = _BITS.search(name), _GROUP.search(name)
    if bits is None:
        return {}
    return {"bits": int(bits[1] or bits[2]), "group_size": int(group[1] or group[2] or group[3]) if group else -1}


def find_single_file(folder: Path) -> Path | None:
    """The weight file of models/NAME, in the order in which text-generation-webui looks for it.

    For each bits and group size (those of NAME if it says them, else the usual ones; no group size comes last):
    models/NAME-4bit-128g, models/NAME/NAME-4bit-128g, models/NAME/4bit-128g, .safetensors before .pt. Else the last .pt
    of the folder, else the last .safetensors. For folders without model.safetensors, pytorch_model.bin or shards.
    """
    said = settings_from_name(folder.name)
    bits = (said["bits"],) if said else _USUAL_BITS
    groups = (said["group_size"],) if said.get("group_size", -1) > 0 else _USUAL_GROUPS
    for width, group, suffix in product(bits, (*(f"-{size}g" for size in groups), ""), _SUFFIXES):
        ending = f"{width}bit{group}{suffix}"
        places = (folder.parent / f"{folder.name}-{ending}", folder / f"{folder.name}-{ending}", folder / ending)
        for place in places:
            if place.is_file():
                return place
    for suffix in reversed(_SUFFIXES):
        found = sorted(file for file in folder.glob("*" + suffix) if file.is_file())
        if found:
            return found[-1]
    return None


def config_from_tensors(path: Path, raws: RawTensors) -> ModelConfig:
    """The config of a single file without config.json, for LLaMA 7B, 13B, 30B and 65B only: the tensors' shapes do not
    say the number of heads, so anything else needs its config.json. Raises CheckpointError that asks for it."""
    ask = f"{path}: put the model's config.json beside this file; "
    table = raws.get("model.embed_tokens.weight")
    if table is None or len(table.shape) != 2:
        raise CheckpointError(f"{ask}it has no tensor 'model.embed_tokens.weight' from which a LLaMA could be told")
    vocabulary, dim = table.shape
    layers = 1 + max((int(found[1]) for name in raws if (found := _LAYER.fullmatch(name))), default=-1)
    ffn = _outputs(raws, "model.layers.0.mlp.gate_proj")
    key = _outputs(raws, "model.layers.0.self_attn.k_proj")
    size, *known = _LLAMA.get(dim, ("", 0, 0, 0.0))
    if [layers, ffn, key] != [*known[:2], dim] or vocabulary < 1:
        raise CheckpointError(
            f"{ask}its shapes (dim {dim}, {layers} layers, ffn {ffn}, key size {key}) are not those of LLaMA 7B, 13B, "
            "30B or 65B, the sizes that can be told without it"
        )
    return ModelConfig(
        architecture="llama",
        name=path.stem,
        dim=dim,
        n_layers=layers,
        n_heads=dim // 128,
        n_kv_heads=dim // 128,
        head_dim=128,
        ffn_dim=int(known[1]),
        vocab_size=vocabulary,
        context=2048,
        norm_eps=float(known[2]),
        rope_interleaved=False,
        tied_output="lm_head.weight" not in raws,
    )


def _outputs(raws: RawTensors, prefix: str) -> int:
    """Out features of a linear: the last dimension of scales [groups, out], or the first of [out, 1]; 0: not there."""
    scales = raws.get(prefix + ".scales")
    if scales is None or len(scales.shape) != 2:
        return 0
    return scales.shape[0] if scales.shape[1] == 1 else scales.shape[1]
