"""Fetching one file from servers that cut, lie, forget, refuse and change their minds."""

import errno
import shutil
from collections import namedtuple

import gdown
import numpy as np
import pytest
from faulty_server import PAGE, FaultyServer, Served

from mlnet_utils.data import transfer
from mlnet_utils.data.transfer import Retries, TransferError, WebPageError, fetch, fetch_drive

CONTENT = np.random.default_rng(0).bytes(3_000_000)  # some blocks of 1 MiB, the last not full


@pytest.fixture
def server():
    with FaultyServer() as running:
        yield running


@pytest.fixture
def part(tmp_path):
    return tmp_path / "archives" / "file.zip.part"


@pytest.fixture
def retries():
    """Three attempts; what would have been slept is in ``waited``."""
    waited = []
    made = Retries(attempts=3, sleep=waited.append)
    object.__setattr__(made, "waited", waited)
    return made


def test_a_file_comes_whole(server, part):
    server.files["f"] = Served(CONTENT)
    fetch(server.url("f"), part, size=len(CONTENT))
    assert part.read_bytes() == CONTENT
    assert len(server.files["f"].requests) == 1


def test_a_cut_connection_is_resumed_where_it_was_cut(server, part, retries):
    served = server.files["f"] = Served(CONTENT, cuts=[1_200_000, 900_000])
    fetch(server.url("f"), part, retries=retries)
    assert part.read_bytes() == CONTENT
    assert [r["Range"] for r in served.requests[1:]] == ["bytes=1200000-", "bytes=2100000-"]


def test_a_reset_connection_is_survived(server, part, retries):
    # A reset may take bytes with it that were on their way, so where it resumes is open.
    served = server.files["f"] = Served(CONTENT, cuts=[1_200_000, 900_000], reset=True)
    fetch(server.url("f"), part, retries=retries)
    assert part.read_bytes() == CONTENT
    assert len(served.requests) == 3


def test_a_second_run_goes_on_where_the_first_gave_up(server, part, retries):
    served = server.files["f"] = Served(CONTENT, cuts=[1_000_000], errors=[])
    with pytest.raises(TransferError, match="cut after 1000000 of 3000000 bytes, after 1 attempts"):
        fetch(server.url("f"), part, retries=Retries(attempts=1))
    assert part.stat().st_size == 1_000_000
    fetch(server.url("f"), part, retries=retries)
    assert part.read_bytes() == CONTENT
    assert served.requests[1]["Range"] == "bytes=1000000-"
    assert served.requests[1]["If-Range"] == '"1"'


def test_a_complete_part_is_not_asked_for_again(server, part):
    served = server.files["f"] = Served(CONTENT)
    fetch(server.url("f"), part)
    fetch(server.url("f"), part)
    assert len(served.requests) == 1


def test_last_modified_serves_where_there_is_no_strong_etag(server, part, retries):
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    served = Served(CONTENT, etag='W/"1"', modified=date, cuts=[1_000_000])
    server.files["f"] = served
    fetch(server.url("f"), part, retries=retries)
    assert served.requests[1]["If-Range"] == date
    assert part.read_bytes() == CONTENT


def cut_first(server, part, **how):
    """A part of one million bytes, as a run that gave up leaves it."""
    server.files["f"] = Served(CONTENT, cuts=[1_000_000], **how)
    with pytest.raises(TransferError):
        fetch(server.url("f"), part, retries=Retries(attempts=1))
    assert part.stat().st_size == 1_000_000


def test_a_server_that_ignores_ranges_makes_the_file_start_anew(server, part, retries):
    cut_first(server, part, ranges=False)
    fetch(server.url("f"), part, retries=retries)
    assert part.read_bytes() == CONTENT


def test_a_file_that_changed_in_between_starts_anew(server, part, retries):
    cut_first(server, part)
    other = CONTENT[::-1][:2_500_000]
    server.files["f"] = Served(other, etag='"2"')
    fetch(server.url("f"), part, retries=retries)
    assert part.read_bytes() == other


def test_a_server_without_validators_makes_the_file_start_anew(server, part, retries):
    cut_first(server, part, etag="")
    fetch(server.url("f"), part, retries=retries)
    assert "Range" not in server.files["f"].requests[1]
    assert part.read_bytes() == CONTENT


@pytest.mark.parametrize("span", ["bytes 0-2999999/3000000", "bytes 1000000-2999999/9", "x"])
def test_other_bytes_than_asked_for_are_not_appended(server, part, retries, span):
    cut_first(server, part)
    server.files["f"].span = span
    fetch(server.url("f"), part, retries=retries)
    assert part.read_bytes() == CONTENT


