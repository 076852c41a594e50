"""Who is erased is found under every id that something of theirs is stored by, and in every table that names people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection
from tests.loop_rig import Rig, open_rig, settings

from pairloop.config import Config
from pairloop.errors import ConflictError, InvalidRequestError
from pairloop.loop import curate, privacy, raters
from pairloop.loop.curate import Decision, Selection
from pairloop.loop.privacy import ledger
from pairloop.loop.raters import gold
from pairloop.store import Store, accounts, audit, doctor, feedback, groups, reservations, saved_views
from pairloop.store.accounts import Role
from pairloop.store.marks import Mark
from pairloop.store.quarantines import Action
from pairloop.store.reservations import ItemKind, Reservation
from pairloop.store.saved_views import SavedView
from pairloop.store.schema import metadata
from pairloop.types import GroupKind, Label, LabelledGroup
from pairloop.web.callers import name_of

JANE = "jane@example.org"
ADA = "account:ada.lovelace"
"""An operator, as the audit trail names her."""


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with open_rig(settings(tmp_path / "state", privacy={"redact": "off"})) as made:
        made.serve(4)
        yield made


def first_groups(rig: Rig) -> list[LabelledGroup]:
    with rig.store.reading() as c:
        return feedback.labelled_since(c, "bot", after_seq=0, kinds=[GroupKind.TRAIN])[0]


def rows_with(store: Store, text: str) -> list[str]:
    """The tables in which a text stands anywhere."""
    with store.reading() as c:
        return [
            table.name
            for table in metadata.sorted_tables
            if any(text in repr(tuple(row)) for row in c.execute(sa.select(table)))
        ]


def trail_of(store: Store) -> list[tuple[str, str]]:
    with store.reading() as c:
        return [(one.actor, one.subject) for one in audit.list_(c) if one.action != "erase"]


def with_redaction(config: Config) -> Config:
    return config.model_copy(update={"privacy": config.privacy.model_copy(update={"redact": "patterns"})})


def stored_raw(rig: Rig, subject: str, name: str = "raw") -> None:
    """A group of hers and a pick about another's, as they were stored while nothing was redacted."""
    one, other = first_groups(rig)[:2]
    mine = replace(one.group, group_id=f"chatcmpl-{name}", user=subject, conversation_id=None)

    def write(c: Connection) -> None:
        groups.insert(c, mine)
        feedback.insert(c, replace(other.feedback[0], feedback_id=f"{name}-pick", rater_id=subject))

    rig.store.write(write)


def test_an_address_from_before_redaction_is_found_and_one_from_before_it_was_turned_off(rig: Rig) -> None:
    stored_raw(rig, JANE)
    config = with_redaction(rig.loop.config)
    with Store.open(config) as store:
        assert store.redactor is not None
        pseudonym = store.redactor.identifier(JANE)
        nameless = replace(first_groups(rig)[0].group, group_id="chatcmpl-talk", user=None, conversation_id=pseudonym)
        store.write(lambda c: groups.insert(c, nameless))
        assert privacy.erase(store, config, f"conversation:{JANE}", reason="asked").counts["groups"] == 1
        assert raters.decide(store, config, JANE, Action.QUARANTINE, "odd", actor="cli:x").rater_id == JANE
        would = privacy.preview(store, config, JANE)
        assert (would.counts["groups"], would.counts["feedback"]) == (1, 1)
        assert privacy.erase(store, config, JANE, reason="asked").counts == would.counts
        assert rows_with(store, JANE) == []
    stored_raw_again = replace(first_groups(rig)[0].feedback[0], feedback_id="later", rater_id=pseudonym)
    rig.store.write(lambda c: feedback.insert(c, stored_raw_again))
    assert privacy.erase(rig.store, rig.loop.config, JANE, reason="asked").counts["feedback"] == 1, "redaction is off again"
    assert rows_with(rig.store, pseudonym) == []
    assert doctor.check(rig.store) == []


