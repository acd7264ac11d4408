# ruff: noqa: E501
"""GPT4All outside of chat sessions: construction, arguments, streams, errors."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle
import types
from pathlib import Path
from typing import Any

import pytest
import requests

from tinyllm.engine.completion import Completion
from tinyllm.hub import catalogue
from tinyllm.kernels.backend import Device
from tinyllm.sdk import CancellationError, Embed4All, GPT4All, devices
from tinyllm.sdk import gpt4all as module
from tinyllm.sdk.llmodel import LLModel
from tinyllm.sdk.templates import from_percent, template_of

GREEDY: dict[str, Any] = {"max_tokens": 12, "temp": 0}
START = "Once upon a time"

# The reference page's signatures; what tinyllm adds is keyword only.
PAGE = {
    GPT4All.__init__: "self model_name * model_path=None model_type=None allow_download=True n_threads=None device=None n_ctx=2048 ngl=100 verbose=False",
    GPT4All.generate: "self prompt * max_tokens=200 temp=0.7 top_k=40 top_p=0.4 min_p=0.0 repeat_penalty=1.18 repeat_last_n=64 n_batch=8 n_predict=None streaming=False callback=empty_response_callback",
    GPT4All.chat_session: "self system_message=None chat_template=None",
    GPT4All.retrieve_model: "model_name model_path=None allow_download=True verbose=False",
    GPT4All.download_model: "model_filename model_path verbose=True url=None expected_size=None expected_md5=None",
    Embed4All.__init__: "self model_name=None * n_threads=None device=None **kwargs",
    Embed4All.embed: "self text * prefix=None dimensionality=None long_text_mode='mean' return_dict=False atlas=False cancel_cb=None",
}  # fmt: skip


def spelled(function: Any) -> list[str]:
    """A signature's parameters, with a star before the keyword-only ones."""
    words: list[str] = []
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        name = "**" + p.name if p.kind is p.VAR_KEYWORD else p.name
        default = getattr(p.default, "__name__", None) or repr(p.default)
        words.append(name if p.default is p.empty else f"{name}={default}")
    return words


@pytest.mark.parametrize("function", PAGE, ids=lambda f: f.__qualname__)
def test_signature_is_the_pages(function: Any) -> None:
    want, got = PAGE[function].split(), spelled(function)
    assert got[: len(want)] == want
    extra = got[len(want) :]
    assert not extra or "*" in want or extra[0] == "*"


def test_module_has_the_names_that_programs_import() -> None:
    from tinyllm.sdk import llmodel

    names = "CancellationError ConfigType Embed4All EmbedResult EmbCancelCallbackType GPT4All LLModel MessageType DEFAULT_MODEL_DIRECTORY DEFAULT_PROMPT_TEMPLATE ResponseCallbackType append_extension_if_missing empty_response_callback _fsync _remove_prefix sys"
    for name in names.split():
        assert hasattr(module, name), name
    names = "LLModel LLModelPromptContext PromptCallback ResponseCallback EmbCancelCallback Sentinel cuda_found _load_cuda MODEL_LIB_PATH llmodel"
    for name in names.split():
        assert hasattr(llmodel, name), name
    assert Embed4All.MIN_DIMENSIONALITY == 64


def test_attributes(llm: GPT4All, models: Path) -> None:
    path = str(models / "stories260K.gguf")
    assert llm.config == {"path": path, "filename": "stories260K.gguf"}
    assert (llm.model.model_path, llm.model.n_ctx, llm.model.ngl) == (path.encode(), 2048, 100)
    assert (llm.backend, llm.device, llm.model_type) == ("cpu", None, None)
    assert llm.current_chat_session is None


def test_only_the_name_is_positional() -> None:
    with pytest.raises(TypeError, match=r"takes 2 positional arguments but 3 were given"):
        GPT4All("x", "/tmp")  # type: ignore[misc]


@pytest.mark.parametrize("argument", ["stops", "n_ctx", "temperature"])
def test_unknown_arguments_of_generate_are_refused(argument: str, llm: GPT4All) -> None:
    with pytest.raises(TypeError, match=argument):
        llm.generate(START, **{argument: 1})


# ---- files


