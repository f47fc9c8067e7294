"""Hostlists: by properties, by examples, and against Slurm's own expansion."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydro_slurm.errors import FormatError
from hydro_slurm.slurm.hostlist import MAX_HOSTS, compress, expand
from hydro_slurm.testbed import Testbed

NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,3}[0-9]{0,4}(n[0-9]{1,3})?", fullmatch=True)

EXAMPLES = {
    "n1": ["n1"],
    "n[1-3]": ["n1", "n2", "n3"],
    "gpu[01-03,08]": ["gpu01", "gpu02", "gpu03", "gpu08"],
    "gpu[08-11]": ["gpu08", "gpu09", "gpu10", "gpu11"],
    "a[1-2]b[3-4]": ["a1b3", "a1b4", "a2b3", "a2b4"],
    "r[1-2]n[08-10],login1,x": ["r1n08", "r1n09", "r1n10", "r2n08", "r2n09", "r2n10", "login1", "x"],
    "n[1,3,5-6],m[2]": ["n1", "n3", "n5", "n6", "m2"],
    "n[9-11]": ["n9", "n10", "n11"],
}


@given(st.lists(NAMES, max_size=30))
def test_expanding_what_was_compressed_gives_the_same_names(names: list[str]) -> None:
    assert sorted(expand(compress(names))) == sorted(set(names))


@given(st.lists(NAMES, max_size=20))
def test_compressing_ignores_order_and_repetition(names: list[str]) -> None:
    assert compress(names) == compress(sorted(names + names, reverse=True))


@given(st.text(alphabet="ab01[]-,. \n²", max_size=25))
def test_any_text_is_expanded_or_refused(text: str) -> None:
    try:
        names = expand(text)
    except FormatError:
        return
    assert all(name and not set("[], \n") & set(name) for name in names)


@pytest.mark.parametrize("text", EXAMPLES)
def test_expands_examples(text: str) -> None:
    assert list(expand(text)) == EXAMPLES[text]


@pytest.mark.parametrize("text", EXAMPLES)
def test_expands_like_slurm(text: str, testbed: Testbed) -> None:
    output = testbed.run(["scontrol", "show", "hostnames", text]).stdout
    assert list(expand(text)) == output.split()


def test_text_may_follow_a_bracket() -> None:
    assert expand("a[0-1]-ib") == ("a0-ib", "a1-ib")


@given(start=st.integers(0, 120), count=st.integers(1, 40), width=st.integers(1, 4))
def test_a_range_is_one_bracket(start: int, count: int, width: int) -> None:
    names = [f"node{number:0{width}d}" for number in range(start, start + count)]
    assert compress(names).count("[") <= 2  # widths may change once (padded, then not)
    assert set(expand(compress(names))) == set(names)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["n2", "n1", "n3"], "n[1-3]"),
        (["gpu01", "gpu02", "gpu10"], "gpu[01-02,10]"),
        (["n1", "n01"], "n01,n1"),
        (["n8", "n9", "n10"], "n[8-10]"),
        (["login", "n7"], "login,n7"),
    ],
)
def test_compresses_examples(names: list[str], text: str) -> None:
    assert compress(names) == text


def test_slurm_reads_what_is_compressed(testbed: Testbed) -> None:
    names = ["n1", "n2", "n10", "gpu01", "gpu02", "gpu10", "r1n7", "x"]
    assert sorted(testbed.run(["scontrol", "show", "hostnames", compress(names)]).stdout.split()) == sorted(names)


@pytest.mark.parametrize(
    "text", ["n[", "n]", "n[]", "n[1-]", "n[-1]", "n[3-1]", "n[a-b]", "n[1-2", "n[[1]]", ",", "a,,b", "a,", "a b"]
)
def test_refuses_what_is_no_hostlist(text: str) -> None:
    with pytest.raises(FormatError, match="hostlist"):
        expand(text)


@pytest.mark.parametrize(
    "text", ["n[0-999999999999]", "a[0-999]b[0-999]c[0-999]", "a[0-9]" * 30, "n[1-60000],m[1-60000]"]
)
def test_size_is_bounded(text: str) -> None:
    started = time.monotonic()
    with pytest.raises(FormatError, match=str(MAX_HOSTS)):
        expand(text)
    assert time.monotonic() - started < 5.0, "refused, but only after expanding it"


@pytest.mark.parametrize("name", ["", "a,b", "a[1]", "a b"])
def test_refuses_to_compress_what_is_no_name(name: str) -> None:
    with pytest.raises(FormatError, match="name"):
        compress([name])