def test_a_restored_row_is_matched_by_whatever_id_the_other_database_remembers(rig: Rig) -> None:
    stored_raw(rig, JANE)
    config = with_redaction(rig.loop.config)
    with Store.open(config) as store:
        assert store.redactor is not None
        entry = ledger.entry_about([store.redactor.identifier(JANE)], "asked")  # all that a database's row tells
        assert privacy.reapply(store, config, [entry])["feedback"] == 1
        assert rows_with(store, JANE) == []


def acts_of_an_operator(rig: Rig) -> None:
    """She relabels a customer's pick, votes where nobody did, excludes, and makes gold."""
    config, decided = rig.loop.config, Decision(ADA, "looked at it")
    with_a_pick = next(one for one in first_groups(rig) if one.feedback[0].label in (Label.A, Label.B))
    label = Label.B if with_a_pick.feedback[0].label is Label.A else Label.A
    curate.relabel(rig.store, config, Selection((with_a_pick.group.group_id,)), label, decided)
    silent = replace(with_a_pick.group, group_id="chatcmpl-silent")
    rig.store.write(lambda c: groups.insert(c, silent))
    curate.relabel(rig.store, config, Selection((silent.group_id,)), Label.A, decided)
    curate.mark(rig.store, config, Selection((silent.group_id,)), Mark.EXCLUDED, decided, is_set=True)
    if silent.completions[0].text != silent.completions[1].text:
        gold.mark(rig.store, config, silent.group_id, Label.A, "plain", actor=ADA)


def test_an_operator_is_erased_from_votes_tags_trail_and_accounts(rig: Rig) -> None:
    named = f"expert:{ADA}"
    assert privacy.person_of(rig.store, rig.loop.config, user=ADA) == f"operator:{ADA}"
    ids = privacy.ids_of(rig.store, rig.loop.config, f"operator:{ADA}")
    assert ids == privacy.ids_of(rig.store, rig.loop.config, named) == (f"operator:{ADA}", named)
    name = ADA.removeprefix("account:")
    rig.store.write(lambda c: accounts.create(c, name, Role.OPERATE, "hash", actor="cli:x", reason="new"))
    acts_of_an_operator(rig)
    assert set(rows_with(rig.store, name)) == {"accounts", "audit", "feedback"}
    with pytest.raises(ConflictError, match="can still sign in"):
        privacy.erase(rig.store, rig.loop.config, named, reason="left us")
    rig.store.write(lambda c: accounts.remove(c, name, actor="cli:x", reason="left us"))
    effect = privacy.erase(rig.store, rig.loop.config, named, reason="left us")
    assert effect.counts["feedback"] == 1, "her own vote; what she relabelled is a customer's"
    assert effect.counts["traces"] >= 6
    assert rows_with(rig.store, name) == []
    with rig.store.reading() as c:
        assert accounts.is_locked(c), "a server that was locked stays so"
        assert [one.actor for one in audit.list_(c) if one.action in ("exclude", "relabel")] == ["erased"] * 3
    assert privacy.erase(rig.store, rig.loop.config, named, reason="again").is_empty
    assert doctor.check(rig.store) == []


def test_an_operator_who_comes_back_with_a_backup_from_before_they_left_is_erased_again(rig: Rig) -> None:
    store, config, name = rig.store, rig.loop.config, "grace.hopper"

    def come(c: Connection) -> None:
        accounts.create(c, name, Role.OPERATE, "hash", actor="cli:x", reason="new")

    store.write(come)  # she did nothing: only her account and the line about it name her
    store.write(lambda c: accounts.remove(c, name, actor="cli:x", reason="left us"))
    assert privacy.erase(store, config, f"account:{name}", reason="left us").counts["traces"] == 3
    entries = privacy.read(privacy.path_of(config))
    store.write(come)
    long_ago = datetime(2020, 1, 1, tzinfo=UTC)
    backed_up = metadata.tables["accounts"]
    store.write(lambda c: c.execute(sa.update(backed_up).where(backed_up.c.name == name).values(created_at=long_ago)))
    assert privacy.reapply(store, config, entries)["erasures"] == 1
    assert rows_with(store, name) == []
    with store.reading() as c:
        assert accounts.list_(c) == []
    # Who came after the erasure is somebody else, or is welcome again: they can go on signing in.
    store.write(come)
    privacy.reapply(store, config, entries)
    with store.reading() as c:
        assert [one.name for one in accounts.list_(c)] == [name]


