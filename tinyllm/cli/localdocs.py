"""``tinyllm localdocs``: collections of documents on the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError
from ..system import expanded
from .arguments import (
    MODEL_HELP,
    Arguments,
    Command,
    Parser,
    json_option,
    load_decoder,
    load_options,
    note,
)
from .terminal import show

if TYPE_CHECKING:
    from ..localdocs import Hit, LocalDocs, Report
    from ..model import Model

WORDS = {  # what an action takes: at least so many words, at most so many
    "add": ("NAME FOLDER ...", 2, None),
    "update": ("[NAME ...]", 0, None),
    "watch": ("[NAME ...]", 0, None),
    "search": ("NAME QUERY", 2, 2),
    "quote": ("NAME QUESTION", 2, 2),
    "ask": ("NAME QUESTION", 2, 2),
    "list": ("", 0, 0),
    "unreadable": ("NAME", 1, 1),
    "rm": ("NAME", 1, 1),
    "check": ("", 0, 0),
    "reembed": ("", 0, 0),
}


SUFFIXES = 8  # that are told of files that were passed over
KEPT = "\n\u200c\u200d"  # line ends, and what joins or parts letters and emoji


def localdocs_arguments(p: Parser) -> None:
    actions = "; ".join(f"{name} {words}".strip() for name, (words, _, _) in WORDS.items())
    p.add_argument("action", metavar="ACTION", choices=tuple(WORDS), help=actions)
    p.add_argument("words", metavar="WORD", nargs="*", help="NAME: a collection; - for all of them")
    p.add_argument("--store", metavar="FILE",
                   help="default: localdocs.sqlite in the user's data folder")  # fmt: skip
    p.add_argument("-m", "--model", metavar="MODEL",
                   help=f"ask: what answers, {MODEL_HELP}; else: what embeds, default"
                   " the store's own, at first all-MiniLM-L6-v2 of GPT4All's list")  # fmt: skip
    p.add_argument(
        "-k",
        type=int,
        metavar="N",
        help="hits (default 5), sentences (3), excerpts of an answer (4)",
    )
    p.add_argument(
        "--file", metavar="PATTERN", help="only in files of such names: '*.md', 'garden/*'"
    )
    p.add_argument("--since", metavar="DATE", help="only in documents since 2026-01-31, or 2026")
    p.add_argument("--until", metavar="DATE", help="only in documents until then")
    p.add_argument("--reranker", metavar="MODEL", help="a ranking model that orders the hits")
    p.add_argument("--nearest", type=float, metavar="X",
                   help="ask, quote: nearness that an excerpt must have; default 0.45")  # fmt: skip
    p.add_argument("-n", "--max-tokens", type=int, default=256, metavar="N", help="of an answer")
    p.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="default %(default)s"
    )
    p.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    load_options(p)
    json_option(p)


def localdocs(args: Arguments) -> None:
    from ..localdocs import LocalDocs

    words, least, most = WORDS[args.action]
    if len(args.words) < least or (most is not None and len(args.words) > most):
        raise ArgumentError(
            f"expected: tinyllm localdocs {args.action} {words}".rstrip()
            + f"; found {len(args.words)} words" + "; put a question between quotes" * bool(most and most > 1)
        )  # fmt: skip
    if args.store is not None and args.action != "add" and not expanded(args.store).exists():
        raise ArgumentError(
            f"there is no store {args.store!r:.200}; `tinyllm localdocs add` makes one"
        )
    embeds = None if args.action == "ask" else args.model
    with LocalDocs(args.store, embeds, args.n_threads) as docs:
        ACTIONS[args.action](docs, args)


def add(docs: LocalDocs, args: Arguments) -> None:
    name, *folders = args.words
    tell(args, {name: docs.add(name, *folders)})
    said_before(docs)


def update(docs: LocalDocs, args: Arguments) -> None:
    tell(args, docs.update(*args.words))


def watch(docs: LocalDocs, args: Arguments) -> None:
    note("watching; Ctrl-C ends it")
    for reports in docs.watch(*args.words):
        tell(args, {name: r for name, r in reports.items() if r.anything})
        sys.stdout.flush()


def tell(args: Arguments, reports: dict[str, Report]) -> None:
    """Say what an update did."""
    for name, r in reports.items():
        if args.json:
            print_json({"collection": name, **vars(r)})
            continue
        show(
            f"{name}: {r.added} files added, {r.changed} changed, {r.removed} gone, {r.unchanged} as before;"
            f" {r.embedded} texts embedded\n"
        )
        if r.passed_over:
            show(f"passed over: {passed(r.passed_over)}\n")
        for file, reason in r.unreadable:
            show(f"not read: {file}: {reason}\n")


def passed(counts: dict[str, int]) -> str:
    """How many files were passed over, and of which suffixes: the most frequent ones."""
    told = [f"{n} {suffix or 'without a suffix'}" for suffix, n in counts.items()]
    rest = sum([*counts.values()][SUFFIXES:])
    more = f", {rest} others" if rest else ""
    return f"{sum(counts.values())} files of kinds that are not read ({', '.join(told[:SUFFIXES])}{more})"


def waiting(docs: LocalDocs, args: Arguments, *names: str) -> str:
    """What is to be said of texts without vectors; "" where all have theirs."""
    n, total = docs.pending(*names)
    store = "" if args.store is None else f" --store {args.store}"
    return (
        f"{n} of {total} texts have no vectors yet; run `tinyllm localdocs update{store}`" * bool(n)
    )


def warned(docs: LocalDocs, args: Arguments) -> None:
    """Tell what a question would miss: an unknown collection, texts without vectors."""
    if args.words[0] == "-" and not docs.list():
        raise ArgumentError("there are no collections; make one: tinyllm localdocs add NAME FOLDER")
    if text := waiting(docs, args, *(n for n in args.words[:1] if n != "-")):
        note(text)


def said_before(docs: LocalDocs) -> None:
    """Say what a search will take, where that is much."""
    if docs.search_bytes > 100e6:
        note(f"a search keeps {docs.search_bytes / 1e6:,.0f} MB in memory")


def chosen(args: Arguments) -> dict[str, Any]:
    """The filters, as ``LocalDocs.search`` takes them."""
    found = {name: getattr(args, name) for name in ("k", "file", "since", "until")}
    if args.words[0] != "-":
        found["collections"] = args.words[0]
    if args.reranker is not None:
        from ..loading import load
        from .arguments import locate

        found["reranker"] = load(locate(args.reranker), n_threads=args.n_threads)
    return {name: value for name, value in found.items() if value is not None}


def search(docs: LocalDocs, args: Arguments) -> None:
    warned(docs, args)
    hits = docs.search(args.words[1], **chosen(args))
    if not hits:
        note("nothing found")
    if args.json:
        print_json([*map(as_json, hits)])
        return
    show("\n".join(map(as_text, hits)))


def as_json(hit: Hit) -> dict[str, Any]:
    """A hit for a program."""
    more = ("collection", "path", "score", "similarity", "nearness")
    return hit.reference() | {name: getattr(hit, name) for name in more}


def as_text(hit: Hit) -> str:
    """A hit in lines; the first begins with its file."""
    about = f" ({hit.heading or hit.title})" if hit.heading or hit.title else ""
    return (
        f"{hit.place}{about}, score {hit.score:.4f}, similarity {hit.similarity:.2f},"
        f" nearness {hit.nearness:.2f}\n{lines_of(hit)}"
    )


def lines_of(hit: Hit) -> str:
    """The lines of a text without those that are empty, since an empty line parts two hits."""
    text = "".join(c if c.isprintable() or c in KEPT else " " for c in hit.text)
    return "".join(f"{line}\n" for line in text.split("\n") if line.strip())


def quote(docs: LocalDocs, args: Arguments) -> None:
    nearest = {} if args.nearest is None else {"nearest": args.nearest}
    warned(docs, args)
    hits = docs.quote(args.words[1], **chosen(args), **nearest)
    if args.json:
        print_json([*map(as_json, hits)])
        return
    show(as_quotes(hits))
    if not hits:
        from ..localdocs.answering import NOT_THERE

        show(f"{NOT_THERE}\n")


def as_quotes(hits: Sequence[Hit]) -> str:
    """Sentences of documents, each above its place."""
    return "\n".join(f"{lines_of(hit)}[{i}] {hit.place}\n" for i, hit in enumerate(hits, 1))


def ask(docs: LocalDocs, args: Arguments) -> None:
    options = chosen(args) | {
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "seed": args.seed,
    }
    if args.nearest is not None:
        options["nearest"] = args.nearest
    warned(docs, args)
    if args.model is None:
        note("the bundled model tells stories; give one that chats with --model, or take `quote`")
    docs.embedder  # noqa: B018 (an error comes before a large model is read)
    with load_decoder(args) as model:
        answered(docs, args, model, options)


def answered(docs: LocalDocs, args: Arguments, model: Model, options: dict[str, Any]) -> None:
    """Show an answer as it is written, then the sentences nearest to the question, where they stand."""
    answer = docs.ask(args.words[1], model, **options)
    if args.json:
        quotes = [*map(as_json, answer.quotes)]
        print_json({"text": answer.text, "references": answer.references, "quotes": quotes})
        return
    for piece in answer:
        show(piece)
    show("\n")
    if answer.quotes:
        show(f"\nIn the documents:\n\n{as_quotes(answer.quotes)}")


def listing(docs: LocalDocs, args: Arguments) -> None:
    found = docs.list()
    if args.json:
        print_json([vars(c) for c in found])
        return
    for c in found:
        show(
            f"{c.name:<12} {c.n_documents} documents, {c.n_chunks} chunks, {c.n_unreadable} not read\n"
        )
        show("".join(f"{'':<12} {folder}\n" for folder in c.folders))
        if c.n_pending:
            show(f"{'':<12} {waiting(docs, args, c.name)}\n")
    if found:
        show(f"{'memory':<12} {docs.search_bytes / 1e6:,.1f} MB for a search\n")
        show(f"{'store':<12} {docs.path}\n")
    else:
        note("there are no collections; make one: tinyllm localdocs add NAME FOLDER")


def unreadable(docs: LocalDocs, args: Arguments) -> None:
    rows = docs.unreadable(args.words[0])
    if args.json:
        print_json(dict(rows))
        return
    show_all(f"{file}: {reason}" for file, reason in rows)


def remove(docs: LocalDocs, args: Arguments) -> None:
    docs.remove(args.words[0])


def check(docs: LocalDocs, args: Arguments) -> None:
    problems = docs.check()
    show_all(problems or ["the store is consistent"])
    show_all(filter(None, [waiting(docs, args)]))
    if problems:
        raise ArgumentError(f"{docs.path} is damaged; delete it, and add the folders again")


def reembed(docs: LocalDocs, args: Arguments) -> None:
    n = docs.reembed()
    show(f"{n} texts embedded with {docs.embedder.name}\n")


def show_all(lines: Iterable[str]) -> None:
    for line in lines:
        show(line + "\n")


def print_json(found: object) -> None:
    show(json.dumps(found, ensure_ascii=False) + "\n")


ACTIONS: dict[str, Callable[[LocalDocs, Arguments], None]] = {
    "add": add, "update": update, "watch": watch, "search": search, "quote": quote, "ask": ask, "list": listing,
    "unreadable": unreadable, "rm": remove, "check": check, "reembed": reembed,
}  # fmt: skip
COMMANDS = {
    "localdocs": Command(
        "Search one's own documents, and let a model answer from them.",
        "tinyllm localdocs add notes ~/notes\n  tinyllm localdocs search notes \"which teas have no caffeine?\""
        "\n  tinyllm localdocs ask notes \"which teas have no caffeine?\" --model model.gguf",
        localdocs_arguments, localdocs,
    ),
}  # fmt: skip
