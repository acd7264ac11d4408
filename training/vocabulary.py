"""Train the byte-level BPE vocabulary: python vocabulary.py --texts DIR --out DIR."""

import argparse
import json
from pathlib import Path

from corpus import SPECIAL, read_documents, split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).parent


def train_vocabulary(texts: Path, n_vocab: int, every_nth_dialogue: int) -> Tokenizer:
    """Merges learned on the training documents; dialogues thinned so that stories count as much."""
    training = {kind: split(docs)[0] for kind, docs in read_documents(texts).items()}
    training["dialogues"] = training["dialogues"][::every_nth_dialogue]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d for docs in training.values() for d in docs), trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, required=True, help="folder of the three texts")
    parser.add_argument("--out", type=Path, required=True, help="folder for tokenizer.json")
    args = parser.parse_args()
    settings = json.loads((HERE / "settings.json").read_text())["vocabulary"]
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_vocabulary(args.texts, **settings)
    tokenizer.save(str(args.out / "tokenizer.json"))
    print(f"{tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
