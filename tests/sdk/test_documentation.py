"""The programs of GPT4All's SDK documentation, as a reader would copy them; only the files differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tinyllm
from tinyllm.sdk import gpt4all, install_as_gpt4all

BUNDLED = Path(tinyllm.__file__).parent / "data" / "bundled.gguf"
LOAD = """
from gpt4all import GPT4All
model = GPT4All("Meta-Llama-3-8B-Instruct.Q4_0.gguf")
"""

BLOCKS = {
    "load and chat": LOAD
    + """
with model.chat_session():
    answer = model.generate("How can I run LLMs efficiently on my laptop?", max_tokens=40)
assert isinstance(answer, str) and answer
""",
    "chat session with history": LOAD
    + """
with model.chat_session():
    response1 = model.generate(prompt="hello", temp=0, max_tokens=20)
    response2 = model.generate(prompt="write me a short poem", temp=0, max_tokens=20)
    response3 = model.generate(prompt="thank you", temp=0, max_tokens=20)
    history = list(model.current_chat_session)
assert [m["content"] for m in history if m["role"] == "assistant"] == [response1, response2, response3]
assert [m["content"] for m in history if m["role"] == "user"][0] == "hello"
assert model.current_chat_session is None
""",
    "direct generation": LOAD
    + """
output = model.generate("The capital of France is ", max_tokens=3)
assert isinstance(output, str)
""",
    "streaming": LOAD
    + """
tokens = []
with model.chat_session():
    for token in model.generate("What is the capital of France?", streaming=True, max_tokens=20):
        tokens.append(token)
assert tokens and all(isinstance(t, str) for t in tokens)
assert "".join(tokens)
""",
    "system message and template": LOAD
    + """
system_template = "A chat between a curious user and an artificial intelligence assistant.\\n"
prompt_template = "USER: {0}\\nASSISTANT: "
with model.chat_session(system_template, prompt_template):
    response1 = model.generate("why is the grass green?", max_tokens=20)
    response2 = model.generate("why is the sky blue?", max_tokens=20)
    assert model.current_chat_session[0] == {"role": "system", "content": system_template}
    assert len(model.current_chat_session) == 5
""",
    "callback": LOAD
    + """
def stop_on_token_callback(token_id, token_string):
    if "." in token_string:
        return False
    return True

response = model.generate(
    "Blue Whales are the biggest animal to ever inhabit the Earth.",
    temp=0,
    callback=stop_on_token_callback,
)
assert response.count(".") <= 1
""",
    "model folder, no download": """
from gpt4all import GPT4All
from gpt4all.gpt4all import DEFAULT_MODEL_DIRECTORY
model = GPT4All(
    model_name="Meta-Llama-3-8B-Instruct.Q4_0.gguf",
    model_path=DEFAULT_MODEL_DIRECTORY,
    allow_download=False,
    n_ctx=256,
    device="cpu",
)
assert model.config["path"].startswith(str(DEFAULT_MODEL_DIRECTORY))
with model:
    assert model.generate("The sky", max_tokens=5)
""",
    "embeddings": """
from gpt4all import Embed4All
text = "The quick brown fox jumps over the lazy dog"
embedder = Embed4All()
output = embedder.embed(text)
assert len(output) == 384 and all(isinstance(x, float) for x in output)
""",
    "embeddings with prefixes and dimensions": """
from gpt4all import Embed4All
text = "Who is Laurens van der Maaten?"
embedder = Embed4All("nomic-embed-text-v1.f16.gguf")
output = embedder.embed(text, prefix="search_query")
batch = embedder.embed([text, text], prefix="search_document", return_dict=True)
assert len(batch["embeddings"]) == 2 and batch["n_prompt_tokens"] > 0
assert batch["embeddings"][0] != output
short = Embed4All("nomic-embed-text-v1.5.f16.gguf").embed(text, prefix="search_query", dimensionality=64)
assert len(short) == 64
""",
}  # fmt: skip


@pytest.fixture
def files(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model directory, with our files under the documentation's names."""
    if not BUNDLED.exists():
        pytest.skip("the package has no bundled model")
    nomic = data / "golden" / "models" / "nomic-bert.gguf"
    sources = {
        "Meta-Llama-3-8B-Instruct.Q4_0.gguf": BUNDLED,
        "all-MiniLM-L6-v2.gguf2.f16.gguf": data / "models" / "all-MiniLM-L6-v2.gguf2.f16.gguf",
        "nomic-embed-text-v1.f16.gguf": nomic,
        "nomic-embed-text-v1.5.f16.gguf": nomic,
    }
    for name, source in sources.items():
        (tmp_path / name).symlink_to(source)
    monkeypatch.setattr(gpt4all, "DEFAULT_MODEL_DIRECTORY", tmp_path)


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block: str, files: None) -> None:
    namespace: dict[str, Any] = {}
    with install_as_gpt4all(replace=True):
        exec(BLOCKS[block], namespace)
    for value in namespace.values():
        if hasattr(value, "close") and not isinstance(value, type):
            value.close()
