"""All directed sequences by name, and how one is played."""

import traceback
from collections.abc import Callable
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass
from typing import Any, Final

from tests.sim import sequences_conducted as conducted
from tests.sim import sequences_crashes as crashes
from tests.sim import sequences_disk as disk
from tests.sim import sequences_hangs as hangs
from tests.sim import sequences_holes as holes
from tests.sim import sequences_joint as joint
from tests.sim import sequences_kept as kept
from tests.sim import sequences_machines as machines
from tests.sim import sequences_mutants as shown
from tests.sim import sequences_reads as reads
from tests.sim import sequences_words as words
from tests.sim.conducted_scene import Stage
from tests.sim.sequences_scene import Scene


@dataclass(frozen=True, slots=True)
class Sequence:
    """One sequence under one arbiter."""

    name: str
    arbiter: str
    script: Callable[[Any], None]
    stage: Callable[[str], Scene | Stage] = Scene


def _named(arbiter: str, *scripts: Callable[[Scene], None]) -> dict[str, Sequence]:
    return {s.__name__: Sequence(s.__name__, arbiter, s) for s in scripts}


def _conducted(arbiter: str, scripts: Sequence_[Callable[[Stage], None]]) -> dict[str, Sequence]:
    """With production's controllers; the same script runs under several arbiters."""
    names = [f"{s.__name__}-{arbiter}" for s in scripts]
    return {name: Sequence(name, arbiter, s, Stage) for name, s in zip(names, scripts, strict=True)}


