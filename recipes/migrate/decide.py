"""What is done about a migration, and what the operator reads: one table for everybody who has to act.

The running command after a failure, the guard after the command's death, ``resume`` and ``abort`` look at
the same things (qemu/facts.py) and ask :func:`decide`. The rules are read from the first to the last, and the
first that fits holds. Three things are true of every rule, and tested for every combination:

- A is told to go on only where the guest has never run on B, or where B's end came before A's ``completed``
  was seen;
- nothing that carries a guest on B is ended, unless A's QEMU has the guest itself: it runs it, or has not
  sent all of it;
- where it is not known who has the guest, nothing is ended and nothing is told to go on.

Nobody is ended on A whom this migration has not seen send its guest (steps/cutover.py).

What the operator reads of a decision is the ``words`` of its rule. Before it stands what has failed; after it
retreat.py and watch.py add what they could not do. docs/decisions.md is made from this table.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

from recipes.hosts.quoting import listed
from recipes.migrate.state import Phase, State
from recipes.plans.by_hand import asking
from recipes.qemu.facts import Facts, OnA, OnB

PREPARING = frozenset({Phase.PREPARED, Phase.EXPORT, Phase.OVERLAY, Phase.LAUNCH, Phase.PRECOPY})
"""Nothing has been told to A's QEMU: a migration that is under way there is somebody else's."""
SENDING = frozenset({Phase.MIGRATE})
"""A's QEMU keeps the end of the guest's state: B's can never run it."""
MOVING = frozenset({Phase.SWITCH_OVER})
BACK = frozenset({Phase.TAKING_BACK})
ON_B = frozenset({Phase.ARRIVED, Phase.STREAM})
"""The guest is B's, and part of its disk is on A only."""
WHOLE = frozenset({Phase.COMPLETE, Phase.SHUT_DOWN})
"""Every block is on B."""
COMMITTING = frozenset({Phase.RECOVERING})
"""A's images are neither the old disks nor the new ones."""


class Wish(Enum):
    """What whoever asks is after."""

    GO_BACK = "go back"
    """The migration cannot, or shall not, go on: a step has failed, the command was killed, ``abort``."""
    GO_ON = "go on"
    """``resume``."""
    ON_B = "boot on B"
    """``recover``: B's QEMU is lost, and the guest is to be booted there."""
    ON_A = "boot on A"
    """``recover --on a``: the same, on A, to which what it wrote on B is to be brought."""


class Action(Enum):
    """What is done; the value says it in full."""

    NOTHING = "nothing"
    CLEAN_UP = "leave A's QEMU alone; end what was started and remove what was made"
    TAKE_BACK = "let the guest go on on A; then end B's QEMU and the rest, and remove what was made"
    END_B_FIRST = "end B's QEMU; then let the guest go on on A, end the rest and remove what was made"
    WAIT = "look again, as long as there is time"
    KEEP = "touch nothing"
    KEEP_B = "let what carries the guest on B live on, and see that A's QEMU does not go on with it"
    START_OVER = "as when going back; then begin anew"
    FINISH = "do what is left of steps 5 and 6"
    COMMIT = "write what the guest wrote on B to A's images, which are its disks then"


@dataclass(frozen=True)
class Rule:
    """One line of the table.

    ``words`` may name {image}, the guest's disk on A, {overlay}, that on B, {missing}, that on B of which A
    has a part, and the commands {finish}, {recover} and {go_on} and {end_a}, which let A's guest go on and
    end its QEMU. Where there are several disks, {image} and {missing} are those that are not complete; the
    other words in braces agree with how many there are.
    """

    name: str
    wishes: Collection[Wish]
    phases: Collection[Phase]
    on_a: Collection[OnA]
    on_b: Collection[OnB]
    action: Action
    words: str

    def fits(self, phase: Phase, wish: Wish, facts: Facts) -> bool:
        """Tell whether the rule speaks of this."""
        return wish in self.wishes and phase in self.phases and facts.a in self.on_a and facts.b in self.on_b


