"""What ends a reply in a format, and which format a model was made for: by its template, its tokens, its name."""

from __future__ import annotations

import pytest

from backend.text.detect import detect_format
from backend.text.formats import FORMATS, stops_for
from backend.text.messages import Message
from backend.text.templates import CHATML

# ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "control", "ids", "stops"),
    [
        ("chatml", {"<|im_start|>": 1, "<|im_end|>": 2, "<|endoftext|>": 0}, {0, 2}, ()),
        ("chatml", {"<|im_start|>": 1, "<|im_end|>": 2}, {2}, ()),
        ("chatml", {"<s>": 1, "</s>": 2}, set(), ("<|im_end|>",)),
        ("llama-3", {"<|end_of_text|>": 128001, "<|eom_id|>": 128008, "<|eot_id|>": 128009}, {128001, 128008, 128009},
         ()),
        ("llama-3", {"<|end_of_text|>": 128001, "<|eot_id|>": 128009}, {128001, 128009}, ()),
        ("llama-3", {"<s>": 1, "</s>": 2}, set(), ("<|eot_id|>",)),
        ("llama-2", {"<s>": 1, "</s>": 2}, {2}, ()),
        ("alpaca", {"<s>": 1, "</s>": 2}, {2}, ("### Instruction:",)),
        ("alpaca", {"<|im_end|>": 2}, set(), ("### Instruction:",)),
        ("vicuna-v0", {"<s>": 1, "</s>": 2}, {2}, ("###",)),
        ("vicuna-v1.1", {"<s>": 1, "</s>": 2}, {2}, ()),
        ("koala", {"<s>": 1, "</s>": 2}, {2}, ()),
        ("mistral", {"<s>": 1, "</s>": 2}, {2}, ()),
        ("zephyr", {"<s>": 1, "</s>": 2}, {2}, ()),
        ("zephyr", {"<|endoftext|>": 7}, {7}, ()),
    ],
)  # fmt: skip
def test_stops(name: str, control: dict[str, int], ids: set[int], stops: tuple[str, ...]) -> None:
    assert stops_for(FORMATS[name], control) == (frozenset(ids), stops)


# detection --------------------------------------------------------------------------------------------------------

BY_NAME = {
    "vicuna-7b-v0": "vicuna-v0", "vicuna-13b-delta-v0": "vicuna-v0", "ggml-vicuna-7b-v0.bin": "vicuna-v0",
    "vicuna-7b-v1.1": "vicuna-v1.1", "vicuna-13b-v1.3": "vicuna-v1.1", "vicuna-7b-v1.5-16k": "vicuna-v1.1",
    "vicuna-7B-1.1-GPTQ-4bit-128g": "vicuna-v1.1", "Wizard-Vicuna-13B": "vicuna-v1.1", "vicuna-7b-v0.1": "vicuna-v1.1",
    "koala-7B.ggml.q4_0.bin": "koala", "Koala_13b_diff_v2": "koala",
    "alpaca-7b": "alpaca", "alpaca-lora-65B.ggmlv3.q4_0": "alpaca", "gpt4-x-alpaca-13b-native-4bit-128g": "alpaca",
    "Llama-2-7b-chat-hf": "llama-2", "llama2_13b_chat": "llama-2", "llama-2-70b-chat.Q4_K_M.gguf": "llama-2",
    "CodeLlama-34b-Instruct-hf": "llama-2", "codellama-7b-instruct.Q5_K_S": "llama-2",
    "zephyr-7b-beta": "zephyr", "TinyLlama-1.1B-Chat-v1.0": "zephyr", "tinyllama_chat": "zephyr",
    "Mistral-7B-Instruct-v0.2": "mistral", "mixtral-8x7b-instruct-v0.1.Q4_K_M": "mistral",
    "llama-7b": None, "Llama-2-7b-hf": None, "7B": None, "CodeLlama-7b-hf": None, "CodeLlama-70b-Instruct-hf": None,
    "Mistral-7B-v0.1": None, "TinyLlama-1.1B-intermediate-step-1431k-3T": None, "": None, "chinese-alpaca-2-7b": None,
}  # fmt: skip


