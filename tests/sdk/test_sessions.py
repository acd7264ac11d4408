# ruff: noqa: E501
"""Chat sessions: templates, history, what is read again, files."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tinyllm.chat.known import WELL_KNOWN
from tinyllm.errors import StateError, TemplateError
from tinyllm.sdk import GPT4All
from tinyllm.sdk.templates import FormatTemplate, JinjaTemplate, from_percent, template_of

STORY = "{% for m in messages %}{{ m.content }}{{ ' ' }}{% endfor %}"
GREEDY: dict[str, Any] = {"max_tokens": 12, "temp": 0}
ONE, TWO = "Once upon a time", "Then the dog"


@pytest.fixture
def read(llm: GPT4All, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each step computed."""
    net, counts = llm.model.model.network, []
    forward = net.forward

    def noted(segments: Any, *how: Any) -> Any:
        counts.extend(n for _, n, _ in segments)
        return forward(segments, *how)

    monkeypatch.setattr(net, "forward", noted)
    return counts


def whole(llm: GPT4All, text: str) -> str:
    """The answer to a conversation's text without any session."""
    return llm.generate(text, **GREEDY)


def test_a_conversation_is_what_its_template_renders(llm: GPT4All) -> None:
    with llm.chat_session(chat_template=STORY) as same:
        assert same is llm
        first = llm.generate(ONE, **GREEDY)
        second = llm.generate(TWO, **GREEDY)
        history = llm.current_chat_session
        assert [m["role"] for m in history] == ["user", "assistant"] * 2
        assert [m["content"] for m in history] == [ONE, first, TWO, second]
        assert history is llm.current_chat_session
    assert llm.current_chat_session is None
    assert first == whole(llm, f"{ONE} ")
    assert second == whole(llm, f"{ONE} {first} {TWO} ")


def test_what_was_read_is_not_read_again(llm: GPT4All, read: list[int]) -> None:
    with llm.chat_session(chat_template=STORY):
        llm.generate(ONE, **GREEDY)
        n_first = sum(read)
        read.clear()
        llm.generate(TWO, **GREEDY)
        said = " ".join(m["content"] for m in llm.current_chat_session[:3])
        n_prompt = llm.model.count_prompt_tokens(said)
    assert read[0] < n_prompt - n_first + 6


def test_the_system_message_comes_first(llm: GPT4All) -> None:
    with llm.chat_session("Be brief.", STORY):
        llm.generate(ONE, **GREEDY)
        assert llm.current_chat_session[0] == {"role": "system", "content": "Be brief."}
    with llm.chat_session(system_prompt="Be brief.", prompt_template="{0}"):
        assert llm.current_chat_session == [{"role": "system", "content": "Be brief."}]
    with llm.chat_session(False, STORY):
        assert llm.current_chat_session == []


def test_changed_history_is_read_again_from_the_change(llm: GPT4All, read: list[int]) -> None:
    with llm.chat_session(chat_template=STORY):
        llm.generate("The big red ball was in the park and", **GREEDY)
        answer = llm.generate(TWO, **GREEDY)
        history = [dict(m) for m in llm.current_chat_session]
        llm.current_chat_session = history[:2]
        read.clear()
        assert llm.generate(TWO, **GREEDY) == answer
        assert read[0] < 12
        llm.current_chat_session[0]["content"] = ONE
        llm.current_chat_session[2:] = []
        texts = [m["content"] for m in llm.current_chat_session]
        again = llm.generate(TWO, **GREEDY)
    assert again == whole(llm, f"{texts[0]} {texts[1]} {TWO} ")


def test_history_may_be_set_only_inside(llm: GPT4All) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        llm.current_chat_session = []
    assert (
        str(caught.value)
        == "current_chat_session may only be set when there is an active chat session"
    )


# ---- templates


def test_no_template_anywhere(llm: GPT4All) -> None:
    with pytest.raises(ValueError) as caught, llm.chat_session():  # noqa: PT011
        pass
    assert (
        str(caught.value)
        == "For sideloaded models or with allow_download=False, you must specify a chat template."
    )
    assert llm.current_chat_session is None


