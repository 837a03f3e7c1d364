"""The tokenizer keys of a GGUF file, from whatever describes the tokenizer of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backend.convert.side_files import read_json, read_json_if_there, read_small
from backend.convert.vocab_json import added_tokens, vocabulary_of_json
from backend.convert.vocab_tiktoken import looks_like_ranks, vocabulary_of_ranks
from backend.convert.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, Vocabulary
from backend.errors import CheckpointError
from backend.tokenizer.modelproto import BPE, parse_model
from backend.tokenizer.source import TokenizerSource

_FIRST_BYTE, _AFTER_BYTES = 3, 259  # ids of the byte tokens in LLaMA's vocabulary


def vocabulary_keys(source: TokenizerSource, vocab_size: int) -> dict[str, Any]:
    """All tokenizer keys, with one token for each of the `vocab_size` rows of the embedding table.

    Raises CheckpointError where the tokenizer is missing, unknown or does not fit.
    """
    if source.kind == "gguf":
        return {key: value for key, value in source.metadata.items() if key.startswith("tokenizer.")}
    vocabulary = (
        _of_ggml(source.path, source.metadata) if source.kind == "ggml" else _of_folder(source.path, vocab_size)
    )
    if len(vocabulary.tokens) > vocab_size:
        raise CheckpointError(
            f"{source.path}: {len(vocabulary.tokens)} tokens, but the embedding table has only {vocab_size} rows"
        )
    vocabulary.fill(vocab_size)
    return vocabulary.keys()


def tokenizer_folder(path: Path) -> Path | None:
    """The folder that holds the tokenizer: the model's own, or the one above it (LLaMA 1)."""
    folder = path if path.is_dir() else path.parent
    for candidate in (folder, folder.absolute().parent):
        if (candidate / "tokenizer.model").is_file() or (candidate / "tokenizer.json").is_file():
            return candidate
    return None


def _of_ggml(path: Path, metadata: Mapping[str, Any]) -> Vocabulary:
    """The raw bytes of old files, with the spelling that LLaMA's own vocabulary has."""
    tokens: list[str] = []
    kinds: list[int] = []
    for number, raw in enumerate(metadata["tokens"]):
        if number < 3:
            token, kind = ("<unk>", "<s>", "</s>")[number], UNKNOWN if number == 0 else CONTROL
        elif len(raw) == 1 and _FIRST_BYTE <= number < _AFTER_BYTES:
            token, kind = f"<0x{raw[0]:02X}>", BYTE
        else:
            try:
                token, kind = raw.decode("utf-8").replace(" ", "▁"), NORMAL if raw else CONTROL
            except UnicodeDecodeError:
                token, kind = "", UNUSED
        tokens.append(token or f"[PAD{number}]")
        kinds.append(kind)
    scores = metadata.get("scores") or [-max(0.0, float(number - _AFTER_BYTES)) for number in range(len(tokens))]
    return Vocabulary("llama", tokens, kinds, scores=list(scores), bos=1, eos=2, unk=0, add_bos=True)


def _of_folder(path: Path, limit: int) -> Vocabulary:
    folder = tokenizer_folder(path)
    if folder is None:
        raise CheckpointError(f"{path}: there is no tokenizer.model and no tokenizer.json beside the weights")
    settings = read_json_if_there(folder, "tokenizer_config.json")
    if (folder / "tokenizer.model").is_file():
        file = folder / "tokenizer.model"
        data = read_small(file)
        if looks_like_ranks(data):
            vocabulary = vocabulary_of_ranks(file, data, limit)
        else:
            vocabulary = _of_spm(file, data)
            _add_tokens(vocabulary, folder, settings, limit)
    else:
        vocabulary = vocabulary_of_json(folder / "tokenizer.json", limit)
    _apply_settings(vocabulary, settings, read_json_if_there(folder, "config.json"))
    template = folder / "chat_template.jinja"
    if template.is_file():
        vocabulary.templates[""] = read_small(template).decode("utf-8", "replace")
    return vocabulary


def _of_spm(file: Path, data: bytes) -> Vocabulary:
    model = parse_model(file, data)
    if model.algorithm != BPE:
        raise CheckpointError(f"{file}: SentencePiece model type {model.algorithm}, expected {BPE} (BPE)")
    try:
        texts = model.texts()
    except ValueError:
        raise CheckpointError(f"{file}: has a piece that is not valid UTF-8") from None
    kinds, scores = [piece.kind for piece in model.pieces], [piece.score for piece in model.pieces]
    found = Vocabulary("llama", texts, kinds, scores=scores, add_bos=True)
    ids = (model.bos_id, model.eos_id, model.unk_id, model.pad_id)
    found.bos, found.eos, found.unk, found.pad = (token if 0 <= token < len(texts) else None for token in ids)
    found.add_space_prefix = model.add_dummy_prefix
    return found


def _add_tokens(vocabulary: Vocabulary, folder: Path, settings: Mapping[str, Any], limit: int) -> None:
    """Tokens that came after training, from the files in which Hugging Face keeps them."""
    found: dict[int, tuple[str, bool, Path]] = {}
    file = folder / "added_tokens.json"
    if file.is_file():
        for token, token_id in read_json(file).items():
            if type(token_id) is not int:
                raise CheckpointError(f"{file}: token {token!r} has the id {token_id!r}, expected a number")
            found[token_id] = (token, True, file)
    file = folder / "tokenizer.json"
    if file.is_file():
        for token_id, token, special in added_tokens(file, read_json(file).get("added_tokens")):
            found[token_id] = (token, special, file)
    decoder = settings.get("added_tokens_decoder")
    for key, entry in (decoder if isinstance(decoder, dict) else {}).items():
        content = entry.get("content") if isinstance(entry, dict) else None
        if key.isdecimal() and len(key) < 10 and isinstance(content, str):
            found[int(key)] = (content, entry.get("special") is True, folder / "tokenizer_config.json")
    for token_id in sorted(found):
        token, special, file = found[token_id]
        if token_id >= len(vocabulary.tokens) or vocabulary.tokens[token_id] == token:
            vocabulary.add(token_id, token, special, limit, file)


def _apply_settings(vocabulary: Vocabulary, settings: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """tokenizer_config.json knows best, then config.json, then the vocabulary itself."""
    for name in ("bos", "eos", "unk", "pad"):
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        token_id = vocabulary.id_of(token) if isinstance(token, str) else None
        if token_id is None and getattr(vocabulary, name) is None:
            value = config.get(f"{name}_token_id")
            value = value[0] if isinstance(value, list) and value else value
            token_id = value if type(value) is int and 0 <= value < len(vocabulary.tokens) else None
        if token_id is not None:
            setattr(vocabulary, name, token_id)
    for name in ("add_bos", "add_eos"):
        if isinstance(settings.get(f"{name}_token"), bool):
            setattr(vocabulary, name, settings[f"{name}_token"])
    templates = settings.get("chat_template")
    if isinstance(templates, str):
        vocabulary.templates[""] = templates
    for entry in templates if isinstance(templates, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str):
            vocabulary.templates["" if entry["name"] == "default" else entry["name"]] = entry["template"]
