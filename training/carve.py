"""Carve a student out of a large model: python carve.py --teacher GGUF --texts DIR --out RUN.

Of the teacher's vocabulary come the tokens that the texts need, of its layers the first ones, and of each the
feed-forward neurons that the stories use most. The head guesses what the layers left out would have come to.
"""

import argparse
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from corpus import SPECIAL, batches, encode, one_of, read_documents, split
from network import Config, Llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from train import load_config

import tinyllm.gguf

HERE = Path(__file__).parent
# The teacher's tokens that begin as <|begin|>, <|end|>, <|user|> and <|assistant|>.
SPECIAL_FROM = ("<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_start|>")
Merges = list[tuple[str, str]]


def byte_level_bpe(tokens: list[str], merges: Merges) -> Tokenizer:
    """A tokenizer that splits texts as GGUF's pre-tokenizer `smollm` does: each digit by itself."""
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def count_tokens(tokenizer: Tokenizer, training: dict[str, list[str]]) -> Counter[str]:
    """How often each token stands in the documents."""
    counts: Counter[str] = Counter()
    for documents in training.values():
        for encoding in tokenizer.encode_batch(documents):
            counts.update(encoding.tokens)
    return counts


def choose(tokens: list[str], merges: Merges, counts: Counter[str], n: int) -> set[str]:
    """The n most needed tokens: one is needed where it stands and where a longer one is made of it.

    So each chosen token's parts are chosen too, and a text that the chosen tokens can spell splits as it
    did before. The 256 bytes are always among them.
    """
    needed = counts.copy()
    for left, right in reversed(merges):
        for part in (left, right):
            needed[part] += needed[left + right]
    made = {left + right for left, right in merges}
    letters = {token for token in tokens if len(token) == 1 and token not in made}
    order = sorted(tokens, key=lambda token: (token not in letters, -needed[token]))
    return set(order[:n])


def load_teacher(file: tinyllm.gguf.GGUFFile, config: Config, rows: list[int]) -> Llama:
    """The large model with these rows of its table of words, which is its head, too."""
    weights = {
        name: torch.from_numpy(tensor.dequantize().astype(np.float32))
        for name, tensor in file.tensors.items()
    }
    weights["token_embd.weight"] = weights["output.weight"] = weights["token_embd.weight"][rows]
    n_layer, n_ff = file.metadata["llama.block_count"], len(weights["blk.0.ffn_gate.weight"])
    teacher = Llama(replace(config, n_layer=n_layer, n_ff=n_ff))
    teacher.load_state_dict(weights)
    return teacher


def keep_neurons(teacher: Llama, config: Config, ids: Tensor) -> dict[str, Tensor]:
    """The first layers' weights, of each the n_ff neurons that add most to the residual over ids [B, T]."""
    names = {name for name, _ in Llama(config).named_parameters()}
    weights = {name: weight for name, weight in teacher.state_dict().items() if name in names}
    x = teacher.token_embd(ids)
    for i, block in enumerate(teacher.blk[: config.n_layer]):
        x = x + block.attention(block.attn_norm(x), teacher.cos, teacher.sin)
        y = block.ffn_norm(x)
        hidden = F.silu(block.ffn_gate(y)) * block.ffn_up(y)
        importance = hidden[:, 1:].abs().flatten(0, 1).mean(0) * block.ffn_down.weight.norm(dim=0)
        x = x + block.ffn_down(hidden)
        top = importance.topk(config.n_ff).indices.sort().values
        for name, axis in ("ffn_gate", 0), ("ffn_up", 0), ("ffn_down", 1):
            key = f"blk.{i}.{name}.weight"
            weights[key] = weights[key].index_select(axis, top)
    return weights


def fit_head(student: Llama, teacher: Llama, ids: Tensor, shrinkage: float) -> Tensor:
    """The head [V, E] by which the student's last residual comes nearest to the teacher's: least squares.

    The first position is left out: its residual is hundreds of times larger than the others.
    """
    wanted = teacher.output_norm(teacher.residual(ids))[:, 1:].flatten(0, 1)
    found = student.output_norm(student.residual(ids))[:, 1:].flatten(0, 1)
    squares = found.T @ found
    ridge = shrinkage * squares.diagonal().mean() * torch.eye(len(squares))
    return teacher.output.weight @ torch.linalg.solve(squares + ridge, found.T @ wanted).T


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, required=True, help="the large model's GGUF file")
    parser.add_argument("--texts", type=Path, required=True, help="folder of the three texts")
    parser.add_argument("--out", type=Path, required=True, help="for tokenizer.json and start.pt")
    parser.add_argument("--settings", type=Path, default=HERE / "carved.json")
    args = parser.parse_args()
    settings = json.loads(args.settings.read_text())
    config, options = load_config(settings), settings["carving"]
    args.out.mkdir(parents=True, exist_ok=True)

    file = tinyllm.gguf.open(args.teacher)
    tokens = list(file.metadata["tokenizer.ggml.tokens"])
    merges = [tuple(merge.split(" ")) for merge in file.metadata["tokenizer.ggml.merges"]]
    training = {kind: split(documents)[0] for kind, documents in read_documents(args.texts).items()}
    thinned = training["dialogues"][:: settings["vocabulary"]["every_nth_dialogue"]]
    counts = count_tokens(byte_level_bpe(tokens, merges), training | {"dialogues": thinned})
    chosen = choose(tokens, merges, counts, config.n_vocab - len(SPECIAL))
    kept = [i for i, token in enumerate(tokens) if token in chosen]
    tokenizer = byte_level_bpe(
        [*SPECIAL, *(tokens[i] for i in kept)], [pair for pair in merges if "".join(pair) in chosen]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(args.out / "tokenizer.json"))

    stories = {"stories": encode(tokenizer, "stories", training["stories"])}
    stream = batches(stories, one_of("stories"), options["n_rows"], options["n_row"], 0)
    ids, others = (torch.from_numpy(next(stream)) for _ in range(2))
    teacher = load_teacher(file, config, [*map(tokens.index, SPECIAL_FROM), *kept])
    student = Llama(config)
    student.load_state_dict(keep_neurons(teacher, config, ids))
    student.output_norm.weight.fill_(1.0)
    student.output.weight.copy_(fit_head(student, teacher, ids, options["shrinkage"]))
    torch.save(student.state_dict(), args.out / "start.pt")
    share = sum(counts[token] for token in chosen) / counts.total()
    print(f"{share:.2%} of the texts' tokens kept; {student.loss(others):.3f} nats a token")


if __name__ == "__main__":
    main()
