"""The check at a stream's start, whose actors may die under it."""

import asyncio
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from saeray.errors import ConfigError, SaerayError
from saeray.stream.launch import CHECK_TRIES, surviving


def answering(*answers):
    """A method whose calls answer, or raise, so."""
    left = list(answers)

    async def call(*arguments):
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer, arguments

    return (lambda: SimpleNamespace(remote=call)), left


LOST = ActorUnavailableError("it is being started again", b"0" * 16)


def test_it_is_made_again_when_its_actor_dies_under_it():
    method, _ = answering(LOST, LOST, "facts")
    assert asyncio.run(surviving(method, "the harvester", 1, 2)) == ("facts", (1, 2))


@pytest.mark.parametrize("deaths", [[LOST] * CHECK_TRIES, [ActorDiedError()]])
def test_but_not_for_ever(deaths):
    method, left = answering(*deaths)
    with pytest.raises(SaerayError, match=r"the harvester died .* out of memory"):
        asyncio.run(surviving(method, "the harvester"))
    assert left == []


def test_what_is_wrong_is_said_at_once():
    method, left = answering(ConfigError("d_in"), "facts")
    with pytest.raises(ConfigError, match="d_in"):
        asyncio.run(surviving(method, "the harvester"))
    assert left == ["facts"]
