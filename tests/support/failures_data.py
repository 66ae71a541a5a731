"""The failure matrix: docs/failures.md is made of it, by failures.py."""

# ruff: noqa: E501 - names of tests are as long as they are

from __future__ import annotations

from dataclasses import replace

from tests.support.failures import BEFORE, LAST, Cell, Component, Outcome, When

AGAIN = "nothing; the same `run` again"
RESUME = "`nbd-migrate resume NAME`, or the `finish` of the message"
NOT_AT_ALL = "not at all"

ON_A = Outcome(
    "runs on, on A",
    "A's image as ever; what was made on B is removed",
    AGAIN,
    "not at all; where it stood still, until A's QEMU is told, `limits.command` at most",
)
"""Given back, or never gone."""

GONE = Outcome(
    "has ended with A's QEMU, as without a migration",
    "A's image as ever; what was made on B is removed",
    "start the guest on A",
    "-",
)

EITHER = Outcome(
    "runs on, on A or on B: the two QEMUs bring it to an end by themselves, and it never runs on both",
    "A's image, or with the overlay on B, whole",
    f"{AGAIN}, or {RESUME}: the line says which",
    "the switch-over, or until B's QEMU has ended",
)

PAUSE = Outcome(
    "runs on B; a read of what is not there yet waits, all else goes on",
    "overlay on B and A's image, which stays out of reach",
    "nothing: it is started again",
    "until it is back, a second or two",
)

LONG_PAUSE = Outcome(
    "runs on B; a read of what is not there yet waits for `limits.reconnect_timeout`, then QEMU pauses the guest; never an error",
    "overlay on B and A's image, which stays out of reach",
    f"nothing when it is back in `limits.recover`; else {RESUME}",
    "until it is back",
)

NOTHING = Outcome("sees nothing of it", "as without it", "nothing", NOT_AT_ALL)

ALONE = Outcome(
    "runs on B",
    "overlay on B and A's image, which stays out of reach; server and fence live on",
    RESUME,
    NOT_AT_ALL,
)

CRASHED = Outcome(
    "has crashed with B's QEMU",
    "overlay on B and A's image are the whole disk together, but for what was not flushed; nothing of either is removed",
    "`nbd-migrate resume NAME --boot`, or without `--boot` the disk alone",
    "until it is started again",
)

WHOLE_CRASHED = replace(
    CRASHED,
    disk="the image on B is the whole disk",
    typed="`nbd-migrate resume NAME --boot` clears up and starts it",
)

WHOLE = Outcome(
    "runs on B, on its own disk",
    "the image on B is whole and on stable storage; A's is out of date",
    f"nothing, or {RESUME} where the line says that something is left",
    NOT_AT_ALL,
)

STOPPED = Outcome(
    "is paused on B as soon as it needs what is not there",
    "overlay on B and A's image, as far as that can be read",
    "what the line says, then `nbd-migrate resume NAME`",
    "until that is mended",
)

HYBRID_DEATHS = "vm/test_migrate_hybrid.py::test_whatever_dies_while_it_is_copied_the_guest_stays_on_a_and_nothing_is_left"
STAYS = "vm/test_migrate_deaths.py::test_the_guest_stays_on_a_when_something_dies_before_the_cut_over"
STREAM_GOES_ON = "vm/test_migrate_deaths.py::test_the_stream_goes_on_when_the_server_or_a_supervisor_dies"
FED = "vm/test_migrate_overlay.py::test_the_stream_goes_on_when_what_feeds_it_dies"
HOST_A = "vm/test_migrate_host_deaths.py::test_with_host_a_the_guest_ends_and_nothing_is_left_on_b"
HOST_B = "vm/test_migrate_host_deaths.py::test_without_host_b_the_guest_runs_on_on_a"
B_AGAIN = "vm/test_migrate_host_deaths.py::test_after_the_death_of_all_on_b_its_disks_are_completed_and_the_guest_started_again"
EACH_ENTRY = "vm/test_migrate_journal.py::test_a_migration_that_was_killed_is_taken_up_again"
EACH_ENTRY_BACK = (
    "vm/test_migrate_journal.py::test_a_migration_that_was_killed_is_taken_back_until_the_guest_has_left"
)
CABLE = "vm/test_migrate_hosts.py::test_a_cable_that_is_pulled_for_a_while_costs_only_time"
HANGS = "vm/test_migrate_deaths.py::test_a_destination_that_hangs_during_the_switch_over_is_ended_before_the_source_goes_on"
REBOOT = (
    "vm/test_migrate_fenced.py::test_after_a_reboot_of_a_nothing_starts_its_guest_and_the_migration_goes_on"
)