SEQUENCES: Final = {
    **_named(
        "none",
        crashes.secondary_loses_power_idle, crashes.peer_dies_alone_writes,
        crashes.primary_killed_returns, crashes.primary_loses_power_returns,
        crashes.primary_dies_secondary_takes_over, crashes.both_lose_power,
        crashes.stale_node_without_cache_boots_alone, crashes.stale_node_forced,
        crashes.promoted_but_never_wrote, crashes.both_alone, crashes.source_dies_in_resync,
        crashes.target_dies_in_resync, crashes.link_flaps_in_resync, crashes.joint_taken_is_lost,
        crashes.local_disk_fails, crashes.remote_disk_fails, crashes.clean_stops,
        crashes.left_node_does_not_start, crashes.new_disk, crashes.rolled_back,
        crashes.torn_superblock,
        holes.alone_flushes_first, holes.take_over_flushes_first,
        holes.source_flushes_before_target_is_written_off, holes.resync_block_not_flushed,
        holes.power_cut_bars_promotion, holes.alone_then_reboot, holes.late_frames,
        holes.same_engine_resumes, holes.other_engine_does_not_resume, holes.both_stop_at_once,
        holes.leave_makes_durable, holes.remote_flush_fails, holes.last_copy_fails,
        holes.no_space_during_resync, holes.damaged_log, holes.damaged_map, holes.peer_disk_hangs,
        holes.idle_link_cut, holes.local_disk_hangs, holes.window_is_bounded,
        holes.two_changes_at_once, holes.stale_command,
        holes.command_while_the_peers_word_is_stored, shown.paused_again_and_again,
        shown.awake_for_moments,
        holes.swap_of_roles, holes.read_waits_for_write,
        joint.cut_in_joint_step,
        disk.remote_zero_fails, disk.remote_trim_without_space, disk.local_zero_not_offered,
        disk.local_trim_fails, disk.failed_primary_acknowledges_nothing,
        disk.local_read_fails, disk.flush_without_space, disk.second_flush_fails,
        disk.durable_write_not_synced, disk.last_copy_is_full, disk.full_in_the_joint_step,
        disk.full_before_the_joint_step, hangs.one_tidying_at_a_time, hangs.flush_hangs,
        hangs.background_flush_hangs,
        hangs.read_hangs, disk.failure_while_the_right_is_taken,
        hangs.peer_left_behind_a_late_write, hangs.peer_back_before_its_word_is_stored,
        hangs.late_write_before_a_swap, hangs.late_write_behind_a_cut,
        hangs.only_copy_with_a_hung_write, hangs.failure_beside_a_hung_write,
        hangs.request_of_an_earlier_term, hangs.pieces_and_a_decision,
        hangs.pieces_and_the_peers_word, hangs.slow_peer_makes_progress,
        hangs.slow_peer_takes_small_writes,
        hangs.block_status_waits_for_a_zero,
        disk.failure_is_stored_before_it_is_told, disk.failure_that_could_not_be_stored,
        shown.intent_not_written, shown.frozen_then_alone, shown.failed_sync_is_remembered,
        shown.promoted_while_applying, shown.target_map_cut_off, shown.dirty_in_sync_drains,
        shown.leave_under_load, shown.evicted_region_is_in_the_map,
        shown.unflushed_region_stays_hot, shown.lost_cache_survives_a_clean_stop,
        shown.failed_flush_at_the_stop_is_recorded, shown.page_of_the_map_in_the_cache_only,
        shown.flush_does_not_cover_a_write_under_way, shown.replay_cut_off,
        shown.joint_step_broken_off_often, shown.joint_generation_in_the_cache_only,
        words.words_for_a_killed_primary, words.words_make_durable,
        words.no_word_from_another_life, words.no_word_about_another_line,
        words.secondary_leaves_without_a_link, words.both_asked_without_a_link,
        words.word_that_comes_too_late, words.next_engine_waits_for_the_words,
        machines.old_peer_after_its_replacement, machines.old_peer_with_the_same_generation,
        machines.old_peer_with_its_page_cache, machines.another_peer_in_a_session,
        machines.written_in_the_first_session, machines.set_back_to_before_the_resync,
        machines.set_back_in_the_resync,
        kept.given_up_copy_is_kept, kept.nothing_kept_if_not_wanted, kept.kept_through_power_cuts,
        kept.no_room_to_keep, kept.no_room_then_discarded, kept.full_after_the_resync,
        kept.kept_before_the_crash, kept.second_image_is_refused,
        kept.flushed_alone_but_never_wrote, kept.half_a_batch, kept.no_room_then_given_up_again,
        kept.no_room_then_forced, kept.kept_whatever_happens,
    ),
    **_named(
        "memory",
        crashes.stale_node_boots_alone, crashes.second_claim_loses, crashes.primary_hangs,
        joint.joint_lost_then_both_claim, joint.joint_step_broken_off_again,
        joint.late_look_at_the_record, joint.claim_settled_in_joint_step,
        holes.claim_flushes_first, holes.power_cut_bars_claim, holes.claim_applied_late,
        holes.claim_applied_then_killed, holes.winner_died, holes.arbiter_has_to_agree,
        holes.record_lost_to_nobody, words.words_for_a_claim,
        reads.deposed_primary_answers_nothing, reads.stopped_primary_wakes_up,
        reads.read_that_takes_long, reads.block_status_is_held, reads.late_echo_lends_nothing,
        reads.engine_that_knows_nothing_waits, reads.longer_lease_counts,
        reads.promoted_before_it_was_told, reads.lease_from_the_joint_step_on,
        reads.reads_freeze_with_the_writes, reads.idle_pair_reads_at_once,
        reads.long_read_locks_nothing, reads.swap_waits_for_nothing, reads.word_waits_for_nothing,
        reads.clock_that_stood_still, reads.reads_share_an_echo, reads.no_session_without_a_lease,
    ),
    **_conducted("none", conducted.EVERYWHERE + conducted.NONE),
    **_conducted("ping", conducted.EVERYWHERE + conducted.PING),
    **_conducted("memory", conducted.EVERYWHERE + conducted.MEMORY),
}  # fmt: skip


def play(sequence: Sequence) -> str:
    """Play it; returns what went wrong, with the end of the trace, or ""."""
    scene: Scene | Stage | None = None
    try:
        scene = sequence.stage(sequence.arbiter)
        sequence.script(scene)
    except Exception as error:  # noqa: BLE001 - whatever is raised is what went wrong
        told = list(scene.world.tail)[-40:] if scene is not None else []
        trace = traceback.format_exc(limit=-4)
        return "\n".join([f"{type(error).__name__}: {error}", trace, *told])
    return ""
