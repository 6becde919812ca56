"""What an error keeps on its way from one process to another."""

from __future__ import annotations

import pickle

import pytest

from terrazzo.lowering.errors import InternalError, TerrazzoError, Unsupported, UserError, forget_frames


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


def test_an_error_that_is_kept_holds_no_frames() -> None:
    try:
        try:
            raise ValueError("first")
        except ValueError as first:
            try:
                raise KeyError("second")
            except KeyError:
                raise RuntimeError("third") from first
    except RuntimeError as raised:
        error = raised
    # What led to what may lead back.
    assert error.__cause__ is not None and error.__context__ is not None
    error.__cause__.__cause__ = error
    forget_frames(error)
    assert not any(e.__traceback__ for e in (error, error.__cause__, error.__context__))
