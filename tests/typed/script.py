"""A user's script: type checkers accept it without a word, and it runs."""

from collections.abc import Iterator
from pathlib import Path

import tinyllm
from tinyllm.sdk import GPT4All


def shout(pieces: Iterator[str]) -> str:
    return "".join(piece.upper() for piece in pieces)


def main() -> None:
    with tinyllm.load(n_threads=1) as model:
        story = model.generate("Once upon a time", max_tokens=8, seed=1, stop=["\n"])
        print(story.text, story.finish_reason, len(story.ids), story.timings.generated_per_s)
        for each in model.generate(["The dog", "The cat"], max_tokens=4, temperature=0):
            print(each.text.strip())
        print(shout(model.generate([1, 2, 3], max_tokens=4, stream=True)))
        answer = model.chat([{"role": "user", "content": "Hello!"}], max_tokens=4, top_k=1)
        print(answer.text, [token.id for token in answer.logprobs or ()])
        state = model.new_state(n_ctx=32)
        print(model.logits(model.tokenizer.encode("Once"), state).argmax(axis=-1).tolist())
        print(model.config.n_embd, model.arch.title(), model.embed("a text").shape)
    device = tinyllm.list_devices()[0]
    print(device.id, device.memory / 1e9)
    llm = GPT4All("bundled.gguf", model_path=Path(tinyllm.__file__).parent / "data", n_ctx=256)
    with llm, llm.chat_session():
        print(llm.generate("Hello", max_tokens=4).strip())
        print(*llm.generate("And you?", max_tokens=4, streaming=True))


if __name__ == "__main__":
    main()
