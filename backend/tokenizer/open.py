"""The tokenizer that a checkpoint's source describes, whatever its format."""

from __future__ import annotations

from backend.errors import CheckpointError
from backend.tokenizer.base import Tokenizer
from backend.tokenizer.bytebpe import byte_bpe_from_gguf
from backend.tokenizer.bytesonly import byte_tokenizer
from backend.tokenizer.folder import tokenizer_from_folder
from backend.tokenizer.ggufkeys import GGUFKeys
from backend.tokenizer.sentence import sentencepiece_from_ggml, sentencepiece_from_gguf
from backend.tokenizer.source import TokenizerSource


def open_tokenizer(source: TokenizerSource, vocab_size: int) -> Tokenizer:
    """Build the tokenizer and check that it fits the model's embedding table of `vocab_size` rows.

    Raises CheckpointError. A folder's added tokens beyond the table are left out instead, with a warning: many
    fine-tunes name a padding token that their model has no row for.
    """
    tokenizer = _build(source, vocab_size)
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{source.path}: {tokenizer.vocab_size} tokens, but the embedding table has only {vocab_size} rows"
        )
    return tokenizer


def _build(source: TokenizerSource, vocab_size: int) -> Tokenizer:
    if source.kind == "folder":
        return tokenizer_from_folder(source.path, vocab_size)
    if source.kind == "bytes":
        return byte_tokenizer(vocab_size)
    if source.kind == "ggml":
        return sentencepiece_from_ggml(source.path, source.metadata)
    keys = GGUFKeys(source.path, source.metadata)
    kind = keys.get("model")
    if kind == "gpt2":
        return byte_bpe_from_gguf(keys)
    if kind == "llama":
        return sentencepiece_from_gguf(keys)
    raise CheckpointError(
        f"{source.path}: tokenizer.ggml.model is {kind!r:.100}; this version knows 'llama' (SentencePiece) and 'gpt2' "
        "(byte-level BPE)"
    )