_BACK, _ON = frozenset({Wish.GO_BACK}), frozenset({Wish.GO_ON})
_BOTH = _BACK | _ON
_ON_A, _ON_B = frozenset({Wish.ON_A}), frozenset({Wish.ON_B})
_RECOVER = _ON_A | _ON_B
_A, _B = frozenset(OnA), frozenset(OnB)
_RUNS = frozenset({OnA.RUNS, OnA.RUNS_TOO, OnA.ANOTHER})
_NOT_YET_SENT = frozenset({OnA.RUNS, OnA.RUNS_TOO, OnA.ANOTHER, OnA.STANDS, OnA.SENDS, OnA.HOLDS})
_B_MAY_HAVE_IT = frozenset({OnA.STANDS, OnA.STUCK, OnA.LEFT, OnA.GONE, OnA.SILENT})
_DOUBTFUL = frozenset({OnA.RUNS_TOO, OnA.ANOTHER, OnA.STANDS})
_HAS_ONE = frozenset(OnA) - {OnA.LEFT, OnA.GONE, OnA.SILENT}
_STOPPED_ON_B = frozenset({OnB.NONE, OnB.STOPPED})
_AGAIN = frozenset({Phase.TAKEN_BACK, Phase.LOST})
_NOT_ON_B = PREPARING | SENDING | MOVING | BACK | _AGAIN
_UNSEEN = SENDING | MOVING | BACK
"""Nobody has seen the guest arrive."""

AS_BEFORE = "the guest runs on A as before"
_LOST = "A's QEMU is gone and with it the guest; its disk is untouched"
_LEFT = "the guest was left on A, but look at it"
_DONE = "the guest and its disk are on B; nothing is left to do"
UNKNOWN = "it is not known where the guest is"
_STAYS = (
    "the guest is on B and stays there; until {missing} {is} complete, keep {image} and A's server; to "
    "complete {it}: {finish}"
)
_STOPPED = (
    "the guest has stopped; its {disk} {are} {overlay} on B together with {image} on A, which {is} still "
    "served: keep {both}; to start the guest again and complete its {disk}: {finish} --boot; to complete the "
    "{disk} without it: {finish}; to start it on A: {recover} --on a"
)
_WHOLE = (
    "its {disk}, {overlay} on B, {are} complete and {need} nothing on A; to clear away what is left: {finish}"
)

_HALF = (
    "what the guest wrote on B is being written to {image} on A, which {is} neither the old {disk} nor the "
    "new until that has ended: {recover} --on a"
)

