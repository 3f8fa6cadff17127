import struct

from e2e.cluster.forward import dns_address, dns_question

QUESTION = dns_question("gateway.example", 7)


def answer(*records: bytes, identity: int = 7) -> bytes:
    header = struct.pack(">6H", identity, 0x8180, 1, len(records), 0, 0)
    return header + QUESTION[12:] + b"".join(records)


def record(kind: int, data: bytes, name: bytes = b"\xc0\x0c") -> bytes:
    return name + struct.pack(">HHIH", kind, 1, 1, len(data)) + data


def test_question_on_the_wire():
    assert QUESTION == b"\0\7\1\0\0\1\0\0\0\0\0\0\7gateway\7example\0\0\1\0\1"


def test_first_address_after_an_alias():
    alias = record(5, b"\3foo\xc0\x14")
    assert dns_address(answer(alias, record(1, bytes([10, 96, 0, 9]))), QUESTION) == "10.96.0.9"


def test_name_written_out():
    assert dns_address(answer(record(1, bytes([10, 0, 0, 1]), b"\1a\0")), QUESTION) == "10.0.0.1"


def test_no_such_name_has_no_address():
    assert dns_address(answer(), QUESTION) is None


def test_answer_to_another_question_is_no_answer():
    assert dns_address(answer(record(1, b"\1\2\3\4"), identity=8), QUESTION) is None
