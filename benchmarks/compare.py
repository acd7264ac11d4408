"""Whole models beside other engines: the same file, the same threads, in turn within the same minute.

    python benchmarks/compare.py llama-1b-Q4_0.gguf --engines tinyllm,llamacpp,gpt4all \\
        --python llamacpp=peers/bin/python -t 2 --rounds 5 --json benchmarks/results/compare.json
    python benchmarks/compare.py model.gguf --depth 4096 --engines tinyllm,llamacpp-fa   # decode far in
    python benchmarks/compare.py model.gguf --sequences 8 --engines tinyllm              # eight at once
    python benchmarks/compare.py model.gguf --depth 512 --busy 1,2         # beside busy neighbours
    python benchmarks/compare.py small.gguf --reference     # logits beside the dequantised product's

Each engine lives in a process of its own for the whole comparison and is asked for one measurement at a
time: round after round, one engine after the other. A ratio is the median over rounds of ours to theirs
within the round, because the speed of a shared machine drifts by more than engines differ.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import common
import numpy as np
from common import HERE, Worker, ratios, show, spread

OURS = "tinyllm"
KNOWN = (OURS, "llamacpp", "llamacpp-fa", "llama-bench", "ik", "ik-repacked", "gpt4all")
WAYS = ("generate", "step")
LIMIT_S = 0.5  # spent on measuring the read bandwidth, each round


def compare(model: Path, o: argparse.Namespace) -> dict[str, Any]:
    """All rounds on one file."""
    common.read_once(model)
    with ExitStack() as stack:
        workers = {e: stack.enter_context(worker(e, o.python)) for e in o.engines}
        n_ctx = (o.depth or o.prompt) + o.tokens + 16
        args = {"model": str(model), "threads": o.threads, "n_ctx": n_ctx}
        loaded, refused = load(workers, args)
        ids = prompt(o.depth or o.prompt, min(x["n_vocab"] or 30000 for x in loaded.values()))
        engines = {e: about(w, loaded[e]) for e, w in workers.items()}
        report = {"model": model.stem, "file_bytes": model.stat().st_size, "engines": engines}
        report["refused"] = refused
        machine = stack.enter_context(worker("limits", {}))
        rounds, limit = [], {"threads": o.threads, "seconds": LIMIT_S}
        for i in range(-1, o.rounds):
            bandwidth = machine.ask("read_bandwidth", **limit)
            found = one_round(workers, loaded, ids, o, i)
            rounds.append(found | {"read_bandwidth": bandwidth})
        report |= summary(rounds[1:], engines, len(ids), o)
        shown = [w for e, w in workers.items() if "logits" in loaded[e]["shows"]]
        report["logits"] = fidelity(shown, args, ids, o)
        for e, w in workers.items():
            engines[e] |= {"idle_share": w.idle_share, "peak_rss_bytes": w.ask("memory")}
    return report


def load(
    workers: dict[str, Worker], args: dict[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What the engines say of the loaded file; those that refuse it are taken out, with their reasons."""
    loaded, refused = {}, {}
    for name, w in list(workers.items()):
        try:
            loaded[name] = w.ask("load", **args)
        except RuntimeError as e:
            refused[name] = str(e)
            del workers[name]
    if not loaded:
        sys.exit("; ".join(refused.values()))
    return loaded, refused


@contextmanager
def worker(engine: str, pythons: dict[str, str]) -> Iterator[Worker]:
    """An engine's process; "llamacpp-fa" runs where "llamacpp" does."""
    python = pythons.get(engine, pythons.get(engine.partition("-")[0], sys.executable))
    w = Worker(python, HERE / "engines.py", engine)
    try:
        yield w
    finally:
        w.close()


