"""The results file: what is read, continued and kept, and that nothing else is ever changed."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from ray_envs.batch_models import ItemResult
from ray_envs.client.results import append_result, results_file, results_in
from ray_envs.errors import InvalidInput


def line(case_id: str) -> bytes:
    return (
        ItemResult(variant_id="v", case_id=case_id, ok=True, value="é").model_dump_json().encode()
    )


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "b.results.jsonl"


def test_results_with_windows_line_ends_are_kept_whole(results: Path) -> None:
    content = line("one") + b"\r\n" + line("two") + b"\r\n"
    results.write_bytes(content)
    with results_file(results, resume=True) as (_, done):
        assert [result.case_id for result in done] == ["one", "two"]
    assert results.read_bytes() == content


def test_a_line_that_was_torn_inside_a_letter_is_cut(results: Path) -> None:
    whole = line("one") + b"\n"
    torn = line("two").partition("é".encode())[0] + "é".encode()[:1]
    results.write_bytes(whole + torn)
    with results_file(results, resume=True) as (log, done):
        assert [result.case_id for result in done] == ["one"]
        log.write(line("three") + b"\n")
    assert results.read_bytes() == whole + line("three") + b"\n"


def test_a_last_result_without_its_newline_counts_only_if_the_file_keeps_it(results: Path) -> None:
    """An editor may leave it so; what is skipped now must be known to the next `--resume` too."""
    results.write_bytes(line("one") + b"\n" + line("two"))
    with results_file(results, resume=True) as (_, done):
        counted = [result.case_id for result in done]
    with results_file(results, resume=True) as (_, done):
        assert [result.case_id for result in done] == counted


def test_an_os_error_of_the_run_is_not_renamed_to_one_of_the_results_file(results: Path) -> None:
    mine = OSError(errno.EIO, "something else")
    with (
        pytest.raises(OSError, match="something else") as caught,
        results_file(results, resume=False),
    ):
        raise mine
    assert caught.value is mine


@pytest.mark.parametrize("resume", [False, True])
def test_an_interrupted_run_without_results_leaves_no_empty_file(
    results: Path, resume: bool
) -> None:
    with pytest.raises(KeyboardInterrupt), results_file(results, resume=resume):
        raise KeyboardInterrupt
    assert list(results.parent.iterdir()) == []


def test_a_device_is_refused_as_results_file_and_stays() -> None:
    null = Path(os.devnull)
    with pytest.raises(InvalidInput, match="not a file"), results_file(null, resume=False):
        pytest.fail("it was accepted")
    assert stat.S_ISCHR(null.stat().st_mode)


# -- what is read ----------------------------------------------------------------------------------

PATH = Path("b.results.jsonl")


def cases_in(content: bytes) -> list[str]:
    return [result.case_id for result in results_in(content, PATH)]


def test_results_are_read_in_order() -> None:
    content = line("a") + b"\n" + line("b") + b"\n"
    assert cases_in(content) == ["a", "b"]
    assert results_in(content, PATH)[0].value == "é"
    assert results_in(b"", PATH) == []


def test_a_result_that_was_being_written_when_its_writer_was_killed_is_ignored() -> None:
    whole, torn = line("a") + b"\n", line("b")
    for length in range(len(torn)):
        assert cases_in(whole + torn[:length]) == ["a"], torn[:length]
    assert cases_in(whole + torn) == ["a", "b"]  # all but the newline was written


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (b'{"variant_id": "v", "cas', "the line is not JSON"),
        (b"[1]", "the line is not an item result"),
        (b'{"variant_id": "v", "case_id": "c", "ok": true, "kee": 1}', "unknown key 'kee'"),
        (b'{"variant_id": "v"}', "case_id is missing"),
        (b"\x00\x00", "the line is not JSON"),
        (b'{"variant_id": "v", "case_id": "c", "ok": true, "value": NaN}', "not JSON"),
        (b'{"variant_id": "v", "case_id": "c", "ok": true, "value": "\\ud83d"}', "not JSON"),
        (b'{"variant_id": "v", "value": ' + b"[" * 100_000, "not JSON"),
        (b'{"variant_id": "v", "value": ' + b"9" * 100_000 + b"}", "not JSON"),
    ],
)
@pytest.mark.parametrize("is_last", [True, False])
def test_any_other_damaged_line_is_named_by_its_number(
    damage: bytes, says: str, is_last: bool
) -> None:
    tail = b"" if is_last else line("b") + b"\n"
    with pytest.raises(InvalidInput) as caught:
        results_in(line("a") + b"\n\n" + damage + b"\n" + tail, PATH)
    assert caught.value.where == f"{PATH}, line 3"
    assert says in caught.value.message
    assert caught.value.hint == "remove the line, or run without resuming"


# -- what is never changed -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b'name = "b"\n[[variants]]\n',  # the batch file itself
        b"a,b\n1,2\n",
        b"one line without a newline",
        b"{",
        b'{"variant_id": "v"}\n',
        b'{"other": 1}\n' + line("a") + b"\n",
        b"\n",
        bytes(range(256)),
    ],
)
@pytest.mark.parametrize("resume", [False, True])
def test_a_file_of_somebody_else_is_refused_and_stays(
    results: Path, content: bytes, resume: bool
) -> None:
    results.write_bytes(content)
    with (
        pytest.raises(InvalidInput, match="something other than results") as caught,
        results_file(results, resume=resume),
    ):
        pytest.fail("it was accepted")
    assert str(results) in caught.value.message
    assert results.read_bytes() == content
    assert os.listdir(results.parent) == [results.name]


def test_each_run_moves_the_results_before_it_to_a_number_of_their_own(results: Path) -> None:
    for case in ("one", "two", "three"):
        with results_file(results, resume=False) as (log, done):
            assert done == []
            append_result(log, ItemResult(variant_id="v", case_id=case, ok=True))
    kept = {path.name: cases_in(path.read_bytes()) for path in results.parent.iterdir()}
    assert kept == {
        results.name: ["three"],
        results.name + ".1": ["one"],
        results.name + ".2": ["two"],
    }


@pytest.mark.parametrize("is_dangling", [False, True])
def test_a_link_in_the_place_of_earlier_results_is_not_followed(
    results: Path, is_dangling: bool
) -> None:
    precious = results.parent / "precious"
    if not is_dangling:
        precious.write_text("kept")
    Path(f"{results}.1").symlink_to(precious)
    results.write_bytes(line("one") + b"\n")
    with results_file(results, resume=False) as (log, _):
        append_result(log, ItemResult(variant_id="v", case_id="two", ok=True))
    assert cases_in(Path(f"{results}.2").read_bytes()) == ["one"]
    assert precious.exists() is not is_dangling
    assert is_dangling or precious.read_text() == "kept"


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("is_dangling", [False, True])
def test_results_are_not_written_through_a_link(
    results: Path, resume: bool, is_dangling: bool
) -> None:
    target = results.parent / "target.jsonl"
    if not is_dangling:
        target.write_bytes(line("one") + b"\n")
    results.symlink_to(target)
    with pytest.raises(InvalidInput, match="is a link"), results_file(results, resume=resume):
        pytest.fail("it was accepted")
    assert target.exists() is not is_dangling
    assert is_dangling or target.read_bytes() == line("one") + b"\n"


def test_a_folder_and_a_path_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for path, says in (
        (tmp_path, "is not a file"),
        (tmp_path / "missing" / "r.jsonl", "No such file"),
        (Path("a\0b"), "cannot write results"),
        (tmp_path / ("x" * 300), "too long"),
    ):
        with pytest.raises(InvalidInput, match=says), results_file(path, resume=False):
            pytest.fail("it was accepted")


def test_a_second_run_of_the_same_results_is_refused_and_the_first_goes_on(results: Path) -> None:
    with results_file(results, resume=False) as (log, _):
        with pytest.raises(InvalidInput, match="another run"), results_file(results, resume=True):
            pytest.fail("it was accepted")
        append_result(log, ItemResult(variant_id="v", case_id="one", ok=True))
    assert cases_in(results.read_bytes()) == ["one"]
