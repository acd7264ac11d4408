"""Does a control vector steer? A probe that never saw its texts tells formal answers from casual ones.

    python benchmarks/steering.py model.gguf [--json FILE]

The vector is made from one half of the pairs below, the probe from the other half; the probe's score is of
pairs that it had not seen. The model then answers requests with the vector added at several scales, and reads
its answers again without it: the probe says how formal each is, the perplexity whether it is still language.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import common
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tinyllm
from tinyllm.research import ControlVector, Probe

PAIRS = """\
I would be grateful if you could send me the report.|hey can you shoot me that report
We regret to inform you that the meeting has been cancelled.|sorry guys the meeting's off
I am writing to enquire about the position advertised.|so is that job still open or what
Please accept my sincere apologies for the delay.|my bad, sorry it took forever
It is imperative that all employees attend the session.|everybody's gotta show up, no excuses
The results of the study were considerably better than expected.|wow the study went way better than we thought
I should like to express my gratitude for your assistance.|thanks a ton for helping me out, you rock
The committee has decided to postpone its decision.|they're gonna sit on it for a while I guess
We kindly request that you refrain from smoking.|don't smoke here ok? not cool
He was unable to attend owing to a prior engagement.|he couldn't make it, had other stuff going on
The children were exceedingly pleased with their presents.|the kids totally loved their stuff
One must consider the consequences of such an action.|dude, think about what's gonna happen
Allow me to introduce my esteemed colleague.|this is my buddy from work
The weather was most disagreeable throughout the journey.|ugh the weather sucked the whole trip
I have the pleasure of inviting you to our annual dinner.|wanna come to our dinner thing? it'll be fun
The vehicle requires immediate repair.|the car's busted, gotta fix it asap
Your request has been forwarded to the relevant department.|yeah I passed it on to those guys
She possesses an extensive knowledge of the subject.|she knows tons about this stuff
We are not in a position to comment at the present time.|no clue, can't say anything right now
The performance was received with great enthusiasm.|people went nuts for the show
It would be advisable to consult a physician.|you should probably go see a doc
The company has experienced a substantial loss of revenue.|the company's losing a ton of cash
I look forward to hearing from you at your earliest convenience.|hit me back when you get a sec
The gentleman declined to provide his name.|the guy wouldn't say who he was
Kindly ensure that the door is closed upon departure.|shut the door when you head out, k?
The proposal was rejected on account of its considerable cost.|they said nope, way too pricey
I must respectfully disagree with your assessment.|nah, I don't buy that
The residence is situated in close proximity to the river.|the place is right by the river, pretty sweet
We would appreciate your prompt attention to this matter.|can you get on this real quick? thanks
The audience remained silent for the duration of the lecture.|nobody said a word the whole time, super weird
It is with great sadness that we announce his resignation.|bummer, he quit
The food was prepared in accordance with traditional methods.|grandma style cooking, yum, so good
Permit me to explain the reasons for our decision.|ok so here's why we did it
The examination proved to be exceptionally difficult.|man that test was brutal
Guests are requested to arrive no later than seven o'clock.|be there by seven, don't be late lol
He expressed considerable dissatisfaction with the service.|he was super mad about the service
The instructions must be followed with the utmost care.|just do what it says, don't mess it up
Our representatives are available to provide further information.|got questions? just ask us, no biggie
I was most impressed by the quality of the exhibition.|that art show was awesome, I was blown away
The contract shall be terminated upon thirty days' notice.|we can ditch the deal with a month's heads up
"""
REQUESTS = [
    "Write a short message that invites a friend to dinner.",
    "What do you think of the weather in autumn?",
    "Tell me about your favourite food.",
    "Write a short note about a lost key.",
    "How was the football match?",
    "Say something about learning to cook.",
    "Describe a day at the beach.",
    "What should I do when I am tired?",
    "Write two sentences about a new car.",
    "Tell me how to make tea.",
    "Write a reply to someone who is late.",
    "What is good about living in a city?",
]
SCALES = (-1.6, -0.8, 0.0, 0.8, 1.6)


def readings(m: tinyllm.Model, texts: list[str], layer: int) -> np.ndarray:
    """The mean row of each text after a layer, without its first token [n, E]."""
    caches = m.run_with_cache(texts, f"blk.{layer}.out", positions=slice(1, None))
    return np.stack([c[f"blk.{layer}.out"].mean(0) for c in caches])


def losses(m: tinyllm.Model, texts: list[str]) -> list[float]:
    """The mean loss of each text's tokens, nats."""
    found = []
    for text in texts:
        ids = m.prompt_ids(text)
        logits = m.logits(ids)[:-1].astype(np.float64)
        top = logits.max(1)
        total = top + np.log(np.exp(logits - top[:, None]).sum(1))
        found.append(float((total - logits[np.arange(len(ids) - 1), ids[1:]]).mean()))
    return found