@pytest.fixture
def config(llm: GPT4All) -> Iterator[dict[str, Any]]:
    """The model's config, which a test may change."""
    before = dict(llm.config)
    yield llm.config
    llm.config.clear()
    llm.config.update(before)


def test_the_lists_template_and_system_message_are_the_default(
    llm: GPT4All, config: dict[str, Any]
) -> None:
    config.update(name="Stories", chatTemplate=STORY, systemMessage="Be kind.")
    with llm.chat_session():
        llm.generate(ONE, **GREEDY)
        assert llm.current_chat_session[0]["content"] == "Be kind."
    config.update(chatTemplate=None)
    with (
        pytest.raises(ValueError, match=r"^The model 'Stories' does not support chat\.$"),
        llm.chat_session(),
    ):
        pass
    config.update(promptTemplate=from_percent("### {Q}: %1\n### A: %2 end"))
    with llm.chat_session():
        assert llm._current_prompt_template == "### {{Q}}: {0}\n### A: {1} end"


def test_the_files_template_is_used(llm: GPT4All, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llm.model.model
    monkeypatch.setattr(model, "metadata", {**model.metadata, "tokenizer.chat_template": STORY})
    with llm.chat_session():
        first = llm.generate(ONE, **GREEDY)
    assert first == whole(llm, f"{ONE} ")


def test_a_listed_template_that_shows_no_message_gives_way_to_the_files(
    llm: GPT4All, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config.update(chatTemplate="{% for m in loop_messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match="never shows the message"):
        llm.chat_session().__enter__()
    model = llm.model.model
    monkeypatch.setattr(model, "metadata", {**model.metadata, "tokenizer.chat_template": STORY})
    with llm.chat_session():
        first = llm.generate(ONE, **GREEDY)
    assert first == whole(llm, f"{ONE} ")


def test_a_malformed_template_is_refused_at_once(llm: GPT4All) -> None:
    with pytest.raises(TemplateError, match="line 1"), llm.chat_session(chat_template="{% for %}"):
        pass


def test_a_message_that_the_template_refuses_leaves_the_history(llm: GPT4All) -> None:
    template = "{% if messages | length > 2 %}{{ raise_exception('enough') }}{% endif %}" + STORY
    with llm.chat_session(chat_template=template):
        llm.generate(ONE, **GREEDY)
        before = list(llm.current_chat_session)
        with pytest.raises(TemplateError, match="enough"):
            llm.generate(TWO, **GREEDY)
        assert llm.current_chat_session == before


def test_a_message_that_is_too_long_leaves_the_history(models: Path) -> None:
    with (
        GPT4All("stories260K", model_path=models, allow_download=False, n_ctx=64) as small,
        small.chat_session(chat_template=STORY),
    ):
        with pytest.raises(
            ValueError, match=r"Your message was too long and could not be processed \(\d+ > 60\)\."
        ):
            small.generate("a " * 100)
        assert small.current_chat_session == []
        for _ in range(6):  # the conversation outgrows the context: its beginning is forgotten
            assert small.generate(TWO, **GREEDY)
        assert len(small.current_chat_session) == 12


def test_a_conversation_that_refuses_to_be_cut_short(llm: GPT4All) -> None:
    template = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + STORY
    )
    with llm.chat_session("Hi.", template):
        assert llm.generate(ONE, **GREEDY)


def test_format_strings_of_the_second_version(llm: GPT4All) -> None:
    with llm.chat_session("Sys ", prompt_template="U: {0} A: {1} end\n"):
        first = llm.generate(ONE, **GREEDY)
        second = llm.generate(TWO, **GREEDY)
    assert first == whole(llm, f"Sys U: {ONE} A: ")
    assert second == whole(llm, f"Sys U: {ONE} A: {first} end\nU: {TWO} A: ")


def test_a_blank_line_follows_an_answer_that_no_format_string_ends() -> None:
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert template_of("[{0}]").render(turn * 2, {}) == "[q]a\n\n[q]a\n\n"


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("{0}", FormatTemplate),
        ("a {0} b {1}", FormatTemplate),
        ("USER: {}\n", FormatTemplate),
        ("{{ messages }} {0}", JinjaTemplate),
        ("{% for m in messages %}{{ m.content }}{% endfor %} {0}", JinjaTemplate),
        ('{{"q": "{0}"}}', FormatTemplate),
        ("{{0}} {0}", FormatTemplate),
        *((name, JinjaTemplate) for name in WELL_KNOWN),
    ],
)
def test_kinds_of_templates(source: str, kind: type) -> None:
    assert isinstance(template_of(source), kind)


