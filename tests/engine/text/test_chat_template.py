from __future__ import annotations

import pytest

from mainsail_engine.errors import RequestError, UnsupportedModelError
from mainsail_engine.text.chat_template import ChatTemplate


def test_the_fields_helpers() -> None:
    template = ChatTemplate(
        "{{ messages[0] | tojson }}{{ strftime_now('%Y') | length }}{% for m in messages %}{% break %}{% endfor %}", {}
    )
    assert template.render([{"role": "user", "content": "<é>"}]) == '{"role": "user", "content": "<é>"}4'


def test_a_refusal_is_a_bad_request() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        template.render([])
    assert (caught.value.status, caught.value.param) == (400, "messages")


@pytest.mark.parametrize("source", ["{{ messages[0].nothing.more }}", "{{ 1 + 'a' }}", "{{ messages | nosuch }}"])
def test_what_cannot_be_rendered(source: str) -> None:
    with pytest.raises((RequestError, UnsupportedModelError)):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])


def test_the_sandbox_holds() -> None:
    template = ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}", {})
    with pytest.raises(RequestError):
        template.render([])


def test_variables_cannot_replace_the_messages() -> None:
    template = ChatTemplate("{{ messages | length }}{{ thinking }}", {})
    assert template.render([], variables={"messages": [1, 2], "thinking": "on"}) == "0on"


def test_a_broken_template_is_said_at_the_start() -> None:
    with pytest.raises(UnsupportedModelError, match="broken"):
        ChatTemplate("{% if %}", {})


@pytest.mark.parametrize("content", ["{{ m['content'] }}", "{{ m['content'] | trim }}"])
def test_the_last_message_is_left_open(content: str) -> None:
    template = ChatTemplate(f"{{% for m in messages %}}[{{{{ m['role'] }}}}]{content}<end>{{% endfor %}}", {})
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I say "}]
    assert template.render(messages, continue_final_message=True) == "[user]Hi<end>[assistant]I say "


def test_a_message_that_the_template_hides_cannot_go_on() -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate("nothing", {}).render([{"role": "user", "content": "x"}], continue_final_message=True)
    assert caught.value.param == "continue_final_message"