RULES: tuple[Rule, ...] = (
    # B is lost, and the guest is to be booted again.
    Rule("recovered", _BOTH | _RECOVER, {Phase.RECOVERED}, _A, _B, Action.NOTHING,
         "the guest's {disk} {are} {image} on A, with all that it wrote on B"),
    Rule("half committed", _BOTH | _ON_B, COMMITTING, _A, _B, Action.KEEP, _HALF),
    Rule("nothing to recover", _RECOVER, PREPARING | _AGAIN, _A, _B, Action.KEEP,
         "the guest never left A, and there is nothing to recover"),
    Rule("recover, B has the guest", _RECOVER, _UNSEEN | ON_B | WHOLE | COMMITTING | {Phase.DONE}, _A,
         {OnB.HAS_GUEST}, Action.KEEP, "B's QEMU has the guest, and there is nothing to recover"),
    Rule("recover, B is silent", _RECOVER, _UNSEEN | ON_B | WHOLE | COMMITTING | {Phase.DONE}, _A,
         {OnB.SILENT}, Action.KEEP, "it is not known whether B's QEMU has the guest"),
    Rule("recover, B waits", _RECOVER, _UNSEEN | ON_B | WHOLE | COMMITTING | {Phase.DONE}, _A,
         {OnB.WAITS, OnB.LATE}, Action.KEEP, "B's QEMU waits for a guest: end it, and then again"),
    Rule("not needed on A", _ON_A, WHOLE | {Phase.DONE}, _A, _B, Action.KEEP,
         "the {disk} {overlay} on B {are} complete and {need} nothing on A: {recover} --on b"),
    Rule("recover a complete disk", _ON_B, {Phase.DONE}, _A, _B, Action.FINISH, "the guest is booted on B"),
    Rule("recover, A has a guest", _RECOVER, _UNSEEN | ON_B | WHOLE | COMMITTING, _HAS_ONE, _B, Action.KEEP,
         "the QEMU at A's monitor has a guest: see what it is (query-status, query-migrate)"),
    Rule("recover on B", _ON_B, ON_B | WHOLE, _A, _B, Action.FINISH, "the guest is booted on B"),
    Rule("recover, A is silent", _RECOVER, _UNSEEN | ON_B | COMMITTING, {OnA.SILENT}, _B, Action.KEEP,
         "A cannot be reached, which has what the guest's {disk} on B {need}"),
    Rule("recover on A", _ON_A, ON_B | COMMITTING, _A, _B, Action.COMMIT, "the guest is booted on A"),
    Rule("recover on B, unseen", _ON_B, _UNSEEN, _A, {OnB.STOPPED}, Action.FINISH,
         "the guest is booted on B"),
    Rule("recover on A, unseen", _ON_A, _UNSEEN, _A, {OnB.STOPPED}, Action.COMMIT,
         "the guest is booted on A"),
    Rule("recover, B had nothing", _RECOVER, _UNSEEN, _A, _B, Action.KEEP,
         "the guest has written nothing on B, so that its {disk} {are} {image} on A as before"),
    # Over.
    Rule("done", _ON, {Phase.DONE}, _A, _B, Action.NOTHING, _DONE),
    Rule("done, too late", _BACK, {Phase.DONE}, _A, _B, Action.KEEP_B, _DONE),
    Rule("lost", _BACK, {Phase.LOST}, _A, _B, Action.NOTHING, _LOST),
    Rule("was taken back", _BACK, {Phase.TAKEN_BACK}, _A, _B, Action.NOTHING,
         "the migration was given up before, and the guest was left on A"),
    Rule("again", _ON, _AGAIN, _RUNS, _B, Action.START_OVER,
         "the migration begins anew"),
    # Before A's QEMU has been told anything.
    Rule("sent by somebody else", _BOTH, {Phase.LAUNCH, Phase.PRECOPY},
         {OnA.LEFT, OnA.GONE, OnA.STANDS, OnA.SILENT},
         {OnB.HAS_GUEST}, Action.KEEP, "B's QEMU has a guest that this migration has not sent"),
    Rule("prepared, A runs", _BACK, PREPARING, _RUNS, _B, Action.CLEAN_UP, AS_BEFORE),
    Rule("prepared, A gone", _BACK, PREPARING, {OnA.GONE}, _B, Action.CLEAN_UP,
         f"what was started has been ended; {_LOST}"),
    Rule("left alone", _BACK, PREPARING, {OnA.SILENT}, _B, Action.CLEAN_UP, _LEFT),
    Rule("prepared, not ours", _BACK, PREPARING, _A, _B, Action.CLEAN_UP,
         "the guest is still on A, where somebody else's migration may be under way: look at query-migrate"),
    Rule("begin anew", _ON, PREPARING, _RUNS, _B, Action.START_OVER, "the migration begins anew"),
    # A's QEMU was told to migrate, and not yet to switch over.
    Rule("sent, B waits", _BOTH, SENDING | MOVING, {OnA.LEFT}, {OnB.WAITS}, Action.WAIT,
         "B's QEMU is about to have the guest"),
    Rule("sent elsewhere", _BOTH, SENDING | MOVING, {OnA.LEFT}, {OnB.LATE}, Action.KEEP,
         "A's QEMU has sent its guest, and B's, which still waits for one, does not have it"),
    Rule("sent by hand", _BACK, SENDING, {OnA.LEFT}, _STOPPED_ON_B, Action.KEEP_B, _STOPPED),
    Rule("sent by hand, B has it", _BACK, SENDING, {OnA.LEFT}, _B, Action.KEEP_B, _STAYS),
    Rule("sending, doubtful", _BOTH, SENDING, _DOUBTFUL, {OnB.HAS_GUEST, OnB.STOPPED, OnB.SILENT},
         Action.KEEP, UNKNOWN),
    Rule("sending, B is silent", _BACK, SENDING, {OnA.GONE, OnA.SILENT}, {OnB.SILENT}, Action.KEEP, UNKNOWN),
    Rule("sending", _BACK, SENDING, _NOT_YET_SENT, _B, Action.TAKE_BACK, AS_BEFORE),
    Rule("sending, begin anew", _ON, SENDING, _NOT_YET_SENT, _B,
         Action.START_OVER, "the migration begins anew"),
    # The switch-over may be under way, or is being taken back.
    Rule("switching", _BOTH, SENDING | MOVING | BACK, {OnA.SWITCHES}, _B, Action.WAIT,
         "the switch-over is under way"),
    Rule("both have the guest", _BOTH, MOVING | BACK, {OnA.RUNS_TOO, OnA.ANOTHER}, {OnB.HAS_GUEST},
         Action.KEEP,
         "a guest runs on A, where it was told to go on or was started, and B's QEMU has it too: stop one of "
         "them at once (command stop of its monitor) and keep the one that the network sees"),
    Rule("B has the guest", _BACK, SENDING | MOVING | BACK, _B_MAY_HAVE_IT, {OnB.HAS_GUEST},
         Action.KEEP_B, _STAYS),
    Rule("B had the guest", _BACK, SENDING | MOVING | BACK, _B_MAY_HAVE_IT, {OnB.STOPPED},
         Action.KEEP_B, _STOPPED),
    Rule("sending, A silent", _BACK, SENDING, {OnA.SILENT}, _B, Action.CLEAN_UP, _LEFT),
    Rule("sending, A gone", _BACK, SENDING, {OnA.GONE}, _B, Action.CLEAN_UP, _LOST),
    Rule("sent, B is dead", _BACK, MOVING, {OnA.LEFT}, {OnB.NONE}, Action.KEEP_B, _STOPPED),
    Rule("sent", _BACK, MOVING, {OnA.LEFT}, _B, Action.KEEP_B, _STAYS),
    Rule("sent while it was taken back", _BOTH, BACK, {OnA.LEFT}, {OnB.WAITS}, Action.WAIT,
         "B's QEMU is about to have the guest"),
    Rule("sent while it was taken back, B is dead", _BOTH, BACK, {OnA.LEFT}, {OnB.NONE}, Action.KEEP,
         "A's QEMU has sent all of the guest, and B's has ended without having written to its disk: if "
         "nobody else has migrated it, the guest goes on on A with: {go_on}"),
    Rule("sent while it was taken back, unknown", _BOTH, BACK, {OnA.LEFT}, {OnB.LATE, OnB.SILENT},
         Action.KEEP, UNKNOWN),
    Rule("A died, B may have all", _BOTH, MOVING | BACK, {OnA.GONE}, {OnB.WAITS}, Action.WAIT,
         "B's QEMU may have all of the guest"),
    Rule("A died", _BACK, MOVING | BACK, {OnA.GONE}, {OnB.NONE, OnB.LATE}, Action.CLEAN_UP, _LOST),
    Rule("B is silent", _BACK, MOVING | BACK, {OnA.GONE}, _B, Action.KEEP, UNKNOWN),
    Rule("A is silent", _BACK, MOVING | BACK, {OnA.SILENT}, _B, Action.KEEP, UNKNOWN),
    Rule("doubtful, B is silent", _BOTH, MOVING | BACK, _DOUBTFUL, {OnB.SILENT}, Action.KEEP, UNKNOWN),
    Rule("both have had the guest", _BOTH, MOVING | BACK, {OnA.RUNS_TOO, OnA.ANOTHER}, {OnB.STOPPED},
         Action.KEEP,
         "a guest runs on A, where it was told to go on or was started, and one has run on B, whose writes "
         "are in {overlay}: keep that until it is known which of the two disks is right"),
    Rule("A was started anew", _BACK, MOVING | BACK, {OnA.ANOTHER}, {OnB.NONE, OnB.LATE}, Action.CLEAN_UP,
         "another QEMU than the one that migrated runs at A's monitor, and was left alone"),
    Rule("A was started anew, resume", _ON, MOVING | BACK, {OnA.ANOTHER}, {OnB.NONE, OnB.LATE}, Action.KEEP,
         "another QEMU than the one that migrated runs at A's monitor: abort clears away what is left"),
    Rule("A was started anew, B waits", _BOTH, MOVING | BACK, {OnA.ANOTHER}, {OnB.WAITS}, Action.WAIT,
         "B's QEMU may have all of the guest"),
    Rule("take back", _BACK, SENDING | MOVING | BACK, _A, _B, Action.END_B_FIRST, AS_BEFORE),
    Rule("arrived", _ON, SENDING | MOVING, {OnA.LEFT}, _B, Action.FINISH, "the guest is on B"),
    Rule("arrived, A does not say so", _ON, SENDING | MOVING | BACK,
         {OnA.STANDS, OnA.STUCK, OnA.LEFT, OnA.GONE}, {OnB.HAS_GUEST, OnB.STOPPED}, Action.FINISH,
         "the guest is on B"),
    # Whoever resumes finds a guest on A, or nobody who says where it is.
    Rule("resume, A gone", _ON, _NOT_ON_B, {OnA.GONE}, {OnB.NONE, OnB.LATE, OnB.WAITS}, Action.KEEP,
         "no QEMU is at A's monitor: if it has ended, its guest is gone with it, its disk is untouched, and "
         "abort clears away what is left"),
    Rule("resume, A silent", _ON, _NOT_ON_B, {OnA.SILENT, OnA.GONE}, _B, Action.KEEP,
         "it cannot be seen where the guest is; see to the monitors, then resume again"),
    Rule("resume, not ours", _ON, PREPARING | _AGAIN, _A, _B, Action.KEEP,
         "the guest on A does not run, or somebody else migrates it: look at query-status and query-migrate"),
    Rule("start over", _ON, SENDING | MOVING | BACK, _A, _B, Action.START_OVER, "the migration begins anew"),
    # The guest is B's.
    Rule("A has a guest, too", _ON, ON_B | WHOLE, _HAS_ONE, _B, Action.KEEP,
         "the guest has come to B, and the QEMU at A's monitor has one, too: if that is the old one, end it, "
         "and then resume: {end_a}"),
    Rule("finish", _ON, ON_B | WHOLE, _A, _B, Action.FINISH, "the migration goes on"),
    Rule("stopped, incomplete", _BACK, ON_B, _A, _STOPPED_ON_B, Action.KEEP_B, _STOPPED),
    Rule("on B", _BACK, ON_B, _A, _B, Action.KEEP_B, _STAYS),
    Rule("stopped, complete", _BACK, WHOLE, _A, _STOPPED_ON_B, Action.KEEP_B,
         f"the guest has stopped; {_WHOLE}; to start it again: {{finish}} --boot"),
    Rule("on B, complete", _BACK, WHOLE, _A, _B, Action.KEEP_B,
         f"the guest is on B and stays there; {_WHOLE}"),
)  # fmt: skip


