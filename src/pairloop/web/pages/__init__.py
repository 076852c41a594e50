"""The pages people look at: rendered here, no build step, nothing from elsewhere. One module per page.

A page reads by the same functions as the API and changes things through the API alone (static/actions.js). What a fragment
shows anew is cut out of the whole page by htmx (``hx-select``), so that there is one template for both.
"""

from __future__ import annotations

from pairloop.web.pages import (
    audit,
    chat,
    datasets,
    docs,
    gates,
    home,
    keys,
    live,
    preferences,
    queue,
    raters,
    requests,
    runs,
    schedule,
    system,
    versions,
)

PAGES = (
    audit,
    chat,
    datasets,
    docs,
    gates,
    home,
    keys,
    live,
    preferences,
    queue,
    raters,
    requests,
    runs,
    schedule,
    system,
    versions,
)
"""Each has a ``router``."""