@pytest.mark.parametrize(
    "source",
    [
        "{x}",
        "plain text",
        "{# {0} #}",
        "{{0}}",
        "USER: {1} BOT: {0}",
        "{0} {0}",
        "{0}{1}{1}",
        "{1}",
        "{{ bos_token }}",
        "{% for m in messages %}{{ m.role }}{% endfor %}",
        "{{ messages[0].contents }}",
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}",
    ],
)
def test_a_template_that_never_shows_the_message_is_refused(source: str, llm: GPT4All) -> None:
    before = llm.current_chat_session
    with pytest.raises(ValueError, match=r"expected (Jinja that prints it|\{0\} once)"):
        llm.chat_session("Be kind.", source).__enter__()
    assert llm.current_chat_session is before is None


@pytest.mark.parametrize(
    "source",
    [
        "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ messages[-1].content }}",
        "{{ messages[-1].content | upper | trim }}",
        "{{ messages | tojson }}",
        "{0!s:>40} {1}",
    ],
)
def test_a_template_that_shows_it_in_its_own_way_is_taken(source: str, llm: GPT4All) -> None:
    with llm.chat_session("Be kind.", source):
        assert llm.generate(ONE, **GREEDY)


@pytest.mark.parametrize(
    "system",
    [
        "<|im_start|>system\nBe kind.<|im_end|>\n",
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>",
        "### System:\nBe kind.\n",
        "<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>",
    ],
)
def test_a_system_message_in_a_templates_markup_is_warned_of(system: str, llm: GPT4All) -> None:
    with (
        pytest.warns(UserWarning, match="is not plain text") as caught,
        llm.chat_session(system, STORY),
    ):
        assert llm.current_chat_session[0]["content"] == system
    assert caught[0].filename == __file__
    with llm.chat_session(system, "<|im_start|>user\n{0}"):  # a format string adds nothing to it
        pass
    with llm.chat_session("Use <b>, [brackets] and a | b < c.", STORY):
        pass


@pytest.mark.parametrize("n_ctx", [64, 100])
def test_what_is_longer_than_the_context_is_an_error_that_says_by_how_much(
    n_ctx: int, models: Path
) -> None:
    with GPT4All("stories260K", model_path=models, allow_download=False, n_ctx=n_ctx) as small:
        n = small.model.count_prompt_tokens("a " * 200 + "Hi ")
        too_long = f"has {n} tokens .* room for {n_ctx - 4}: {n - n_ctx + 4} too many"
        with small.chat_session("a " * 200, "{0}"):
            for streaming in (False, True):
                with pytest.raises(ValueError, match=too_long):
                    small.generate("Hi ", streaming=streaming)
            assert len(small.current_chat_session) == 1
        with small.chat_session(chat_template=STORY):
            small.generate(ONE, **GREEDY)
            before = [{"role": "user", "content": "a " * 99}] * 2
            small.current_chat_session = list(before)
            with pytest.raises(ValueError, match=r"too many. Shorten them"):
                small.generate("Hi", **GREEDY)
            assert small.current_chat_session == before
            small.current_chat_session[0]["content"] = "a"
            small.current_chat_session.pop()
            assert small.generate("Hi", **GREEDY)


def test_losing_the_system_message_is_warned_of_once(models: Path) -> None:
    with GPT4All("stories260K", model_path=models, allow_download=False, n_ctx=64) as small:
        with small.chat_session("Be kind.", STORY), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(6):
                small.generate(TWO, **GREEDY)
        assert ["the system message included" in str(w.message) for w in caught] == [True]
        with (  # an answer alone can push it out
            small.chat_session("Be kind.", STORY),
            pytest.warns(UserWarning, match="outgrown the context of 64 tokens"),
        ):
            small.generate(ONE, max_tokens=100, temp=0)


