"""The chat page as text: the configured reasons, escaped; nothing is written inline; and assets stay small."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.server import RunningServer, fake_config

import pairloop.web
from pairloop.errors import ConfigError

ASSETS_LIMIT = 300_000
"""Bytes of everything that the pages load, all together."""


def test_the_reasons_are_the_configured_ones_and_escaped(serve: Callable[..., RunningServer], tmp_path: Path) -> None:
    config = fake_config(tmp_path, feedback={"reasons": ["kinder", "<b>bolder</b>"]})
    page = serve(config=config).http.get("/").text
    assert 'data-reason="kinder"' in page
    assert "&lt;b&gt;bolder&lt;/b&gt;" in page
    assert "<b>bolder" not in page
    assert "more helpful" not in page


@pytest.mark.parametrize("reasons", [["a, b"], [""], ["x" * 41], [f"reason {number}" for number in range(11)]])
def test_reasons_that_the_tag_cannot_hold_are_refused(tmp_path: Path, reasons: list[str]) -> None:
    with pytest.raises(ConfigError, match="reasons"):
        fake_config(tmp_path, feedback={"reasons": reasons})


def test_all_assets_together_stay_small() -> None:
    static = Path(pairloop.web.__file__).parent / "static"
    assert sum(path.stat().st_size for path in static.rglob("*.*") if path.suffix != ".md") < ASSETS_LIMIT