def test_a_nameless_request_without_a_conversation_does_not_come_back_either(rig: Rig) -> None:
    nameless = replace(first_groups(rig)[0].group, group_id="chatcmpl-nameless", user=None, conversation_id=None)
    rig.store.write(lambda c: groups.insert(c, nameless))
    assert privacy.erase(rig.store, rig.loop.config, "conversation:chatcmpl-nameless", reason="asked").counts["groups"] == 1
    back = {"prompt": "who am I?", "prompt_hash": "as it was"}
    rows = metadata.tables["groups"]
    rig.store.write(lambda c: c.execute(sa.update(rows).where(rows.c.group_id == nameless.group_id).values(back)))
    privacy.reapply(rig.store, rig.loop.config, privacy.read(privacy.path_of(rig.loop.config)))
    assert rows_with(rig.store, "who am I?") == []


def test_a_customer_who_is_called_like_an_expert_or_a_policy_takes_nobody_along(rig: Rig) -> None:
    acts_of_an_operator(rig)
    pick = first_groups(rig)[0].feedback[0]
    rows = [replace(pick, feedback_id=f"of-{one}", rater_id=one) for one in ("bob", "expert:bob", "ada.lovelace")]
    rig.store.write(lambda c: [feedback.insert(c, row) for row in rows])
    for person in ("bob", "ada.lovelace"):
        assert privacy.erase(rig.store, rig.loop.config, person, reason="asked").counts["feedback"] == 1
    assert rows_with(rig.store, "expert:bob") == ["feedback"]
    assert "audit" in rows_with(rig.store, ADA)


def test_an_operator_and_a_customer_of_one_name_are_erased_one_without_the_other(rig: Rig) -> None:
    acts_of_an_operator(rig)
    stored_raw(rig, ADA)  # as an application may call its customer, too
    rig.store.write(lambda c: viewed(c, "", ADA))
    with pytest.raises(ConflictError, match=r"user 'operator:account:ada\.lovelace'.* rater 'account:ada\.lovelace'"):
        privacy.person_of(rig.store, rig.loop.config, user=ADA)
    config, customer = rig.loop.config, privacy.person_of(rig.store, rig.loop.config, rater=ADA)
    trail = trail_of(rig.store)
    effect = privacy.erase(rig.store, config, customer, reason="asked")
    assert (effect.counts["groups"], effect.counts["feedback"], effect.counts["traces"]) == (1, 1, 1)
    assert trail_of(rig.store) == trail
    assert rows_with(rig.store, f"expert:{ADA}") == ["feedback"]
    assert "groups" not in rows_with(rig.store, ADA)
    assert privacy.person_of(rig.store, rig.loop.config, user=ADA) == f"operator:{ADA}", "only one is left"
    # The other way round, and again after a restore: the ledger knows who was meant.
    stored_raw(rig, ADA, "again")
    assert privacy.erase(rig.store, config, f"operator:{ADA}", reason="left us").counts["groups"] == 0
    assert rows_with(rig.store, ADA) == ["groups", "feedback"]
    entries = privacy.read(privacy.path_of(config))
    assert privacy.reapply(rig.store, config, entries[1:])["erasures"] == 0
    assert privacy.reapply(rig.store, config, entries)["feedback"] == 1
    assert rows_with(rig.store, ADA) == []