def test_percent_placeholders_are_refused_as_before(llm: GPT4All) -> None:
    with pytest.raises(ValueError) as caught, llm.chat_session(prompt_template="U: %1 A: "):  # noqa: PT011
        pass
    assert str(caught.value) == (
        "Prompt template containing a literal '%1' is not supported. For a prompt placeholder, please use '{0}' instead."
    )
    assert from_percent("%1 and %2") == "{0} and {1}"


@pytest.mark.parametrize(
    ("source", "error"), [("{0} {2}", IndexError), ("{0} {x}", KeyError), ("{0} {", ValueError)]
)
def test_wrong_format_strings_fail_as_before(
    source: str, error: type[Exception], llm: GPT4All
) -> None:
    with llm.chat_session(prompt_template=source):
        with pytest.raises(error):
            llm.generate(ONE)
        assert llm.current_chat_session == []


def test_a_subclass_that_formats_prompts_itself(models: Path) -> None:
    class Old(GPT4All):
        def _format_chat_prompt_template(
            self, messages, default_prompt_header="", default_prompt_footer=""
        ):
            return default_prompt_header + "".join(f"<{m['content']}>" for m in messages)

    with Old("stories260K", model_path=models, allow_download=False) as old:
        session = old.chat_session("Sys ")
        with pytest.warns(DeprecationWarning, match="_format_chat_prompt_template is deprecated"):
            session.__enter__()
        first = old.generate(ONE, **GREEDY)
        session.__exit__(None, None, None)
        assert first == whole(old, f"Sys <{ONE}>")


def test_names_of_the_second_version(llm: GPT4All) -> None:
    llm._current_prompt_template = "U: {0} A: "
    assert (
        llm._format_chat_prompt_template(
            [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}], "H", "F"
        )
        == "H\n\nU: u A: a\n\n\nF"
    )
    llm._current_prompt_template = "U: {0} A: {1} end"  # as the list has them
    assert llm._format_chat_prompt_template([{"role": "user", "content": "u"}]) == "U: u A: "
    llm._current_prompt_template = "U: {0} A: "
    llm._history = [{"role": "system", "content": "Sys "}]
    answer = llm.generate(ONE, **GREEDY)
    assert len(llm._history) == 3
    llm._history = None
    assert answer == whole(llm, f"Sys U: {ONE} A: ")
    llm._current_prompt_template = "{0}"
    assert llm.current_chat_session is None


# ---- interruptions


def test_a_stream_adds_its_answer_when_it_ends(llm: GPT4All) -> None:
    with llm.chat_session(chat_template=STORY):
        text = "".join(llm.generate(ONE, streaming=True, **GREEDY))
        assert llm.current_chat_session[-1] == {"role": "assistant", "content": text}


def test_a_closed_stream_leaves_what_was_answered(llm: GPT4All) -> None:
    with llm.chat_session(chat_template=STORY):
        stream = llm.generate(ONE, streaming=True, **GREEDY)
        begun = next(stream) + next(stream)
        stream.close()
        assert llm.current_chat_session[-1] == {"role": "assistant", "content": begun}
        second = llm.generate(TWO, **GREEDY)
    assert second == whole(llm, f"{ONE} {begun} {TWO} ")


def test_a_later_message_ends_the_open_stream_which_says_so(llm: GPT4All) -> None:
    with llm.chat_session(chat_template=STORY):
        stream = llm.generate(ONE, streaming=True, **GREEDY)
        begun = next(stream)
        llm.generate(TWO, **GREEDY)
        with pytest.raises(RuntimeError, match="ended by a later message of its chat session"):
            next(stream)
        assert [m["content"] for m in llm.current_chat_session[:3]] == [ONE, begun, TWO]


def test_a_stream_that_nobody_reads_was_not_said(llm: GPT4All) -> None:
    with llm.chat_session(chat_template=STORY):
        llm.generate(ONE, streaming=True, **GREEDY)
        llm.generate(TWO, **GREEDY)
        assert [m["content"] for m in llm.current_chat_session[:1]] == [TWO]


def test_answering_inside_of_an_answer_is_refused(llm: GPT4All) -> None:
    with llm.chat_session(chat_template=STORY):
        with pytest.raises(RuntimeError, match="answering already"):
            llm.generate(ONE, callback=lambda i, s: llm.generate(TWO), **GREEDY)
        assert [m["role"] for m in llm.current_chat_session] == ["user", "assistant"]


