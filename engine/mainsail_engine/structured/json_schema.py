"""JSON Schemas made enforceable: rewritten to what the compiler keeps to, and refused by keyword where it would not.

A keyword that the compiler drops in silence would give answers that do not validate. So, with `strict`, such a keyword
is an error that names it and where it stands; without (OpenAI's best effort) it is dropped, and all else is enforced.
Rewriting only ever narrows: an answer to the result is an answer to the original.

    properties       an object that names some has no others unless the schema says so: models make them up
    strict           a tuple ends with its prefix
    no "type"        inferred from the keywords ({"minimum": 3} → a number)
    allOf of one     replaced by it
    const, enum      as they stand;  oneOf: as anyOf, where the branches cannot overlap
    required names   that no property describes become properties of any value
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

MAX_DEPTH = 48
ANNOTATIONS = frozenset({
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema", "$id",
    "contentEncoding", "contentMediaType", "contentSchema", "discriminator", "nullable", "example", "externalDocs",
    "$anchor",
})  # fmt: skip
OBJECT_KEYS = frozenset({
    "properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties",
    "maxProperties",
})  # fmt: skip
ARRAY_KEYS = frozenset({"items", "prefixItems", "minItems", "maxItems"})
STRING_KEYS = frozenset({"minLength", "maxLength", "pattern", "format"})
NUMBER_KEYS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
DEFINITIONS = frozenset({"$defs", "definitions"})
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
FORMATS = frozenset({
    "email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri", "uri-reference",
    "uri-template", "json-pointer", "relative-json-pointer",
})  # fmt: skip
"""What the compiler knows a pattern for. Other formats are annotations, as the standard has it."""

Schema = dict[str, Any]


class SchemaError(ValueError):
    """The schema cannot be enforced; the message names the keyword and its path."""


def enforceable(schema: Any, *, strict: bool) -> Schema | bool:
    """The schema as the compiler enforces it. Raises SchemaError."""
    return _Rewriter(schema, strict=strict).any(schema, "$", 0)


class _Rewriter:
    def __init__(self, root: Any, *, strict: bool) -> None:
        self._root = root
        self._strict = strict

    def any(self, schema: Any, path: str, depth: int) -> Schema | bool:
        """One schema, wherever it stands."""
        if depth > MAX_DEPTH:
            raise SchemaError(f"{path}: nested more than {MAX_DEPTH} levels deep")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise SchemaError(f"{path}: a schema is an object, true or false")
        node = {key: value for key, value in cast("Schema", schema).items() if key not in ANNOTATIONS}
        out = self._definitions(node, path, depth)
        out.update(self._body(node, path, depth))
        return out

    def _definitions(self, node: Schema, path: str, depth: int) -> Schema:
        out: Schema = {}
        for key in DEFINITIONS & node.keys():
            out[key] = self._each(node.pop(key), f"{path}.{key}", depth)
        return out

    def _each(self, schemas: Any, path: str, depth: int) -> Schema:
        """A map from names to schemas."""
        if not isinstance(schemas, dict):
            raise SchemaError(f"{path}: must be an object")
        named = cast("Schema", schemas)
        return {name: self.any(schema, f"{path}.{name}", depth + 1) for name, schema in named.items()}

    def _body(self, node: Schema, path: str, depth: int) -> Schema:
        if node.get("enum") is not None or "const" in node:
            return self._values(node, path)
        for key in ("$ref", "anyOf", "oneOf", "allOf"):
            if key in node:
                return self._combined(key, node, path, depth)
        kinds = self._types(node, path)
        if kinds is None:
            self._refuse_others(node, frozenset(), path)
            return {}
        if len(kinds) > 1:
            return {"anyOf": [self._typed(kind, node, path, depth) for kind in kinds]}
        return self._typed(kinds[0], node, path, depth)

    # -- values and combinations ------------------------------------------------------------------------------------

    def _values(self, node: Schema, path: str) -> Schema:
        """const and enum decide alone; a type beside them only sorts out what it does not fit."""
        values: Any = [node["const"]] if "const" in node else node["enum"]
        if not isinstance(values, list) or not values:
            raise SchemaError(f"{path}.enum: must be a list with at least one value")
        self._refuse_others(node, frozenset({"enum", "const", "type"}), path)
        kinds = self._types({"type": node["type"]}, path) if "type" in node else None
        fitting = [v for v in cast("list[Any]", values) if kinds is None or any(_is(v, kind) for kind in kinds)]
        if not fitting:
            raise SchemaError(f"{path}: no value of the enum has the type that is asked for")
        return {"enum": fitting}

    def _combined(self, key: str, node: Schema, path: str, depth: int) -> Schema:
        if key == "$ref":
            self._refuse_others(node, frozenset({"$ref"}), path)
            reference = node["$ref"]
            if not isinstance(reference, str) or not reference.startswith("#"):
                raise SchemaError(f"{path}.$ref: only references inside the schema (#/…) are possible")
            return {"$ref": reference}
        branches = node[key]
        if not isinstance(branches, list) or not branches:
            raise SchemaError(f"{path}.{key}: must be a list with at least one schema")
        others = {name: value for name, value in node.items() if name != key}
        if key == "allOf":
            return self._all_of(cast("list[Any]", branches), others, path, depth)
        self._refuse_others(others, frozenset({"type"}), path)
        schemas = [self.any(b, f"{path}.{key}.{i}", depth + 1) for i, b in enumerate(cast("list[Any]", branches))]
        if key == "oneOf" and self._strict and not self._exclusive(schemas):
            raise SchemaError(f"{path}.oneOf: its branches may overlap, which cannot be ruled out; use anyOf")
        return {"anyOf": schemas}

    def _all_of(self, branches: list[Any], others: Schema, path: str, depth: int) -> Schema:
        """One branch is that branch; several are one object, if they are objects that share no property."""
        parts = [self._resolved(branch) for branch in branches] + ([others] if others else [])
        if len(branches) == 1 and not others:
            return cast("Schema", self.any(branches[0], f"{path}.allOf.0", depth + 1))
        merged: Schema = {"type": "object", "properties": {}, "required": []}
        for part in parts:
            extra = part.keys() - ANNOTATIONS - {"type", "properties", "required", "additionalProperties"}
            if (
                part.get("type", "object") != "object"
                or extra
                or part.get("properties", {}).keys() & merged["properties"]
            ):
                if not self._strict:  # the others may ask for more than the first one names
                    first = {"additionalProperties": True, **parts[0]} if "properties" in parts[0] else branches[0]
                    return cast("Schema", self.any(first, f"{path}.allOf.0", depth + 1))
                raise SchemaError(f"{path}.allOf: only objects without common properties can be combined")
            merged["properties"].update(part.get("properties", {}))
            merged["required"] += part.get("required", [])
            if part.get("additionalProperties") is False:
                raise SchemaError(f"{path}.allOf: a branch with additionalProperties false forbids what others require")
        return cast("Schema", self.any(merged, path, depth + 1))

    def _resolved(self, schema: Any) -> Schema:
        """A reference's target, one step; anything else as it is."""
        if not isinstance(schema, dict):
            raise SchemaError("$.allOf: a branch must be an object")
        node = cast("Schema", schema)
        reference = node.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return node
        target: Any = self._root
        for part in reference[2:].split("/"):
            target = (
                cast("Schema", target).get(part.replace("~1", "/").replace("~0", "~"))
                if isinstance(target, dict)
                else None
            )
        if not isinstance(target, dict):
            raise SchemaError(f"$ref {reference!r} leads nowhere")
        return cast("Schema", target)

    def _exclusive(self, schemas: list[Schema | bool]) -> bool:
        """Whether no value can fit two of these: different types, or a required property that tells them apart."""
        nodes = [self._resolved(s) if isinstance(s, dict) else {} for s in schemas]
        return all(_apart(a, b) for i, a in enumerate(nodes) for b in nodes[i + 1 :])

    # -- types ------------------------------------------------------------------------------------------------------

    def _types(self, node: Schema, path: str) -> list[str] | None:
        """The types that are possible; None: any at all."""
        kinds: Any = node.get("type")
        if kinds is None:
            for keys, kind in (
                (OBJECT_KEYS, "object"),
                (ARRAY_KEYS, "array"),
                (STRING_KEYS, "string"),
                (NUMBER_KEYS, "number"),
            ):
                if node.keys() & keys:
                    return [kind]
            return None
        listed: list[Any] = cast("list[Any]", kinds) if isinstance(kinds, list) else [kinds]
        unknown = [kind for kind in listed if kind not in TYPES]
        if unknown or not listed:
            raise SchemaError(f"{path}.type: {unknown or kinds!r} is no type of JSON Schema")
        return list(dict.fromkeys(cast("list[str]", listed)))

    def _typed(self, kind: str, node: Schema, path: str, depth: int) -> Schema:
        build: dict[str, Callable[[Schema, str, int], Schema]] = {
            "object": self._object, "array": self._array, "string": self._string, "number": self._number,
            "integer": self._number,
        }  # fmt: skip
        keys = {"object": OBJECT_KEYS, "array": ARRAY_KEYS, "string": STRING_KEYS, "number": NUMBER_KEYS}
        allowed = keys.get("number" if kind == "integer" else kind, frozenset[str]())
        every = OBJECT_KEYS | ARRAY_KEYS | STRING_KEYS | NUMBER_KEYS
        self._refuse_others(node, every | {"type"}, path)
        own = {key: value for key, value in node.items() if key in allowed}
        out = build[kind](own, path, depth) if kind in build else {}
        return {"type": kind, **out}

    def _object(self, node: Schema, path: str, depth: int) -> Schema:
        out: Schema = {}
        named = self._each(node.get("properties", {}), f"{path}.properties", depth)
        rest: Any = node.get("additionalProperties")
        for name in _names(node.get("required", []), f"{path}.required"):
            if name not in named:
                if rest is False:
                    raise SchemaError(f"{path}.required: {name!r} is required, and additionalProperties forbids it")
                named[name] = self.any(True if rest is None else rest, f"{path}.{name}", depth + 1)
        if named:
            out["properties"] = named
        if node.get("required"):
            out["required"] = node["required"]
        closed = "properties" in node and rest is None and "patternProperties" not in node
        closed = closed and _least(node) <= len(named)
        if closed or rest is not None:
            out["additionalProperties"] = False if closed else self.any(rest, f"{path}.additionalProperties", depth + 1)
        if "patternProperties" in node:
            self._refuse_if(bool(named), f"{path}.patternProperties: cannot be enforced beside properties")
            out["patternProperties"] = self._each(node["patternProperties"], f"{path}.patternProperties", depth)
        if "propertyNames" in node:
            self._refuse_if(bool(named), f"{path}.propertyNames: cannot be enforced beside properties")
            out["propertyNames"] = self.any(node["propertyNames"], f"{path}.propertyNames", depth + 1)
        for key in ("minProperties", "maxProperties"):
            if key in node:
                out[key] = _count(node[key], f"{path}.{key}")
        return out

    def _array(self, node: Schema, path: str, depth: int) -> Schema:
        out: Schema = {key: _count(node[key], f"{path}.{key}") for key in ("minItems", "maxItems") if key in node}
        if "prefixItems" in node:
            prefix = node["prefixItems"]
            if not isinstance(prefix, list):
                raise SchemaError(f"{path}.prefixItems: must be a list of schemas")
            items = cast("list[Any]", prefix)
            out["prefixItems"] = [self.any(s, f"{path}.prefixItems.{i}", depth + 1) for i, s in enumerate(items)]
            if self._strict and "items" not in node:
                out["items"] = False
        if "items" in node:
            out["items"] = self.any(node["items"], f"{path}.items", depth + 1)
        return out

    def _string(self, node: Schema, path: str, depth: int) -> Schema:
        out: Schema = {key: _count(node[key], f"{path}.{key}") for key in ("minLength", "maxLength") if key in node}
        form = node.get("format")
        if "pattern" in node:
            if not isinstance(node["pattern"], str):
                raise SchemaError(f"{path}.pattern: must be a text")
            self._refuse_if(bool(out), f"{path}: minLength and maxLength cannot be enforced beside pattern")
            self._refuse_if(form in FORMATS, f"{path}: format cannot be enforced beside pattern")
            return {"pattern": node["pattern"]}
        if form in FORMATS:
            self._refuse_if(bool(out), f"{path}: minLength and maxLength cannot be enforced beside format")
            return {"format": form}
        return {"pattern": _bounded(out)} if out else out

    def _number(self, node: Schema, path: str, depth: int) -> Schema:
        for key, value in node.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise SchemaError(f"{path}.{key}: must be a number")
        if "multipleOf" in node:
            self._refuse_if(True, f"{path}.multipleOf: cannot be enforced")
        return {key: value for key, value in node.items() if key != "multipleOf"}

    # -- refusing ---------------------------------------------------------------------------------------------------

    def _refuse_others(self, node: Schema, allowed: frozenset[str], path: str) -> None:
        """Keywords that are not known, or not possible beside the others (`uniqueItems: false` and the like are)."""
        for key in sorted(node.keys() - allowed - DEFINITIONS):
            self._refuse_if(node[key] is not False, f"{path}.{key}: cannot be enforced here")

    def _refuse_if(self, condition: bool, message: str) -> None:
        if condition and self._strict:
            raise SchemaError(message)


