//! The conformance suite of transports: one list of cases, run in-process and over gRPC on loopback,
//! against shards that a script makes compute, refuse, hang, lie, break and come back. What must hold in
//! every case: rows come back in the order asked for, with the bits that one healthy shard would give, or
//! a typed error names what is missing; nothing waits longer than its bound.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod cases;
mod cluster;
mod rig;
mod scripted;

macro_rules! conformance {
    ($($case:ident),* $(,)?) => {
        mod local {
            $(#[test] fn $case() { super::cases::$case::<super::rig::LocalRig>() })*
        }
        mod grpc {
            $(#[test] fn $case() { super::cases::$case::<super::rig::GrpcRig>() })*
        }
    };
}

conformance! {
    rows_come_back_in_the_order_asked_for,
    an_empty_batch_and_an_empty_choice_need_no_shard,
    two_exchanges_overlap,
    every_numerics_class_has_its_sizes,
    copies_share_the_work,
    retryable_refusals_go_to_the_other_copy,
    a_hung_shard_is_left_within_the_bound,
    a_slow_shard_is_left_and_then_avoided_until_it_is_quick_again,
    a_slow_shard_that_has_the_only_copy_is_waited_for,
    wrong_answers_and_dropped_frames_go_to_the_other_copy,
    rows_that_are_not_finite_go_to_the_other_copy_until_the_shard_proves_itself,
    without_a_copy_rows_that_are_not_finite_name_the_shard,
    an_overflow_takes_nobody_out,
    a_broken_link_is_noticed_at_once,
    an_unlisted_shard_is_left_at_once,
    a_draining_shard_gets_nothing_new,
    without_a_copy_the_step_waits_for_the_shard_at_its_old_address,
    without_a_copy_the_step_waits_for_the_shard_at_a_new_address,
    without_a_copy_the_step_waits_for_the_shard_to_be_ready,
    without_a_copy_a_refused_frame_is_sent_again,
    without_a_copy_a_late_answer_is_taken,
    without_a_copy_the_error_names_what_is_missing,
    late_answers_of_frames_sent_elsewhere_are_ignored,
    a_recovered_shard_gets_work_again,
    another_model_is_refused_by_name,
    another_epoch_waits_for_the_next_view,
    a_bug_of_ours_is_not_retried,
    a_step_that_always_finds_a_copy_to_fail_on_ends_within_the_bound,
    a_batch_that_does_not_fit_is_refused_before_it_is_sent,
    without_a_view_there_is_no_placement,
    closing_ends_a_wait,
    abandoned_exchanges_are_forgotten,
    many_workers_share_the_shards,
}