PREPARING = BEFORE[:3]

COMPONENTS = (
    Component(
        "A's QEMU ends",
        (
            Cell(
                (*BEFORE, When.SWITCH),
                replace(
                    GONE, guest=f"{GONE.guest}; in the switch-over it is on B where all of it had been sent"
                ),
                (
                    "vm/test_migrate_deaths.py::test_nothing_is_left_when_the_source_itself_dies",
                    "vm/test_migrate_shutdown.py::test_a_guest_that_switches_itself_off_on_a_is_no_crash_either",
                    HYBRID_DEATHS,
                ),
            ),
            Cell(
                (When.STREAM, *LAST),
                replace(NOTHING, guest="sees nothing of it; A's QEMU was ended as the guest had left"),
                ("vm/test_migrate_deaths.py::test_the_source_may_die_as_soon_as_the_guest_has_left",),
            ),
        ),
    ),
    Component(
        "B's QEMU ends",
        (
            Cell((When.EXPORT, When.OVERLAY), NOTHING, why_not="it is started in step 3"),
            Cell((When.LAUNCH, When.PRECOPY, When.RAM), ON_A, (STAYS, HYBRID_DEATHS)),
            Cell(
                (When.SWITCH,),
                ON_A,
                (
                    "vm/test_switch_over_states.py::test_in_the_switch_over_a_source_takes_its_guest_back_when_the_destination_dies",
                    STAYS,
                    HANGS,
                ),
            ),
            Cell(
                (When.STREAM,),
                CRASHED,
                (
                    "vm/test_migrate_deaths.py::test_both_halves_of_the_disk_are_kept_when_the_destination_dies_while_streaming",
                    "vm/test_migrate_finish.py::test_the_disk_of_a_guest_whose_qemu_died_is_completed_with_or_without_it",
                    "vm/test_migrate_disks.py::test_the_disks_of_a_guest_whose_qemu_died_are_completed_with_or_without_it",
                ),
            ),
            Cell(
                LAST,
                WHOLE_CRASHED,
                (
                    "vm/test_migrate_shutdown.py::test_a_crash_in_the_last_step_is_told_and_everything_else_is_done",
                    "vm/test_migrate_finish.py::test_a_complete_disk_whose_guest_and_orchestrator_have_died_is_all_that_a_guest_needs",
                ),
            ),
        ),
    ),
    Component(
        "nbdserve on A ends",
        (
            Cell((*BEFORE, When.SWITCH), ON_A, (STAYS, HYBRID_DEATHS)),
            Cell(
                (When.STREAM,),
                PAUSE,
                (
                    STREAM_GOES_ON,
                    FED,
                    "vm/test_migrate_disks.py::test_the_streams_go_on_when_what_feeds_them_dies",
                ),
            ),
            Cell(
                LAST,
                WHOLE,
                ("vm/test_migrate_deaths.py::test_a_server_that_dies_at_the_very_end_is_only_told",),
            ),
        ),
    ),
    Component(
        "qemu-nbd on A ends, which reads a qcow2 disk",
        (
            Cell(
                (*BEFORE, When.SWITCH),
                NOTHING,
                why_not="there is none: A's QEMU serves the disk until the guest has left",
            ),
            Cell(
                (When.STREAM,),
                PAUSE,
                (
                    "vm/test_migrate_qcow2.py::test_what_dies_while_the_server_changes_to_the_files_is_only_waited_for",
                    "vm/test_migrate_qcow2.py::test_where_the_files_cannot_be_served_the_qemu_of_a_goes_on_serving_them",
                ),
            ),
            Cell(LAST, WHOLE, why_not="nobody reads from it any more; its server's end is the row above"),
        ),
    ),
    Component(
        "nbd-overlay on B ends",
        (
            Cell((When.EXPORT, When.OVERLAY), NOTHING, why_not="it is started in step 3"),
            Cell(
                (When.LAUNCH, When.PRECOPY, When.RAM),
                ON_A,
                (
                    "vm/test_migrate_overlay.py::test_the_guest_stays_on_a_when_nbd_overlay_dies_before_it_was_needed",
                    HYBRID_DEATHS,
                ),
            ),
            Cell(
                (When.SWITCH,),
                EITHER,
                (
                    "vm/test_migrate_overlay.py::test_nbd_overlay_that_dies_at_the_switch_over_is_started_again_or_the_guest_stays_on_a",
                    "vm/test_migrate_two_deaths.py::test_a_guest_that_comes_to_b_without_its_disk_waits_for_it",
                ),
            ),
            Cell(
                (When.STREAM,),
                replace(PAUSE, guest="runs on B; its requests wait, and what was acknowledged is there"),
                (
                    FED,
                    "vm/test_migrate_overlay.py::test_nbd_overlay_that_dies_when_the_guest_arrives_is_started_again",
                    "interop/test_overlay_engine_kills.py::test_kill_9_at_any_moment_loses_no_acknowledged_write_and_leaves_no_wrong_block",
                    "vm/test_migrate_advice.py::test_an_nbd_overlay_that_dies_again_and_again_is_called_that",
                ),
            ),
            Cell(
                (When.PIVOT,),
                replace(PAUSE, disk="the image on B is whole"),
                (
                    "vm/test_migrate_overlay.py::test_an_overlay_that_dies_just_before_the_pivot_is_started_again",
                    "vm/test_pivot.py::test_a_server_that_dies_in_the_middle_costs_time_but_no_data",
                ),
            ),
            Cell(
                (When.END,),
                WHOLE,
                ("vm/test_migrate_shutdown.py::test_nbd_overlay_that_dies_in_the_last_step_leaves_nothing",),
            ),
        ),
    ),
    Component(
        "An end of the channel ends (`--channel single`, `--channel ssh`)",
        (
            Cell(
                (*BEFORE, When.SWITCH),
                ON_A,
                (
                    "vm/test_migrate_single.py::test_the_guest_is_on_a_as_before_when_it_fails_before_the_cut_over",
                    "vm/test_migrate_tunnel.py::test_the_guest_is_on_a_as_before_when_it_fails_before_the_cut_over",
                ),
            ),
            Cell(
                (When.STREAM,),
                PAUSE,
                (
                    "vm/test_migrate_single.py::test_an_end_that_dies_after_the_cut_over_is_started_again",
                    "vm/test_migrate_single.py::test_resume_starts_what_has_died_meanwhile",
                    "vm/test_migrate_tunnel.py::test_whatever_leads_through_ssh_may_die_after_the_cut_over",
                    "vm/test_migrate_tunnel.py::test_resume_starts_what_has_died_meanwhile",
                ),
            ),
            Cell(
                LAST, WHOLE, why_not="nobody reads through it any more; what is left of it is the last table"
            ),
        ),
    ),
    Component(
        "The command is killed (`kill -9`), or interrupted",
        (
            Cell(
                BEFORE,
                replace(
                    ON_A, typed="nothing, as its guard did it; `run` again, or `nbd-migrate resume NAME`"
                ),
                (
                    "vm/test_migrate_deaths.py::test_the_guard_brings_the_guest_back_when_the_orchestrator_is_killed",
                    "vm/test_migrate_deaths.py::test_an_interrupted_migration_leaves_the_guest_on_a",
                    "vm/test_migrate_hybrid.py::test_a_migration_that_was_killed_while_it_copied_is_taken_back_or_begun_anew",
                    EACH_ENTRY,
                ),
            ),
            Cell(
                (When.SWITCH,),
                EITHER,
                (
                    "vm/test_migrate_two_deaths.py::test_in_the_switch_over_the_guest_comes_to_b",
                    EACH_ENTRY,
                    EACH_ENTRY_BACK,
                ),
            ),
            Cell(
                (When.STREAM, *LAST),
                ALONE,
                (
                    "vm/test_migrate_deaths.py::test_the_guest_survives_on_b_when_the_orchestrator_is_killed_after_the_cut_over",
                    "vm/test_migrate_finish.py::test_what_the_guard_says_finishes_a_migration_whose_orchestrator_was_killed",
                    "vm/test_migrate_fenced.py::test_the_guard_of_a_killed_command_puts_the_image_out_of_reach",
                    "vm/test_pivot.py::test_whoever_comes_after_an_orchestrator_that_died_between_two_commands_goes_on",
                    EACH_ENTRY,
                ),
            ),
        ),
    ),
    Component(
        "The guard ends, alone or with the command and its deputy",
        (
            Cell(
                BEFORE,
                ON_A,
                (STAYS, "vm/test_migrate_two_deaths.py::test_before_the_switch_over_the_guest_runs_on_on_a"),
            ),
            Cell(
                (When.SWITCH,),
                replace(
                    EITHER,
                    typed="nothing; where all three were killed as the guest stood still, `nbd-migrate abort NAME`",
                    waits="where all three were killed as it stood still, until that is typed",
                ),
                (
                    "vm/test_migrate_journal.py::test_a_guest_that_stands_still_before_the_switch_over_is_let_run",
                    "vm/test_migrate_pages.py::test_a_guest_that_stands_still_before_the_switch_over_is_let_run",
                    "vm/test_migrate_deaths.py::test_a_helper_that_dies_while_the_guest_stands_still_costs_nothing",
                ),
            ),
            Cell((When.STREAM, *LAST), NOTHING, why_not="it is dismissed when the guest has arrived"),
        ),
    ),
    Component(
        "A supervisor ends, or is stopped",
        (
            Cell(
                (*BEFORE, When.SWITCH),
                ON_A,
                (
                    STAYS,
                    "vm/test_migrate_stopped.py::test_a_supervisor_that_was_stopped_is_in_nobodys_way_back",
                ),
            ),
            Cell(
                (When.STREAM, *LAST),
                NOTHING,
                (
                    STREAM_GOES_ON,
                    "interop/test_supervisors.py::test_a_process_whose_supervisor_is_dead_is_taken_over_without",
                ),
            ),
        ),
    ),
    Component(
        "The network between A and B is cut",
        (
            Cell(
                (*BEFORE, When.SWITCH),
                ON_A,
                (
                    "vm/test_migrate_over_ssh.py::test_a_host_that_is_cut_off_before_the_cut_over_is_told_of_and_abort_clears_it",
                    "vm/test_migrate_unreachable.py::test_before_the_switch_over_a_b_that_is_away_does_not_keep_the_guest_from_a",
                    "vm/test_migrate_unreachable.py::test_a_guest_that_is_back_on_a_is_said_to_be_there_when_b_cannot_be_cleared",
                ),
            ),
            Cell(
                (When.STREAM,),
                LONG_PAUSE,
                (
                    CABLE,
                    "vm/test_migrate_over_ssh.py::test_a_cable_that_is_pulled_for_a_moment_after_the_cut_over_costs_only_time",
                    "vm/test_migrate_single.py::test_a_cable_that_is_pulled_costs_only_time",
                    "vm/test_migrate_tunnel.py::test_a_cable_that_is_pulled_costs_only_time",
                    "vm/test_migrate_safety.py::test_a_guest_whose_server_is_gone_pauses_and_the_operator_takes_it_up_again",
                ),
            ),
            Cell(
                LAST,
                WHOLE,
                ("vm/test_migrate_finish.py::test_a_complete_disk_is_the_guests_own_although_a_is_away",),
            ),
        ),
    ),
    Component(
        "A's host is under another address all of a sudden",
        (
            Cell(
                (*BEFORE, When.SWITCH),
                replace(
                    ON_A, typed="`nbd-migrate abort NAME`, then `run` with a plan that names the new address"
                ),
                (
                    "vm/test_migrate_over_ssh.py::test_a_host_that_is_cut_off_before_the_cut_over_is_told_of_and_abort_clears_it",
                ),
            ),
            Cell(
                (When.STREAM,),
                replace(
                    LONG_PAUSE,
                    typed="`nbd-migrate resume NAME --source-address HOST`, as the line says; nothing with the single channel, whose connection A makes",
                    waits="until that is typed",
                ),
                (
                    "vm/test_migrate_other_address.py::test_a_host_that_comes_back_under_another_address_is_told_and_the_guest_notices_nothing",
                ),
            ),
            Cell(
                LAST,
                WHOLE,
                ("vm/test_migrate_finish.py::test_a_complete_disk_is_the_guests_own_although_a_is_away",),
            ),
        ),
    ),
    Component(
        "A connection is half open: the other end hangs, or is gone without a word",
        (
            Cell(
                (When.EXPORT, When.OVERLAY, When.LAUNCH, When.PRECOPY),
                ON_A,
                (
                    "interop/test_hosts.py::test_a_host_that_accepts_and_says_nothing_is_waited_for_only_so_long",
                    "interop/test_shared_connections.py::test_a_monitor_that_says_nothing_is_told_of_as_on_this_machine",
                ),
            ),
            Cell(
                (When.RAM,),
                replace(ON_A, waits="not at all: it runs until `limits.silence` has passed without a byte"),
                (
                    "vm/test_migrate_while_running.py::test_ram_that_nobody_takes_is_no_migration",
                    "vm/test_migrate_ram_port.py::test_a_visitor_who_says_nothing_keeps_no_guest_from_running_for_longer_than_the_limit",
                ),
            ),
            Cell((When.SWITCH,), replace(ON_A, waits="`limits.silence` at most"), (HANGS,)),
            Cell(
                (When.STREAM,),
                LONG_PAUSE,
                (
                    "vm/test_migrate_safety.py::test_a_server_that_hangs_ends_the_wait_but_not_the_guest",
                    "vm/test_migrate_advice.py::test_a_server_that_hangs_is_not_told_to_run",
                    "interop/test_overlay_engine_lost.py::test_a_hung_source_gives_way_to_another_and_its_late_answers_land_nowhere",
                    "interop/test_channel.py::test_a_peer_that_falls_silent_is_noticed_by_both_ends",
                ),
            ),
            Cell(
                LAST,
                WHOLE,
                why_not="no byte is waited for from A by then; a host that hangs is the row above",
            ),
        ),
    ),
    Component(
        "Host A is switched off, and starts its guests again",
        (
            Cell(
                (*BEFORE, When.SWITCH),
                replace(GONE, typed="`nbd-migrate abort NAME`; A starts the guest as ever"),
                (HOST_A,),
            ),
            Cell(
                (When.STREAM,),
                replace(LONG_PAUSE, guest=f"{LONG_PAUSE.guest}; what starts guests on A finds no image"),
                (REBOOT,),
            ),
            Cell(
                LAST,
                WHOLE,
                (
                    "vm/test_migrate_finish.py::test_a_complete_disk_is_the_guests_own_although_a_is_away",
                    "vm/test_migrate_fenced.py::test_an_image_that_is_not_moved_aside_stays_out_of_reach_when_all_is_done",
                ),
            ),
        ),
    ),
    Component(
        "Host B is switched off",
        (
            Cell(
                (*BEFORE, When.SWITCH),
                replace(ON_A, typed="`nbd-migrate abort NAME` once B is back clears it"),
                (HOST_B,),
            ),
            Cell((When.STREAM,), CRASHED, (B_AGAIN,)),
            Cell(LAST, WHOLE_CRASHED, (B_AGAIN,)),
        ),
    ),
    Component(
        "B's disk is full",
        (
            Cell(
                (When.EXPORT, When.OVERLAY, When.LAUNCH, When.RAM, When.SWITCH),
                NOTHING,
                why_not="nothing but maps and logs is written there before the guest has arrived, and their room is seen to before step 1",
            ),
            Cell(
                (When.PRECOPY,),
                ON_A,
                why_not="it ends as every failure of a round, whose tests are those of nbd-overlay's end",
            ),
            Cell(
                (When.STREAM,),
                replace(
                    STOPPED,
                    guest="is paused on B when it writes where there is no room",
                    typed="make room, then `nbd-migrate resume NAME`",
                ),
                (
                    "vm/test_migrate_advice.py::test_a_full_disk_on_b_is_called_that",
                    "vm/test_migrate_safety.py::test_a_destination_without_space_pauses_the_guest_and_says_so",
                ),
            ),
            Cell(LAST, WHOLE, why_not="every block has its room by then"),
        ),
    ),
    Component(
        "A's disk has a bad sector",
        (
            Cell(
                (When.EXPORT, When.OVERLAY, When.LAUNCH, When.RAM, When.SWITCH),
                NOTHING,
                why_not="nothing of the disk is read for B before",
            ),
            Cell(
                (When.PRECOPY,),
                ON_A,
                (
                    "vm/test_migrate_advice.py::test_a_bad_sector_that_is_found_before_the_guest_goes_leaves_it_on_a",
                ),
            ),
            Cell(
                (When.STREAM,),
                STOPPED,
                (
                    "vm/test_migrate_advice.py::test_a_bad_sector_on_a_is_called_that",
                    "interop/test_overlay_engine_bad_sectors.py::test_of_a_streamed_disk_only_the_clusters_with_bad_sectors_are_absent",
                ),
            ),
            Cell(
                LAST, WHOLE, why_not="nothing is read there any more; what `--verify` reads again is step 5's"
            ),
        ),
    ),
    Component(
        "A backup or a clean-up job touches A's image",
        (
            Cell(
                (When.EXPORT, When.OVERLAY, When.LAUNCH, When.PRECOPY, When.RAM, When.SWITCH),
                replace(ON_A, disk="A's image as the job has left it; what was made on B is removed"),
                (
                    "vm/test_migrate_changes.py::test_a_change_before_the_ram_moves_ends_the_migration_with_the_guest_on_a",
                    "vm/test_migrate_changes.py::test_a_change_while_the_ram_moves_is_noticed_while_the_guest_stands_still",
                    "vm/test_migrate_changes.py::test_a_job_that_is_there_before_is_told_of_before_anything_starts",
                ),
            ),
            Cell(
                (When.STREAM,),
                replace(
                    STOPPED,
                    guest="sees nothing of one that reads; is paused where the image was cut off, or deleted and its server has ended",
                    typed="the command of the line, as the fence has the file open still; then `nbd-migrate resume NAME`",
                ),
                (
                    "vm/test_migrate_lost_source.py::test_a_job_that_reads_touches_or_renames_the_image_costs_nothing",
                    "vm/test_migrate_lost_source.py::test_an_image_that_was_cut_off_is_named_with_what_is_missing",
                    "vm/test_migrate_lost_source.py::test_an_image_that_is_gone_with_its_server_is_had_back_by_what_is_to_be_typed",
                    "vm/test_migrate_lost_source.py::test_a_qcow2_image_that_is_gone_with_its_reader_is_had_back",
                    "vm/test_migrate_finish.py::test_somebody_who_writes_to_the_old_disk_is_not_overlooked",
                ),
            ),
            Cell(LAST, WHOLE, why_not="A's image is out of date by then; one that is missing is no failure"),
        ),
    ),
    Component(
        "A certificate expires",
        (
            Cell(
                (*BEFORE, When.SWITCH),
                ON_A,
                (
                    "interop/test_migration_certificates.py::test_a_server_is_not_started_with_those_that_have_expired_and_says_so_in_a_line",
                ),
            ),
            Cell(
                (When.STREAM,),
                LONG_PAUSE,
                (
                    "interop/test_nbdserve_certificates.py::test_a_certificate_that_expires_while_the_server_runs_is_in_the_log",
                    "unit/recipes/channel/test_keys.py::test_a_limit_of_the_speed_that_makes_it_longer_is_refused",
                ),
                "a connection that stands goes on; they are valid for a year, and a plan that needs longer is refused before step 1",
            ),
            Cell(LAST, WHOLE, why_not="no connection is made any more"),
        ),
    ),
    Component(
        "A monitor answers slowly",
        (
            Cell(
                BEFORE,
                replace(ON_A, guest="runs on, on A, when `limits.command` is over; sooner it is only late"),
                (
                    "interop/test_shared_connections.py::test_a_monitor_that_lets_nobody_in_is_told_of_as_on_this_machine",
                    "vm/test_migrate_stopped.py::test_the_time_in_which_the_orchestrator_was_stopped_does_not_count",
                ),
            ),
            Cell((When.SWITCH,), replace(ON_A, waits="`limits.silence` at most"), (HANGS,)),
            Cell(
                (When.STREAM,),
                replace(NOTHING, typed="nothing before `limits.command`; then what the line says"),
                (
                    "vm/test_migrate_advice.py::test_monitors_that_answer_late_cost_only_time",
                    "vm/test_migrate_advice.py::test_a_qemu_on_b_that_hangs_is_called_that",
                    "vm/test_migrate_advice.py::test_an_nbd_overlay_that_hangs_is_called_that",
                ),
            ),
            Cell(
                LAST,
                replace(WHOLE, waits="as its QEMU does"),
                why_not="the same questions, of the same monitors, as while the disk is streamed",
            ),
        ),
    ),
    Component(
        "The clean-up fails",
        (
            Cell(
                (*BEFORE, When.SWITCH),
                replace(
                    ON_A,
                    disk="A's image as ever; what is left on B is named",
                    typed="the command of the line, or `nbd-migrate abort NAME`",
                ),
                (
                    "vm/test_migrate_journal.py::test_what_cannot_be_removed_is_told_until_it_is_gone",
                    "vm/test_migrate_unreachable.py::test_a_guest_that_is_back_on_a_is_said_to_be_there_when_b_cannot_be_cleared",
                    "vm/test_exporter.py::test_what_is_left_of_it_is_told_with_what_to_type",
                ),
            ),
            Cell((When.STREAM,), NOTHING, why_not="nothing is cleared away while the disk is streamed"),
            Cell(
                LAST,
                WHOLE,
                (
                    "vm/test_migrate_overlay.py::test_a_failure_behind_the_stream_does_not_say_that_the_source_is_needed",
                    "vm/test_migrate_fenced.py::test_a_fence_that_is_killed_before_it_has_moved_the_image_is_made_up_for_by_the_end",
                    "vm/test_migrate_fenced.py::test_an_image_whose_new_name_somebody_takes_meanwhile_keeps_its_own_and_is_told",
                ),
            ),
        ),
    ),
)
