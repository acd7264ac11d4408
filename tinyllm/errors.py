"""Every exception tinyllm raises on purpose.

One ``except`` catches a kind with all below it:

    TinyLLMError
    ├── GGUFError          (also ValueError)  the file is malformed, truncated or hostile
    ├── UnsupportedModel                      the file is well formed, but we do not run what it holds
    ├── ArgumentError      (also ValueError)  a caller's argument is out of range or of the wrong kind
    ├── ContextOverflow    (also ValueError)  the tokens do not fit into the context
    ├── StateError                            a conversation state cannot do what was asked
    ├── DeviceError                           a device, driver or optional package is missing or too small
    ├── QueueFull                             an engine has as many waiting requests as it may have
    ├── TemplateError      (also ValueError)  a chat template failed, or was stopped
    └── NumericError                          NaN or infinity in weights or logits
"""

from __future__ import annotations


class TinyLLMError(Exception):
    """Base of all errors raised on purpose; catching it catches them all."""


class GGUFError(TinyLLMError, ValueError):
    """A malformed GGUF file; the message names the file, the byte offset and the key or tensor.

    Parameters
    ----------
    message : str
        What was found, and what was expected.
    path : str, optional
        The file.
    offset : int, optional
        Byte offset in the file of the offending field.
    name : str, optional
        The metadata key or tensor concerned.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        offset: int | None = None,
        name: str | None = None,
    ) -> None:
        self.path, self.offset, self.name = path, offset, name
        where = [] if path is None else [path]
        if offset is not None:
            where.append(f"byte {offset}")
        if name is not None:
            where.append(name)
        super().__init__(": ".join([", ".join(where), message] if where else [message]))


class UnsupportedModel(TinyLLMError):
    """A well-formed file whose architecture, key, tensor or tokenizer we do not run."""


class ArgumentError(TinyLLMError, ValueError):
    """An argument that is out of range, of the wrong type, or contradicts another."""


class ContextOverflow(TinyLLMError, ValueError):
    """More tokens than the context holds, and the caller chose ``overflow="error"``.

    Parameters
    ----------
    found : str
        How many there are, and how many it holds.
    advice : str, optional
        What the caller of the Python function that raises it may do.
    """

    def __init__(self, found: str, advice: str = "") -> None:
        self.found, self.advice = found, advice
        super().__init__(f"{found}. {advice}" if advice else found)


class StateError(TinyLLMError):
    """A state was asked for what it cannot do, such as truncating a recurrent one."""


class DeviceError(TinyLLMError):
    """A device, driver or package is missing, or it is too small, or the kernels' sources were replaced."""


class QueueFull(TinyLLMError):
    """An Engine has as many waiting requests as it may have; try again later."""


class TemplateError(TinyLLMError, ValueError):
    """A chat template is wrong, raised an error itself, or exceeded its limits."""


class NumericError(TinyLLMError):
    """NaN or infinity where a finite number is needed."""