@dataclass(frozen=True)
class Decision:
    """What is to be done, and the sentence for the operator, still with its places for names."""

    action: Action
    words: str
    rule: str


def decide(phase: Phase, wish: Wish, facts: Facts) -> Decision:
    """Decide what to do about a migration that has come to ``phase``, as it is found."""
    for rule in RULES:
        if rule.fits(phase, wish, facts):
            return Decision(rule.action, rule.words, rule.name)
    raise AssertionError(f"no rule for {phase}, {wish}, {facts}")


def asks_anybody(phase: Phase, wish: Wish) -> bool:
    """Tell whether what anybody says makes a difference."""
    return len({decide(phase, wish, Facts(a, b)).rule for a in OnA for b in OnB}) > 1


def asks_b(phase: Phase, wish: Wish, a: OnA) -> bool:
    """Tell whether what B's QEMU says makes a difference, so that it has to be asked."""
    return len({decide(phase, wish, Facts(a, b)).rule for b in OnB}) > 1


def told(words: str, state: State) -> str:
    """Put the names of a migration into a rule's words."""
    go_on, end_a = (asking(state.plan.source, each) for each in ("cont", "quit"))
    disks = state.disks
    missing = [disk for disk in disks if not disk.complete] or disks
    several, some = len(disks) > 1, len(missing) > 1
    return words.format(
        image=listed(disk.on_a for disk in missing),
        overlay=listed(disk.target for disk in disks),
        missing=listed(disk.target for disk in missing),
        disk="disks" if several else "disk",
        are="are" if several else "is",
        need="need" if several else "needs",
        both="all of them" if several else "both",
        it="them" if some else "it",
        finish=state.finish,
        recover=f"nbd-migrate recover {state.name}",
        go_on=go_on,
        end_a=end_a,
        **{"is": "are" if some else "is"},
    )