@pytest.mark.parametrize(("name", "expected"), BY_NAME.items())
def test_detection_by_name(name: str, expected: str | None) -> None:
    found = detect_format(None, {"<s>": 1, "</s>": 2}, name, adds_space=True)
    assert (found.name if found else None) == expected


@pytest.mark.parametrize(
    ("tokens", "name", "adds_space", "expected"),
    [
        ({"<|im_start|>": 1}, "", False, "chatml"),
        ({"<|im_start|>": 1}, "vicuna", False, "chatml"),
        ({"<|start_header_id|>": 1}, "checkpoint", False, "llama-3"),
        ({"[INST]": 3}, "Mistral-7B-v0.3", True, None),
        ({"[INST]": 3}, "Mistral-7B-Instruct-v0.3", True, "mistral-v3"),
        ({"[INST]": 3}, "Mistral-Nemo-Instruct-2407", False, "mistral-tekken"),
        ({"[INST]": 3, "[SYSTEM_PROMPT]": 17}, "Mistral-Large-Instruct-2411", True, "mistral-v7"),
        ({"[INST]": 3, "[SYSTEM_PROMPT]": 17}, "Mistral-Small-24B-Instruct-2501", False, "mistral-v7-tekken"),
    ],
)
def test_detection_by_tokens(tokens: dict[str, int], name: str, adds_space: bool, expected: str | None) -> None:
    found = detect_format(None, tokens, name, adds_space=adds_space)
    assert (found.name if found else None) == expected


BY_TEMPLATE = {
    CHATML: "chatml",
    "{{ '<|im_start|>user<|im_sep|>' }}": "own",
    "{{ bos_token + '[INST] <<SYS>>' }}": "llama-2",
    "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endfor %}": "mistral",
    "{{ ' [INST] ' + system_message }}": "mistral-v1",
    "[AVAILABLE_TOOLS]{{ '[INST] ' + m.content + '[/INST]' }}": "mistral-v3",
    "[AVAILABLE_TOOLS]{{ '[INST]' + m.content + '[/INST]' }}": "mistral-tekken",
    "[SYSTEM_PROMPT]{{ '[INST] ' + m.content }}": "mistral-v7",
    "[SYSTEM_PROMPT]{{ '[INST]' + m.content }}": "mistral-v7-tekken",
    "{{ '<|start_header_id|>' }}": "llama-3",
    "{{ '<|user|>\n' + message['content'] + eos_token }}": "zephyr",
    "{{ '<|user|>\n' + message['content'] + '<|endoftext|>' }}": "zephyr",
    "{{ '<|user|>\n' + message['content'] + '<|end|>' }}": "own",
    "{{ 'USER: ' + m.content + ' ASSISTANT: ' }}": "vicuna-v1.1",
    "{{ '### Human: ' + m.content }}": "vicuna-v0",
    "{{ '### Instruction:\n' + m.content + '### Response:' }}": "alpaca",
    "{{ 'BEGINNING OF CONVERSATION: USER: ' + m.content + ' GPT:' }}": "koala",
    "{{ messages }}": "own",
}


@pytest.mark.parametrize(("template", "expected"), BY_TEMPLATE.items())
def test_detection_by_template(template: str, expected: str) -> None:
    found = detect_format(template, {"<|im_start|>": 1}, "koala")
    assert found is not None
    assert (found.name, found.template, found.built_in) == (expected, template, False), "its own template is rendered"
    assert found.refusal([Message("user", "[INST]")]) is None, "Meta's rule belongs to Meta's format"


def test_the_ends_of_an_unknown_template() -> None:
    found = detect_format("{{ messages[0].content }}<end_of_turn>", {})
    assert found is not None
    assert stops_for(found, {"<end_of_turn>": 9}) == (frozenset({9}), ())
    assert stops_for(found, {}) == (frozenset(), ("<end_of_turn>",))
