"""What an error keeps on its way from one process to another."""

from __future__ import annotations

import pickle

import pytest

from terrazzo.lowering.errors import InternalError, TerrazzoError, Unsupported, UserError


@pytest.mark.parametrize("kind", [TerrazzoError, UserError, Unsupported, InternalError])
def test_an_error_can_be_sent_to_another_process(kind: type[TerrazzoError]) -> None:
    error = kind("node mul", "no way", stage="fuse", remedy="Do without.", source="model.py:3")
    error.add_note("seen at night")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind and str(back) == str(error) and vars(back) == vars(error)
    assert back.source == "model.py:3" and back.__notes__ == ["seen at night"]


def test_what_was_not_given_stays_out_of_the_message() -> None:
    back = pickle.loads(pickle.dumps(UserError("a request", "it is wrong", stage="intake")))
    assert str(back) == "a request: it is wrong [intake]." and (back.remedy, back.source) == ("", "")
