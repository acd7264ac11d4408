"""Base classes for models: a ``with`` block closes them, and they belong to one process."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, SupportsIndex

if TYPE_CHECKING:
    from typing_extensions import Self


class NotPickled:
    """What lives in one process, and says so."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            f"a loaded {type(self).__name__} can be neither pickled nor copied: its weights belong to this"
            " process. Make one in each process, from the same arguments"
        )


class Closing(NotPickled):
    """A context manager that closes itself."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        typ: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()
