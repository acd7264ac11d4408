"""`tinyllm bench --profile`: what it prints, in numbers and in words, and what it draws."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import tinyllm
from tinyllm.cli import bench, profile
from tinyllm.cli.commands import main
from tinyllm.cli.profile import Part, Row
from tinyllm.kernels.profile import Launch, Work

BUNDLED = str(Path(__file__).resolve().parents[2] / "tinyllm" / "data" / "bundled.gguf")
LIMITS = {"read GB/s": 10.0, "dot GMAC/s": 1000.0, "float GMAC/s": 100.0}
BENCH = ["bench", BUNDLED, "-p", "8", "-n", "3", "-r", "2", "--profile"]
MS = 1e-3


def launch(kernel: str, seconds: float, *work: int, numbers: str = "") -> Launch:
    return Launch(kernel, seconds, Work(*work, numbers=numbers))  # type: ignore[arg-type]


def matvec(seconds: float = 9 * MS) -> Row:
    """8 bits per weight: 80 MB, 8 ms at the limit."""
    return Row("matvec_Q8_0", 10, seconds, 80 * 10**6, 80 * 10**6, 80 * 10**6, "int8", "Q8_0")


def words(part: Part, n_threads: int | None = 2) -> str:
    return "\n".join(profile.in_words(part, LIMITS, n_threads, 2))


def test_launches_of_a_kernel_are_added_up_the_longest_first() -> None:
    rows = profile.by_kernel(
        [launch("a", 1.0, 10, 5, 7), launch("b", 3.0, 1), launch("a", 1.5, 20, 5, 7)]
    )
    assert rows == [Row("b", 1, 3.0, 1, 0, 0, ""), Row("a", 2, 2.5, 30, 10, 14, "")]


def test_the_fastest_of_each_launch_counts() -> None:
    steps = [[launch("a", 2.0), launch("b", 1.0)], [launch("a", 1.0), launch("b", 3.0)]]
    assert [x.seconds for x in profile.fastest(steps)] == [1.0, 1.0]
    steps.append([launch("a", 2.5)])  # another program
    assert profile.fastest(steps) == steps[-1]


def test_the_limit_is_the_slower_of_reading_and_products() -> None:
    assert matvec().least(LIMITS) == pytest.approx(8 * MS)
    floats = Row("matmul_F32", 1, 1.0, 0, 10**6, 10**9, "float")
    assert floats.least(LIMITS) == pytest.approx(10 * MS)
    assert Row("add", 1, 1.0, 10**6, 0, 0, "").least(LIMITS) == 0


def test_a_token_is_told_what_memory_and_other_formats_would_change() -> None:
    said = words(Part("tg8", [matvec()], 1 * MS))
    assert "reading 80.0 MB of weights, keys and values takes 8.00 ms at 10.0 GB/s, 80% of" in said
    assert "Q8_0 in 4.5 bits (Q4_0, Q4_K) would save some 3.94 ms of 10.00 ms" in said
    assert "with 8 sequences side by side, a token takes 1.25 ms at best" in said
    assert "More threads: none are idle." in said
    assert "-t 2 would use all 2 cores" in words(Part("tg8", [matvec()], 0.0), 1)


def test_formats_are_named_not_kernels() -> None:
    rows = [
        Row(f"{name}_parts", 1, 5 * MS, 10**7, 10**7, 10**7, "int8", kind)
        for name, kind in (
            ("matvec_Q8_0", "Q8_0"),
            ("lanes", "Q6_K"),
            ("matvec_experts_Q8_0", "Q8_0"),
        )
    ]
    assert "A smaller format: Q8_0 and Q6_K in 4.5 bits" in words(Part("tg8", rows, 0.0))


def test_long_names_do_not_shift_columns() -> None:
    rows = [matvec(), Row("a_kernel_" * 5, 1, 1 * MS, 1, 0, 0, "")]
    table = profile.as_table(Part("pp8", rows, 0.0, 3), LIMITS)
    assert "the prompt, each kernel at its fastest of 3;" in table[0]
    assert len({len(line) for line in table[1:]}) == 1


def test_a_prompt_is_profiled_more_than_once_and_not_in_fresh_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def timed(self: Any, launches: Any = profile.fastest) -> Any:
        seen.append(self)
        return launches(self)

    monkeypatch.setattr(profile, "fastest", timed)
    with tinyllm.load(BUNDLED) as model:
        result = bench.measure(model, 8, 0, 4, 1)[0]
        (part,) = profile.measure(model, [result])
    assert part.steps == len(seen[0]) == profile.LEAST
    assert len({len(step) for step in seen[0]}) == 1


def test_what_a_context_does_not_hold_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", BUNDLED, "-c", "4", "-p", "8", "-n", "1"]) == 2
    assert "-d 0, -p 8 and -n 1 need a context of 8 tokens; -c 4 is" in capsys.readouterr().err
    assert main(["bench", BUNDLED, "-d", "510", "-p", "3", "-n", "0", "-r", "1"]) == 0
    assert "was trained for 512 tokens" in capsys.readouterr().err


def test_what_loses_is_named() -> None:
    said = words(Part("tg8", [matvec(40 * MS)], 10 * MS))
    assert "matvec_Q8_0 takes 32.00 ms more than the limits ask" in said
    assert "20% pass in starting the step" in said


def test_a_prompt_is_told_that_products_limit_it() -> None:
    rows = [Row("matmul_Q4_0", 1, 30 * MS, 10**7, 10**7, 2 * 10**10, "int8")]
    said = words(Part("pp64", rows, 0.0), None)
    assert said.startswith(
        "What limits it: the products take 20.00 ms at the limits, 67% of the prompt"
    )
    assert "A smaller format: changes little" in said
    assert "threads" not in said


def test_bench_prints_a_profile(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(BENCH) == 0
    out = capsys.readouterr().out
    assert "\npp8: " in out
    assert "\ntg3: " in out
    assert "| matvec_Q8_0" in out
    assert "| (outside kernels) " in out
    assert out.count("What limits it: ") == 2


def test_bench_gives_a_profile_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BENCH, "-n", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["profile"]
    assert found["limits"].keys() == LIMITS.keys()
    part = found["pp8"]
    shares = (
        sum(row["share"] for row in part["kernels"]) + part["outside_kernels"] / part["seconds"]
    )
    assert shares == pytest.approx(1)
    assert {"kernel", "calls", "nbytes", "gb_per_s", "of_limit"} <= part["kernels"][0].keys()


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_bench_draws_a_profile(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"where.{kind}"
    assert main([*BENCH, "--plot", str(path)]) == 0
    start = path.read_bytes()[:100]
    assert b"PNG" in start if kind == "png" else b"<?xml" in start


def test_a_plot_that_cannot_be_drawn_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["bench", BUNDLED, "--plot", "x.png"]) == 2
    assert "--plot draws a profile; give --profile too" in capsys.readouterr().err
    assert main([*BENCH, "--plot", "x.jpeg"]) == 2
    assert "x.jpeg: expected a file that ends in .png, .svg, .pdf" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*BENCH, "--plot", str(tmp_path / "x.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_the_reference_backend_has_no_profile(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BENCH, "--device", "reference"]) == 1
    assert "reference runs no kernels of its own" in capsys.readouterr().err


def test_a_bench_without_a_plot_does_not_import_matplotlib() -> None:
    import subprocess

    code = (
        "import sys; from tinyllm.cli.commands import main; "
        f"main({[*BENCH, '-n', '0']!r}); assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
