"""Makes tests/data/wordpiece.json.gz: Hugging Face's ids of texts for the vocabulary of all-MiniLM-L6-v2.

Needs the package tokenizers and the models of the test data. Run from the repository's root::

    PYTHONPATH=. python tests/tokenizers/make_wordpiece.py ../shared/data
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parent))

from samples import HAND_MADE, UNLIKE_WORDPIECE, random_texts

from tinyllm import gguf
from tinyllm.tokenizers.spm import SPACE

SCRIPTS = [
    "नमस्ते दुनिया", "বাংলা ভাষা", "தமிழ்", "മലയാളം", "안녕하세요 세계", "각 한국어 힣", "e\u0301a\u0300 \u0301x",
    "Việt Nam", "Ångström café naïve", "İstanbul ı ẞ ß", "สวัสดีชาวโลก", "ｱｲ ガ が",
    "\u1100\u1161\u11a8", "a\x0bb\x85c\x1fd",
]  # fmt: skip


def main(data: Path) -> None:
    """Write the texts that tell Hugging Face's tokenizer from others, and some more."""
    file = gguf.open(data / "models" / "all-MiniLM-L6-v2.gguf2.f16.gguf")
    vocabulary: dict[str, int] = {}
    for i, token in enumerate(file.metadata["tokenizer.ggml.tokens"]):
        inner = token if token[:1] == "[" else "##" + token
        vocabulary.setdefault(token[1:] if token[:1] == SPACE else inner, i)
    model = models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100)
    oracle = Tokenizer(model)
    oracle.normalizer = normalizers.BertNormalizer(lowercase=True)
    oracle.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    mixed = [t for t in HAND_MADE + random_texts(400, seed=7) if UNLIKE_WORDPIECE.search(t)]
    texts = [t for t in SCRIPTS + mixed if "[CLS]" not in t]
    ids = [oracle.encode(t, add_special_tokens=False).ids for t in texts]
    path = Path(__file__).resolve().parent.parent / "data" / "wordpiece.json.gz"
    packed = json.dumps({"texts": texts, "ids": ids}, separators=(",", ":")).encode()
    path.write_bytes(gzip.compress(packed, mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
