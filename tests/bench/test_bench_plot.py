"""The figure of the benches: which row is which dot, and that texts do not overlap."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochameleon.bench import plot
from nanochameleon.bench.__main__ import Args, main
from nanochameleon.bench.rows import Row, save
from nanochameleon.errors import UserError

ROW = Row("kernels", "zloss 3 x 4 fp32 f+b", "numba", 1.0, "ms", None, None, "a CPU, 1 thread", "2", "0", 0.25)


def row(variant: str, share: float | None = 0.25, **changes) -> Row:
    return dataclasses.replace(ROW, variant=variant, of_limit=share, **changes)


def test_each_program_has_its_best_share_in_the_line_of_its_shape():
    rows = [
        row("reference", 0.1), row("compile", 0.2), row("in place", 0.4), row("numba", 0.3), row("copy", 0.5),
        row("loops", 0.01), row("numba", None), row("numba", 0.6, case="zloss 5 x 6 bf16 f+b"),
    ]  # fmt: skip
    found = plot.panels(rows)["zloss"]
    assert found.lines == {
        "3 x 4 fp32": {"eager": 0.1, "compile": 0.2, "ours": 0.4, "copy": 0.5}, "5 x 6 bf16": {"ours": 0.6},
    }  # fmt: skip
    assert list(found.devices) == ["a CPU, 1 thread"]


def test_forward_alone_is_drawn_only_where_there_is_nothing_else():
    cases = "attention B1 f", "attention B1 f+b", "decode B1 f"
    found = plot.panels([row("cuda", 0.1 * i, case=case) for i, case in enumerate(cases, 1)])
    assert {op: panel.lines for op, panel in found.items()} == {
        "attention": {"B1": {"ours": 0.2}}, "decode": {"B1 f": {"ours": pytest.approx(0.3)}},
    }  # fmt: skip


def test_training_has_a_line_for_each_precision_and_the_best_mode_of_each_side():
    variants = {
        "nano eager fp32": 0.5, "nano eager bf16": 0.4, "nano eager bf16 packed": 0.9, "nano": 0.95,
        "transformers eager bf16": 0.1, "transformers compile weights": 0.2,
    }  # fmt: skip
    rows = [row(name, share, bench="train", case="tiny, each") for name, share in variants.items()]
    assert plot.panels(rows)["train"].lines == {
        "tiny, fp32": {"ours": 0.5}, "tiny, bf16": {"ours": 0.4, "transformers": 0.2},
    }  # fmt: skip


def test_generation_is_compared_with_transformers_alone():
    names = "nano", "nano sampled", "nano without guidance", "transformers generate dynamic"
    rows = [row(name, bench="engine", case="text") for name in names]
    assert plot.panels(rows)["engine"].lines == {"text": {"ours": 0.25, "transformers": 0.25}}


def test_the_ratio_is_that_of_the_shares_to_the_best_of_the_others():
    assert plot.ratio({"ours": 0.4, "eager": 0.1, "compile": 0.2, "copy": 0.9}) == "2.0 x torch.compile"
    assert plot.ratio({"ours": 0.4, "copy": 0.9}) == plot.ratio({"eager": 0.1}) == ""


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0.3, 1.2)), min_size=1, max_size=5))
def test_names_do_not_overlap_and_keep_their_order(names):
    places, widths = zip(*sorted(names), strict=True)
    moved = plot.spread(places, widths)
    for i in range(len(moved) - 1):
        assert moved[i + 1] - moved[i] >= (widths[i] + widths[i + 1]) / 2 - 1e-3


def test_names_with_room_stay_where_they_are():
    assert plot.spread([0.0, 1.0, 2.5], [1.0, 1.0, 1.0]) == [0.0, 1.0, 2.5]


def test_no_two_programs_look_alike():
    looks = [plot.LOOKS[name] for name in plot.LOOKS if name != "limit"]
    for attribute in ("label", "colour", "marker"):
        assert len({getattr(look, attribute) for look in looks}) == len(looks)


def test_saved_rows_are_drawn_as_one_figure_of_the_width_of_a_page(tmp_path, capsys):
    save([row("numba")], tmp_path / "a.json")
    save([row("nano", bench="engine", case="text")], tmp_path / "b.json")
    main(Args("plot", (tmp_path / "a.json", tmp_path / "b.json"), plot=tmp_path / "all.png"))
    content = (tmp_path / "all.png").read_bytes()
    assert content.startswith(b"\x89PNG") and int.from_bytes(content[16:20], "big") == 1_600
    assert capsys.readouterr().out.count("25% of the limit") == 2


def test_rows_without_a_limit_are_no_figure(tmp_path):
    with pytest.raises(UserError, match="no row has a share"):
        plot.draw([row("numba", None)], tmp_path / "a.png")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (Args("plot", plot="a.png"), "name files"),
        (Args("plot", ("a.json",)), "name files"),
        (Args("train", ("a.json",)), "only plot reads files"),
        (Args("data", plot="a.png"), "--plot belongs to"),
    ],
)
def test_options_that_do_not_fit_are_refused(args, why):
    with pytest.raises(UserError, match=why):
        main(args)
