"""The small JSON files beside a tokenizer: which tokens begin and end a text, which were added, the chat template.

Read are `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`, `generation_config.json`,
`config.json`, `chat_template.jinja` and `chat_template.json`, as transformers writes them. Every one may be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend.errors import CheckpointError
from backend.tokenizer.ggufkeys import MAX_TEMPLATE
from backend.tokenizer.jsonfile import read_file, read_json
from backend.tokenizer.vocabulary import MAX_TOKENS

_LIMIT = 16 << 20  # bytes of one side file; tokenizer_config.json of Llama 3 has 50,000
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_PADDING = {"[PAD]", "<pad>", "<PAD>"}  # added by fine-tunes, some of which forgot to say that it is special


@dataclass(frozen=True)
class AddedToken:
    text: str
    special: bool


@dataclass(frozen=True)
class SideFiles:
    """What the files say; None and empty where they say nothing. Ids are as written: they may not exist."""

    named: Mapping[str, str] = field(default_factory=dict)  # "bos_token" -> its spelling
    bos_id: int | None = None
    eos_ids: Sequence[int] = ()
    add_bos: bool | None = None
    added: Mapping[int, AddedToken] = field(default_factory=dict)
    chat_template: str | None = None

    def token(self, name: str, ids: Mapping[str, int]) -> int | None:
        """The id of a named token such as "bos_token" among `ids`."""
        return ids.get(self.named.get(name, ""))


def read_side_files(find: Callable[[str], Path | None]) -> SideFiles:
    """`find(name)`: where a file of that name is. Raises CheckpointError for a file that is there and is not right."""
    files = {
        name: (path, read_json(path, _LIMIT))
        for name in ("tokenizer_config", "special_tokens_map", "added_tokens", "generation_config", "config")
        if (path := find(f"{name}.json")) is not None
    }
    named: dict[str, str] = {}
    special: set[str] = set()
    for source in ("special_tokens_map", "tokenizer_config"):  # the second is the one transformers believes
        path, content = files.get(source, (Path(), {}))
        for name in _NAMED:
            if text := _token_text(path, name, content.get(name)):
                named[name] = text
        more = content.get("additional_special_tokens") or []
        if not isinstance(more, list):
            raise CheckpointError(f"{path}: additional_special_tokens is no list")
        special.update(_token_text(path, "additional_special_tokens", token) for token in more)
    ids = [_token_ids(*files[name], "eos_token_id") for name in ("generation_config", "config") if name in files]
    begin = _token_ids(*files["config"], "bos_token_id") if "config" in files else []
    path, config = files.get("tokenizer_config", (Path(), {}))
    add_bos = config.get("add_bos_token")
    if add_bos is not None and not isinstance(add_bos, bool):
        raise CheckpointError(f"{path}: add_bos_token is {add_bos!r:.60}, expected true or false")
    return SideFiles(
        named=named,
        bos_id=begin[0] if begin else None,
        eos_ids=[token for found in ids for token in found],
        add_bos=add_bos,
        added=_added(files, special | set(named.values()) | _PADDING),
        chat_template=_chat_template(find, path, config.get("chat_template")),
    )


def _token_text(path: Path, name: str, value: Any) -> str:
    """A token is written as its text or as an object with `content`; "" for none."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CheckpointError(f"{path}: {name} is {value!r:.60}, expected a text")
    return value


def _token_ids(path: Path, content: Mapping[str, Any], name: str) -> list[int]:
    value = content.get(name)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int for token in values):
        raise CheckpointError(f"{path}: {name} is {value!r:.60}, expected a token id or a list of them")
    return [int(token) for token in values]


def _added(files: Mapping[str, tuple[Path, dict[str, Any]]], special: set[str]) -> dict[int, AddedToken]:
    added: dict[int, AddedToken] = {}
    path, content = files.get("added_tokens", (Path(), {}))
    for text, token in content.items():
        if type(token) is not int or not 0 <= token < MAX_TOKENS:
            raise CheckpointError(
                f"{path}: token {text!r:.60} has the id {token!r:.60}, expected 0 to {MAX_TOKENS - 1}"
            )
        added[token] = AddedToken(text, text in special)
    path, config = files.get("tokenizer_config", (Path(), {}))
    decoder = config.get("added_tokens_decoder", {})
    if decoder is None:
        return added
    if not isinstance(decoder, dict):
        raise CheckpointError(f"{path}: added_tokens_decoder is no object")
    for key, value in decoder.items():
        text = _token_text(path, "added_tokens_decoder", value)
        if not key.isdecimal() or len(key) > 7 or int(key) >= MAX_TOKENS or not text:
            raise CheckpointError(f"{path}: entry {key!r:.60} of added_tokens_decoder is no token")
        flagged = isinstance(value, dict) and value.get("special") is True
        added[int(key)] = AddedToken(text, flagged or text in special)
    return added


def _chat_template(find: Callable[[str], Path | None], config: Path, value: Any) -> str | None:
    """A file of its own counts before `tokenizer_config.json`, as in transformers."""
    if (path := find("chat_template.jinja")) is not None:
        try:
            return read_file(path, MAX_TEMPLATE).decode("utf-8-sig") or None
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: not UTF-8 text (byte {error.start})") from None
    path = config
    if (other := find("chat_template.json")) is not None:
        path, value = other, read_json(other, _LIMIT).get("chat_template")
    if isinstance(value, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in value if _is_named_template(entry)}
        value = named.get("default")
    if value is not None and (not isinstance(value, str) or len(value) > MAX_TEMPLATE):
        raise CheckpointError(f"{path}: chat_template is no text of at most {MAX_TEMPLATE} characters")
    return value or None


def _is_named_template(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("name"), str)