def test_missing_directory_and_file(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    with pytest.raises(FileNotFoundError) as caught:
        GPT4All("x", model_path=absent, allow_download=False)
    assert str(caught.value) == f"Model directory does not exist: {absent!r}"
    with pytest.raises(FileNotFoundError) as caught:
        GPT4All("x", model_path=tmp_path, allow_download=False)
    assert str(caught.value) == f"Model file does not exist: {tmp_path / 'x.gguf'!r}"


def test_a_path_as_name_works(models: Path) -> None:
    with GPT4All(str(models / "stories260K.gguf"), model_path="/", allow_download=False) as llm:
        assert llm.config["path"] == str(models / "stories260K.gguf")


def test_a_file_that_is_there_asks_no_network(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(requests, "get", no_network)
    with GPT4All("stories260K", model_path=models, verbose=True) as llm:
        assert llm.generate(START, **GREEDY)
    assert f"Found model file at {str(models / 'stories260K.gguf')!r}" in capsys.readouterr().err


def test_config_has_the_list_as_last_fetched(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path))
    entry = {"filename": "stories260K.gguf", "name": "Stories", "promptTemplate": "U: %1 A: %2"}
    (tmp_path / "models3.json").write_text(json.dumps([entry]))
    config = GPT4All.retrieve_model("stories260K", models)
    assert (config["name"], config["promptTemplate"]) == ("Stories", "U: {0} A: {1}")
    assert "name" not in GPT4All.retrieve_model("stories260K", models, allow_download=False)


def test_config_has_the_packages_list_when_none_was_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "Meta-Llama-3-8B-Instruct.Q4_0.gguf").write_text("")
    config = GPT4All.retrieve_model("Meta-Llama-3-8B-Instruct.Q4_0", tmp_path)
    assert config["systemPrompt"] == ""
    assert config["promptTemplate"].startswith("<|start_header_id|>user<|end_header_id|>\n\n{0}")
    assert config["promptTemplate"].count("{1}") == 1


def test_the_templates_of_the_packages_list_show_the_message() -> None:
    turns = [{"role": "user", "content": "How are you?"}]
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    for model in catalogue.packaged_list()["models"]:
        sources = [model.get("chatTemplate"), from_percent(model.get("promptTemplate") or "")]
        for source in filter(None, sources):
            if model["filename"] == "wizardlm-13b-v1.2.Q4_0.gguf":  # it never shows the message
                with pytest.raises(ValueError, match="never shows the message"):
                    template_of(source)
                continue
            assert "How are you?" in template_of(source).render(turns, tokens), model["filename"]


def test_no_network_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "LIST_URL", "http://127.0.0.1:9/models3.json")
    with pytest.raises(
        requests.exceptions.ConnectionError, match=r"Copy the file there, or pass its path$"
    ) as caught:
        Embed4All(model_path=tmp_path)
    assert "\n" not in str(caught.value)
    assert "all-MiniLM-L6-v2.gguf2.f16.gguf is not in" in str(caught.value)


