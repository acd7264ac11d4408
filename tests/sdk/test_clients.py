"""Real packages that use gpt4all, unmodified, on the shim. Each runs in a process of its own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.clients
ROOT = Path(__file__).resolve().parents[2]
PRELUDE = """
import json
from tinyllm.sdk import install_as_gpt4all

install_as_gpt4all(replace=True)


def tell(value):
    print("RESULT" + json.dumps(value))

"""


@pytest.fixture
def home(tmp_path: Path, data: Path) -> Path:
    """A home directory whose GPT4All models are ours, under the names that clients ask for."""
    directory = tmp_path / ".cache" / "gpt4all"
    directory.mkdir(parents=True)
    sources = {
        "all-MiniLM-L6-v2.gguf2.f16.gguf": data / "models" / "all-MiniLM-L6-v2.gguf2.f16.gguf",
        "stories260K.gguf": data / "models" / "stories260K.gguf",
        "Meta-Llama-3-8B-Instruct.Q4_0.gguf": ROOT / "tinyllm" / "data" / "bundled.gguf",
        "nomic-embed-text-v1.f16.gguf": data / "golden" / "models" / "nomic-bert.gguf",
        "nomic-embed-text-v1.5.f16.gguf": data / "golden" / "models" / "nomic-bert.gguf",
    }
    for name, source in sources.items():
        (directory / name).symlink_to(source)
    return tmp_path


def run(home: Path, package: str, code: str) -> Any:
    """What the code tells; it runs in a new process, after the shim is installed."""
    return printed(home, package, code)[1]


def printed(home: Path, package: str, code: str) -> tuple[str, Any]:
    """What the code prints, and what it tells."""
    before, _, told = output(home, package, "-c", PRELUDE + code).partition("RESULT")
    return before, json.loads(told)


def shimmed(home: Path, package: str, *program: str, text: str = "") -> str:
    """What a program prints that is run on the shim as it is, with ``text`` as its standard input."""
    return output(home, package, "-m", "tinyllm.sdk.shim", *program, text=text)


def output(home: Path, package: str, *args: str, text: str = "", first: Path = ROOT) -> str:
    """What Python prints, in a process of its own with ``home`` as the user's folder."""
    if importlib.util.find_spec(package) is None and not (first / package).is_dir():
        pytest.skip(f"{package} is not installed")
    environment = {
        **os.environ,
        "HOME": str(home),
        "LLM_USER_PATH": str(home / "llm"),
        "LLM_LOAD_PLUGINS": "llm-gpt4all",
        "PYTHONPATH": os.pathsep.join([str(first), str(ROOT)]),
        "PYTHONWARNINGS": "ignore",
        "COLUMNS": "200",
        "ANONYMIZED_TELEMETRY": "False",
        "EC_TELEMETRY": "false",
    }
    done = subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        input=text,
        env=environment,
        cwd=home,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_langchain_llm(home: Path, llm: Any) -> None:
    model = home / ".cache" / "gpt4all" / "stories260K.gguf"
    texts = run(
        home,
        "langchain_community",
        f"""
from langchain_community.llms import GPT4All
from langchain_core.callbacks import StreamingStdOutCallbackHandler
one = GPT4All(model={str(model)!r}, n_threads=4, temp=0, n_predict=20)
two = GPT4All(model={str(model)!r}, temp=0, n_predict=20, streaming=True)
batch = one.batch(["Once upon a time", "The dog"])
tell(([one.invoke("Once upon a time"), two.invoke("Once upon a time"), *batch]))
""",
    )
    want = llm.generate("Once upon a time", temp=0, max_tokens=20)
    assert texts == [want, want, want, llm.generate("The dog", temp=0, max_tokens=20)]


