"""Each line is one JSON object, whoever logs it and wherever."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from gmem.runtime import log
from gmem.runtime.log import bound, logger


@pytest.fixture(autouse=True)
def configured() -> Iterator[None]:
    root = logging.getLogger()
    before = logger.names, logger.level, root.handlers[:], root.level
    log.configure(service="vmm-0", host="h")
    yield
    logger.names, logger.level, root.handlers[:], level = before
    root.setLevel(level)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_line_says_when_who_and_what(capsys: pytest.CaptureFixture[str]) -> None:
    logger.info("ready", target="unix:/x", number=1)
    (line,) = lines(capsys)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "level": "info",
        "service": "vmm-0",
        "host": "h",
        "event": "ready",
        "target": "unix:/x",
        "number": 1,
    }


def test_what_is_below_the_level_is_not_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger.debug("answered")
    logging.getLogger("grpc").debug("call")
    log.configure(service="vmm-0", host="h", level="ERROR")
    logger.warning("slow")
    logger.error("failed")
    assert [line["event"] for line in lines(capsys)] == ["failed"]


async def test_names_follow_tasks_and_end_with_their_block(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def other() -> None:
        with bound(inode=7):
            logger.info("inside")

    with bound(request_id="r", vm=""):
        await asyncio.create_task(other())
        logger.info("after")
    logger.info("outside")
    names = [{"request_id": "r", "inode": 7}, {"request_id": "r"}, {}]
    for line, wanted in zip(lines(capsys), names, strict=True):
        found = {key: line[key] for key in ("request_id", "inode", "vm") if key in line}
        assert found == wanted


def test_a_traceback_is_in_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError("no")  # noqa: TRY301
    except ValueError as error:
        logger.exception("handled")
        logger.critical("bug", exc_info=error)
    for line, level in zip(lines(capsys), ("error", "critical"), strict=True):
        assert line["level"] == level
        assert "exc_info" not in line
        assert line["exception"].startswith("Traceback")
        assert line["exception"].endswith("ValueError: no")


def test_what_libraries_log_has_the_same_form(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logging.getLogger("asyncio").warning("took %d s", 3)
    (line,) = lines(capsys)
    assert (line["level"], line["event"]) == ("warning", "took 3 s")
    assert (line["service"], line["logger"]) == ("vmm-0", "asyncio")


def test_what_has_no_json_is_written_as_text(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger.info("odd", value={1, 2}.__class__)
    assert lines(capsys)[0]["value"] == "<class 'set'>"


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "no space left")


def closed() -> io.StringIO:
    file = io.StringIO()
    file.close()
    return file


@pytest.mark.parametrize("file", [Full(), closed()], ids=["full", "closed"])
def test_a_line_that_cannot_be_written_is_lost(
    monkeypatch: pytest.MonkeyPatch, file: io.StringIO
) -> None:
    monkeypatch.setattr(sys, "stderr", file)
    logger.info("to nobody")