def test_a_customer_who_is_stored_as_a_pseudonym_is_not_taken_for_an_operator_of_that_name(rig: Rig) -> None:
    config, name = with_redaction(rig.loop.config), f"account:{JANE}"
    with Store.open(config) as store:
        assert store.redactor is not None
        pseudonym = store.redactor.identifier(name)
        assert pseudonym != name
        stored_raw(rig, pseudonym)
        with pytest.raises(ConflictError, match="a customer or rater is called the same"):
            privacy.person_of(store, config, user=name)
        customer = privacy.person_of(store, config, rater=name)
        assert privacy.erase(store, config, customer, reason="asked").counts["groups"] == 1


def test_who_was_erased_before_there_were_tags_does_not_come_back(rig: Rig) -> None:
    entry = ledger.entry_about([ADA], "asked")  # as such a ledger has it: of the name alone
    stored_raw(rig, ADA)
    acts_of_an_operator(rig)
    assert privacy.reapply(rig.store, rig.loop.config, [entry])["groups"] == 1
    assert rows_with(rig.store, ADA) == []


@pytest.mark.parametrize("name", [f"expert:{ADA}", f"operator:{ADA}", f"rater:{ADA}"])
def test_nobody_comes_under_a_name_that_would_be_read_as_somebody_elses(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="may not be") as refused:
        name_of(None, name, "rater_id")
    assert (refused.value.param, refused.value.code) == ("rater_id", "reserved_name")
    assert name_of(None, ADA, "user") == ADA
    assert name_of(None, "expert:bob", "user") == "expert:bob"


# --- each with a planted row


def reserved(c: Connection, group_id: str) -> None:
    now = datetime.now(UTC)
    held = Reservation("reservation_1", "bot", group_id, JANE, ItemKind.NEW, 0, now, now + timedelta(hours=1))
    reservations.insert(c, held)


def viewed(c: Connection, _group_id: str, name: str = JANE) -> None:
    saved_views.insert(c, "bot", SavedView("view_1", "hers", {"rater": name}, datetime.now(UTC)))


def told(c: Connection, group_id: str) -> None:
    for subject in (group_id, f"group:{group_id}"):
        audit.record(c, audit.AuditAction.EXCLUDE, actor="cli:x", subject=subject, reason=f"{JANE} asked us to")


def test_what_names_a_person_goes_with_them(rig: Rig) -> None:
    one = next(one for one in first_groups(rig) if one.group.completions[0].text != one.group.completions[1].text)
    hers = replace(one.group, group_id="chatcmpl-hers", user=JANE)
    rig.store.write(lambda c: groups.insert(c, hers))
    gold.mark(rig.store, rig.loop.config, hers.group_id, Label.A, f"{JANE} says so", actor="cli:x")
    for plant in (reserved, viewed, told):
        rig.store.write(lambda c, plant=plant: plant(c, hers.group_id))  # type: ignore[misc]
    assert set(rows_with(rig.store, JANE)) == {"groups", "gold_items", "audit", "reservations", "saved_views"}
    privacy.erase(rig.store, rig.loop.config, JANE, reason="asked")
    assert rows_with(rig.store, JANE) == []
    with rig.store.reading() as c:
        assert gold_items_left(c) == 0


def test_who_is_known_by_nothing_else_is_found(rig: Rig) -> None:
    group_id = first_groups(rig)[0].group.group_id
    for plant in (reserved, viewed):
        rig.store.write(lambda c, plant=plant: plant(c, group_id))  # type: ignore[misc]
        effect = privacy.erase(rig.store, rig.loop.config, JANE, reason="asked")
        assert (effect.erasure_id is not None, effect.counts["traces"], effect.is_empty) == (True, 1, False)
        assert rows_with(rig.store, JANE) == []
        rig.store.write(lambda c, plant=plant: plant(c, group_id))  # type: ignore[misc]  # as a restored backup brings it back
        entries = privacy.read(privacy.path_of(rig.loop.config))
        assert privacy.reapply(rig.store, rig.loop.config, entries)["traces"] == 1
        assert rows_with(rig.store, JANE) == []


def gold_items_left(c: Connection) -> int:
    return c.execute(sa.select(sa.func.count()).select_from(metadata.tables["gold_items"])).scalar_one()
