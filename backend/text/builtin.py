"""The templates of the prompt formats that are known by name. formats.py says what each is for and what ends a reply.

All write the special tokens as the model spells them. `first` is true before anything was said; what a format has no
place for is refused, and ChatTemplate then puts it into a user's turn. Where Mistral's texts show a space that
SentencePiece vocabularies add by themselves, it is `gap` (before plain text) or `tag_gap` (after a tag).
"""

from __future__ import annotations

from backend.text.templates import CUT

ROLES_ERROR = (
    "model only supports 'system', 'user' and 'assistant' roles, starting with 'system', then 'user' and alternating "
    "(u/a/u/a/u...)"
)
ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
ALPACA_INPUT_PREAMBLE = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request."
)
VICUNA_V0_PREAMBLE = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)
VICUNA_PREAMBLE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)

# A system text at the start takes the preamble's place.
_SYSTEM = r"""
{%- set system = messages and messages[0].role == 'system' -%}
{%- set turns = messages[1:] if system else messages -%}
{{- messages[0].content if system else preamble -}}
"""
_OTHER_ROLE = "{{- raise_exception('this format has no place for a turn of the role ' ~ turn.role ~ ' here') -}}"
_GAPS = r"""
{%- set gap = gap | default(' ') -%}
{%- set tag_gap = tag_gap | default(' ') -%}
"""

# Meta's code joins the system text to the first user's and strips the whole; the answers are stripped too.
LLAMA_2 = r"""
{%- set system = 1 if messages and messages[0].role == 'system' else 0 -%}
{%- set turns = messages[system:] -%}
{%- if not turns %}{{ raise_exception(roles_error) }}{% endif -%}
{%- for turn in turns -%}
    {%- if turn.role != ('assistant' if loop.index0 % 2 else 'user') %}{{ raise_exception(roles_error) }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt and turns[-1].role != 'user' -%}
    {{- raise_exception('Last message must be from user, got ' ~ turns[-1].role) -}}
{%- endif -%}
{%- for turn in turns -%}
    {%- if turn.role == 'user' -%}
        {%- set folded = '<<SYS>>\n' ~ messages[0].content ~ '\n<</SYS>>\n\n' if loop.first and system else '' -%}
        {{- bos_token ~ '[INST] ' ~ (folded ~ turn.content) | trim ~ ' [/INST]' -}}
    {%- else -%}
        {{- ' ' ~ turn.content | trim ~ ' ' ~ eos_token -}}
    {%- endif -%}
{%- endfor -%}
""".replace("roles_error", f'"{ROLES_ERROR}"')

LLAMA_3 = r"""
{{- bos_token -}}
{%- for turn in messages -%}
    {{- '<|start_header_id|>' ~ turn.role ~ '<|end_header_id|>\n\n' ~ turn.content | trim ~ '<|eot_id|>' -}}
{%- endfor -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt -}}
"""

ALPACA = (
    '{%- set preamble = "' + ALPACA_PREAMBLE + '" -%}' + _SYSTEM + r"""
{%- for turn in turns -%}
    {%- if turn.role == 'user' -%}
        {{- '\n\n### Instruction:\n' ~ turn.content ~ '\n\n### Response:' -}}
    {%- elif turn.role == 'assistant' -%}
        {{- turn.content ~ eos_token -}}
    {%- else -%}
""" + _OTHER_ROLE + r"""
    {%- endif -%}
{%- endfor -%}
"""
)  # fmt: skip

VICUNA_V0 = (
    '{%- set preamble = "' + VICUNA_V0_PREAMBLE + '" -%}' + _SYSTEM + r"""
{%- for turn in turns -%}
    {%- if turn.role == 'user' -%}
        {{- ('\n\n' if loop.first else '\n') ~ '### Human: ' ~ turn.content -}}
    {%- elif turn.role == 'assistant' -%}
        {{- '\n### Assistant: ' ~ turn.content -}}
    {%- else -%}
""" + _OTHER_ROLE + r"""
    {%- endif -%}
{%- endfor -%}
{{- '\n### Assistant:' if add_generation_prompt -}}
"""
)  # fmt: skip

