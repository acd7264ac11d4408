"""Train the network on the CPU: python train.py --texts DIR --out DIR --minutes 68."""

import argparse
import copy
import csv
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from corpus import KINDS, batches, encode, one_of, read_documents, split
from network import Config, Llama
from tokenizers import Tokenizer
from torch import Tensor

HERE = Path(__file__).parent
HELD_OUT_BATCHES = 3


class MixedPrecision:
    """Float32 weights that are updated, and a copy of less precision (or the same) that computes."""

    def __init__(self, config: Config, precision: str) -> None:
        self.master = Llama(config)
        self.working = copy.deepcopy(self.master).to(getattr(torch, precision))
        self.loss = torch.compile(self.working.loss, dynamic=False)

    def backward(self, ids: Tensor) -> float:
        """One pass over ids [B, T+1]; leaves float32 gradients on the master weights."""
        loss = self.loss(ids)
        loss.backward()
        for weight, copied in self.pairs():
            weight.grad, copied.grad = copied.grad.float(), None
        return loss.item()

    @torch.no_grad()
    def refresh(self) -> None:
        for weight, copied in self.pairs():
            copied.copy_(weight)

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.master.parameters(), self.working.parameters(), strict=True)

    @torch.no_grad()
    def held_out_loss(self, batches: list[Tensor]) -> float:
        """Mean nats per id, without dropout."""
        self.working.eval()
        losses = [self.working.loss(ids).item() for ids in batches]
        self.working.train()
        return sum(losses) / len(losses)


class Optimizer:
    """AdamW; with ``muon``, Muon for the matrices of the blocks."""

    def __init__(
        self, network: Llama, learning_rate: float, weight_decay: float, muon: bool
    ) -> None:
        named = list(network.named_parameters())
        matrices = [p for name, p in named if p.dim() == 2 and name.startswith("blk.") and muon]
        tables = [p for name, p in named if p.dim() == 2 and not (name.startswith("blk.") and muon)]
        norms = [p for _, p in named if p.dim() == 1]
        groups = [{"params": tables}, {"params": norms, "weight_decay": 0.0}]
        self.parameters = [p for _, p in named]
        self.learning_rate = learning_rate
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, weight_decay=weight_decay, betas=(0.9, 0.99))
        ]
        if muon:
            self.parts.append(
                torch.optim.Muon(
                    matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
                )
            )

    def step(self, scale: float, gradient_norm: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, gradient_norm)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = scale * self.learning_rate
            part.step()
            part.zero_grad()


def schedule(progress: float, warmup: float) -> float:
    """Linear warm-up, then a cosine down to zero; progress and warmup are shares of the run."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


def load_config(settings: dict) -> Config:
    return Config(n_vocab=settings["vocabulary"]["n_vocab"], **settings["model"])


def tensors(stream: Iterator[np.ndarray], n: int) -> list[Tensor]:
    return [torch.from_numpy(next(stream)) for _ in range(n)]


class Run:
    """Data, network, optimizer, clock and log of one training run."""

    def __init__(self, texts: Path, out: Path, settings: dict, minutes: float, steps: int) -> None:
        self.begin = time.monotonic()
        self.out, self.minutes, self.steps = out, minutes, steps
        self.options = settings["training"]
        torch.manual_seed(self.options["seed"])
        config = load_config(settings)
        self.load_data(texts, settings["mixture"], self.options["n_row"] + 1)
        self.net = MixedPrecision(config, self.options["precision"])
        self.optimizer = Optimizer(
            self.net.master,
            self.options["learning_rate"],
            self.options["weight_decay"],
            self.options["muon"],
        )
        self.best = math.inf

    def start_from(self, checkpoint: Path) -> None:
        """Take the weights of an earlier run; the optimizer and the schedule start afresh."""
        self.net.master.load_state_dict(torch.load(checkpoint, weights_only=True))
        self.net.refresh()

    def load_data(self, texts: Path, mixture: dict[str, float], n: int) -> None:
        tokenizer = Tokenizer.from_file(str(self.out / "tokenizer.json"))
        parts = {kind: split(docs) for kind, docs in read_documents(texts).items()}
        training = {kind: encode(tokenizer, kind, parts[kind][0]) for kind in KINDS}
        held_out = {kind: encode(tokenizer, kind, parts[kind][1]) for kind in KINDS}
        n_batch, seed = self.options["n_batch"], self.options["seed"]
        self.stream = batches(training, mixture, n_batch, n, seed)
        self.held_out = {
            kind: tensors(batches(held_out, one_of(kind), n_batch, n, seed), HELD_OUT_BATCHES)
            for kind in KINDS
        }

    def elapsed(self) -> float:
        return (time.monotonic() - self.begin) / 60

    def progress(self, step: int) -> float:
        """Share of the run that is done: by steps where their number is given, else by the clock."""
        return step / self.steps if self.steps else self.elapsed() / self.minutes

    def train(self) -> None:
        step, losses, due = 0, [], 0.0
        while (progress := self.progress(step)) < 1:
            losses.append(self.net.backward(torch.from_numpy(next(self.stream))))
            scale = schedule(progress, self.options["warmup"])
            self.optimizer.step(scale, self.options["gradient_norm"])
            self.net.refresh()
            step += 1
            if self.elapsed() >= due:
                self.record(step, scale, losses)
                losses, due = [], self.elapsed() + self.options["evaluate_minutes"]
        if losses:
            self.record(step, 0.0, losses)

    def record(self, step: int, scale: float, losses: list[float]) -> None:
        """One line of the log, and a checkpoint where the held-out loss is the lowest so far."""
        held_out = {kind: self.net.held_out_loss(ids) for kind, ids in self.held_out.items()}
        mean = sum(losses) / max(1, len(losses))
        line = {"step": step, "minutes": self.elapsed(), "rate": scale, "training": mean}
        write_line(self.out / "loss.csv", {**line, **held_out}, fresh=step == 1)
        torch.save(self.net.master.state_dict(), self.out / "last.pt")
        # The stories decide: they are the smallest text, the first to be learned by heart.
        if held_out["stories"] < self.best:
            self.best = held_out["stories"]
            torch.save(self.net.master.state_dict(), self.out / "best.pt")


def write_line(path: Path, line: dict[str, float], fresh: bool) -> None:
    text = {k: v if isinstance(v, int) else f"{v:.4f}" for k, v in line.items()}
    print(text, flush=True)
    with path.open("w" if fresh else "a", newline="") as file:
        writer = csv.DictWriter(file, list(text), lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, required=True, help="folder of the three texts")
    parser.add_argument("--out", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--minutes", type=float, default=68, help="length of the run")
    parser.add_argument("--steps", type=int, default=0, help="length in steps instead")
    parser.add_argument("--start", type=Path, help="a checkpoint to continue from")
    parser.add_argument("--settings", type=Path, default=HERE / "settings.json")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = json.loads(args.settings.read_text())
    run = Run(args.texts, args.out, settings, args.minutes, args.steps)
    if args.start:
        run.start_from(args.start)
    run.train()


if __name__ == "__main__":
    main()
