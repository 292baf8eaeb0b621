"""A log harms nothing that is there, and is nobody else's to read."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gradmap.common.errors import UserError
from serving import log_file
from serving.log import Log


def write(path, *lines):
    log = Log(path)
    for line in lines:
        log.relay(line)
    log.close()


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_lines_go_behind_what_is_there(tmp_path):
    path = tmp_path / "log"
    path.write_text("earlier\n")
    path.chmod(0o644)
    write(path, "later")
    assert path.read_text() == "earlier\nlater\n"
    assert mode(path) == 0o600


def test_a_new_log_is_its_owners(tmp_path):
    before = os.umask(0)
    try:
        write(tmp_path / "deeper" / "log", "one")
    finally:
        os.umask(before)
    assert mode(tmp_path / "deeper" / "log") == 0o600


def test_a_large_log_is_rotated_and_the_last_one_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(log_file, "ROTATE_BYTES", 10)
    path = tmp_path / "log"
    write(path, "12345678")
    write(path, "next")
    assert (path.read_text(), (tmp_path / "log.1").read_text()) == ("next\n", "12345678\n")
    assert mode(path) == mode(tmp_path / "log.1") == 0o600


@pytest.mark.parametrize("target", ["/dev/stdout", "/dev/stderr", "/proc/self/fd/1"])
def test_a_link_to_a_stream_is_written_through(tmp_path, capfd, monkeypatch, target):
    monkeypatch.setattr(log_file, "ROTATE_BYTES", 10)
    link = tmp_path / "log"
    link.symlink_to(target)
    write(link, "longer than a rotation", "of logs")
    captured = capfd.readouterr()
    assert (
        captured.err if target == "/dev/stderr" else captured.out
    ) == "longer than a rotation\nof logs\n"
    assert str(link.readlink()) == target
    assert list(tmp_path.iterdir()) == [link]


def test_a_device_stays_a_device():
    write(Path("/dev/null"), "one")
    assert Path("/dev/null").is_char_device()


def test_a_pipe_is_written_to(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    write(path, "one", "two")
    assert os.read(reader, 100) == b"one\ntwo\n"
    os.close(reader)


def test_what_cannot_be_written_is_refused_before_the_start(tmp_path):
    os.mkfifo(tmp_path / "unread")
    (tmp_path / "file").touch()
    for path in (tmp_path / "unread", tmp_path, tmp_path / "file" / "log"):
        with pytest.raises(UserError, match=r"cannot be written \(.+\); choose another with --log"):
            Log(path).open()


def test_a_link_to_a_file_is_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(log_file, "ROTATE_BYTES", 10)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write(tmp_path / "link", "12345678")
    write(tmp_path / "link", "next")
    assert (tmp_path / "link").is_symlink()
    assert [(tmp_path / name).read_text() for name in ("link", "file.1")] == [
        "next\n",
        "12345678\n",
    ]


def test_a_reader_that_is_gone_does_not_stop_the_server():
    script = (
        "import sys; from serving.log import Log; sys.stdin.read();"
        "logs = [Log(), Log(as_json=True)];"
        "[log.say('unheard') or log.relay('unheard') for log in logs]; sys.exit(7)"
    )
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    process.stderr.close()
    process.stdin.close()
    assert process.wait() == 7
