"""Chat templates that many models share, by the names that people know."""

from __future__ import annotations

_TURNS = (
    "{{% if messages[0].role == 'system' %}}{{% set system = messages[0].content %}}"
    "{{% set turns = messages[1:] %}}{{% else %}}{{% set system = '' %}}{{% set turns = messages %}}"
    "{{% endif %}}{0}{{% for m in turns %}}{{% if m.role == 'user' %}}{1}{{% else %}}{2}{{% endif %}}"
    "{{% endfor %}}{{% if add_generation_prompt %}}{3}{{% endif %}}"
)
_EACH = (
    "{0}{{% for m in messages %}}{1}{{% endfor %}}{{% if add_generation_prompt %}}{2}{{% endif %}}"
)
_FIRST = "{% if loop.first and system %}"


def _turns(system: str, user: str, assistant: str, opening: str) -> str:
    """A template of a system text, then turns of user and assistant."""
    return _TURNS.format(system, user, assistant, opening)


WELL_KNOWN = {
    "chatml": _EACH.format(
        "", "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", "<|im_start|>assistant\n"
    ),
    "llama2": _turns(
        "",
        "{{ bos_token }}[INST] " + _FIRST + "<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}"
        "{{ m.content }} [/INST]",
        " {{ m.content }} {{ eos_token }}",
        "",
    ),
    "llama3": _EACH.format(
        "{{ bos_token }}",
        "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": _turns(
        "{{ bos_token }}",
        "[INST] " + _FIRST + "{{ system }}\n\n{% endif %}{{ m.content }} [/INST]",
        " {{ m.content }}{{ eos_token }}",
        "",
    ),
    "gemma": _turns(
        "{{ bos_token }}",
        "<start_of_turn>user\n" + _FIRST + "{{ system }}\n\n{% endif %}"
        "{{ m.content | trim }}<end_of_turn>\n",
        "<start_of_turn>model\n{{ m.content | trim }}<end_of_turn>\n",
        "<start_of_turn>model\n",
    ),
    "phi3": _EACH.format("", "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n", "<|assistant|>\n"),
    "zephyr": _EACH.format(
        "", "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n", "<|assistant|>\n"
    ),
    "vicuna": _turns(
        "{{ bos_token }}{% if system %}{{ system }} {% endif %}",
        "USER: {{ m.content }} ",
        "ASSISTANT: {{ m.content }}{{ eos_token }}",
        "ASSISTANT:",
    ),
}
"""Jinja sources by name, for ``chat(template="chatml")``."""
