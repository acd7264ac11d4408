"""What clients are told of wrong fields and by the engine: their own names, what was found, what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from ..errors import ContextOverflow
from .errors import Refusal, refusal_of
from .fields import Wrong

ARGUMENT = re.compile(r"(\w+)(?=[=:]| has | is | and )")
"""The engine's errors begin with the argument that they are about."""
PARAMETERS = re.compile(r"tools\[(\d+)\]: the parameters of ")
MEDIA = {"image": "images are", "image_url": "images are", "input_image": "images are",
         "document": "files are", "file": "files are", "input_file": "files are",
         "input_audio": "sound is", "audio": "sound is"}  # fmt: skip
SAID = ("missing", "too_short", "too_long", "union_tag_not_found")  # what was found is said
SHOULD, WRONG = "Input should be ", ("_type", "literal_error")
OURS = {
    "Value error, ": "",
    "valid dictionary or object to extract fields from": "JSON object",
    "valid dictionary": "JSON object",
}
KINDS = {str: "texts", int: "numbers", float: "numbers", bool: "true or false", type(None): "null",
         list: "lists", dict: "objects"}  # fmt: skip


def fields_of(body: BaseModel, **special: str) -> dict[str, str]:
    """The request's field for each argument of the engine: of the same name, but for ``special`` ones."""
    return {**{name: name for name in type(body).model_fields}, **special}


def in_words(error: BaseException, fields: Mapping[str, str]) -> Refusal:
    """An error of the engine by a request's names; ``fields["prompt"]`` is the one with the text."""
    refusal = refusal_of(error)
    if isinstance(error, ContextOverflow):
        refusal.param = fields.get("prompt")
        if error.advice:  # for who loads the model himself
            wide = "" if "overflow" not in fields else f", give {fields['overflow']}"
            refusal.message = (
                f"{error.found}: shorten {refusal.param or 'it'}{wide}, or have the server started "
                "with a larger --n-ctx"
            )
    elif refusal.message.startswith("the text holds") and "prompt" in fields:
        refusal.param = fields["prompt"]
        refusal.message = f"{refusal.param}: {refusal.message}"
    elif (found := PARAMETERS.match(refusal.message)) and "parameters" in fields:
        refusal.param = fields["parameters"].format(found[1])
        refusal.message = f"{refusal.param}: {refusal.message[found.end() :]}"
    elif (found := ARGUMENT.match(refusal.message)) and found[1] in fields:
        refusal.param = fields[found[1]]
        if found[1] == "json_schema" and refusal.message.startswith(" and ", found.end()):
            refusal.param = fields.get("form", refusal.param)  # it is not the schema that is wrong
        refusal.message = refusal.param + refusal.message[found.end() :]
    return refusal


def wrong_field(errors: Sequence[Any], body: Any) -> Refusal:
    """Name a wrong field: an unknown one before all others, else the innermost, which says most.

    Of the types that a field may have, the one that was meant knows more than that it is another.
    """
    unknown = [e for e in errors if e["type"] == "extra_forbidden"]
    found = max(unknown or errors, key=lambda e: (len(e["loc"]), not e["type"].endswith("_type")))
    kind, told, given = found["type"], found.get("ctx", {}), found["input"]
    if kind == "json_invalid":
        at = found["loc"][-1]
        return Refusal(400, f"the body is no JSON: {told.get('error', '')} at character {at}")
    place = place_of(found, body)
    name = ".".join(map(str, place))
    if kind == "extra_forbidden":
        return Refusal(
            400, f"Unrecognized request argument supplied: {name}", param=name, code="unknown_field"
        )
    if not name and kind != "value_error":
        return Refusal(400, "the body is missing, or no object; expected a JSON object")
    same = [e["msg"] for e in errors if e["type"].endswith(WRONG) and place_of(e, body) == place]
    message = found["msg"]
    if kind.endswith(WRONG):
        message = " or ".join([message, *(m.removeprefix(SHOULD) for m in same if m != message)])
    if kind.startswith("union_tag"):
        name, message = f"{name}.type", "Field required"
    if kind == "union_tag_invalid":
        message, given = f"{SHOULD}{told['expected_tags']}", told["tag"]
    if name.endswith(".type") and (media := MEDIA.get(str(told.get("tag", given)))):
        message = f"{media} not taken, only texts"
    if kind not in SAID and not isinstance(told.get("error"), Wrong):
        message += f"; found {shown(given)}"
    for words, ours in OURS.items():
        message = message.replace(words, ours)
    return Refusal(400, f"{name or 'the body'}: {message}", param=name or None)


def place_of(error: Any, body: Any) -> list[Any]:
    """The parts of an error's place that the body has; the others say which of several types was tried."""
    found, loc = [], error["loc"][1:]  # behind "body"
    for part in loc:
        inside = part in body if isinstance(body, dict) else isinstance(body, list)
        if inside and (isinstance(body, dict) or isinstance(part, int)):
            found.append(part)
            body = body[part]
    return [*found, *loc[-1:]] if error["type"] == "missing" else found


def unreadable(cause: BaseException | None) -> str:
    """Why a body's bytes are no JSON, where the reader of JSON gave up."""
    if isinstance(cause, RecursionError):
        return "the body is no JSON that is read: its lists and objects are nested too deeply"
    if isinstance(cause, UnicodeDecodeError):
        return f"the body is no JSON: byte {cause.start} is no {cause.encoding.upper()}; expected UTF-8"
    if isinstance(cause, ValueError):
        return f"the body is no JSON that is read: {str(cause).partition(';')[0]}"
    return "the body could not be read"


def shown(value: Any) -> str:
    """What a body has somewhere, in JSON's words."""
    if isinstance(value, dict):
        return "an object"
    if not isinstance(value, list):
        text = json.dumps(value, ensure_ascii=False)
        return text if len(text) <= 60 else f"{text[:57]}..."
    kinds = " and ".join(dict.fromkeys(KINDS[type(v)] for v in value))
    return f"a list of {kinds}" if kinds else "an empty list"
