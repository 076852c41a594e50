"""The schedule in a real browser: set, looked at before, paused, taken back."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Locator, expect
from tests.browsing import CHROMIUM, PHONE, chromium, visit
from tests.server import POLICY, RunningServer, fake_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed; the pages are tested as text"),
]


def confirm(dialog: Locator, button: str, reason: str) -> None:
    dialog.locator("input").fill(reason)
    dialog.get_by_role("button", name=button).click()


def test_an_operator_sets_the_schedule_and_sees_the_next_run_move(tmp_path: Path) -> None:
    config = fake_config(tmp_path, schedule={"min_pairs": 100_000, "poll": "0.2s", "every": "6h"})
    with RunningServer(tmp_path, config=config, turning=True) as server, chromium() as browser:
        seen = visit(browser, server.url, "/schedule")
        tab = seen.page
        form, clock = tab.locator("#schedule-form"), tab.locator("#now .tile", has_text="by the clock")
        button = form.get_by_role("button", name="Set the schedule")
        expect(clock).to_contain_text("in 6 h")
        expect(button).to_be_disabled()

        form.locator("[data-cadence]").select_option("cron")
        form.locator("[data-part=cron]").fill("at noon")
        expect(form.locator("[data-preview]")).to_contain_text("'at noon' is not a cron line")
        expect(button).to_be_disabled()
        form.locator("[data-cadence]").select_option("weekly")
        form.locator("[data-part=day]").select_option("Wednesday")
        form.locator("[data-part=time]").fill("04:30")
        expect(form.locator("[data-preview]")).to_contain_text("04:30 UTC")
        form.locator("[name=reason]").fill("rounds on Wednesdays")
        assert server.http.post(f"/v1/schedules/{POLICY}", json={"min_pairs": 77_777}).status_code == 200
        expect(tab.locator("#outlook")).to_contain_text("77,777 new pairs")  # somebody else's; what is typed here stays
        button.click()
        expect(tab.locator("#edit table")).to_contain_text("rounds on Wednesdays")
        expect(clock).to_contain_text("04:30:00 UTC")
        held = server.http.get(f"/v1/schedules/{POLICY}").json()
        assert (held["cron"], held["every"]) == ("30 4 * * 3", None)
        assert held["min_pairs"] == 77_777, "what did not change here is not sent"

        tab.get_by_role("button", name="Pause the schedule").click()
        confirm(tab.locator("#pause"), "Pause it", "wait")
        expect(tab.locator("#now")).to_contain_text("The schedule is paused")
        tab.get_by_role("button", name="Resume the schedule").click()
        confirm(tab.locator("#resume"), "Resume it", "go on")
        expect(tab.locator("#now")).not_to_contain_text("The schedule is paused")
        back = tab.get_by_role("button", name="Back to the file's value of every")
        back.click()
        confirm(tab.locator("#back"), "Take it back", "over")
        expect(back).to_have_count(0)
        expect(clock).to_contain_text("in 6 h")

        # Another operator's change reaches a form that nobody has touched, and the table; a touched one is left as it is.
        elsewhere = {"min_pairs": 66_666, "reason": "from elsewhere"}
        assert server.http.post(f"/v1/schedules/{POLICY}", json=elsewhere).status_code == 200
        expect(tab.locator("#origins")).to_contain_text("from elsewhere")
        expect(form.locator("[data-part=min_pairs]")).to_have_value("66666")
        form.locator("[data-part=min_pairs]").fill("55555")
        expect(button).to_be_enabled()
        elsewhere = {"every": "3h", "reason": "and again"}
        assert server.http.post(f"/v1/schedules/{POLICY}", json=elsewhere).status_code == 200
        expect(tab.locator("#origins")).to_contain_text("and again")
        expect(form.locator("[data-preview]")).to_contain_text("was set meanwhile")
        expect(form.locator("[data-part=min_pairs]")).to_have_value("55555")
        expect(button).to_be_enabled()

        for scheme in ("light", "dark"):
            tab.emulate_media(color_scheme=scheme)
            assert seen.serious() == [], scheme
        tab.set_viewport_size({"width": PHONE[0], "height": PHONE[1]})
        assert seen.overflow() <= 0
        assert seen.outside == []
        assert [one for one in seen.problems if "400" not in one] == []