def test_a_206_of_another_version_is_not_appended(server, part, retries, monkeypatch):
    cut_first(server, part)
    served = server.files["f"] = Served(CONTENT[::-1], etag='"2"')
    # A broken server that heeds Range but not If-Range.
    monkeypatch.setattr(
        "faulty_server._Handler._start",
        lambda self, served: int(self.headers.get("Range", "bytes=0-")[6:-1]),
    )
    fetch(server.url("f"), part, retries=retries)
    assert part.read_bytes() == CONTENT[::-1]
    assert len(served.requests) == 2


def test_a_part_longer_than_the_file_starts_anew(server, part, retries):
    cut_first(server, part)
    server.files["f"] = Served(CONTENT[:500_000])
    fetch(server.url("f"), part, retries=retries)
    assert part.read_bytes() == CONTENT[:500_000]


def test_a_part_of_another_address_is_not_gone_on_with(server, part, retries):
    cut_first(server, part)
    server.files["g"] = Served(CONTENT[::-1])
    fetch(server.url("g"), part, retries=retries)
    assert part.read_bytes() == CONTENT[::-1]


def test_a_wrong_length_is_never_taken_for_whole(server, part, retries):
    server.files["f"] = Served(CONTENT, announce=len(CONTENT) + 10)
    with pytest.raises(TransferError, match="after 3 attempts"):
        fetch(server.url("f"), part, retries=retries)


def test_a_file_of_another_size_is_refused_before_it_comes(server, part):
    server.files["f"] = Served(CONTENT)
    with pytest.raises(TransferError, match=r"offers 3000000 bytes, but the file has 7.*replaced"):
        fetch(server.url("f"), part, size=7)
    assert not part.exists()


def test_a_stream_without_length_is_fetched(server, part):
    server.files["f"] = Served(CONTENT, chunked=True)
    fetch(server.url("f"), part)
    assert part.read_bytes() == CONTENT


def test_a_missing_file_is_not_tried_again(server, part, retries):
    with pytest.raises(TransferError, match="the server answers 404"):
        fetch(server.url("gone"), part, retries=retries)
    assert retries.waited == []


def test_passing_errors_are_waited_out(server, part, retries):
    served = server.files["f"] = Served(CONTENT, errors=[503, 429], retry_after="7")
    fetch(server.url("f"), part, retries=retries)
    assert part.read_bytes() == CONTENT
    assert retries.waited == [7, 7]
    served.errors, served.retry_after = [500] * 9, ""
    part.unlink()
    with pytest.raises(TransferError, match=r"answers 500 .*after 3 attempts"):
        fetch(server.url("f"), part, retries=retries)
    assert retries.waited[2:] == [1, 2]


def test_waiting_doubles_up_to_a_limit():
    waited = []
    retries = Retries(first_wait=1, longest_wait=5, sleep=waited.append)
    for failures in (1, 2, 3, 4, 5):
        retries.wait(failures)
    retries.wait(1, asked=3600)
    assert waited == [1, 2, 4, 5, 5, 5]


def test_attempts_that_bring_bytes_do_not_count(server, part, retries):
    server.files["f"] = Served(CONTENT, cuts=[400_000] * 6)
    fetch(server.url("f"), part, retries=retries)
    assert part.read_bytes() == CONTENT


def test_a_server_that_stalls_is_given_up(server, part, retries, monkeypatch):
    monkeypatch.setattr(transfer, "TIMEOUT", 0.1)
    served = server.files["f"] = Served(CONTENT, stalls=[1_200_000])
    fetch(server.url("f"), part, retries=retries)
    assert part.read_bytes() == CONTENT
    assert len(served.requests) == 2
    part.unlink()
    served.stalls = [0] * 9  # not even a header
    with pytest.raises(TransferError, match="timed out, after 3 attempts"):
        fetch(server.url("f"), part, retries=retries)


@pytest.mark.parametrize("state", ["[]", "{}", "1"])
def test_a_part_of_which_nothing_is_known_starts_anew(server, part, retries, state):
    cut_first(server, part)
    part.with_name(f"{part.name}.json").write_text(state)
    fetch(server.url("f"), part, retries=retries)
    assert "Range" not in server.files["f"].requests[1]
    assert part.read_bytes() == CONTENT


def test_nobody_at_the_other_end(part, retries):
    with FaultyServer() as closed:
        url = closed.url("f")
    with pytest.raises(TransferError, match="after 3 attempts"):
        fetch(url, part, retries=retries)


