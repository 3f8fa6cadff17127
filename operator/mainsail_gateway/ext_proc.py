"""The messages of Envoy's external processing protocol (`envoy.service.ext_proc.v3`), as far as a picker needs them.

Written from the protocol's documentation: on the wire a message is its field numbers, so the few fields that are used
are declared here, under a package of our own, instead of carrying all of Envoy's API along. What Envoy sends beside
them is skipped, as protobuf does with every field that it does not know.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, struct_pb2

METHOD = ("envoy.service.ext_proc.v3.ExternalProcessor", "Process")
FULL_DUPLEX_STREAMED = 4
"""A BodySendMode: the body comes in pieces, and goes on only as the processor sends it back."""

_PACKAGE = "mainsail.ext_proc"
_FILE = "mainsail/ext_proc.proto"
_SCALARS = {"string": 9, "bytes": 12, "bool": 8, "int32": 5}
# name: fields as (name, number, type); `*` repeated, `?` one of the message's alternatives, capitals: a message.
_MESSAGES: dict[str, list[tuple[str, int, str]]] = {
    "HeaderValue": [("key", 1, "string"), ("value", 2, "string"), ("raw_value", 3, "bytes")],
    "HeaderMap": [("headers", 1, "*HeaderValue")],
    "HeaderValueOption": [("header", 1, "HeaderValue"), ("append_action", 3, "int32")],
    "HeaderMutation": [("set_headers", 1, "*HeaderValueOption"), ("remove_headers", 2, "*string")],
    "FilterMetadata": [("key", 1, "string"), ("value", 2, "Struct")],
    "Metadata": [("filter_metadata", 1, "*FilterMetadata")],
    "HttpHeaders": [("headers", 1, "HeaderMap"), ("end_of_stream", 3, "bool")],
    "HttpBody": [("body", 1, "bytes"), ("end_of_stream", 2, "bool")],
    "HttpTrailers": [("trailers", 1, "HeaderMap")],
    "ProtocolConfiguration": [("request_body_mode", 1, "int32"), ("response_body_mode", 2, "int32")],
    "ProcessingRequest": [
        ("request_headers", 2, "?HttpHeaders"),
        ("response_headers", 3, "?HttpHeaders"),
        ("request_body", 4, "?HttpBody"),
        ("response_body", 5, "?HttpBody"),
        ("request_trailers", 6, "?HttpTrailers"),
        ("response_trailers", 7, "?HttpTrailers"),
        ("metadata_context", 8, "Metadata"),
        ("observability_mode", 10, "bool"),
        ("protocol_config", 11, "ProtocolConfiguration"),
    ],
    "StreamedBodyResponse": [("body", 1, "bytes"), ("end_of_stream", 2, "bool")],
    "BodyMutation": [("body", 1, "?bytes"), ("clear_body", 2, "?bool"),
                     ("streamed_response", 3, "?StreamedBodyResponse")],
    "CommonResponse": [
        ("status", 1, "int32"),
        ("header_mutation", 2, "HeaderMutation"),
        ("body_mutation", 3, "BodyMutation"),
        ("clear_route_cache", 5, "bool"),
    ],
    "HeadersResponse": [("response", 1, "CommonResponse")],
    "BodyResponse": [("response", 1, "CommonResponse")],
    "TrailersResponse": [("header_mutation", 1, "HeaderMutation")],
    "HttpStatus": [("code", 1, "int32")],
    "ImmediateResponse": [("status", 1, "HttpStatus"), ("headers", 2, "HeaderMutation"), ("body", 3, "bytes"),
                          ("details", 5, "string")],
    "ProcessingResponse": [
        ("request_headers", 1, "?HeadersResponse"),
        ("response_headers", 2, "?HeadersResponse"),
        ("request_body", 3, "?BodyResponse"),
        ("response_body", 4, "?BodyResponse"),
        ("request_trailers", 5, "?TrailersResponse"),
        ("response_trailers", 6, "?TrailersResponse"),
        ("immediate_response", 7, "?ImmediateResponse"),
        ("dynamic_metadata", 8, "Struct"),
    ],
}  # fmt: skip
"""`FilterMetadata` is what a map's entry is on the wire."""


def _declared() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name=_FILE, package=_PACKAGE, syntax="proto3")
    file.dependency.append(struct_pb2.DESCRIPTOR.name)
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        if any(kind.startswith("?") for _, _, kind in fields):
            message.oneof_decl.add(name="kind")
        for field, number, kind in fields:
            _declare(message, field, number, kind)
    return file


def _declare(message: descriptor_pb2.DescriptorProto, field: str, number: int, kind: str) -> None:
    bare = kind.lstrip("*?")
    label = descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED if kind.startswith("*") else 1
    made = message.field.add(name=field, number=number)
    made.label = label  # pyright: ignore[reportAttributeAccessIssue]  # an enum that is an int
    if kind.startswith("?"):
        made.oneof_index = 0
    if bare in _SCALARS:
        made.type = _SCALARS[bare]  # pyright: ignore[reportAttributeAccessIssue]
    else:
        made.type = descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE
        made.type_name = ".google.protobuf.Struct" if bare == "Struct" else f".{_PACKAGE}.{bare}"


def _classes() -> tuple[Any, Any]:
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(_declared().SerializeToString())
    request, response = (
        message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
        for name in ("ProcessingRequest", "ProcessingResponse")
    )
    return request, response


Request, Response = _classes()
"""Protobuf's message classes, made at import; their fields are those above."""