VICUNA = (
    '{%- set preamble = "' + VICUNA_PREAMBLE + '" -%}' + _SYSTEM + r"""
{%- for turn in turns -%}
    {%- if turn.role == 'user' -%}
        {{- (' ' if loop.first) ~ 'USER: ' ~ turn.content -}}
    {%- elif turn.role == 'assistant' -%}
        {{- ' ASSISTANT: ' ~ turn.content ~ eos_token -}}
    {%- else -%}
""" + _OTHER_ROLE + r"""
    {%- endif -%}
{%- endfor -%}
{{- ' ASSISTANT:' if add_generation_prompt -}}
"""
)  # fmt: skip

# The answer is text of its own: `GPT:` and what follows were never one text for the model.
KOALA = (
    r"""
{{- 'BEGINNING OF CONVERSATION:' -}}
{%- for turn in messages -%}
    {%- if turn.role == 'user' -%}
        {{- (' ' if loop.first) ~ 'USER: ' ~ turn.content ~ ' GPT:' -}}
    {%- elif turn.role == 'assistant' -%}
        {{- 'CUT' ~ turn.content ~ eos_token -}}
    {%- else -%}
""".replace("CUT", CUT) + _OTHER_ROLE + r"""
    {%- endif -%}
{%- endfor -%}
"""
)  # fmt: skip


ZEPHYR = r"""
{%- for turn in messages -%}
    {{- '<|' ~ turn.role ~ '|>\n' ~ turn.content ~ eos_token ~ '\n' -}}
{%- endfor -%}
{{- '<|assistant|>\n' if add_generation_prompt -}}
"""


# As Hugging Face's template of the 7B models has it; the answer was always tokenised on its own.
MISTRAL = (
    _GAPS + r"""
{{- bos_token -}}
{%- for turn in messages -%}
    {%- if turn.role == 'user' -%}
        {{- (gap if not loop.first) ~ '[INST] ' ~ turn.content ~ ' [/INST]' -}}
    {%- elif turn.role == 'assistant' -%}
        {{- 'CUT' ~ turn.content ~ eos_token -}}
    {%- else -%}
""".replace("CUT", CUT) + _OTHER_ROLE + r"""
    {%- endif -%}
{%- endfor -%}
"""
)  # fmt: skip

MISTRAL_V1 = (
    _GAPS + r"""
{{- bos_token -}}
{%- for turn in messages -%}
    {%- if turn.role == 'user' -%}
        {{- gap ~ '[INST] ' ~ turn.content ~ ' [/INST]' -}}
    {%- elif turn.role == 'assistant' -%}
        {{- ' ' ~ turn.content ~ eos_token -}}
    {%- else -%}
""" + _OTHER_ROLE + r"""
    {%- endif -%}
{%- endfor -%}
"""
)  # fmt: skip

MISTRAL_V3 = (
    _GAPS + r"""
{{- bos_token -}}
{%- for turn in messages -%}
    {%- if turn.role == 'user' -%}
        {{- '[INST]' ~ tag_gap ~ turn.content ~ '[/INST]' -}}
    {%- elif turn.role == 'assistant' -%}
        {{- tag_gap ~ turn.content ~ eos_token -}}
    {%- else -%}
""" + _OTHER_ROLE + r"""
    {%- endif -%}
{%- endfor -%}
"""
)  # fmt: skip

MISTRAL_TEKKEN = r"""
{%- set tag_gap = '' -%}
""" + MISTRAL_V3.replace(_GAPS, "")

MISTRAL_V7 = MISTRAL_V3.replace(_OTHER_ROLE, "{{- '[SYSTEM_PROMPT]' ~ tag_gap ~ turn.content ~ '[/SYSTEM_PROMPT]' -}}")

MISTRAL_V7_TEKKEN = r"""
{%- set tag_gap = '' -%}
""" + MISTRAL_V7.replace(_GAPS, "")