def _apart(a: Schema, b: Schema) -> bool:
    kinds_a, kinds_b = _kinds(a), _kinds(b)
    if kinds_a and kinds_b and not kinds_a & kinds_b:
        return True
    for name in set(_list(a.get("required"))) & set(_list(b.get("required"))):
        values_a, values_b = _fixed(a, name), _fixed(b, name)
        if values_a and values_b and not any(value in values_b for value in values_a):
            return True
    return False


def _kinds(node: Schema) -> set[str]:
    kinds = node.get("type")
    names = (
        {str(kind) for kind in cast("list[Any]", kinds)}
        if isinstance(kinds, list)
        else {str(kinds)}
        if kinds
        else set[str]()
    )
    return names | {"number", "integer"} if names & {"number", "integer"} else names


def _fixed(node: Schema, name: str) -> list[Any]:
    """The values that a property may have, where there are only a few."""
    described = node.get("properties", {}).get(name, {})
    if not isinstance(described, dict):
        return []
    known = cast("Schema", described)
    return [known["const"]] if "const" in known else _list(known.get("enum"))


def _list(value: Any) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else []


def _names(value: Any, path: str) -> list[str]:
    names = _list(value)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in names):
        raise SchemaError(f"{path}: must be a list of names")
    return cast("list[str]", names)


def _bounded(bounds: Schema) -> str:
    """Strings of a length, as a pattern: xgrammar's own rule for them lets control characters through, which JSON does
    not allow in a string. As in that rule there are no escapes, whose length would not be their text's."""
    least, most = bounds.get("minLength", 0), bounds.get("maxLength", "")
    return f'^[^"\\\\\\x00-\\x1f]{{{least},{most}}}$'


def _least(node: Schema) -> int:
    least = node.get("minProperties", 0)
    return least if isinstance(least, int) else 0


def _count(value: Any, path: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise SchemaError(f"{path}: must be a whole number that is not negative")
    return value


def _is(value: Any, kind: str) -> bool:
    """Whether a value has this type of JSON Schema."""
    if kind == "null":
        return value is None
    if kind == "boolean":
        return isinstance(value, bool)
    if kind in ("number", "integer"):
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer() and kind == "integer")
        return not isinstance(value, bool) and (whole or (kind == "number" and isinstance(value, float)))
    return isinstance(value, {"string": str, "object": dict, "array": list}[kind])
