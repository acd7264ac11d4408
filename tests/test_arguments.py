"""What callers hand to a model: prompts, numbers, templates; wrong ones are told, whatever their type."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import numpy as np
import pytest

import tinyllm
from tinyllm import gguf
from tinyllm.errors import ArgumentError, ContextOverflow, TemplateError, TinyLLMError
from tinyllm.loading import BUNDLED

HELLO = [{"role": "user", "content": "Hello there"}]
YES = {"type": "predicate", "instructions": "It is a greeting."}


@pytest.fixture(scope="module")
def model() -> Iterator[tinyllm.Model]:
    with tinyllm.load(device="reference") as m:
        yield m


# ---- prompts


@pytest.mark.parametrize(
    "prompt",
    [b"Once", bytearray(b"x"), None, 5, 1.5, {"a": 1}, {1, 2}, [b"x"], [None], [1, "x"], ["x", 1],
     [1.5], [True], [["x"]], [[1], [1.5]], np.array([1.5]), np.array(3), object()],
)  # fmt: skip
def test_what_is_no_prompt_is_told(model, prompt) -> None:
    with pytest.raises(ArgumentError, match="prompt"):
        model.generate(prompt, max_tokens=1)


@pytest.mark.parametrize(
    "prompt", [[3, 4], (3, 4), np.array([3, 4]), np.array([3, 4], np.uint8), range(3, 5)]
)
def test_ids_are_any_sequence_of_whole_numbers(model, prompt) -> None:
    assert model.generate(prompt, max_tokens=1).prompt_ids == [3, 4]


def test_no_prompts_are_no_completions(model) -> None:
    assert model.generate([[3], "Once"], max_tokens=1, seed=1)[0].prompt_ids == [3]


@pytest.mark.parametrize("ids", [[999_999], [-1], [3, 1 << 40]])
def test_ids_outside_of_the_vocabulary_are_told(model, ids) -> None:
    for call in (
        lambda: model.generate(ids, max_tokens=1),
        lambda: model.logits(ids),
        lambda: model.embed_ids(ids),
    ):
        with pytest.raises(ArgumentError, match=r"token ids .* expected 0 to \d+"):
            call()


WRONG = [None, 5, 1.5, "7", b"x", bytearray(b"x"), True, [True], [None], ["x"], [b"x"], [1.5], {1: 2}, {1, 2},
         np.array(3), np.array([1.5]), np.array(["a"]), object()]  # fmt: skip


@pytest.mark.parametrize("ids", WRONG)
def test_what_is_no_list_of_ids_is_told(model, ids) -> None:
    for call in (model.logits, model.embed_ids):
        with pytest.raises(ArgumentError, match=r"ids is .*; expected the ids of tokens"):
            call(ids)


@pytest.mark.parametrize("ids", [None, 5, "7", ["x"], [1.5], [None], [b"x"], np.array(3)])
def test_what_cannot_be_decoded_is_told(model, ids) -> None:
    with pytest.raises(ArgumentError, match=r"ids is|token id"):
        model.tokenizer.decode(ids)


@pytest.mark.parametrize("texts", [None, 5, True, np.array(3), object(), b"x", [None], ["x", 5]])
def test_what_is_no_list_of_texts_is_told(model, texts) -> None:
    with pytest.raises(ArgumentError, match=r"expected a list of texts|text is expected"):
        model.embed(texts)


def test_an_encoder_says_the_same_wherever_it_is_asked_to_write(data) -> None:
    with tinyllm.load(data / "models" / "all-MiniLM-L6-v2.gguf2.f16.gguf", "reference") as m:
        for call in (lambda: m.logits([101, 102]), lambda: m.generate("x")):
            with pytest.raises(ArgumentError, match="bert reads texts and writes none; use embed"):
                call()


def test_an_end_token_is_not_added_to_a_text_that_goes_on(tmp_path, model) -> None:
    path = tmp_path / "m.gguf"
    with gguf.open(BUNDLED) as f:
        gguf.write(path, {**f.exact_metadata, "tokenizer.ggml.add_eos_token": True}, f.tensors)
    with tinyllm.load(path, "reference") as m:
        eos = m.tokenizer.eos
        assert m.tokenizer.encode("Once")[-1] == eos
        assert m.generate("Once", max_tokens=1).prompt_ids == model.tokenizer.encode("Once")
        assert eos not in m.chat(HELLO, template="chatml", max_tokens=1).prompt_ids[-1:]


# ---- numbers and names


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ({"overflow": "Shift"}, "expected one of 'error', 'shift', 'truncate'"),
        ({"overflow": None}, "expected one of"),
        ({"logprobs": -1}, "logprobs=-1"),
        ({"logprobs": "3"}, "logprobs='3'"),
        ({"logprobs": True}, "logprobs=True"),
        ({"logit_bias": {5: 1e300}}, "logit_bias"),
        ({"logit_bias": {5: float("inf")}}, "logit_bias"),
        ({"presence_penalty": -1e38}, "presence_penalty=-1e"),
        ({"frequency_penalty": 1e38}, "frequency_penalty=1e"),
        ({"stop": 5}, "stop=5"),
        ({"stop": [""]}, "stop="),
        ({"stop": b"x"}, "stop="),
        ({"max_tokens": None}, "max_tokens=None"),
        ({"seed": -1}, "seed=-1; expected an integer >= 0; None, or leaving it out, draws one"),
    ],
)
def test_a_wrong_argument_is_told(model, argument, expected) -> None:
    with pytest.raises(ArgumentError, match=expected.replace("(", r"\(")):
        model.generate("Once " * 3, **{"max_tokens": 2, **argument})


def test_none_is_no_stop_string(model) -> None:
    assert model.generate("Once", max_tokens=2, temperature=0, stop=None).ids


@pytest.mark.parametrize(
    "argument",
    [{"n_threads": "1"}, {"n_threads": 0}, {"n_threads": 1.5}, {"n_threads": True}, {"n_ctx": "8"},
     {"n_ctx": 1 << 31}, {"n_gpu_layers": "x"}, {"device": 3}],
)  # fmt: skip
def test_a_wrong_argument_of_load_is_told(argument) -> None:
    with pytest.raises(ArgumentError, match=next(iter(argument))):
        tinyllm.load(**argument)


@pytest.mark.parametrize("n", ["1", 0, -1, 1.5, True, []])
def test_a_wrong_number_of_threads_is_told_where_none_are_used(n) -> None:
    with pytest.raises(ArgumentError, match="n_threads"):
        tinyllm.load(device="reference", n_threads=n)


def test_a_number_of_threads_may_be_numpys() -> None:
    with tinyllm.load(n_threads=np.int64(1)) as m:
        assert m.generate("Once", max_tokens=1).ids


@pytest.mark.parametrize("path", [5, True, 1.5, [], {"a": 1}, object(), "", "a\0b", "\ud800", b""])
def test_what_is_no_path_is_told(model, path) -> None:
    for call in (
        tinyllm.load,
        gguf.open,
        lambda path: gguf.write(path, {}, {}),
        model.new_state(8).save,
        model.new_state(8).restore,
    ):
        with pytest.raises(ArgumentError, match="is no name of a file"):
            call(path)


@pytest.mark.parametrize("wrong", [0, 5, "", "x", [], {}, np.array([1, 2]), object()])
def test_what_is_no_state_or_tap_is_told(model, wrong) -> None:
    for name in ("state", "tap"):
        for call in (
            lambda **given: model.generate("Once", max_tokens=1, **given),
            lambda **given: model.chat(HELLO, template="chatml", max_tokens=1, **given),
            lambda **given: model.logits([3], **given),
        ):
            with pytest.raises(ArgumentError, match=f"{name} is "):
                call(**{name: wrong})


@pytest.mark.parametrize("n", [None, "1", 1.5, np.float32(1), [], -1, 9])
def test_what_cannot_be_kept_of_a_state_is_told(model, n) -> None:
    state = model.new_state(8)
    model.logits([3, 4], state)
    with pytest.raises(ArgumentError, match="cannot keep"):
        state.truncate(n)
    assert state.ids == [3, 4]
    state.truncate(np.int64(1))
    assert state.ids == [3]


def test_a_model_says_why_it_cannot_be_pickled(model) -> None:
    with pytest.raises(TypeError, match="a model cannot be pickled"):
        pickle.dumps(model)


# ---- templates


@pytest.mark.parametrize(
    "template", ["", " \n", "nonesuch", "Hello", "{{ 'Hello' }}", "{{ messages[0].role }}"]
)
def test_a_template_that_shows_no_message_is_refused(model, template) -> None:
    with pytest.raises(TemplateError, match=r"shows no message|does not show the last message"):
        model.chat(HELLO, template=template, max_tokens=1)


def test_no_pooling_is_not_the_usual_one(model) -> None:
    with pytest.raises(ArgumentError, match="pooling=''"):
        model.embed("x", "")


@pytest.mark.parametrize(
    "messages",
    [None, 5, "Hello", b"x", [], (), {"role": "user", "content": "x"}, ["x"], [None], [[]],
     np.array([1, 2])],
)  # fmt: skip
def test_what_are_no_messages_is_told(model, messages) -> None:
    with pytest.raises(ArgumentError, match=r"messages.* expected a list such as"):
        model.chat(messages, template="chatml", max_tokens=1)


@pytest.mark.parametrize(
    "content",
    [None, 5, b"x", {"a": 1}, ["x"], [{"type": "image_url"}], [{"type": "text", "text": 5}]],
)
def test_what_is_no_content_is_told(model, content) -> None:
    for call in (model.turn, model.chat, lambda *a: model.decide(a[0], [YES], "chatml")):
        with pytest.raises(
            ArgumentError, match=r"messages\[0\] has the content .*; expected a text"
        ):
            call([{"role": "user", "content": content}], "chatml")


def test_parts_of_a_content_are_one_text(model) -> None:
    parts = [{"type": "text", "text": "Hello "}, {"type": "input_text", "text": "there"}]
    told = [{"role": "user", "content": parts}]
    assert model.turn(told, "chatml").ids == model.turn(HELLO, "chatml").ids
    assert model.decide(told, [YES], "chatml").mass == model.decide(HELLO, [YES], "chatml").mass
    called = {"role": "assistant", "content": None}
    assert model.turn([*HELLO, called, *HELLO], "chatml").ids


@pytest.mark.parametrize("given", [None, 5, b"x", {"role": "user"}])
def test_what_cannot_be_asked_about_is_told(model, given) -> None:
    with pytest.raises(ArgumentError, match=r"given is .*; expected a text, or a chat's messages"):
        model.decide(given, [YES], "chatml")


def test_what_is_too_long_to_decide_is_told_with_what_helps(model) -> None:
    with pytest.raises(ContextOverflow, match="Load with a larger n_ctx, or ask about less"):
        model.decide("word " * 999, [YES], "chatml")
    with pytest.raises(ArgumentError, match=r"questions\[0\] is"):
        model.decide("x", [{"type": [], "instructions": "x"}], "chatml")


@pytest.mark.parametrize("variables", [5, 0, "x", [], ["a"], np.array([1, 2])])
def test_what_are_no_variables_is_told(model, variables) -> None:
    with pytest.raises(ArgumentError, match=r"template_vars=.*expected a mapping"):
        model.chat(HELLO, template="chatml", template_vars=variables, max_tokens=1)


@pytest.mark.parametrize("template", [5, b"x", ["x"]])
def test_a_template_is_a_text(model, template) -> None:
    with pytest.raises(TemplateError, match="a chat template is a text"):
        model.chat(HELLO, template=template, max_tokens=1)


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_an_empty_template_in_a_file_counts_as_none(empty, tmp_path) -> None:
    path = tmp_path / "m.gguf"
    with gguf.open(BUNDLED) as f:
        gguf.write(path, {**f.exact_metadata, "tokenizer.chat_template": empty}, f.tensors)
    with (
        tinyllm.load(path, "reference") as m,
        pytest.raises(TemplateError, match="has no chat template"),
    ):
        m.chat(HELLO, max_tokens=1)


def test_variables_reach_the_template(model) -> None:
    template = "{{ messages[0].content }}{% if not thinking %}[quick]{% endif %}"
    found = model.chat(HELLO, template=template, template_vars={"thinking": False}, max_tokens=1)
    assert model.tokenizer.decode(found.prompt_ids).endswith("Hello there[quick]")
    for wrong in ({"messages": []}, {"a b": 1}, {3: 4}):
        with pytest.raises(ArgumentError, match="template_vars"):
            model.chat(HELLO, template=template, template_vars=wrong)


@pytest.mark.parametrize("content", ["Hello, my", "Hello, my\n"])
def test_a_last_message_is_continued(model, content) -> None:
    messages = [*HELLO, {"role": "assistant", "content": content}]
    found = model.chat(messages, template="llama3", continue_final_message=True, max_tokens=1)
    assert model.tokenizer.decode(found.prompt_ids).endswith("Hello, my")


def test_nothing_to_continue_is_told(model) -> None:
    with pytest.raises(TemplateError, match="no text to continue"):
        model.chat(
            [{"role": "user", "content": ""}], template="chatml", continue_final_message=True
        )


# ---- what belongs to another


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_a_state_of_another_model_is_refused(model, device, stories260k) -> None:
    with tinyllm.load(stories260k, device) as other:
        state = other.new_state(64)
        for call in (
            lambda: model.generate("Hi", state=state, max_tokens=1),
            lambda: model.logits([3], state),
        ):
            with pytest.raises(tinyllm.errors.StateError, match="another model"):
                call()
        assert state.n_past == 0


def test_a_stream_of_a_closed_model_ends_with_an_error() -> None:
    m = tinyllm.load(device="reference")
    pieces = m.generate("Once", max_tokens=20, stream=True)
    next(pieces)
    m.close()
    with pytest.raises(TinyLLMError, match="the model is closed"):
        list(pieces)
