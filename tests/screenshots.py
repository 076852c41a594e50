"""``make screenshots``: every page of a furnished server as a picture, in light, in dark and on a phone."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Browser
from tests.browsing import PHONE, WIDE, chromium, visit
from tests.server import RunningServer
from tests.showroom import furnish, showroom

from pairloop.web.pages.menu import GROUPS

LOOKS = {"light": (WIDE, "light"), "dark": (WIDE, "dark"), "phone": (PHONE, "light")}
FIRST_LINKS = ("/versions", "/gates", "/runs", "/preferences", "/raters", "/datasets", "/requests")
"""Pages whose first entry has a page of its own."""


def take(browser: Browser, server: RunningServer, out: Path) -> list[Path]:
    """The pictures of each page and of the first entry of each list."""
    paths = [entry.path for _, entries in GROUPS for entry in entries]
    paths += [found for path in FIRST_LINKS if (found := _first_below(browser, server, path)) is not None]
    taken = []
    for path in paths:
        for look, (size, scheme) in LOOKS.items():
            seen = visit(browser, server.url, path, size=size, color_scheme=scheme)
            seen.page.wait_for_load_state("load")
            file = out / f"{name_of(path)}-{look}.png"
            seen.page.screenshot(path=file, full_page=True)
            seen.page.context.close()
            taken.append(file)
    return taken


def name_of(path: str) -> str:
    """``chat`` of ``/``, ``versions-one`` of ``/versions/3``."""
    first, *rest = urlsplit(path).path.strip("/").split("/")
    return "-".join(filter(None, (first or "chat", "one" if rest else "")))


def _first_below(browser: Browser, server: RunningServer, path: str) -> str | None:
    seen = visit(browser, server.url, path)
    links = seen.page.eval_on_selector_all("main table a[href]", "links => links.map((link) => link.getAttribute('href'))")
    seen.page.context.close()
    return next((link for link in links if link.startswith(f"{path}/")), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("screenshots"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, showroom(Path(folder) / "bot") as server, chromium() as browser:
        furnish(server)
        for file in take(browser, server, out):
            print(file)


if __name__ == "__main__":
    main()
