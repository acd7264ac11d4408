"""Draw loss.csv as loss.svg: python plot.py."""

import csv
from pathlib import Path

from corpus import KINDS

from tinyllm import plots

HERE = Path(__file__).parent


def main() -> None:
    with (HERE / "loss.csv").open() as file:
        lines = list(csv.DictReader(file))
    steps = [int(line["step"]) for line in lines]
    names = {"training": "training mixture"} | {kind: f"held-out {kind}" for kind in KINDS}
    plots.lines(
        {name: (steps, [float(line[key]) for line in lines]) for key, name in names.items()},
        xlabel="step",
        ylabel="nats per token",
        path=HERE / "loss.svg",
    )


if __name__ == "__main__":
    main()
