import pytest

from mainsail_gateway.settings import Settings, parse


def test_defaults_are_the_dataclass():
    assert parse([]) == Settings()


def test_flags():
    got = parse(["--port", "1", "--namespace", "a", "--namespace", "b", "--namespace", "a", "--drain-delay-s", "0.5"])
    assert (got.port, got.namespaces, got.drain_delay_s) == (1, ("a", "b"), 0.5)
    assert (got.access_log, got.kv_events) == (False, True)
    got = parse(["--no-kv-events", "--access-log"])
    assert (got.access_log, got.kv_events) == (True, False)


@pytest.mark.parametrize(
    "argv", [["--port", "x"], ["--port", "-1"], ["--trace-ratio", "5"], ["--log-level", "loud"], ["--nope"], ["extra"]]
)
def test_bad_flags_end_with_2(argv):
    with pytest.raises(SystemExit) as end:
        parse(argv)
    assert end.value.code == 2