def prompt(n: int, n_vocab: int) -> list[int]:
    """Ids of ordinary tokens, the same for all engines."""
    low = min(100, n_vocab // 4)
    return [low + (i * 7919) % min(30000, n_vocab // 2) for i in range(n)]


def about(w: Worker, loaded: dict[str, Any]) -> dict[str, Any]:
    """What is known of an engine before it is timed."""
    known = {k: loaded[k] for k in ("version", "load_s")}
    return known | ({"about": w.ask("about")} if "about" in loaded["shows"] else {})


# ---- measuring


def one_round(
    workers: dict[str, Worker],
    loaded: dict[str, Any],
    ids: list[int],
    o: argparse.Namespace,
    i: int,
) -> dict[str, Any]:
    """Every engine once, each way.

    Round -1 warms up: it compiles, touches memory and finds the steps' sizes.
    """
    found: dict[str, Any] = {}
    for name, w in workers.items():
        found[name] = {}
        for way in [way for way in o.ways if way in loaded[name]["ways"]]:
            keep = o.depth is not None
            found[name][way] = w.measure(way=way, ids=ids, n=o.tokens, keep=keep)
        if name == OURS and o.sequences:
            args = {"ids": ids, "n": o.tokens, "sequences": o.sequences}
            found["together_s"] = w.ask("together", **args)
    if i >= 0:
        found["busy"] = {str(n): beside(n, workers, loaded, ids, o) for n in o.busy}
    say(f"{'warm-up' if i < 0 else f'round {i + 1} of {o.rounds}'}: {line(found, ids, o)}")
    return found


def beside(
    n: int,
    workers: dict[str, Worker],
    loaded: dict[str, Any],
    ids: list[int],
    o: argparse.Namespace,
) -> dict[str, float]:
    """Seconds in which each engine decodes, in turn, while n other processes compute."""
    seconds = {}
    with common.neighbours(n):
        for name, w in workers.items():
            way = next(way for way in o.ways if way in loaded[name]["ways"])
            seconds[name] = w.measure(way=way, ids=ids, n=o.tokens, keep=True)["decode_s"]
    rates = ", ".join(f"{name} {o.tokens / s:.1f}" for name, s in seconds.items())
    say(f"beside {n} busy: {rates}")
    return seconds


def line(found: dict[str, Any], ids: list[int], o: argparse.Namespace) -> str:
    """One round's rates, for those who watch."""
    parts = []
    for name, ways in found.items():
        for way, t in ways.items() if isinstance(ways, dict) else ():
            if way in o.ways:
                read = "" if o.depth else f"{len(ids) / t['prefill_s']:.0f} / "
                parts.append(f"{name} {way} {read}{o.tokens / t['decode_s']:.1f}")
    return ", ".join(parts)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def fidelity(
    workers: list[Worker],
    args: dict[str, Any],
    ids: list[int],
    o: argparse.Namespace,
) -> list[dict[str, Any]]:
    """How far the engines' logits after the prompt are from each other, or from the reference's."""
    ids = ids[: o.prompt]
    with tempfile.TemporaryDirectory() as folder:
        logits = {}
        for w in workers:
            logits[w.name] = last_logits(w, ids, folder)
        if o.reference:
            with worker("reference", o.python) as w:
                w.ask("load", **args)
                logits["reference"] = last_logits(w, ids, folder)
    base = next((name for name in ("reference", OURS) if name in logits), None)
    return [difference(n, x, base, logits[base]) for n, x in logits.items() if base and n != base]


def last_logits(w: Worker, ids: list[int], folder: str) -> np.ndarray:
    path = os.path.join(folder, f"{w.name}.npy")
    w.ask("logits", ids=ids, path=path)
    return np.load(path).astype(np.float64)


def difference(name: str, x: np.ndarray, base: str, y: np.ndarray) -> dict[str, Any]:
    """In standard deviations of the logits that are compared with."""
    error = (x - y) / y.std()
    return {
        "engine": name,
        "compared_with": base,
        "max_error": float(np.abs(error).max()),
        "rms_error": float(np.sqrt((error**2).mean())),
        "same_argmax": bool(x.argmax() == y.argmax()),
    }


# ---- reporting


def summary(
    rounds: list[dict[str, Any]], engines: dict[str, Any], n_read: int, o: argparse.Namespace
) -> dict[str, Any]:
    """Rates of each engine and way, and ours to each other's."""
    rates: dict[str, Any] = {}
    for name in engines:
        for way in [w for w in o.ways if w in rounds[0][name]]:
            times = [r[name][way] for r in rounds]
            row = {f"tg{o.tokens}": spread(o.tokens / t["decode_s"] for t in times)}
            if o.depth is None:
                row = {f"pp{n_read}": spread(n_read / t["prefill_s"] for t in times)} | row
            rates.setdefault(name, {})[way] = row
    out: dict[str, Any] = {"depth": n_read, "tokens_per_s": rates, "ratios": against(rates)}
    if o.busy:
        out["busy"] = {str(n): busy(str(n), rounds, rates, o) for n in o.busy}
    if OURS in engines:
        out |= limits(rounds, engines[OURS]["about"], rates[OURS], o)
    return out


def against(rates: dict[str, Any]) -> dict[str, Any]:
    """Ours to each other engine's, way by way, test by test."""
    ours = rates.get(OURS, {})
    return {
        name: {
            way: {t: ratios(ours[way][t]["all"], s["all"]) for t, s in tests.items()}
            for way, tests in ways.items()
            if way in ours
        }
        for name, ways in rates.items()
        if name != OURS and ours
    }


def busy(
    n: str, rounds: list[dict[str, Any]], rates: dict[str, Any], o: argparse.Namespace
) -> dict[str, Any]:
    """Rates beside n busy processes, ours to each other's, and each to its own without them."""
    beside = {e: [o.tokens / r["busy"][n][e] for r in rounds] for e in rates}
    alone = {e: next(iter(ways.values()))[f"tg{o.tokens}"]["all"] for e, ways in rates.items()}
    ours = beside.get(OURS)
    return {
        "tokens_per_s": {e: spread(x) for e, x in beside.items()},
        "ratios": {e: ratios(ours, x) for e, x in beside.items() if ours and e != OURS},
        "to_alone": {e: ratios(x, alone[e]) for e, x in beside.items()},
    }


def limits(
    rounds: list[dict[str, Any]], known: dict[str, Any], ours: dict[str, Any], o: argparse.Namespace
) -> dict[str, Any]:
    """Our decoding beside the machine's read bandwidth, and many sequences beside one."""
    bandwidth = [r["read_bandwidth"] for r in rounds]
    per_token = known["bytes_per_token"]
    out: dict[str, Any] = {
        "read_gb_per_s": spread(b / 1e9 for b in bandwidth),
        "weights_gb_per_token": per_token / 1e9,
        "fraction_of_bandwidth": {
            way: ratios([per_token * x for x in tests[f"tg{o.tokens}"]["all"]], bandwidth)
            for way, tests in ours.items()
        },
    }
    if o.sequences and "step" in ours:
        together = [o.sequences * o.tokens / r["together_s"] for r in rounds]
        out["sequences"] = {
            "count": o.sequences,
            "tokens_per_s": spread(together),
            "to_one": ratios(together, ours["step"][f"tg{o.tokens}"]["all"]),
        }
    return out


def as_text(r: dict[str, Any]) -> str:
    """One file's results as tables."""
    head = ["engine", "way", *next(iter(next(iter(r["tokens_per_s"].values())).values()))]
    rows = []
    for name, ways in r["tokens_per_s"].items():
        for way, tests in ways.items():
            rows.append([name, way, *(show(s) for s in tests.values())])
    for name, ways in r["ratios"].items():
        for way, tests in ways.items():
            rows.append([f"ours / {name}", way, *(show(s, 2) + " x" for s in tests.values())])
    at = f"{r['file_bytes'] / 1e6:.0f} MB; tokens/s, decoding from depth {r['depth']}"
    at += f"; our kernels: {kernels}" if (kernels := instruction_set(r)) else ""
    parts = [f"## {r['model']} ({at})", common.table(head, rows), *busy_table(r), engine_table(r)]
    return "\n\n".join([*parts, "\n".join(remarks(r))])


def instruction_set(r: dict[str, Any]) -> str | None:
    """What our kernels were compiled for, if they took part."""
    return r["engines"].get(OURS, {}).get("about", {}).get("instruction set")


def busy_table(r: dict[str, Any]) -> Iterator[str]:
    """Decoding beside busy processes, if that was measured."""
    rows = []
    for n, found in r.get("busy", {}).items():
        for e, s in found["tokens_per_s"].items():
            to_alone = show(found["to_alone"][e], 2) + " x"
            ratio = show(found["ratios"][e], 2) + " x" if e in found["ratios"] else ""
            rows.append([n, e, show(s), to_alone, ratio])
    if rows:
        head = ["busy processes beside it", "engine", "tokens/s", "to itself alone", "ours to it"]
        yield common.table(head, rows)


def engine_table(r: dict[str, Any]) -> str:
    """Loading and memory."""
    rows = [
        [e["version"], f"{e['load_s']:.2f}", f"{e['peak_rss_bytes'] / 1e6:.0f}",
         f"{e['peak_rss_bytes'] / r['file_bytes']:.2f}", f"{e['idle_share']:.3f}"]
        for e in r["engines"].values()
    ]  # fmt: skip
    return common.table(["engine", "load s", "peak MB", "peak / file", "cores while idle"], rows)


def remarks(r: dict[str, Any]) -> Iterator[str]:
    """What does not fit a table."""
    if "read_gb_per_s" in r:
        parts = [f"{show(s, 2)} ({way})" for way, s in r["fraction_of_bandwidth"].items()]
        yield f"- Reading memory: {show(r['read_gb_per_s'])} GB/s; weights read in decoding, of that: "
        yield "  " + ", ".join(parts)
    if s := r.get("sequences"):
        rate, to_one = show(s["tokens_per_s"]), show(s["to_one"], 2)
        yield f"- {s['count']} sequences together: {rate} tokens/s, {to_one} x one"
    for d in r["logits"]:
        same = "the same" if d["same_argmax"] else "another"
        yield (
            f"- Logits of {d['engine']} beside {d['compared_with']}'s: largest difference {d['max_error']:.4f} "
            f"standard deviations, RMS {d['rms_error']:.5f}; {same} likeliest token"
        )
    for reason in r["refused"].values():
        yield f"- Refused: {reason}"
    yield from common.warnings({name: e["idle_share"] for name, e in r["engines"].items()})


# ---- command line


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("models", nargs="+", type=common.existing, help="GGUF files")
    add("--engines", type=common.names, default=[OURS, "llamacpp"], help=",".join(KNOWN))
    add("--ways", type=common.names, default=["generate", "step"], help="generate,step")
    add("-p", "--prompt", type=int, default=512, help="tokens of prompt")
    add("-n", "--tokens", type=int, default=64, help="tokens to decode after it")
    add(
        "-d",
        "--depth",
        type=int,
        help="decode after so many tokens, read once; no prefill is timed",
    )
    add("-t", "--threads", type=int, default=os.cpu_count(), help="of each engine")
    add("--rounds", type=int, default=5, help="after one to warm up")
    add("--sequences", type=int, help="also decode so many together (ours only)")
    add(
        "--busy",
        type=common.counts,
        default=[],
        help="also decode while so many other processes compute, such as 1,2",
    )
    add(
        "--reference",
        action="store_true",
        help="compare logits with the dequantised product's (slow)",
    )
    common.add_peers(parser)
    o = parser.parse_args(argv)
    o.python = dict(o.python)
    for what, known in (("engines", KNOWN), ("ways", WAYS)):
        if unknown := set(getattr(o, what)) - set(known):
            parser.error(f"--{what} {','.join(unknown)}; expected some of {','.join(known)}")
    if min(o.prompt, o.tokens, o.threads or 1, o.rounds, o.depth or 1) < 1:
        parser.error("-p, -n, -d, -t and --rounds must be at least 1")
    if o.sequences and "step" not in o.ways:
        parser.error("--sequences is compared with one sequence by steps; add step to --ways")
    return o


def main(argv: list[str] | None = None) -> None:
    """Compare, print tables, write JSON."""
    o = options(argv)
    shown = ("prompt", "tokens", "depth", "threads", "rounds", "sequences")
    settings = {k: getattr(o, k) for k in shown} | {"busy": o.busy or None}
    report: dict[str, Any] = {
        "benchmark": "compare",
        "machine": common.machine(),
        "settings": settings,
    }
    common.each_model(report, o, compare, as_text)


if __name__ == "__main__":
    main()