def test_a_web_page_keeps_the_part_that_is_there(server, part, retries):
    cut_first(server, part)
    server.files["f"] = Served(PAGE, kind="text/html; charset=utf-8", etag='"2"')
    with pytest.raises(WebPageError, match="a web page came in place of the file"):
        fetch(server.url("f"), part, retries=retries)
    assert part.stat().st_size == 1_000_000


def test_a_full_disk_is_noticed_before_the_transfer(server, part, monkeypatch):
    server.files["f"] = Served(CONTENT)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 2_999_999))
    with pytest.raises(OSError, match=r"needs 0.00 GB, but the disk .* --root"):
        fetch(server.url("f"), part)
    assert not part.exists()


# ---- Google Drive ------------------------------------------------------------------------------
@pytest.fixture
def drive(server, monkeypatch):
    """gdown itself, which treats other servers' addresses as plain files."""
    monkeypatch.setattr(transfer, "DRIVE", server.url("{}"))
    return server


def test_gdown_fetches(drive, part):
    part.parent.mkdir()
    drive.files["id1"] = Served(CONTENT)
    fetch_drive("id1", part)
    assert part.read_bytes() == CONTENT


def test_gdown_resumes(drive, part, retries):
    served = drive.files["id1"] = Served(CONTENT, cuts=[1_500_000])
    fetch_drive("id1", part, retries=retries)
    assert part.read_bytes() == CONTENT
    assert len(served.requests) == 3  # gdown asks once more before it asks for the rest
    assert [path.name for path in part.parent.iterdir()] == [part.name]


def test_attempts_of_gdown_that_bring_bytes_do_not_count(drive, part, retries):
    drive.files["id1"] = Served(CONTENT, cuts=[600_000] * 20)  # it keeps whole blocks of 0.5 MB
    fetch_drive("id1", part, retries=retries)
    assert part.read_bytes() == CONTENT
    assert len(retries.waited) > retries.attempts


def test_gdown_does_not_wait_for_a_server_that_stalls(drive, part, retries, monkeypatch):
    monkeypatch.setattr(transfer, "TIMEOUT", 0.1)
    drive.files["id1"] = Served(CONTENT, stalls=[0] * 9)
    with pytest.raises(TransferError, match=r"timed out.*after 3 attempts"):
        fetch_drive("id1", part, retries=retries)


def test_gdown_without_timeouts_is_served_too(part, monkeypatch):
    def download(url, output, quiet, use_cookies, resume):  # as of gdown 5
        part.write_bytes(b"x")
        return output

    monkeypatch.setattr(gdown, "download", download)
    fetch_drive("id1", part)
    assert part.read_bytes() == b"x"


def test_a_full_disk_is_noticed_before_gdown_starts(drive, part, monkeypatch):
    served = drive.files["id1"] = Served(CONTENT)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 2_999_999))
    with pytest.raises(
        OSError, match=r"id1 \(a rough size\) needs 0.00 GB, but the disk .* --root"
    ):
        fetch_drive("id1", part, about=3_000_000)
    assert not served.requests
    begun = part.with_name(f"{part.name}abcdefgh.part")  # as gdown names it
    begun.write_bytes(CONTENT[:1])
    fetch_drive("id1", part, about=3_000_000)
    assert (part.read_bytes(), begun.exists()) == (CONTENT, False)
    fetch_drive("id1", part, about=3_000_000)  # all is here


def test_a_disk_that_fills_up_is_not_tried_again(part, retries, monkeypatch):
    def fill(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gdown, "download", fill)
    with pytest.raises(TransferError, match="No space left on device"):
        fetch_drive("id1", part, retries=retries)
    assert retries.waited == []


def test_gdown_errors_are_told_apart(drive, part, retries, monkeypatch):
    with pytest.raises(TransferError, match="404"):
        fetch_drive("id1", part, retries=retries)
    assert retries.waited == []
    drive.files["id1"] = Served(CONTENT, errors=[503] * 9)
    with pytest.raises(TransferError, match=r"503.*after 3 attempts"):
        fetch_drive("id1", part, retries=retries)

    def refuse(*_, **__):
        raise gdown.exceptions.FileURLRetrievalError("Too many users\n\thave viewed the file")

    monkeypatch.setattr(gdown, "download", refuse)
    with pytest.raises(WebPageError, match="Too many users have viewed the file"):
        fetch_drive("id1", part, retries=retries)


def test_without_gdown_the_remedy_is_named(part, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gdown", None)
    with pytest.raises(ImportError, match=r"pip install 'mlnet-utils\[download\]'"):
        fetch_drive("id1", part)
