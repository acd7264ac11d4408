"""Calls of tools: every real template's are read back, whole and letter by letter."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from spelled import call as spelled
from spelled import written

from tinyllm.chat import tools
from tinyllm.chat.forms import FORMS, THINK, Form
from tinyllm.chat.known import WELL_KNOWN
from tinyllm.chat.render import render
from tinyllm.chat.tools import Habits, Reader, for_template, functions_of, habits_of
from tinyllm.errors import ArgumentError

TEMPLATES = {
    "hermes": ["NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B",
               "Qwen-QwQ-32B", "ibm-granite-granite-4.0", "MiMo-VL", "Reka-Edge", "Bielik-11B-v3.0-Instruct"],
    "llama": ["meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.2-3B-Instruct",
              "meta-llama-Llama-3.3-70B-Instruct"],
    "mistral list": ["mistralai-Mistral-Nemo-Instruct-2407"],
    "mistral ids": ["Mistral-Small-3.2-24B-Instruct-2506"],
    "mistral": ["unsloth-mistral-Devstral-Small-2507", "mistralai-Ministral-3-14B-Reasoning-2512"],
    "gemma": ["google-gemma-4-31B-it", "google-gemma-4-31B-it-interleaved"],
    "deepseek r1": ["deepseek-ai-DeepSeek-R1-Distill-Qwen-32B"],
    "deepseek v3.1": ["deepseek-ai-DeepSeek-V3.1"],
    "deepseek v3.2": ["deepseek-ai-DeepSeek-V3.2"],
    "deepseek v4": ["deepseek-ai-DeepSeek-V4", "deepseek-ai-DeepSeek-V4-Flash-0731"],
    "command r": ["CohereForAI-c4ai-command-r7b-12-2024-tool_use", "Cohere2MoE"],
    "glm": ["GLM-4.6", "GLM-4.7-Flash", "Spark2.5", "inclusionai-ling-3.0-flash", "poolside-Laguna-XS.2"],
    "qwen coder": ["Qwen3-Coder", "Qwen3.5-4B", "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "StepFun3.5-Flash"],
    "seed": ["ByteDance-Seed-OSS"],
    "minimax": ["MiniMax-M2"],
    "minimax m1": ["MiniMax-M1"],
    "minicpm": ["openbmb-MiniCPM5-1B"],
    "harmony": ["openai-gpt-oss-120b"],
    "functionary v3.1": ["meetkai-functionary-medium-v3.1"],
    "functionary v3.2": ["meetkai-functionary-medium-v3.2"],
    "kimi": ["moonshotai-Kimi-K2"],
    "nemotron": ["NVIDIA-Nemotron-Nano-v2"],
    "apriel": ["unsloth-Apriel-1.5", "Apriel-1.6-15b-Thinker-fixed"],
    "apertus": ["Apertus-8B-Instruct"],
    "solar": ["upstage-Solar-Open-100B"],
}  # fmt: skip
ROWS = [(form, name) for form, names in TEMPLATES.items() for name in names]
NAMED = {  # templates that render no calls, or refuse the probe, and name a form's marks
    "granite": "ibm-granite-granite-3.3-2B-Instruct",
    "command r+": "CohereForAI-c4ai-command-r-plus-tool_use",
    "firefunction": "fireworks-ai-llama-3-firefunction-v2",
}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Tells something.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Where."},
                    "days": {"type": "integer", "description": "How many."},
                    "tags": {"type": "array", "items": {"type": "string"}, "description": "Any."},
                },
                "required": ["city", "days"],
            },
        },
    }
    for name in ("get_weather", "get-news")
]
QUESTION = {"role": "user", "content": "What is new?"}
CALLS = [
    ("get_weather", {"city": 'São "Paulo", 12', "days": 3}),
    ("get-news", {"city": "007", "days": -1, "tags": ["a b", "{c}"]}),
]


def source(data: Path, name: str) -> str:
    return (data / "chat_templates" / "templates" / f"{name}.jinja").read_text("utf-8")


@cache
def habits(template: str) -> Habits:
    return habits_of(template)


def message(calls: list[tuple[str, dict[str, Any]]], **more: Any) -> dict[str, Any]:
    """An assistant's message as OpenAI's API has it."""
    made = [
        {
            "id": f"call0000{i}",
            "type": "function",
            "function": {"name": n, "arguments": json.dumps(a)},
        }
        for i, (n, a) in enumerate(calls)
    ]
    return {"role": "assistant", "content": "", "tool_calls": made, **more}


def rendered(template: str, said: dict[str, Any]) -> str:
    """What a template writes behind the question."""
    conversation = for_template([QUESTION, said], habits(template))
    text = render(template, conversation, tools=TOOLS, bos_token="<s>", eos_token="</s>",
                  add_generation_prompt=False)  # fmt: skip
    return text[text.rfind(QUESTION["content"]) + len(QUESTION["content"]) :]


def read(kept: Habits, text: str, size: int = 0, **options: Any) -> Reader:
    """Read a text in pieces of a size; the deltas add up to the message."""
    reader = Reader(kept, functions_of(TOOLS), tells_parts=True, **options)
    pieces = [text[i : i + size] for i in range(0, len(text), size)] if size else [text]
    deltas = [d for piece in pieces for d in reader.feed(piece)] + reader.finish()
    assert "".join(d.content for d in deltas) == "".join(reader.content)
    assert "".join(d.reasoning for d in deltas) == "".join(reader.reasoning)
    assert [d.call for d in deltas if d.call] == reader.calls
    for i, call in enumerate(reader.calls):
        parts = [d.part for d in deltas if d.part and d.part.index == i]
        if parts:
            assert (parts[0].id, parts[0].name) == (call["id"], call["function"]["name"])
            assert "".join(p.arguments for p in parts) == call["function"]["arguments"]
            assert not any(p.id or p.name for p in parts[1:])
    return reader


def calls_of(reader: Reader) -> list[tuple[str, Any]]:
    return [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in reader.calls]


@pytest.mark.parametrize(("form", "name"), ROWS, ids=[n for _, n in ROWS])
def test_calls_of_a_template_are_read_back(form: str, name: str, data: Path) -> None:
    template = source(data, name)
    kept = habits(template)
    assert kept.form is not None
    assert kept.form.name == form
    for calls in ([CALLS[0]], [CALLS[1]], CALLS)[: 2 if kept.form.one else 3]:
        text = rendered(template, message(calls))
        if kept.form.alone:
            text = text[text.index("{") :].removesuffix("<|eot_id|>")
        for size in (0, 1, 7):
            reader = read(kept, text, size)
            assert calls_of(reader) == calls, size
            assert len({c["id"] for c in reader.calls}) == len(calls)


@pytest.mark.parametrize(("form", "name"), NAMED.items())
def test_marks_that_a_template_names_are_enough(form: str, name: str, data: Path) -> None:
    kept = habits(source(data, name))
    assert kept.form is not None
    assert kept.form.name == form


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_every_row_has_a_template(form: Form) -> None:
    assert form.name in {*TEMPLATES, *NAMED}


@pytest.mark.parametrize("name", ["google-gemma-2-2b-it", "microsoft-Phi-3.5-mini-instruct"])
def test_a_template_without_calls_has_no_form(name: str, data: Path) -> None:
    assert habits(source(data, name)).form is None


@pytest.mark.parametrize("name", WELL_KNOWN)
def test_the_well_known_templates_have_no_form(name: str) -> None:
    assert habits(WELL_KNOWN[name]).form is None


@pytest.mark.parametrize("size", [0, 1, 5])
@pytest.mark.parametrize("form", [f for f in FORMS if not f.alone], ids=lambda f: f.name)
def test_reasoning_and_content_stand_before_calls(form: Form, size: int) -> None:
    text = written(form, "get_weather", {"city": "Rome", "days": 2})
    reader = read(Habits(form), "<think>\nHm < 3.\n</think>\n\nLet me see.\n" + text, size)
    assert calls_of(reader) == [("get_weather", {"city": "Rome", "days": 2})]
    assert reader.message["reasoning"] == "Hm < 3."
    assert reader.message["content"] == "Let me see."


@pytest.mark.parametrize("size", [0, 1])
def test_an_answer_of_harmony_is_told_apart_by_its_channels(size: int) -> None:
    form = next(f for f in FORMS if f.name == "harmony")
    kept = Habits(form, habits_of("<|channel|>analysis<|message|>").thinking)
    said = read(kept, "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant"
                "<|channel|>final<|message|>Four.", size).message  # fmt: skip
    assert said == {"role": "assistant", "content": "Four.", "reasoning": "Easy."}
    called = read(kept, "<|channel|>analysis<|message|>Ask.<|end|><|start|>assistant<|channel|>commentary "
                  'to=functions.get-news <|constrain|>json<|message|>{"city": "Bern"}', size)  # fmt: skip
    assert calls_of(called) == [("get-news", {"city": "Bern"})]
    assert called.message["content"] == ""


@pytest.mark.parametrize("size", [0, 1])
def test_reasoning_that_the_prompt_opened_is_reasoning(size: int) -> None:
    said = read(Habits(None), "One.\n</think>\n\nTwo.", size, thinks=True).message
    assert said == {"role": "assistant", "content": "Two.", "reasoning": "One."}
    assert read(Habits(None), "One.", size, thinks=True).message["reasoning"] == "One."


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize(
    "text",
    ["", "a < b", "<tool", "<tool_call>", '<tool_call>\n{"name": "f", "argum', "  two\n", "<tool_call>no"],
)  # fmt: skip
def test_what_is_no_call_is_content(text: str, size: int) -> None:
    said = read(Habits(FORMS[0]), text, size).message
    assert said == {"role": "assistant", "content": text}


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_no_part_of_a_call_that_was_cut_off_is_content(form: Form) -> None:
    one = spelled(form, "get_weather", {"city": "Rome", "days": 2})
    two = (
        one
        if form.one
        else one + spelled(form, "get_weather", {"city": "Oslo", "days": 1}, first=False)
    )
    for text in {one, two}:
        for n in range(1, len(text)):
            reader = Reader(Habits(form), functions_of(TOOLS))
            reader.feed("" if form.alone else "Let me see. ")
            reader.feed(text[:n])
            reader.finish(cut=True)
            said = "".join(reader.content).strip()
            assert said == ("" if form.alone else "Let me see."), text[:n]
            assert len(reader.calls) >= (n > len(one)), text[:n]


def test_a_call_is_told_in_parts_and_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = json.dumps({"city": 'a "}] \\ b' * 50, "days": [{"n": 1}] * 20})
    parsed: list[int] = []
    parse = tools.parse_call

    def counted(*args: Any) -> Any:
        parsed.append(1)
        return parse(*args)

    monkeypatch.setattr(tools, "parse_call", counted)
    for form in FORMS:
        parsed.clear()
        if form.pair or (form.is_object and "$id" in form.call):
            continue
        text = form.first + form.call + form.last
        text = text.replace("$name", "get-news").replace("$id", "abcdefghi")
        text = text.replace("$args", arguments)
        reader, parts = Reader(Habits(form), tells_parts=True), []
        for c in text:
            parts += [d.part for d in reader.feed(c) if d.part]
        reader.finish()
        assert [p.name for p in parts if p.name] == ["get-news"], form.name
        assert "".join(p.arguments for p in parts) == arguments
        assert len(parts) > len(arguments) // 2
        assert len(parsed) < 40, form.name
        assert not any(d.part for d in Reader(Habits(form)).feed(text))


def test_content_is_shown_at_once_and_marks_are_held() -> None:
    reader = Reader(Habits(FORMS[0], THINK))
    assert [d.content for d in reader.feed("Hello <")] == ["Hello "]
    assert [d.content for d in reader.feed("b>")] == ["<b>"]


@pytest.mark.parametrize("tool", ["f", {}, {"function": {}}, {"name": "a b"}, {"name": 3}, 7])
def test_what_is_no_tool_is_refused(tool: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^tools has .*; expected"):
        functions_of([tool])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([{"name": "f"}, {"name": "g"}, {"name": "f"}], "tools has two functions 'f'"),
        ([{"name": "f", "parameters": "x"}], "the parameters of f are 'x'; expected a JSON schema"),
        ([{"name": "f", "parameters": []}], "the parameters of f are"),
    ],
)
def test_wrong_functions_are_refused(given: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        functions_of(given)


def test_arguments_that_are_no_json_are_refused(data: Path) -> None:
    said = message([CALLS[0]])
    said["tool_calls"][0]["function"]["arguments"] = "{"
    with pytest.raises(ArgumentError, match="expected JSON"):
        for_template([said], Habits(FORMS[0]))