@pytest.mark.parametrize("name", ["../x.gguf", "/etc/x.gguf", "a/b.gguf"])
def test_a_download_stays_in_its_directory(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not the name of a file"):
        GPT4All.download_model(name, tmp_path)
    with pytest.raises(FileNotFoundError):
        GPT4All(name, model_path=tmp_path)


def test_the_model_directory_can_be_moved(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEFAULT_MODEL_DIRECTORY", models)
    assert GPT4All.retrieve_model("stories260K")["path"] == str(models / "stories260K.gguf")


def test_a_model_directory_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(module, "DEFAULT_MODEL_DIRECTORY", tmp_path / "file" / "below")
    with pytest.raises(RuntimeError, match=r"^Failed to create model download directory$"):
        GPT4All.retrieve_model("x")


def test_subclasses_may_find_files_themselves(models: Path) -> None:
    class Mine(GPT4All):
        @staticmethod
        def retrieve_model(model_name, model_path=None, allow_download=True, verbose=False):  # type: ignore[override]
            return {"path": str(models / model_name)}

    with Mine("stories260K.gguf") as llm:
        assert llm.config["filename"] == "stories260K.gguf"


@pytest.mark.parametrize("content", [b"", b"GGU", b"not a model at all", b"GGUF\x03\0\0\0\x01"])
def test_a_file_that_is_no_model(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(RuntimeError) as caught:
        GPT4All("x", model_path=tmp_path, allow_download=False)
    assert str(caught.value) == "Unable to instantiate model: Unsupported file format"


def test_an_architecture_that_is_not_known(tmp_path: Path) -> None:
    from tinyllm.gguf import writer

    writer.write(tmp_path / "x.gguf", {"general.architecture": "frobnicator"}, {})
    with pytest.raises(RuntimeError) as caught:
        GPT4All("x", model_path=tmp_path, allow_download=False)
    assert (
        str(caught.value)
        == "Unable to instantiate model: Unsupported model architecture: frobnicator"
    )


# ---- devices


def test_devices_that_are_not_there(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyllm.kernels.devices.list_devices", list)
    with pytest.raises(ValueError, match=r"^Unable to retrieve available GPU devices$"):
        GPT4All.list_gpus()
    for device in ("gpu", "kompute", "kompute:0", "nvidia", "Some Name"):
        with pytest.raises(ValueError, match=r"^Unable to retrieve available GPU devices$"):
            GPT4All("stories260K", model_path=models, allow_download=False, device=device)
    for device in ("cuda", "cuda:0", "cuda:X"):
        with pytest.raises(RuntimeError, match=r"^Unable to instantiate model: Could not find any"):
            GPT4All("stories260K", model_path=models, allow_download=False, device=device)


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices of each kind; the last is Intel's for the CPU."""
    there = [
        Device("cpu", 0, "A CPU", 1 << 40),
        Device("cuda", 0, "NVIDIA H200", 1 << 37),
        Device("opencl", 0, "Radeon", 1000),
        Device("opencl", 1, "Intel(R) Xeon(R)", 1 << 40, on_cpu=True),
    ]
    monkeypatch.setattr("tinyllm.kernels.devices.list_devices", lambda: there)


def test_devices_that_do_not_match(models: Path, several: None) -> None:
    assert GPT4All.list_gpus() == ["cuda:NVIDIA H200", "kompute:Radeon"]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        GPT4All("stories260K", model_path=models, allow_download=False, device="Radeon")
    assert str(caught.value) == (
        "Unable to initialize model on GPU: 'Radeon'\nAvailable GPUs: ['cuda:NVIDIA H200']\n"
        "Unavailable GPUs due to insufficient memory: ['kompute:Radeon']"
    )
    for device in ("intel", "amd", "cuda:1", "kompute:2", "cuda:Radeon"):
        with pytest.raises(ValueError, match="Unable to initialize model on GPU"):
            devices.choose(*devices.split_device(device))


@pytest.mark.parametrize(
    ("device", "engine"),
    [
        ("gpu", "cuda:0"),
        ("cuda", "cuda:0"),
        ("cuda:0", "cuda:0"),
        ("cuda:NVIDIA H200", "cuda:0"),
        ("nvidia", "cuda:0"),
        ("kompute:0", "opencl:0"),
        ("Radeon", "opencl:0"),
        ("kompute:Intel(R) Xeon(R)", "opencl:1"),
    ],
)
def test_devices_by_kind_index_and_name(device: str, engine: str, several: None) -> None:
    assert devices.choose(*devices.split_device(device)).device.id == engine


def test_threads(models: Path) -> None:
    with GPT4All("stories260K", model_path=models, allow_download=False, n_threads=4) as llm:
        assert llm.model.thread_count() == 4
        llm.model.set_thread_count(1)
        assert llm.model.thread_count() == 1
        assert llm.generate(START, **GREEDY)
        with pytest.raises(ValueError, match=r"^n_threads=0; expected a whole number from 1"):
            llm.model.set_thread_count(0)


def test_context_warnings(models: Path, capsys) -> None:
    with GPT4All("stories260K", model_path=models, allow_download=False, n_ctx=4) as llm:
        assert llm.model.n_ctx == 4
    err = capsys.readouterr().err
    assert err == "warning: minimum context size is 8, using minimum size.\n"
    with pytest.raises(ValueError, match=r"^n_ctx=0; expected a whole number from 1"):
        GPT4All("stories260K", model_path=models, allow_download=False, n_ctx=0)


@pytest.mark.parametrize("n_ctx", range(1, 8))
def test_the_smallest_context_is_what_the_warning_says(n_ctx: int, models: Path, capsys) -> None:
    with GPT4All("stories260K", model_path=models, allow_download=False, n_ctx=n_ctx) as llm:
        assert llm.generate("Hi", max_tokens=3, temp=0)
        with pytest.raises(ValueError, match=r"\(\d+ > 4\)"):
            llm.generate(START)
        with llm.chat_session(chat_template="{0}"):
            assert llm.generate("a", max_tokens=3, temp=0)
    assert "minimum context size is 8, using minimum size" in capsys.readouterr().err


# ---- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_ctx": 2**31}, f"n_ctx={2**31}; expected a whole number from 1 to {2**31 - 1}"),
        ({"n_ctx": "2048"}, "n_ctx='2048'; expected a whole number from 1"),
        ({"n_ctx": 2048.0}, r"n_ctx=2048\.0; expected a whole number from 1"),
        ({"n_ctx": None}, "n_ctx=None; expected a whole number from 1"),
        ({"n_threads": "2"}, "n_threads='2'; expected a whole number from 1"),
        ({"n_threads": 0}, "n_threads=0; expected a whole number from 1"),
        ({"ngl": "all"}, "ngl='all'; expected a whole number"),
        ({"device": 0}, "device=0; expected a text"),
        ({"kv_type": "q4_0"}, "kv_type='q4_0'; expected"),
        ({"model_path": 3}, "model_path=3; expected the name or the path"),
        ({"model_name": None}, "model_name=None; expected the name or the path of a file"),
        ({"model_name": ""}, "model_name=''; expected the name or the path of a file"),
        ({"model_name": b"x.gguf"}, "model_name=b'x.gguf'; expected the name or the path"),
    ],
)
def test_a_wrong_argument_of_the_class_is_named(
    arguments: dict[str, Any], message: str, models: Path
) -> None:
    given = {"model_name": "stories260K", "model_path": models, "allow_download": False}
    with pytest.raises(ValueError, match=f"^{message}"):
        GPT4All(**{**given, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": None}, "max_tokens=None; expected a whole number"),
        ({"max_tokens": "9"}, "max_tokens='9'; expected a whole number"),
        ({"n_predict": 1.5}, r"n_predict=1\.5; expected a whole number"),
        ({"temp": "hot"}, "temp='hot'; expected a number"),
        ({"n_batch": None}, "n_batch=None; expected a whole number from 1"),
        ({"logprobs": -1}, "logprobs=-1; expected a whole number from 0"),
        ({"callback": None}, r"callback=None; expected callback\(token_id, text\)"),
        ({"stop": [1]}, r"stop=\[1\]"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_wrong_argument_of_generate_is_named(
    arguments: dict[str, Any], message: str, streaming: bool, llm: GPT4All
) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate(START, streaming=streaming, **arguments)


def test_other_wrong_arguments_are_named(llm: GPT4All, embedder: Embed4All) -> None:
    for wrong in (5, True, ["Be kind."]):
        with pytest.raises(ValueError, match=r"^system_message="):
            llm.chat_session(wrong, "{0}").__enter__()
    with pytest.raises(ValueError, match=r"^chat template 5; expected a text"):
        llm.chat_session("Be kind.", 5).__enter__()
    for text in (5, 1.5):
        with pytest.raises(ValueError, match=r"^text=.*; expected a text or a list of texts"):
            embedder.embed(text)
    with pytest.raises(ValueError, match=r"^dimensionality='64'; expected a whole number"):
        embedder.embed("a", dimensionality="64")
    with pytest.raises(ValueError, match=r"^cancel_cb=3; expected"):
        embedder.embed("a", cancel_cb=3)
    assert llm.generate(START, stop=None, **GREEDY) == llm.generate(START, **GREEDY)


def test_a_path_and_a_directory_as_name(models: Path, tmp_path: Path) -> None:
    with GPT4All(models / "stories260K.gguf", allow_download=False) as llm:
        assert llm.generate(START, **GREEDY)
    with Embed4All(models / "all-MiniLM-L6-v2.gguf2.f16.gguf") as embedder:
        assert len(embedder.embed("a")) == 384
    (tmp_path / "dir.gguf").mkdir()
    for name, directory in (("dir.gguf", tmp_path), (str(tmp_path / "dir.gguf"), None)):
        with pytest.raises(IsADirectoryError, match="give the path of a GGUF file in it"):
            GPT4All(name, model_path=directory, allow_download=False)


def test_a_model_is_neither_pickled_nor_copied(llm: GPT4All, embedder: Embed4All) -> None:
    for thing in (llm, embedder, llm.model):
        for use in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match=r"Make one in each process, from the same"):
                use(thing)


def test_keys_and_values_may_be_kept_smaller(models: Path) -> None:
    with GPT4All("stories260K", model_path=models, allow_download=False, kv_type="q8_0") as small:
        assert small.generate(START, **GREEDY)


# ---- arguments of generate


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temp", -1.0),
        ("temp", math.nan),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("n_batch", 0),
        ("stop", ""),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: float, llm: GPT4All) -> None:
    with pytest.raises(ValueError, match=rf"^{name}="):
        llm.generate(START, **{name: value})


@pytest.mark.parametrize("prompt", [None, b"bytes", 3])
def test_a_prompt_that_is_no_text(prompt: Any, llm: GPT4All) -> None:
    with pytest.raises(AttributeError, match="encode"):
        llm.generate(prompt)
    with (
        llm.chat_session(chat_template="{{ messages[-1].content }}"),
        pytest.raises(AttributeError, match="encode"),
    ):
        llm.generate(prompt)


def test_a_number_of_tokens_is_whole(llm: GPT4All) -> None:
    with pytest.raises(ValueError, match=r"^max_tokens=4\.0; expected a whole number$"):
        llm.generate(START, max_tokens=4.0)  # type: ignore[arg-type]


def test_a_lone_surrogate_is_refused(llm: GPT4All) -> None:
    with pytest.raises(UnicodeEncodeError):
        llm.generate("a\ud800b")


def test_a_prompt_does_not_end_in_the_end_token(
    llm: GPT4All, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = llm.model.model.tokenizer
    plain = llm.model.prompt_ids(START)
    monkeypatch.setattr(tokenizer, "add_eos", True)
    monkeypatch.setattr(tokenizer, "_after", [tokenizer.eos])
    assert tokenizer.encode(START)[-1] == tokenizer.eos
    assert llm.model.prompt_ids(START) == llm.model.prompt_ids(START, special=False) == plain


def test_a_nul_does_not_end_the_prompt(llm: GPT4All) -> None:
    assert llm.model.count_prompt_tokens("a\0b") > llm.model.count_prompt_tokens("a")


def test_a_prompt_longer_than_the_context(llm: GPT4All) -> None:
    n = llm.model.count_prompt_tokens("a " * 3000)
    for streaming in (False, True):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
            llm.generate("a " * 3000, streaming=streaming)
        assert (
            str(caught.value)
            == f"Your message was too long and could not be processed ({n} > 2044)."
        )


def test_a_seed_repeats_the_answer(llm: GPT4All) -> None:
    options: dict[str, Any] = {"max_tokens": 20, "temp": 1.5, "top_p": 1.0}
    assert llm.generate(START, seed=7, **options) == llm.generate(START, seed=7, **options)
    assert len({llm.generate(START, **options) for _ in range(4)}) > 1


def test_stop_strings_end_the_answer_and_are_not_shown(
    llm: GPT4All, recorded: dict[str, Any]
) -> None:
    whole = recorded["generate"]["greedy_topk1"]["text"]
    options: dict[str, Any] = {"max_tokens": 60, "temp": 0, "repeat_penalty": 1.0}
    before = whole[: whole.index("named Lily")]
    assert llm.generate(START, stop="named Lily", **options) == before
    assert (
        "".join(llm.generate(START, stop=["x", "named Lily"], streaming=True, **options)) == before
    )


def test_logprobs_come_with_the_completion(llm: GPT4All) -> None:
    completion = llm.generate(START, logprobs=3, **GREEDY)
    assert isinstance(completion, Completion)
    assert completion.text == llm.generate(START, **GREEDY)
    assert len(completion.logprobs) == len(completion.ids) == 12
    assert all(len(t.top) == 3 and max(t.top, key=t.top.get) == t.id for t in completion.logprobs)
    with pytest.raises(ValueError, match="logprobs come with the whole answer"):
        llm.generate(START, logprobs=3, streaming=True)


def test_a_list_of_prompts_gives_the_same_texts(llm: GPT4All) -> None:
    prompts = [START, "The dog", "", "She went to the park and"]
    assert llm.generate(prompts, **GREEDY) == [llm.generate(p, **GREEDY) for p in prompts]
    assert llm.generate([]) == []
    with pytest.raises(ValueError, match="a list of prompts takes no streaming"):
        llm.generate(prompts, streaming=True)


# ---- callbacks and streams


@pytest.mark.parametrize("answer", [False, None, 0])
def test_a_callback_ends_the_answer(answer: Any, llm: GPT4All) -> None:
    seen: list[str] = []

    def stop_at_third(token_id: int, text: str) -> Any:
        seen.append(text)
        return True if len(seen) < 3 else answer

    assert llm.generate(START, callback=stop_at_third, **GREEDY) == "".join(seen) == ", there was"
    seen.clear()
    assert list(llm.generate(START, callback=stop_at_third, streaming=True, **GREEDY)) == [
        ",",
        " there",
    ]


def test_an_error_in_the_callback_is_the_callers(llm: GPT4All) -> None:
    def fail(token_id: int, text: str) -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        llm.generate(START, callback=fail, **GREEDY)
    assert llm.generate(START, **GREEDY)


def test_a_stream_is_a_generator_that_works_only_when_asked(
    llm: GPT4All, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, steps = llm.model.model.network, []
    forward = net.forward
    monkeypatch.setattr(net, "forward", lambda *a: steps.append(1) or forward(*a))
    stream = llm.generate(START, streaming=True, **GREEDY)
    assert isinstance(stream, types.GeneratorType)
    assert not steps
    next(stream)
    assert len(steps) == 1
    stream.close()
    assert len(steps) == 1
    assert list(stream) == []


def test_two_streams_at_once(llm: GPT4All) -> None:
    one, two = (llm.generate(p, streaming=True, **GREEDY) for p in (START, "The dog"))
    pairs = list(zip(one, two, strict=True))
    assert "".join(a for a, _ in pairs) == llm.generate(START, **GREEDY)
    assert "".join(b for _, b in pairs) == llm.generate("The dog", **GREEDY)


def test_reading_of_the_prompt_can_be_cancelled(
    llm: GPT4All, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    monkeypatch.setattr(
        LLModel, "_prompt_callback", staticmethod(lambda i: read.append(i) or len(read) < 300)
    )
    assert llm.generate("a " * 600, **GREEDY) == ""
    assert len(read) == 300


def test_an_unfinished_character_at_the_end_is_dropped(llm: GPT4All) -> None:
    bias = {llm.model.model.tokenizer.token_id("<0xF0>"): 100.0}
    text = llm.model.model.generate(START, max_tokens=1, temperature=0, logit_bias=bias)
    assert text.text == ""


# ---- closing


def test_a_closed_model_says_so(models: Path) -> None:
    with GPT4All("stories260K", model_path=models, allow_download=False) as llm:
        stream = llm.generate(START, streaming=True, **GREEDY)
        next(stream)
    llm.close()
    uses = [
        lambda: next(stream),
        lambda: llm.generate(START),
        lambda: llm.backend,
        lambda: llm.device,
        llm.model.thread_count,
        lambda: llm.model.generate_embeddings("x", None, -1, True, False, None),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=r"^Attempted operation on a closed LLModel$"):
            use()


def test_an_unloaded_model_says_so(models: Path) -> None:
    model = LLModel(str(models / "stories260K.gguf"), 64, 100, "cpu")
    with pytest.raises(Exception, match=r"^Model not loaded$"):
        model.thread_count()
    assert model.load_model() is True
    pieces: list[str] = []
    model.prompt_model(START, "%1", lambda i, s: pieces.append(s) or True, n_predict=3, temp=0)
    assert "".join(pieces) == ", there was"
    assert (model.context.n_predict, model.context.n_ctx) == (3, 64)
    by_position: list[str] = []
    for args in (("%1", lambda i, s: by_position.append(s) or True), (lambda i, s: True,)):
        model.prompt_model(START, *args, 3, temp=0)
    assert by_position == pieces
    with pytest.raises(TypeError, match="12 options by position; expected at most 11"):
        model.prompt_model(START, lambda i, s: True, *range(12))
    assert len(model.prompt_ids("<s>", special=False)) > len(model.prompt_ids("<s>"))
    for option in ({"context_erase": 0.5}, {"reset_context": False}):
        with pytest.raises(ValueError, match=r"context_erase is 0\.75"):
            model.start(START, **option)
    model.close()


def test_an_embedding_model_does_not_write(embedder: Embed4All, llm: GPT4All) -> None:
    with pytest.raises(RuntimeError, match="does not support text or chat completion"):
        embedder.gpt4all.generate(START)
    with pytest.raises(RuntimeError, match="Failed to generate embeddings: not an embedding model"):
        llm.model.generate_embeddings("x", "", -1, True, False, None)


def test_cancellation_error_is_one_class() -> None:
    assert module.CancellationError is CancellationError


def test_what_calls_have_in_common_is_read_once(
    llm: GPT4All, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, rows = llm.model.model.network, []
    forward = net.forward
    monkeypatch.setattr(net, "forward", lambda s, *a: rows.append(s[0][1]) or forward(s, *a))
    first = llm.generate("The big red ball was in the park and", **GREEDY)
    rows.clear()
    assert llm.generate("The big red ball was in the park and", **GREEDY) == first
    assert rows == [1] * 12