def test_an_error_in_the_callback_keeps_what_was_said(llm: GPT4All) -> None:
    def fail(token_id: int, text: str) -> bool:
        raise ZeroDivisionError

    with llm.chat_session(chat_template=STORY):
        with pytest.raises(ZeroDivisionError):
            llm.generate(ONE, callback=fail, **GREEDY)
        assert len(llm.current_chat_session) == 2
        assert llm.generate(TWO, **GREEDY)


def test_sessions_may_nest(llm: GPT4All) -> None:
    with llm.chat_session("outer", STORY):
        with llm.chat_session("inner", STORY):
            assert llm.current_chat_session[0]["content"] == "inner"
        assert llm.current_chat_session[0]["content"] == "outer"


def test_logprobs_in_a_session(llm: GPT4All) -> None:
    with llm.chat_session(chat_template=STORY):
        completion = llm.generate(ONE, logprobs=1, **GREEDY)
        assert llm.current_chat_session[-1]["content"] == completion.text
        with pytest.raises(ValueError, match="logprobs come with the whole answer"):
            llm.generate(ONE, logprobs=1, streaming=True)
        with pytest.raises(ValueError, match=r"^temp=-1;"):
            llm.generate(ONE, temp=-1)
        assert len(llm.current_chat_session) == 2


# ---- files


def test_a_saved_session_goes_on_elsewhere(
    llm: GPT4All, models: Path, tmp_path: Path, read: list[int]
) -> None:
    path = tmp_path / "chat.session"
    with llm.chat_session(chat_template=STORY):
        llm.generate("The big red ball was in the park and", **GREEDY)
        llm.save_session(path)
        history = list(llm.current_chat_session)
        want = llm.generate(TWO, **GREEDY)
    assert [p.name for p in tmp_path.iterdir()] == ["chat.session"]
    with llm.chat_session(chat_template=STORY):
        llm.load_session(path)
        assert llm.current_chat_session == history
        read.clear()
        assert llm.generate(TWO, **GREEDY) == want
        assert read[0] < 12


def test_sessions_are_saved_inside_only(llm: GPT4All, tmp_path: Path) -> None:
    for use in (llm.save_session, llm.load_session):
        with pytest.raises(ValueError, match="no active chat session"):
            use(tmp_path / "x")


def _zip(path: Path, compression: int = zipfile.ZIP_STORED, **entries: str) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, text in entries.items():
            archive.writestr(name.replace("_", "."), text)


@pytest.mark.parametrize(
    "entries",
    [
        None,
        {},
        {"history_json": "{"},
        {"history_json": '{"a": 1}'},
        {"history_json": '[{"role": 1}]'},
        {"history_json": "[]", "state_npz": "no state"},
        {"history_json": "[]", "compression": zipfile.ZIP_DEFLATED},
    ],
)
def test_damaged_sessions_are_refused(
    entries: dict[str, Any] | None, llm: GPT4All, tmp_path: Path
) -> None:
    path = tmp_path / "x.session"
    if entries is None:
        path.write_bytes(b"no zip")
    else:
        _zip(path, **entries)
    with llm.chat_session("Sys", STORY):
        with pytest.raises(StateError, match=r"x\.session|state\.npz"):
            llm.load_session(path)
        assert llm.current_chat_session == [{"role": "system", "content": "Sys"}]


def test_no_warning_without_a_reason(llm: GPT4All) -> None:
    with warnings.catch_warnings(record=True) as caught, llm.chat_session(chat_template=STORY):
        llm.generate(ONE, **GREEDY)
    assert not caught


@pytest.mark.parametrize("history", [None, 5, "x", {"role": "user"}, [None], ["x"], [[]]])
def test_what_is_no_history_is_told(history: Any, llm: GPT4All) -> None:
    with llm.chat_session(chat_template="chatml"):
        before = list(llm.current_chat_session or [])
        with pytest.raises(ValueError, match=r"current_chat_session=.*expected a list of messages"):
            llm.current_chat_session = history
        assert llm.current_chat_session == before
