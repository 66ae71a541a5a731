"""The streaming job's states: what moves it from one to another, and what does not."""

from __future__ import annotations

import threading

import pytest

from overlay.fill.job import Interrupted, Job, Phase


def running() -> Job:
    """A job that runs."""
    job = Job()
    assert job.start("stream")
    return job


def test_a_job_runs_once_at_a_time_and_keeps_its_name() -> None:
    job = running()
    assert not job.start("another")
    assert job.identifier == "stream"


def test_only_a_job_that_runs_can_be_paused_and_only_one_that_rests_resumed() -> None:
    job = Job()
    assert not job.pause()
    assert not job.resume()
    job.start("stream")
    assert not job.resume()
    assert job.pause()
    assert not job.pause()
    assert job.resume()


def test_a_failed_job_says_why_until_it_is_resumed() -> None:
    job = running()
    job.fail("the backing is lost")
    assert (job.phase, job.error) == (Phase.FAILED, "the backing is lost")
    assert job.resume()
    assert (job.phase, job.error) == (Phase.RUNNING, None)


@pytest.mark.parametrize("stop", [Job.pause, Job.cancel, Job.complete])
def test_an_error_that_comes_after_the_job_was_stopped_is_not_told_as_its_own(stop: object) -> None:
    job = running()
    assert callable(stop)
    stop(job)
    phase = job.phase
    job.fail("too late")
    assert (job.phase, job.error) == (phase, None)


def test_a_cancelled_job_may_be_started_again_and_a_completed_one_may_not() -> None:
    job = running()
    assert job.cancel()
    assert job.start("again")
    job.complete()
    assert not job.cancel()
    assert not job.start("once more")


def test_every_change_is_told_once_with_what_the_job_is_then() -> None:
    job, told = Job(), list[Phase]()
    job.tell = told.append
    job.start("stream")
    job.pause()
    job.pause()
    job.resume()
    job.fail("an error")
    job.resume()
    job.complete()
    assert told == [Phase.RUNNING, Phase.PAUSED, Phase.RUNNING, Phase.FAILED, Phase.RUNNING, Phase.DONE]


def test_the_end_wakes_who_waits_for_work_and_interrupts_who_works() -> None:
    idle, outcome = Job(), list[bool]()
    thread = threading.Thread(target=lambda: outcome.append(idle.wait_until_running()))
    thread.start()
    idle.end()
    thread.join(120)
    assert outcome == [False]
    job = running()
    job.pause_point()
    job.end()
    with pytest.raises(Interrupted):
        job.pause_point()


def test_a_pause_ends_a_rest_at_once() -> None:
    job = running()
    threading.Timer(0.05, job.pause).start()
    with pytest.raises(Interrupted):
        job.pause_point(60.0)
