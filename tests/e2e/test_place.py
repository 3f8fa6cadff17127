from pathlib import Path

import pytest
from e2e.cluster.place import FIRST_PORT, PORT_PAIRS, place_of
from e2e.steps import StepError

HERE, THERE = Path("/one/checkout"), Path("/another/checkout")


def test_two_checkouts_share_only_the_cache():
    here, there = place_of(HERE, {"HOME": "/root"}), place_of(THERE, {"HOME": "/root"})
    assert here.cache == there.cache
    assert here.name != there.name
    assert {here.gateway_port, here.api_port}.isdisjoint({there.gateway_port, there.api_port})


def test_ports_follow_from_the_path_and_stay_below_outgoing_ones():
    place = place_of(HERE, {})
    assert place == place_of(HERE, {})
    assert FIRST_PORT <= place.gateway_port < place.api_port < FIRST_PORT + 2 * PORT_PAIRS


def test_ports_can_be_set():
    place = place_of(HERE, {"MAINSAIL_PORT": "8080", "MAINSAIL_API_PORT": "6443"})
    assert (place.gateway_port, place.api_port) == (8080, 6443)


@pytest.mark.parametrize("text", ["http", "0", "65536", "-1", "80 "])
def test_a_bad_port_is_named(text: str):
    with pytest.raises(StepError, match="MAINSAIL_PORT is"):
        place_of(HERE, {"MAINSAIL_PORT": text})


def test_cache_folder_of_the_user():
    assert place_of(HERE, {"XDG_CACHE_HOME": "/cache"}).cache == Path("/cache/mainsail")