def test_langchain_embeddings(home: Path, embedder: Any) -> None:
    vectors = run(
        home,
        "langchain_community",
        """
from langchain_community.embeddings import GPT4AllEmbeddings
default = GPT4AllEmbeddings()
named = GPT4AllEmbeddings(
    model_name="all-MiniLM-L6-v2.gguf2.f16.gguf", gpt4all_kwargs={"allow_download": "True"}
)
tell(([default.embed_query("Hello"), *named.embed_documents(["Hello", "world"])]))
""",
    )
    assert vectors == [embedder.embed("Hello"), embedder.embed("Hello"), embedder.embed("world")]


def test_nomic_local_and_dynamic(home: Path) -> None:
    results = run(
        home,
        "nomic",
        """
from nomic import embed
texts = ["a"]  # more is sent away by the dynamic mode
one = embed.text(texts, model="nomic-embed-text-v1", inference_mode="local", task_type="search_document")
two = embed.text(texts, model="nomic-embed-text-v1", inference_mode="dynamic", task_type="search_document")
query = embed.text(texts, model="nomic-embed-text-v1.5", inference_mode="local", task_type="search_query")
embed.free_embedding_model()
tell(([one, two, query]))
""",
    )
    one, two, query = results
    assert one["inference_mode"] == "local"
    assert one["usage"]["prompt_tokens"] > 0
    assert one["embeddings"] == two["embeddings"]
    assert one["embeddings"] != query["embeddings"]
    assert all(sum(x * x for x in v) == pytest.approx(1, abs=1e-5) for v in one["embeddings"])


def test_llm_with_its_gpt4all_plugin(home: Path, data: Path, llm: Any) -> None:
    models = json.loads((data / "models3.json").read_text(encoding="utf-8"))
    models.append(
        {**models[1], "filename": "stories260K.gguf", "promptTemplate": "[INST] %1 [/INST]"}
    )
    (home / "llm").mkdir()
    (home / "llm" / "gpt4all_models3.json").write_text(json.dumps(models))
    streamed, (plugins, listed, answered, conversation) = printed(
        home,
        "llm_gpt4all",
        """
import llm
from click.testing import CliRunner
from llm.cli import cli
ask = ["-m", "stories260K", "Once upon a time", "-o", "temp", "0", "-o", "max_tokens", "20"]
told = [CliRunner().invoke(cli, a) for a in (["plugins"], ["models", "list"], [*ask, "--no-stream"])]
cli(ask, standalone_mode=False)
conversation = llm.get_model("stories260K").conversation()
turns = [conversation.prompt(p, temp=0, max_tokens=20) for p in ("Once upon a time", "Then")]
tell([*(r.output for r in told), [(t.text(), t.response_json["full_prompt"]) for t in turns]])
""",
    )
    assert "llm-gpt4all" in plugins
    size = "mistral-7b-instruct-v0 - Mistral Instruct, 3.83GB download, needs 8GB RAM"
    assert f"gpt4all: {size}\n" in listed
    assert "(installed)" in next(line for line in listed.splitlines() if "stories260K" in line)
    first = "[INST] Once upon a time [/INST]"
    want = llm.generate(first, temp=0, max_tokens=20)
    assert (streamed, answered) == (want + "\n", want + "\n")
    second = f"{first}{want}[INST] Then [/INST]"
    assert conversation == [[want, first], [llm.generate(second, temp=0, max_tokens=20), second]]


