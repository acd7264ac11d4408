"""JSON schemas of the kinds that people send, and those that cannot be held, with the keyword at fault."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
TEXT, WHOLE = {"type": "string", "maxLength": 20}, {"type": "integer", "minimum": 0, "maximum": 99}


def record(**properties: Any) -> Schema:
    """An object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def some(items: Any, **limits: int) -> Schema:
    """A short list."""
    return {"type": "array", "items": items, "maxItems": 3, **limits}


PERSON = record(name=TEXT, age=WHOLE)
HELD: dict[str, Schema] = {
    "object": PERSON,
    "nested": record(id=WHOLE, owner=record(who=PERSON, since={"type": "string", "format": "date"})),
    "deep": record(a=record(b=record(c=record(d=record(e=WHOLE))))),
    "optional": {**PERSON, "required": ["name"]},
    "nothing required": {**PERSON, "required": []},
    "empty object": record(),
    "enum": record(colour={"enum": ["red", "green", "blue"]}),
    "mixed enum": record(x={"enum": ["auto", 1, 2.5, None, True]}),
    "enum alone": {"enum": ["yes", "no"]},
    "quotes in an enum": {"enum": ['say "hi"', "back\\slash", "new\nline", "é", "日本"]},
    "const": record(version={"const": "1.0"}, ok={"const": True}),
    "const object": {"const": {"a": [1, 2, {"b": None}]}},
    "integer": record(n=WHOLE),
    "exclusive bounds": record(n={"type": "integer", "exclusiveMinimum": 5, "exclusiveMaximum": 8}),
    "negative": record(t={"type": "integer", "minimum": -40, "maximum": -1}),
    "number": record(x={"type": "number", "minimum": 0, "maximum": 1}),
    "multiple": record(n={"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100}),
    "boolean": record(a={"type": "boolean"}, b={"type": "boolean"}),
    "null": record(nothing={"type": "null"}),
    "nullable": record(nick={"anyOf": [TEXT, {"type": "null"}]}),
    "types in a list": record(x={"type": ["integer", "null"], "minimum": 0, "maximum": 9}),
    "list": some(WHOLE),
    "list of objects": record(people=some(PERSON, minItems=1)),
    "list of lists": some(some(WHOLE)),
    "tuple": {"type": "array", "prefixItems": [TEXT, WHOLE], "items": False, "minItems": 2},
    "length": record(code={"type": "string", "minLength": 3, "maxLength": 5}),
    "pattern": record(plate={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}),
    "date-time": record(at={"type": "string", "format": "date-time"}),
    "time": record(at={"type": "string", "format": "time"}),
    "uuid": record(id={"type": "string", "format": "uuid"}),
    "ipv4": record(host={"type": "string", "format": "ipv4"}),
    "union": {"anyOf": [record(kind={"const": "cat"}), record(kind={"const": "dog"}, age=WHOLE)]},
    "discriminated": {
        "oneOf": [
            record(kind={"const": "circle"}, r=WHOLE),
            record(kind={"const": "box"}, w=WHOLE, h=WHOLE),
        ]
    },
    "oneOf of types": record(x={"oneOf": [{"type": "boolean"}, WHOLE]}),
    "allOf": {
        "allOf": [{"required": ["a"]}, {"properties": {"b": {"enum": [1]}}, "required": ["b"]}],
        **record(a=WHOLE, b=WHOLE),
    },
    "references": {
        "$defs": {"Person": PERSON},
        **record(author={"$ref": "#/$defs/Person"}, editor={"$ref": "#/$defs/Person"}),
    },
    "definitions": {"definitions": {"P": PERSON}, **record(p={"$ref": "#/definitions/P"})},
    "recursion": {
        "$defs": {"Tree": record(value=WHOLE, children=some({"$ref": "#/$defs/Tree"}))},
        "$ref": "#/$defs/Tree",
    },
    "linked list": {
        "$defs": {"Node": record(v=WHOLE, next={"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]})},
        "$ref": "#/$defs/Node",
    },
    "map": {"type": "object", "additionalProperties": WHOLE, "maxProperties": 3},
    "list of enums": record(tags=some({"enum": ["new", "sale", "last"]}, minItems=1)),
    "fixed length": record(rgb={"type": "array", "items": WHOLE, "minItems": 3, "maxItems": 3}),
    "email": record(to={"type": "string", "format": "email"}),
    "date": record(on={"type": "string", "format": "date"}, days=WHOLE),
    "keys by pattern": {
        "type": "object", "patternProperties": {"^x-[a-z]{1,5}$": WHOLE}, "additionalProperties": False,
        "maxProperties": 2,
    },
    "extracted": record(
        title=TEXT, authors=some(TEXT, minItems=1), year={"type": ["integer", "null"]},
        topics=some(record(name=TEXT, weight={"enum": [0, 0.5, 1]})),
    ),
    "verdict": record(reason=TEXT, label={"enum": ["positive", "negative", "neutral"]}, sure=WHOLE),
    "steps": record(
        steps=some(record(explanation=TEXT, output=TEXT), minItems=1), final_answer=TEXT
    ),
    "filter": {
        "$defs": {"F": {"anyOf": [
            record(field=TEXT, op={"enum": ["=", "<", ">"]}, value={"anyOf": [TEXT, WHOLE]}),
            record(all=some({"$ref": "#/$defs/F"}, minItems=1)),
        ]}},
        "$ref": "#/$defs/F",
    },
    "described": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Answer",
        "description": "What was found.",
        **record(found={"type": "boolean", "description": "Whether it was.", "default": False}),
    },
    "pydantic": {
        "title": "Order",
        "type": "object",
        "properties": {
            "items": {"title": "Items", "type": "array", "items": PERSON, "maxItems": 2},
            "note": {"anyOf": [TEXT, {"type": "null"}], "default": None, "title": "Note"},
        },
        "required": ["items"],
        "additionalProperties": False,
    },
}  # fmt: skip

REFUSED: dict[str, Schema] = {
    "not": {"not": {"type": "string"}},
    "if": {"if": {"type": "string"}, "then": {"maxLength": 3}},
    "contains": {"type": "array", "contains": WHOLE},
    "uniqueItems": some(WHOLE) | {"uniqueItems": True},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^a"}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "unevaluatedProperties": record(a={"type": "object", "unevaluatedProperties": False}),
    "oneOf": {"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]},
    "pattern": {"type": "string", "pattern": "(?=a)b"},
    "format": {"type": "string", "format": "no such format"},
    "type": {"type": "objekt"},
    "$ref": {"$ref": "#/$defs/nowhere"},
    "minLength": {"type": "string", "minLength": 5, "maxLength": 2},
}
