"""Writes adapters.json.gz: adapters as PEFT saves them, and the logits that PEFT computes with them.

Needs torch, transformers and peft, and convert.json.gz beside it:

    python tests/data/make_adapters.py
"""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from make_convert import IDS, weights, write_safetensors

HERE = Path(__file__).resolve().parent
STORED = json.loads(gzip.decompress((HERE / "convert.json.gz").read_bytes()))
ALL = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> model of convert.json.gz, LoraConfig's arguments
    "llama-all": ("llama", ALL),
    "llama-some": ("llama", {
        "target_modules": ["q_proj", "v_proj", "embed_tokens"], "r": 3, "lora_alpha": 5, "use_rslora": True,
        "rank_pattern": {"layers.1.self_attn.q_proj": 6}, "alpha_pattern": {"v_proj": 2},
    }),
    "llama-ffn": ("llama", {"target_modules": ["down_proj", "gate_proj"], "r": 2, "lora_alpha": 4}),
    "llama-mlp": ("llama", {"target_modules": ["up_proj", "o_proj"], "r": 1, "lora_alpha": 1}),
    "gpt2-all": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "r": 4}),
    "gptneox-all": ("gptneox", ALL),
    "falcon40-all": ("falcon40", ALL),
    "qwen2-all": ("qwen2", ALL),
    "phi3-all": ("phi3", ALL),
    "gemma3-all": ("gemma3", ALL),
}  # fmt: skip


def write_adapter(
    folder: Path, config: dict[str, Any], shapes: dict[str, tuple[str, list[int]]]
) -> None:
    """The folder of an adapter whose tensors have these names, types and shapes."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write_safetensors(folder / "adapter_model.safetensors", shapes)


def main() -> None:
    import peft
    import torch
    import transformers

    found: dict[str, Any] = {}
    for name, (base, arguments) in CASES.items():
        model = STORED["models"][base]
        with tempfile.TemporaryDirectory() as top:
            folder = Path(top) / base
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(model["config"]))
            write_safetensors(folder / "model.safetensors", model["shapes"])
            kind = getattr(transformers, model["config"]["architectures"][0])
            whole = kind.from_pretrained(folder, dtype=torch.float64).eval()
            plain = whole(torch.tensor([IDS])).logits[0, -1, :32].tolist()
            adapted = peft.get_peft_model(whole, peft.LoraConfig(**arguments)).eval()
            adapted.save_pretrained(Path(top) / "saved", save_embedding_layers=False)
            config = json.loads((Path(top) / "saved" / "adapter_config.json").read_text())
            config = {k: v for k, v in config.items() if k in (*arguments, "peft_type")}
            shapes = {}
            with torch.no_grad():
                for key, x in peft.get_peft_model_state_dict(
                    adapted, save_embedding_layers=False
                ).items():
                    shapes[key] = ("F32", list(x.shape))
                    x.copy_(torch.tensor(np.float64(weights(key, list(x.shape), "F32"))))
            y = adapted(torch.tensor([IDS])).logits[0, -1, :32].tolist()
        assert np.abs(np.subtract(y, plain)).max() > 0.1 * np.std(plain), name
        found[name] = {
            "base": base, "config": config, "shapes": shapes, "logits": [float(f"{v:.8g}") for v in y],
        }  # fmt: skip
    with gzip.GzipFile(HERE / "adapters.json.gz", "wb", mtime=0) as file:
        file.write(json.dumps(found).encode())


if __name__ == "__main__":
    main()