def test_openlit_instruments_the_classes(home: Path) -> None:
    if importlib.util.find_spec("openlit") is None:
        pytest.skip("openlit is not installed")
    major, minor, *_ = importlib.metadata.version("openlit").split(".")
    if (int(major), int(minor)) < (1, 40):
        pytest.skip("openlit before 1.40 downloads a tokenizer")
    (home / "pricing.json").write_text("{}")
    spans, pieces, n = run(
        home,
        "openlit",
        f"""
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
exporter, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
import inspect
import openlit
wanted = dict(disable_metrics=True, disable_events=True, pricing_json={str(home / "pricing.json")!r})
known = inspect.signature(openlit.init).parameters  # versions differ
openlit.init(**{{name: value for name, value in wanted.items() if name in known}})
import gpt4all
llm = gpt4all.GPT4All("stories260K.gguf", allow_download=False)
llm.generate("Once upon a time", max_tokens=5)
pieces = list(llm.generate("Once upon a time", max_tokens=5, streaming=True))
n = len(gpt4all.Embed4All().embed("Hello"))
tell(([str(dict(s.attributes)) for s in exporter.get_finished_spans()], pieces, n))
""",
    )
    assert len(spans) == 3
    assert all("stories260K.gguf" in attributes for attributes in spans[:2])
    assert "all-MiniLM-L6-v2" in spans[2]
    assert len(pieces) == 5
    assert n == 384


def test_scikit_llm_classifies(home: Path) -> None:
    (home / "classify.py").write_text(
        """
import pandas
from skllm import ZeroShotGPTClassifier
from skllm.config import SKLLMConfig
SKLLMConfig.set_openai_key("none")
SKLLMConfig.set_openai_org("none")
classifier = ZeroShotGPTClassifier(openai_model="gpt4all::Meta-Llama-3-8B-Instruct.Q4_0")
classifier.fit(None, ["good", "bad"])
print(*classifier.predict(pandas.Series(["I like it", "It broke"])))
"""
    )
    labels = shimmed(home, "skllm", "classify.py").split()
    assert len(labels) == 2
    assert set(labels) <= {"good", "bad"}


def test_gpt4all_cli_talks(home: Path) -> None:
    model = str(home / ".cache" / "gpt4all" / "Meta-Llama-3-8B-Instruct.Q4_0.gguf")
    said = shimmed(
        home,
        "gpt4all_cli",
        *("gpt4all-cli", "--model", model, "--readline-history", "", "--num-threads", "1"),
        text="Hello! /ask\n/temp 0.5\nI want a table for two. /ask\n/exit\n",
    )
    assert "Model is now initialized" in said
    first, second = said.split(">>> ")[1:4:2]
    assert len(first.strip()) > 5
    assert len(second.strip()) > 5


def test_llmshell_suggests_a_command(home: Path) -> None:
    version = shimmed(home, "gpt_shell", "llmshell", "--version")
    assert "llmshell" in version
    for key, value in (
        ("backends.gpt4all.model", "Meta-Llama-3-8B-Instruct.Q4_0.gguf"),
        ("backends.gpt4all.model_path", str(home / ".cache" / "gpt4all")),
    ):
        shimmed(home, "gpt_shell", "llmshell", "config", "set", key, value)
    said = shimmed(home, "gpt_shell", "llmshell", "run", "--dry-run", "list all files")
    assert "Using backend: gpt4all" in said


def test_embedchain_answers_from_chroma(home: Path) -> None:
    (home / "ask.py").write_text(
        f"""
from embedchain import App
app = App.from_config(config={{
    "llm": {{"provider": "gpt4all", "config": {{
        "model": {str(home / ".cache" / "gpt4all" / "stories260K.gguf")!r}, "max_tokens": 20,
        "temperature": 0.0, "top_p": 1, "stream": False}}}},
    "embedder": {{"provider": "gpt4all", "config": {{"model": "all-MiniLM-L6-v2.gguf2.f16.gguf"}}}},
    "vectordb": {{"provider": "chroma", "config": {{"dir": "db", "allow_reset": True}}}},
}})
app.add("Lily has a red ball.", data_type="text")
app.add("The moon is far away.", data_type="text")
print(app.search("Who plays with something round?", num_documents=1)[0]["context"])
print(len(app.query("What does Lily have?")) > 5)
"""
    )
    program = ("-m", "tinyllm.sdk.shim", "ask.py")
    said = output(home, "embedchain", *program, first=Path(sys.prefix) / "embedchain")
    assert said.splitlines()[-2:] == ["Lily has a red ball.", "True"]
