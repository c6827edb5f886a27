"""A mistake is printed once, and never by no rank."""

import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanochameleon.errors import OwnError, UserError, exit_on_user_error
from nanochameleon.parallel.mesh import rank_and_world_size

NUMBERS = ("0", "1", "2", "7", "first", "", "-1", "\u00b2")
ENVIRONMENTS = st.dictionaries(st.sampled_from(["RANK", "WORLD_SIZE", "MASTER_ADDR"]), st.sampled_from(NUMBERS))


def said(environment: dict[str, str], capsys, error: UserError, each: bool = False) -> str:
    """What a program that meets the error prints where the environment is so."""

    def main():
        raise error

    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as end:
            exit_on_user_error(main, each)
    assert end.value.code == 2
    return capsys.readouterr().err


@given(ENVIRONMENTS)
@example({"RANK": "1"})
@example({"RANK": "1", "WORLD_SIZE": "1", "MASTER_ADDR": "h"})
@example({"RANK": "1", "WORLD_SIZE": "2"})
@example({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h"})
def test_only_ranks_of_torchrun_other_than_0_leave_the_sentence_to_rank_0(capsys, environment):
    others = environment.get("WORLD_SIZE") in ("2", "7") and "MASTER_ADDR" in environment
    silent = others and environment.get("RANK") in ("1", "2", "7")
    assert said(environment, capsys, UserError("wrong: mend it")) == ("" if silent else "error: wrong: mend it\n")
    assert said(environment, capsys, OwnError("wrong")) == "error: wrong\n"
    assert said(environment, capsys, UserError("wrong"), each=True) == "error: wrong\n"


@given(st.integers(0, 9), st.integers(1, 9) | st.none())
def test_a_rank_is_among_its_world_or_refused(rank, world):
    """A rank that is not would do no work, or another's: units rank, rank + world, ... of prepared data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", {"RANK": str(rank)} | ({"WORLD_SIZE": str(world)} if world else {}))
        if rank < (world or 1):
            assert rank_and_world_size() == (rank, world or 1)
        else:
            with pytest.raises(UserError, match=f"RANK is {rank} in the environment, but WORLD_SIZE is"):
                rank_and_world_size()
