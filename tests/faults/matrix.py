"""The fault matrix: every fault, what holds under it, and which tests say so.

docs/faults.md shows it; tests/faults/test_matrix.py holds the two together. A row that waits for
something says so in `later`; once its tests exist, name them instead, and put what

    python -m tests.faults.matrix

prints into the page.
"""

from tests.faults.row import Row, of, render

KILLS = of("faults/test_deployed_kills", "kills_at_random_times_change_no_bit", times=5)
NONSENSE = of("faults/test_malicious", "thirty_percent_that_send_nonsense_change_no_bit", times=12)
UNRELIABLE = of(
    "faults/test_unreliable_grid", "messages_may_be_lost_doubled_late_and_old", times=20
)

MATRIX = (
    Row(
        "server killed",
        "goes on from HEAD; no acknowledged round is lost, at most one is done again; the "
        "adapter is the uninterrupted run's, bit for bit",
        local=(
            *of(
                "faults/test_kill",
                "a_killed_run_resumes_without_loss_to_the_same_bits",
                times=50,
            ),
            *of("faults/test_kill", "the_command_line_resumes_a_killed_simulation", times=25),
            *of(
                "server/test_blob_store",
                "a_kill_before_any_system_call_loses_nothing_that_was_acknowledged",
            ),
        ),
        deployed=(
            *KILLS,
            *of(
                "faults/test_deployed_kills", "a_killed_serverapp_and_a_killed_worker_change_no_bit"
            ),
        ),
    ),
    Row(
        "SuperLink killed",
        "a new Flower run starts by itself; the same",
        local=of("server/test_keeper", "a_dead_serverapp_is_replaced_at_once"),
        deployed=KILLS,
    ),
    Row(
        "client killed in training",
        "trains again to the same bytes, or sends what it had kept; counts once",
        local=(
            *of("client/test_duty", "a_worker_killed_at_any_write_gives_the_same_bytes", times=30),
            *of("client/test_flower", "a_run_in_flower_messages_with_a_worker_that_is_killed"),
            *of(
                "simulation/test_private_runs",
                "a_client_that_dies_in_training_has_spent_what_it_reserved",
            ),
            *of(
                "privacy/test_ledger_faults",
                "killed_at_any_point_it_never_says_less_than_was_done",
                times=100,
            ),
        ),
        deployed=KILLS,
    ),
    Row(
        "client killed between the update's making and its acknowledgement",
        "the kept bytes are sent again, and count once",
        local=(
            *of("client/test_duty", "an_update_that_was_not_sent_is_sent_without_training"),
            *of("client/test_duty", "a_worker_killed_at_any_write_gives_the_same_bytes", times=30),
            *of(
                "simulation/test_private_runs",
                "an_update_that_was_made_is_sent_again_and_not_made_again",
            ),
        ),
    ),
    Row(
        "reply lost, doubled or out of order",
        "one contribution of a client to a round; the clean run's adapter, bit for bit",
        local=(
            *UNRELIABLE,
            *of(
                "faults/test_network",
                "a_cut_at_any_byte_sends_only_the_rest",
                "whatever_happens_to_connections_the_bytes_are_right",
                times=20,
            ),
            *of("faults/test_network", "a_connection_that_falls_silent_is_left", times=5),
        ),
        deployed=of(
            "faults/test_deployed_faults", "transfers_through_a_bad_network_change_no_bit", times=5
        ),
    ),
    Row(
        "stale or replayed update (an old round, another run, another start)",
        "refused by name; the adapter is unchanged",
        local=(
            *NONSENSE,
            *of("server/test_admission", "an_update_of_another_round_is_stale"),
            *UNRELIABLE,
        ),
    ),
    Row(
        "slow client",
        "the round closes at its deadline with the quorum; what comes late is refused; the "
        "client is in the next round",
        local=of(
            "faults/test_unreliable_grid",
            "a_slow_client_is_left_behind_and_is_back_in_the_next_round",
        ),
        deployed=of(
            "faults/test_deployed_faults",
            "a_stopped_client_is_left_behind_and_is_back_later",
            times=5,
        ),
    ),
    Row(
        "fewer clients than the quorum",
        "the round is abandoned, tried again federation.retries times, then the run ends with "
        "code 3; never an endless wait",
        local=of(
            "server/test_rounds",
            "too_few_updates_stop_the_run_and_the_round_stands",
            "a_round_is_tried_again_with_the_next_attempt",
        ),
        deployed=of(
            "faults/test_deployed_faults",
            "too_few_clients_end_the_run_at_the_deadline",
            "a_round_below_quorum_ends_the_run_which_goes_on_when_clients_are_back",
            times=5,
        ),
    ),
    Row(
        "NaN, infinity, a huge norm, zero",
        "refused (zero is accepted); the others' mean is that of a run without the client, bit "
        "for bit",
        local=(*NONSENSE, *of("faults/test_malicious", "a_zero_update_is_accepted_and_counts")),
    ),
    Row(
        "wrong shape, rank or type, extra or missing tensor, another base",
        "refused by name; the run goes on",
        local=NONSENSE,
    ),
    Row(
        "a lie about the number of examples",
        "clamped or refused; a client's weight is at most the largest over the sum",
        local=(
            *NONSENSE,
            *of("faults/test_malicious", "the_most_examples_a_client_may_claim_bound_its_weight"),
        ),
    ),
    Row(
        "oversized or malformed body, compressed zeros, a header of 100 MB",
        "refused before 8 MiB are held; memory grows by less than 64 MiB; an honest upload "
        "completes meanwhile",
        local=(
            *of(
                "faults/test_exchange_faults",
                "hostile_bodies_do_not_grow_the_server_and_an_honest_upload_completes",
                "many_silent_callers_do_not_keep_an_honest_one_out",
            ),
            *of("server/test_exchange", "noise_instead_of_a_message_is_refused"),
            *NONSENSE,
        ),
    ),
    Row(
        "a client without a certificate, with a revoked or an expired one",
        "refused by name, and never a node",
        local=(
            *of(
                "server/test_exchange",
                "a_caller_without_a_certificate_of_our_ca_gets_no_connection",
                "a_ticket_that_is_not_the_callers_moves_nothing",
            ),
            *of("test_tickets", "no_other_text_is_honoured"),
        ),
        deployed=of(
            "faults/test_deployed_strangers",
            "another_authority_is_refused",
            "an_expired_certificate_is_refused",
            "a_revoked_certificate_is_refused",
            times=5,
        ),
    ),
    Row(
        "a man in the middle, another CA, plain text",
        "the client leaves; no byte of an update is sent",
        local=(
            *of("faults/test_impostors", "no_byte_of_a_delta_goes_to_an_impostor", times=2),
            *of("server/test_exchange", "why_there_is_no_connection_is_said"),
        ),
        deployed=of(
            "faults/test_deployed_strangers",
            "another_authority_is_refused",
            "plain_text_is_refused",
            times=5,
        ),
    ),
    Row(
        "a server that asks for more than a site permits",
        "the client's policy refuses",
        local=(
            *of(
                "client/test_policy",
                "what_a_hostile_server_asks_is_refused_by_default",
                "a_demand_of_privacy_refuses_a_job_without_it",
                "a_job_may_ask_for_the_limit_and_not_for_one_more",
            ),
            *of("client/test_duty", "refusals_say_what_kind_they_are"),
            *of("privacy/test_ledger_faults", "no_release_after_the_budget_ever"),
        ),
    ),
    Row(
        "clocks that are off",
        "by ten seconds: no bit changes, for deadlines are measured by monotonic clocks; by ten "
        "minutes: refused, and the clock is named",
        local=of("server/test_consortium", "clocks_ten_minutes_apart_are_named"),
        deployed=(
            *of(
                "faults/test_deployed_faults",
                "a_clock_that_is_a_little_off_changes_no_bit",
            ),
            *of("faults/test_deployed_strangers", "a_clock_that_is_too_far_off_is_named"),
        ),
        later="a small skew where libfaketime lets no process wait; a clock set amid a run",
    ),
    Row(
        "disk full",
        "no partial file; a clear error; goes on once there is space",
        local=of(
            "faults/test_full_disk",
            "a_run_on_a_full_disk_stops_and_goes_on_once_there_is_space",
            "an_upload_to_a_full_disk_is_continued",
            "an_update_that_does_not_fit_is_not_kept",
            "events_that_do_not_fit_are_written_once_there_is_space",
            times=20,
        )
        + of(
            "privacy/test_ledger_faults",
            "on_a_full_disk_the_ledger_is_never_behind_the_training",
        ),
    ),
    Row(
        "a flipped bit in what is kept",
        "always noticed; a checkpoint falls back by one round, and comes to the same bits",
        local=of(
            "faults/test_corruption",
            "a_flipped_bit_of_a_checkpoint_costs_one_round_at_most",
            "a_flipped_bit_of_a_kept_update_is_never_sent",
            "a_flipped_bit_of_a_receipt_is_noticed",
            "a_flipped_bit_of_a_received_payload_is_noticed",
            times=200,
        ),
    ),
    Row(
        "torn tail of a ledger",
        "what is incomplete counts as spent",
        local=of(
            "privacy/test_ledger_faults",
            "cut_off_at_any_byte_it_is_completed_or_refused",
            "a_torn_last_line_is_completed_on_disk",
        ),
    ),
    Row(
        "ledger deleted, swapped or rolled back",
        "refused, or reported",
        local=(
            *of(
                "privacy/test_ledger_faults",
                "a_missing_file_is_refused",
                "an_older_head_is_refused",
                "deleted_while_open_it_is_refused",
                "any_flipped_bit_is_noticed",
                "lines_dropped_swapped_repeated_or_forged_are_noticed",
            ),
            *of(
                "simulation/test_private_runs",
                "a_ledger_that_was_touched_stops_the_run_with_advice",
            ),
        ),
    ),
    Row(
        "a client's memory runs out",
        "its round fails with the reason, and the next one is served",
        local=(
            *of("client/test_worker", "a_failure_inside_is_an_answer_and_the_next_call_is_served"),
            *of("privacy/test_private_step", "memory_that_runs_out_changes_nothing"),
            *of(
                "training/test_cohort",
                "a_cohort_that_does_not_fit_is_halved_within_the_step",
            ),
            *of("training/test_private_cohort", "memory_that_runs_out_changes_nothing"),
        ),
    ),
    Row(
        "200 clients with large updates",
        "updates wait on disk; memory stays within a tenth of what ten clients take",
        local=of("faults/test_server_memory", "many_large_updates_need_no_more_memory_than_few"),
    ),
    Row(
        "an update of 2.1 GiB",
        "goes up in pieces, and goes on where it was cut",
        local=of(
            "faults/test_exchange_faults", "more_bytes_than_one_message_may_have_go_up_in_pieces"
        ),
    ),
    Row(
        "another version",
        "refused when it joins, with both versions named",
        local=of("server/test_consortium", "other_versions_are_refused_by_both_names"),
        deployed=of(
            "faults/test_deployed_strangers", "another_version_is_refused_with_both_named", times=5
        ),
    ),
    Row(
        "a seed for the noise in a private job",
        "refused",
        local=of("config/test_job", "every_bad_value_is_named_with_its_key"),
    ),
)

if __name__ == "__main__":
    print(render(MATRIX))
