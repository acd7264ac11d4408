"""Draw loss.csv as loss.svg: python plot.py."""

import csv
from pathlib import Path

import matplotlib.pyplot as plt
from corpus import KINDS

HERE = Path(__file__).parent


def main() -> None:
    with (HERE / "loss.csv").open() as file:
        lines = list(csv.DictReader(file))
    steps = [int(line["step"]) for line in lines]
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(steps, [float(line["training"]) for line in lines], "k:", label="training mixture")
    for kind in KINDS:
        axes.plot(steps, [float(line[kind]) for line in lines], label=f"held-out {kind}")
    axes.set(xlabel="step", ylabel="nats per token")
    axes.legend()
    figure.savefig(HERE / "loss.svg")


if __name__ == "__main__":
    main()
