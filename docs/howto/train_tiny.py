"""Train a tiny Llama on a text, and save it as Hugging Face's libraries do: train_tiny.py TEXT FOLDER STEPS."""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

text, folder, steps = Path(sys.argv[1]).read_text("utf-8"), sys.argv[2], int(sys.argv[3])
end, alphabet = "<|endoftext|>", pre_tokenizers.ByteLevel.alphabet()
tok = Tokenizer(models.BPE())
tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tok.decoder = decoders.ByteLevel()
bpe = trainers.BpeTrainer(vocab_size=512, special_tokens=[end], initial_alphabet=alphabet)
tok.train_from_iterator([text], bpe)
ids = torch.tensor(tok.encode(text).ids)

sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
vocabulary = {"vocab_size": tok.get_vocab_size(), "bos_token_id": 0, "eos_token_id": 0}
model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **vocabulary))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(steps):
    at = torch.randint(len(ids) - 64, (16,))
    batch = torch.stack([ids[i : i + 64] for i in at])
    loss = model(batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
sys.stdout.write(f"loss {loss.item():.2f} after {steps} steps\n")
model.save_pretrained(folder)
PreTrainedTokenizerFast(tokenizer_object=tok, eos_token=end).save_pretrained(folder)
