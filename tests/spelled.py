"""Calls of tools, spelled as a row of forms says: what a model would write."""

from __future__ import annotations

import json
from typing import Any

from tinyllm.chat.forms import Form

# the bundled model's template, with tools
HERMES = """
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<|user|><tool_response>\n' + m.content + '\n</tool_response>' + eos_token }}
{%- else %}{{ ('<|' + m.role + '|>') if m.role != 'system' else '' }}{{ m.content }}
{%- for call in m.tool_calls or [] %}{{ '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- (call.function.arguments if call.function.arguments is string else call.function.arguments | tojson)
    + '}\n</tool_call>' }}{% endfor %}{{ eos_token }}
{%- endif %}{%- endfor %}
{%- if tools %}{{ '<tools>' }}{% for t in tools %}{{ t.function.name }} {% endfor %}{{ '</tools>' }}{% endif %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


def call(form: Form, name: str, arguments: dict[str, Any], first: bool = True) -> str:
    """One call, behind what begins the first one or what parts it from the one before."""
    text = json.dumps(arguments)
    if form.pair:
        pairs = [
            form.pair.replace("$key", k).replace("$string", str(isinstance(v, str)).lower())
            .replace("$value", f"{form.quote}{v}{form.quote}" if isinstance(v, str) else json.dumps(v))
            for k, v in arguments.items()
        ]  # fmt: skip
        text = form.join.join(pairs)
    made = form.call.replace("$name", name).replace("$id", "abcdefgh9").replace("$args", text)
    return (form.first if first else form.between) + made


def written(form: Form, name: str, arguments: dict[str, Any]) -> str:
    """One call and what ends the calls."""
    return call(form, name, arguments) + form.last