def answers(model: str, vector: Path, scale: float, n: int) -> list[str]:
    """The answers of the model loaded with the vector, greedily and once by chance."""
    with tinyllm.load(model, control=[(vector, scale)]) as m, tinyllm.Engine(m) as engine:
        requests = [
            engine.submit(
                [{"role": "user", "content": request}], max_tokens=n, temperature=t, seed=1
            )
            for t in (0.0, 0.8)
            for request in REQUESTS
        ]
        return [r.result().text.strip() or "nothing" for r in requests]


def measure(m: tinyllm.Model, model: str, n: int) -> dict[str, Any]:
    pairs = [line.split("|") for line in PAIRS.splitlines()]
    ours, probes = pairs[::2], pairs[1::2]
    depth = m.config.n_layer
    first, last, read = depth // 3, depth // 2, 2 * depth // 3
    vector = m.control_vector(
        [formal for formal, _ in ours], [casual for _, casual in ours], "mean", slice(1, None)
    ).layers(first, last)
    vector = ControlVector({int(i): x / len(vector) for i, x in vector.items()}, vector.hint)
    file = Path(mkdtemp()) / "formal.gguf"
    vector.write(file)
    texts = [text for pair in probes for text in pair]
    probe = Probe.fit(
        readings(m, texts, read),
        np.tile([True, False], len(probes)),
        groups=[i // 2 for i in range(len(texts))],
    )
    scale_of_kinds = probe.predict(readings(m, texts, read)).reshape(-1, 2).mean(0)
    rows = []
    for scale in SCALES:
        written = answers(model, file, scale, n)
        formal = probe.predict(readings(m, written, read))
        rows.append(
            {
                "scale": scale,
                "formality": float(formal.mean()),
                "error": float(formal.std(ddof=1) / np.sqrt(len(formal))),
                "called_formal": float((formal > 0).mean()),
                "perplexity": float(np.exp(np.mean(losses(m, written)))),
                "examples": written[:3],
            }
        )
        r = rows[-1]
        print(f"{scale:6.1f} {r['formality']:7.2f} ± {r['error']:.2f} {r['called_formal']:6.0%} "
              f"{r['perplexity']:8.2f}  {written[0]!r:.90}", flush=True)  # fmt: skip
    return {
        "layers": [first, last], "probe_layer": read, "probe_accuracy": probe.score,
        "probe_of_formal_and_casual": scale_of_kinds.tolist(), "answers": len(REQUESTS) * 2,
        "rows": rows,
    }  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("model")
    p.add_argument("-n", type=int, default=32, help="tokens of an answer; default %(default)s")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    with tinyllm.load(args.model) as m:
        found = measure(m, args.model, args.n)
    print(f"the probe is right about {found['probe_accuracy']:.0%} of sentences it had not seen")
    if args.json:
        report = {"machine": common.machine(), "model": Path(args.model).name, **found}
        common.write_json(args.json, report)


if __name__ == "__main__":
    main()
