"""Plausible bugs, and the tests that should notice each.

They are data for scripts/mutate.py. A snippet occurs exactly once in its file, which
tests/architecture/test_mutations.py checks: where code changes, its mutations change with it.
`equivalent` explains why no test can notice one.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """A bug: `new` instead of `old`."""

    id: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str = ""


def of(file: str, *rows: tuple[str, str, str, tuple[str, ...]], **equivalent: str) -> tuple[Mutation, ...]:
    """Return a module's mutations of rows (name, old, new, tests).

    `equivalent` gives reasons by name, hyphens as underscores.
    """
    module = file.rpartition("/")[2].removesuffix(".py").replace("_", "-")
    return tuple(
        Mutation(f"{module}-{name}", file, old, new, tests, equivalent.get(name.replace("-", "_"), ""))
        for name, old, new, tests in rows
    )


_EXAMPLES = "tests/pipelines/shards/test_examples.py::"
REFERENCE = (f"{_EXAMPLES}test_build_examples_equals_the_reference",)
FUTURE = (f"{_EXAMPLES}test_features_do_not_read_anything_at_or_after_the_session_start", *REFERENCE)
INDEX = (f"{_EXAMPLES}test_time_index_counts_and_finds_the_first_and_the_last",)
ORDER = (f"{_EXAMPLES}test_time_index_orders_by_key_and_time_and_then_as_they_came",)
SPLIT = (f"{_EXAMPLES}test_split_times_keep_the_parts_in_order_and_a_window_apart",)
BUCKETS = (f"{_EXAMPLES}test_shards_pipeline_equals_the_reference",)
HISTORY = (f"{_EXAMPLES}test_histories_of_busy_users_equal_the_reference",)
TIES = (f"{_EXAMPLES}test_events_of_one_moment_stand_in_a_history_by_kind_and_listing", *REFERENCE)
LISTED = (f"{_EXAMPLES}test_a_listing_offered_at_the_session_start_is_not_known_to_be",)
FILES_OF_DAYS = (f"{_EXAMPLES}test_rows_of_a_session_lie_in_one_file_of_a_day",)
PARTS = (f"{_EXAMPLES}test_parts_of_a_log_begin_where_they_should",)
EARLY = (f"{_EXAMPLES}test_events_of_final_days_are_summed_up_to_the_first_day_that_is_built",)

_DAYS = "tests/pipelines/shards/test_final_days.py::"
NIGHTS = (f"{_DAYS}test_nights_add_up_to_one_build_of_the_whole_log",)
FINAL = (f"{_DAYS}test_days_are_kept_up_to_the_first_that_may_change", *NIGHTS)
OPEN_DAYS = (f"{_DAYS}test_final_days_stay_and_open_days_keep_their_features",)
SAMPLES = (
    f"{_DAYS}test_the_least_values_are_found_among_many_that_are_alike",
    f"{_DAYS}test_samples_are_the_least_numbers_of_each_day",
)
SAME_LOG = (
    f"{_DAYS}test_a_log_that_grows_is_known_again",
    f"{_DAYS}test_a_final_day_is_known_by_half_of_its_sample",
)
DELISTED = (f"{_DAYS}test_only_listings_that_final_days_refer_to_are_kept",)

_LOG = "tests/pipelines/shards/test_log_cache.py::"
GROUPS = (f"{_LOG}test_row_groups_are_known_by_what_they_hold",)
PLANS = (f"{_LOG}test_plans_of_many_nights_give_the_rows_of_tonights_log",)
CUT_PARTS = (f"{_LOG}test_kept_rows_of_another_size_are_not_used",)

_SNAPSHOT = "tests/pipelines/score/test_snapshot.py::"
SCORED = (f"{_SNAPSHOT}test_snapshot_gives_a_past_click_its_training_features",)
STRANGERS = (f"{_SNAPSHOT}test_snapshot_of_empty_logs_and_of_strangers",)
NOWHERE = (f"{_SNAPSHOT}test_item_features_know_nothing_of_an_unknown_store",)
BOOKS = (f"{_SNAPSHOT}test_build_log_accounts_for_every_row",)
ACTIVE = (f"{_SNAPSHOT}test_activity_is_that_of_the_last_28_days",)
SOME_ROWS = (f"{_SNAPSHOT}test_a_tile_holds_the_listings_that_it_is_asked_for",)
NOBODY = (f"{_SNAPSHOT}test_a_pair_of_nobody_knows_nothing",)

PUBLICATION = ("tests/pipelines/runs/test_publication.py",)
PUBLISHED = ("tests/pipelines/runs/test_manifest.py",)
READERS = ("tests/pipelines/runs/test_readers_path.py",)
GATES = ("tests/pipelines/score/test_gates.py",)

_STORE = "tests/pipelines/runs/test_store.py::"
MERGED = (f"{_STORE}test_merged_parts_hold_the_same_rows",)
REPLACED = (
    f"{_STORE}test_parts_are_removed_only_after_two_days_and_when_not_listed",
    f"{_STORE}test_a_removal_that_is_cut_off_leaves_the_marker",
)
PLANNED = (
    f"{_STORE}test_parts_of_other_kernels_are_not_merged",
    f"{_STORE}test_few_small_parts_and_large_ones_are_left_alone",
)
CONTENTS = ("tests/pipelines/embed/test_encode.py",)
TILES = ("tests/pipelines/score/test_tiles.py",)

SCORER = ("tests/camenn_model/scoring/test_scorer.py",)
_SHORTLIST = "tests/camenn_model/scoring/test_shortlist.py"
SHORTLIST = (
    f"{_SHORTLIST}::test_a_draft_may_be_two_slacks_behind_and_be_the_best",
    f"{_SHORTLIST}::test_what_is_best_so_far_is_no_draft",
    f"{_SHORTLIST}::test_a_draft_may_err_three_times_as_much_as_those_that_were_probed",
    f"{_SHORTLIST}::test_slack_is_three_times_the_largest_error_and_never_shrinks",
    f"{_SHORTLIST}::test_one_error_beyond_the_slack_has_its_tile_computed_again",
    f"{_SHORTLIST}::test_errors_are_probed_all_over_the_first_tile",
    f"{_SHORTLIST}::test_the_best_are_found_whatever_drafts_err_within_the_slack",
)
LAYOUT = ("tests/camenn_model/model/test_layout.py",)
EXPERTS = ("tests/camenn_model/model/test_experts.py", "tests/camenn_model/model/test_camenn.py")
MODEL = ("tests/camenn_model/model/test_camenn.py",)
LOSSES = ("tests/camenn_model/training/test_losses.py",)
PLATT = ("tests/camenn_model/test_calibration.py",)
METRICS = ("tests/camenn_model/evaluation/test_metrics.py",)

_DATASET = "tests/camenn_model/data/test_examples.py"
_TRAIN = "tests/camenn_model/training/test_train.py::"
DATASET = (_DATASET,)
COLLATE = (f"{_TRAIN}test_collate_holds_each_item_and_session_once",)
CHECKPOINT = ("tests/camenn_model/test_package.py",)

_INTEGRITY = "tests/pipelines/runs/test_integrity.py::"
DAMAGED = (f"{_INTEGRITY}test_a_flipped_bit_is_told_or_changes_nothing",)
REMEMBERED = (f"{_INTEGRITY}test_what_was_found_whole_is_remembered_until_it_changes",)
DOCUMENTS = (f"{_INTEGRITY}test_documents_of_before_are_read_and_others_are_not",)
OLD_FILES = (f"{_INTEGRITY}test_a_file_without_a_checksum_is_known_by_its_size",)
WRITERS = ("tests/pipelines/runs/test_concurrent_writers.py",)
LEASE = ("tests/pipelines/io/test_lease.py",)
GARBAGE = ("tests/pipelines/runs/test_garbage.py",)
LATE_RESUME = (f"{_TRAIN}test_a_run_that_is_resumed_late_keeps_its_best_and_evaluates_when_due",)
EPOCHS = (f"{_TRAIN}test_each_epoch_sees_every_example_once",)
SEEDS = (f"{_TRAIN}test_each_step_and_piece_draws_its_own_dropout",)
PATIENCE = (f"{_TRAIN}test_patience_counts_evaluations_in_a_row",)


MUTATIONS: tuple[Mutation, ...] = (
    *of(
        "camenn_model/calibration.py",
        (
            "raw-labels",
            "target = np.where(y == 1, (positives + 1) / (positives + 2), 1 / (len(y) - positives + 2))",
            "target = y",
            PLATT,
        ),
        ("negatives-by-positives", "1 / (len(y) - positives + 2))", "1 / (positives + 2))", PLATT),
        ("intercept-at-the-centre", "float(w[1] - w[0] * centre / spread)", "float(w[1])", PLATT),
        ("slope-of-spreads", "float(w[0] / spread)", "float(w[0])", PLATT),
        (
            "intercept-of-zero",
            "float(np.log(positives / (len(y) - positives)) - z[0])",
            "float(np.log(positives / (len(y) - positives)))",
            PLATT,
        ),
        ("stops-early", "tolerance: float = 1e-10", "tolerance: float = 1e-4", PLATT),
        ("ranks-may-turn", "if slope <= 0.0:", "if slope == 0.0:", PLATT),
        ("rate-not-odds", "np.log(positives / (len(y) - positives))", "np.log(positives / len(y))", PLATT),
    ),
    *of(
        "camenn_model/data/alignment_sampler.py",
        ("own-photo-is-foreign", "                | (table.image_row[a] == table.image_row[b])\n", "", DATASET),
        ("own-title-is-foreign", "                | (table.title_row[a] == table.title_row[b])\n", "", DATASET),
    ),
    *of(
        "camenn_model/data/batching.py",
        (
            "padding-moves-places",
            "torch.from_numpy(place - offset if offset else place)",
            "torch.from_numpy(place)",
            DATASET + COLLATE,
        ),
    ),
    *of(
        "camenn_model/data/examples.py",
        ("delisted-has-a-kind", "keep = (place < size) & (item >= 0)", "keep = place < size", DATASET),
        (
            "first-place-is-unknown",
            "np.clip(position + 1, 0, self.position_size - 1)",
            "np.clip(position, 0, self.position_size - 1)",
            DATASET,
        ),
        (
            "session-of-all-stores",
            'stable_hash(examples["session_id"]), store], axis=1)',
            'stable_hash(examples["session_id"])], axis=1)',
            DATASET + COLLATE,
        ),
    ),
    *of(
        "camenn_model/evaluation/metrics.py",
        (
            "ece-equal-width",
            "bin_of = np.arange(len(y)) * bins // len(y)",
            "bin_of = np.minimum((p * bins).astype(np.int64), bins - 1)",
            METRICS,
        ),
        ("ece-ties-apart", "y = (np.bincount(tie, weights=y) / np.bincount(tie))[tie]", "y = y + 0 * tie", METRICS),
        (
            "ece-mean-of-bins",
            "float(np.abs(gap).sum() / len(y))",
            "float(np.abs(gap / np.maximum(np.bincount(bin_of, minlength=bins), 1)).mean())",
            METRICS,
        ),
        (
            "auc-from-rank-zero",
            "(ranks[y == 1].sum() - positives * (positives + 1) / 2)",
            "(ranks[y == 1].sum() - positives * (positives - 1) / 2)",
            METRICS,
        ),
        ("gauc-by-positives", "return within, size", "return within, positives", METRICS),
        (
            "gauc-unweighted",
            "float(np.average(within[both], weights=size[both]))",
            "float(np.mean(within[both]))",
            METRICS,
        ),
        ("ndcg-ideal-of-k", "gained[positives[some]]", "gained[np.minimum(k, len(gained) - 1)]", METRICS),
        ("hit-before-k", "weights=y * (last <= k))", "weights=y * (last < k))", METRICS),
        ("hit-one-draw-less", "= k - first[straddles] + 1", "= k - first[straddles]", METRICS),
        ("recall-ties-count-for", "((sim >= best) & ~own)", "((sim > best) & ~own)", METRICS),
        ("recall-of-all-queries", "sim, own = sim[possible], own[possible]", "pass", METRICS),
        ("log-loss-not-clipped", "p = np.clip(p, SMALLEST, 1 - SMALLEST)", "p = np.asarray(p)", METRICS),
        ("pcoc-turned", "float(p.sum() / y.sum())", "float(y.sum() / p.sum())", METRICS),
        (
            "mismatch-is-aligned",
            "auc(mismatched, -np.asarray(alignment",
            "auc(mismatched, np.asarray(alignment",
            METRICS,
        ),
        ("ne-of-the-loss", "/ log_loss(y, np.full(len(y), rate))", "/ log_loss(y, np.full(len(y), 0.5))", METRICS),
    ),
    *of(
        "camenn_model/integrity.py",
        ("bytes-not-compared", "if file_sha256(path) != sha256:", "if not sha256:", DAMAGED),
        ("known-by-its-times", "status.st_mtime_ns, status.st_ctime_ns)", "status.st_mtime_ns)", REMEMBERED),
        ("remembered-for-ever", "return 0 <= age < REMEMBERED_S", "return 0 <= age", REMEMBERED),
        ("remembered-from-the-future", "return 0 <= age < REMEMBERED_S", "return age < REMEMBERED_S", REMEMBERED),
        ("document-not-compared", "value[CHECKSUM] != document_checksum(value)", "not value[CHECKSUM]", DAMAGED),
        ("any-key", "other = sorted(value.keys() - set(fields) - {CHECKSUM})", "other: list[str] = []", DOCUMENTS),
        ("size-not-compared", "if status.st_size != size:", "if status.st_size < size:", OLD_FILES),
    ),
    *of(
        "camenn_model/model/experts.py",
        ("softmax-over-all", "ordered[..., :keep].softmax(dim=-1)", "ordered.softmax(dim=-1)[..., :keep]", EXPERTS),
        (
            "noise-not-positive",
            "F.softplus(sum(spread[1:], start=spread[0]))",
            "sum(spread[1:], start=spread[0])",
            EXPERTS,
        ),
        ("chosen-without-noise", "*choose(logits, self.keep))", "*choose(quiet, self.keep))", EXPERTS),
        ("quiet-is-noisy", "GateOutput(logits, quiet, *", "GateOutput(logits, logits, *", EXPERTS),
        ("use-of-slots", ".sum(1).float().mean(0)", ".float().mean((0, 1))", EXPERTS),
        ("weights-of-the-first", "gate.weights[pairs, slot]", "gate.weights[pairs, 0]", EXPERTS),
        ("sides-not-normal", "Side(norm(side.tokens), side.mask", "Side(side.tokens, side.mask", EXPERTS),
        ("outputs-not-normal", "norm(tokens).to(mixed.dtype)", "tokens.to(mixed.dtype)", EXPERTS),
    ),
    *of(
        "camenn_model/model/layers.py",
        ("groups-for-rows", "bool((groups == 1).all())", "len(row) == rows", LAYOUT),
        ("number-not-of-the-group", "number % size", "number % (size - 1)", LAYOUT),
        (
            "memory-is-changed",
            "torch.cat([self.finish(active, attended), kept], dim=1)",
            "torch.cat([self.finish(active, attended), kept + attended.sum()], dim=1)",
            MODEL,
        ),
    ),
    *of(
        "camenn_model/model/towers.py",
        ("scaled-by-all-heads", "* width**-0.5", "* query.shape[-1] ** -0.5", MODEL),
        ("padding-is-attended", "score + mask_bias(mask)[:, None]", "score", MODEL),
        ("no-residual", "task = task + drop(self.out(attended)", "task = drop(self.out(attended)", MODEL),
        ("feed-forward-not-normal", "self.ffn(self.ffn_norm(task))", "self.ffn(task)", MODEL),
        ("log-of-the-rate", "math.log(base_rate / (1.0 - base_rate))", "math.log(base_rate)", MODEL),
        (
            "head-starts-at-a-half",
            "            init_linear(module)\n    tower.reset_head()",
            "            init_linear(module)",
            MODEL,
        ),
        ("attention-drops-always", "self.attention_dropout, self.training)", "self.attention_dropout, True)", MODEL),
        (
            "sides-not-read",
            "routed.side.read(share).to(read.dtype)",
            "0 * routed.side.read(share).to(read.dtype)",
            MODEL,
        ),
    ),
    *of(
        "camenn_model/package.py",
        (
            "version-without-calibration",
            '    "agreement.safetensors",\n    "calibration.json",\n',
            '    "agreement.safetensors",\n',
            CHECKPOINT,
        ),
        ("shapes-not-compared", "if own[name].shape != tensors[name].shape", "if False", CHECKPOINT),
        (
            "surplus-not-seen",
            "other = set(own.keys() ^ tensors.keys())",
            "other = set(own.keys() - tensors.keys())",
            CHECKPOINT,
        ),
        ("dropout-in-scoring", "return model.eval()", "return model", CHECKPOINT),
    ),
    *of(
        "camenn_model/model/target_attention.py",
        ("padding-answers", "torch.where(real, 0.0, MASKED)", "torch.zeros(())", MODEL),
        ("answers-have-no-age", "(self.age(age) + self.kind(kind))", "self.kind(kind)", MODEL),
        (
            "likeness-of-any-listing",
            "self.ask(entry).index_select(0, item)",
            "self.ask(entry)[:1].expand(len(item), -1, -1)",
            MODEL,
        ),
    ),
    *of(
        "camenn_model/data/examples.py",
        ("histories-lose-their-end", ".max(initial=0)) + 1", ".max(initial=0))", DATASET),
        (
            "joined-histories-shift",
            "joined([piece.item for piece in pieces], -1)",
            "joined([piece.item for piece in pieces], 0)",
            DATASET,
        ),
    ),
    *of(
        "camenn_model/scoring/scorer.py",
        ("unwanted-are-scored", ".masked_fill_(~wanted, -torch.inf)", "", SCORER),
        (
            "padding-is-attended",
            "kv.shape[-1] ** -0.5, side_tokens.mask)",
            "kv.shape[-1] ** -0.5, torch.ones_like(side_tokens.mask))",
            SCORER,
        ),
        (
            "filled-by-any-expert",
            "rows = rows[~states.filled[expert, rows]]",
            "rows = rows[~states.filled.any(0)[rows]]",
            SCORER,
        ),
        (
            "filled-from-the-top",
            "_fill(model, side.states, expert, rows + side.start)",
            "_fill(model, side.states, expert, rows)",
            SCORER,
        ),
        (
            "margin-of-the-best",
            "ordered[..., keep - 1] - ordered[..., keep]",
            "ordered[..., 0] - ordered[..., keep]",
            SCORER,
        ),
        ("position-is-the-first", "unknown = torch.zeros(len(buckets)", "unknown = torch.ones(len(buckets)", SCORER),
        (
            "counts-forgotten",
            "below = below + model.counts(counted + model.counts.found(found), values, buckets)",
            "pass",
            SCORER,
        ),
        ("nothing-has-no-weight", "F.pad(past.values, (0, 1), value=1.0)", "F.pad(past.values, (0, 1))", SCORER),
        (
            "padding-has-mass",
            "states.tower.values[..., -1] = states.mask[:, None]",
            "states.tower.values[..., -1] = 1.0",
            SCORER,
        ),
        (
            "values-not-shared",
            ".unflatten(-1, (weights.shape[-1], -1)) * share).sum(2)",
            ".unflatten(-1, (weights.shape[-1], -1))).sum(2)",
            SCORER,
        ),
        (
            "tower-scaled-twice",
            "(model.config.heads, -1)), 1.0, mask)",
            "(model.config.heads, -1)), kv.shape[-1] ** -0.5, mask)",
            SCORER,
        ),
    ),
    *of(
        "camenn_model/scoring/shortlist.py",
        ("draft-errs-once", "- 2 * self.slack)", "- self.slack)", SHORTLIST),
        (
            "best-without-slack",
            "least = audience.best[:, -1:] - self.slack",
            "least = audience.best[:, -1:]",
            SHORTLIST,
        ),
        ("slack-shrinks", "self.slack = max(self.slack, SAFETY * found)", "self.slack = SAFETY * found", SHORTLIST),
        ("believed-too-long", "if found > self.slack:", "if found > SAFETY * self.slack:", SHORTLIST),
        (
            "best-of-drafts",
            "torch.cat([audience.best, logits], dim=1)",
            "torch.cat([audience.best, draft], dim=1)",
            SHORTLIST,
        ),
        ("probed-at-the-top", "places[:: max(1, len(places) // PROBED_PAIRS)]", "places[:PROBED_PAIRS]", SHORTLIST),
        ("mean-error", "(logits - draft)[both].abs().max()", "(logits - draft)[both].abs().mean()", SHORTLIST),
        ("error-with-a-sign", "(logits - draft)[both].abs().max()", "(logits - draft)[both].max()", SHORTLIST),
        (
            "no-safety",
            "self.slack = SAFETY * error(compute(_evenly(drafted)))",
            "self.slack = error(compute(_evenly(drafted)))",
            SHORTLIST,
        ),
        ("draft-at-the-bound", "compute(drafted & (draft >= least))", "compute(drafted & (draft > least))", SHORTLIST),
    ),
    *of(
        "camenn_model/tensors.py",
        ("written-in-place", 'temporary = path.with_name(f"{path.name}.tmp")', "temporary = path", CHECKPOINT),
        ("checksum-not-compared", 'given.get("sha256") == _digest(tensors, metadata)', 'given.get("sha256")', DAMAGED),
    ),
    *of(
        "camenn_model/training/losses.py",
        ("share-of-pairs", ".float() / chosen.numel()", ".float() / len(chosen)", LOSSES),
        ("balance-of-noise", "chosen, _ = choose(gate.quiet, gate.chosen.shape[1])", "chosen = gate.chosen", LOSSES),
        ("square-of-the-mean", "logsumexp(dim=-1).square().mean()", "logsumexp(dim=-1).mean().square()", LOSSES),
        (
            "own-is-masked",
            "(group[:, None] == group[None, :]) & ~torch.eye(count, dtype=torch.bool, device=group.device)",
            "group[:, None] == group[None, :]",
            LOSSES,
        ),
        (
            "one-direction",
            "(F.cross_entropy(masked, own) + F.cross_entropy(masked.T, own)) / 2",
            "F.cross_entropy(masked, own)",
            LOSSES,
        ),
        (
            "smoothed-to-one",
            "labels * (1.0 - smoothing) + smoothing / 2",
            "labels * (1.0 - smoothing) + smoothing",
            LOSSES,
        ),
        ("alignment-twice", "half = config.alignment / 2", "half = config.alignment", LOSSES),
        ("variance-not-halved", "log_variances / 2).sum()", "log_variances).sum()", LOSSES),
        ("choice-turned", "F.softplus(-cvr.choice)", "F.softplus(cvr.choice)", LOSSES),
        ("ita-weighs-tia", "half * config.ita, half * config.tia", "half * config.tia, half * config.ita", LOSSES),
    ),
    *of(
        "camenn_model/training/trainer.py",
        ("average-begins-anew", '        self.ema.load_state_dict(part("ema."))\n', "", LATE_RESUME),
        ("best-is-forgotten", '        self.best = part("best.")\n', "", LATE_RESUME),
        (
            "due-at-once",
            "due = (state.examples // every + 1) * every\n        saved",
            "due = every\n        saved",
            LATE_RESUME,
        ),
        ("batch-goes-on", "                state.batch = 0\n", "", EPOCHS),
        (
            "one-dropout-for-all-steps",
            "self.options.seed * 1_000_003 + self.state.step + piece.number * PIECE_SEED",
            "self.options.seed * 1_000_003 + piece.number * PIECE_SEED",
            SEEDS,
        ),
        ("one-dropout-for-all-pieces", "piece.number * PIECE_SEED", "(piece.number << 40)", SEEDS),
        (
            "worse-adds-up",
            "state.best_loss, state.best_step, state.worse = loss, state.step, 0",
            "state.best_loss, state.best_step = loss, state.step",
            PATIENCE,
        ),
    ),
    *of(
        "pipelines/embed/encode.py",
        ("wanted-twice", "keep[1:] = keys[1:] != keys[:-1]", "pass", CONTENTS),
        ("not-sorted", 'wanted = kinds["wanted"].sort_by(column)', 'wanted = kinds["wanted"]', CONTENTS),
        ("stored-forgets-twice", "keep &= np.fromiter", "keep = np.fromiter", CONTENTS),
        ("failures-again", "keys = pa.chunked_array([*stored.chunks, *keys.chunks])", "keys = stored", CONTENTS),
        (
            "last-chunk-lost",
            "range(0, table.num_rows, CHUNK)",
            "range(0, table.num_rows // CHUNK * CHUNK, CHUNK)",
            CONTENTS,
        ),
        ("chunk-of-any-run", "chunk_name(self.run, piece", 'chunk_name("", piece', CONTENTS),
        (
            "rows-not-contents",
            'pc.count_distinct(kinds["wanted"][column]).as_py()',
            'kinds["wanted"].num_rows',
            CONTENTS,
        ),
        (
            "committed-not-reported",
            "        else:\n            yield from _report(self.contract, part)",
            "",
            CONTENTS,
        ),
        (
            "gone-photos-are-failures",
            "failures=encoded.defects,",
            "failures=(*encoded.defects, *encoded.unread),",
            CONTENTS,
        ),
        ("compiled-by-chunk", "self.spec.pays_to_compile(sum(due))", "self.spec.pays_to_compile(max(due))", CONTENTS),
    ),
    *of(
        "pipelines/features/as_of.py",
        ("listed-now", "np.where(listed_at < queries.time", "np.where(listed_at <= queries.time", LISTED),
        ("prior-without-weight", "np.float32(PRIOR_CVR * PRIOR_CLICKS)", "np.float32(PRIOR_CVR)", REFERENCE),
        (
            "known-since-first-click",
            "np.minimum(np.minimum(first_click, first_order), time)",
            "np.minimum(first_click, time)",
            REFERENCE,
        ),
        ("days-without-one", "days = 1 + (time - ", "days = 1e-9 + (time - ", REFERENCE),
        (
            "conversion-known-at-the-click",
            "conversions = TimeIndex(events.click_user[happened], events.converted_at[happened])",
            "conversions = TimeIndex(events.click_user[happened], events.clicked_at[happened])",
            FUTURE,
        ),
        (
            "store-of-nobody",
            "here = np.where(queries.store >= 0, _pair(queries.item, queries.store, n_stores), -1)",
            "here = _pair(queries.item, queries.store, n_stores)",
            NOWHERE,
        ),
        (
            "no-group-is-a-group",
            "key = np.where(group >= 0, _pair(user, group, n_groups), -1)",
            "key = _pair(user, group, n_groups)",
            REFERENCE,
        ),
        ("unknown-user-zero-days", 'np.nan if "days" in name else 0', "0", NOBODY),
        (
            "unknown-user-is-a-key",
            "known_user = queries.user >= 0",
            "known_user = queries.user >= -1",
            NOBODY,
        ),
        (
            "brand-by-subcategory",
            "events.ordered_at, items.brand)",
            "events.ordered_at, items.subcategory)",
            REFERENCE,
        ),
        (
            "orders-of-clicks",
            '"user_subcategory_orders": in_group(events.order_user, events.order_item, events.ordered_at,',
            '"user_subcategory_orders": in_group(events.click_user, events.click_item, events.clicked_at,',
            REFERENCE,
        ),
        ("weekday-from-sunday", "local.hour, local.weekday", "local.hour, (local.weekday + 1) % 7", REFERENCE),
    ),
    *of(
        "pipelines/features/attribution.py",
        ("window-exclusive", "click_time[credited[some]] <= window", "click_time[credited[some]] < window", REFERENCE),
        (
            "order-at-the-click",
            "index.bounds(order_pair, order_time, inclusive=True)",
            "index.bounds(order_pair, order_time)",
            REFERENCE,
        ),
        (
            "first-click",
            "credited[some] = index.order[end[some] - 1]",
            "credited[some] = index.order[start[some]]",
            REFERENCE,
        ),
        (
            "last-order",
            "np.minimum.at(first, credited[some], order_time[some])",
            "first[credited[some]] = order_time[some]",
            REFERENCE,
        ),
    ),
    *of(
        "pipelines/features/history.py",
        (
            "history-looks-back-too-little",
            "np.arange(1, 2 * length + 1)",
            "np.arange(1, length + 1)",
            HISTORY,
        ),
        (
            "history-knows-later-orders",
            "(log.converted[event] >= time[:, None])",
            "(log.converted[event] == NEVER)",
            HISTORY,
        ),
        ("history-ties-by-falling-item", "np.lexsort((-item[event], kind", "np.lexsort((item[event], kind", TIES),
        (
            "history-ties-clicks-first",
            "kind[event], index.combined[tied])",
            "-kind[event], index.combined[tied])",
            TIES,
        ),
        ("history-quarter-rounded-up", "length // CLICKS_OF_HISTORY", "-(-length // CLICKS_OF_HISTORY)", HISTORY),
        (
            "history-young-clicks-yield",
            "clicked[:, ::-1].cumsum(axis=1)[:, ::-1]",
            "clicked.cumsum(axis=1)",
            HISTORY,
        ),
        (
            "history-purchases-listed-again",
            "position = (last - listed - 1)[:, None] - number",
            "position = (last - 1)[:, None] - number",
            HISTORY,
        ),
    ),
    *of(
        "pipelines/features/time_index.py",
        (
            "no-upper-clamp",
            "np.clip(time - self.low + inclusive, 0, self.span - 1)",
            "np.maximum(time - self.low + inclusive, 0)",
            INDEX,
        ),
        ("last-is-the-next", "self.time[end[some] - 1]", "self.time[np.minimum(end[some], len(self.time) - 1)]", INDEX),
        ("sparse-key-not-compared", "there[there] = self.keys[code[there]] == key[there]", "pass", INDEX),
        ("key-below-the-first", "there = (code >= 0) & (code < width)", "there = code < width", INDEX),
        ("weights-as-they-came", "np.cumsum(weight[self.order])", "np.cumsum(weight)", INDEX),
        (
            "unstable-by-time",
            'np.argsort(time, kind="stable")\n    rest',
            "np.argsort(time)\n    rest",
            ORDER,
        ),
        (
            "one-pass-too-few",
            "range(16, max(width - 1, 1).bit_length(), 16)",
            "range(16, max(width - 1, 1).bit_length() - 1, 16)",
            ORDER,
        ),
    ),
    *of(
        "pipelines/runs/accounting.py",
        ("rows-from-nowhere", 'if row.get("in", 0) != sum(', 'if row.get("in", 0) > sum(', PUBLISHED),
        (
            "reject-rate-reached",
            "if total and rejected / total > limit:",
            "if total and rejected / total >= limit:",
            PUBLISHED,
        ),
    ),
    *of(
        "pipelines/runs/garbage.py",
        ("by-one-clock", "_file_system_now(root), newest)", "_file_system_now(root))", GARBAGE),
        ("by-the-files-alone", "min(now.timestamp(), _file_system_now(root), newest)", "newest", GARBAGE),
        ("young-too", " - YOUNG.total_seconds()", "", GARBAGE),
        ("first-runs-kept", "recent = list(at)[-keep:]", "recent = list(at)[:keep]", GARBAGE),
        ("any-run", " and proven.run(run)", "", GARBAGE),
        ("any-generation", " and proven.generation(files.join(folder, generation))", "", GARBAGE),
        ("reached-too", " and not vouched & reached", "", GARBAGE),
        (
            "proof-first",
            'return file.path.endswith((".json", f"/{files.OWN}")), file.path',
            "return False, file.path",
            GARBAGE,
        ),
        ("readers-not-asked", ", files.no_readers(root):", ":", GARBAGE),
    ),
    *of(
        "pipelines/io/lease.py",
        ("never-free", "> found.seconds + _ROUNDING", "> found.seconds + 1e9", LEASE),
        ("free-at-once", "> found.seconds + _ROUNDING", "> 0", LEASE),
        ("gone-by-number-alone", 'return _started(pid) != process.get("started")', "return False", LEASE),
        ("not-verified", "        lease.verify()\n", "", LEASE),
        ("theirs-released", "found.holder != self._holder:", "False:", LEASE),
        ("young-forever", "            limit = RENEW\n", "            limit = TTL\n", LEASE),
    ),
    *of(
        "pipelines/runs/manifest.py",
        (
            "files-not-synced",
            "    files.sync_tree(root, _new_files(root, manifest))\n",
            "",
            ("tests/pipelines/runs/test_kill_points.py::test_what_is_published_is_synced_before_it_is_seen",),
        ),
        ("request-of-any-version", '"camenn": versions()["camenn"], ', "", PUBLISHED),
    ),
    *of(
        "pipelines/runs/publication.py",
        (
            "rolled-back-by-one",
            'while stack and stack[-1] != entry["run"]:',
            'if stack and stack[-1] != entry["run"]:',
            PUBLICATION,
        ),
        ("cut-off-counts", "while stack and stack[-1] != run:", "while stack and run not in stack:", PUBLICATION),
        (
            "nights-newest-first",
            "read_run(root, run) for run in reversed(there)]",
            "read_run(root, run) for run in there]",
            PUBLICATION,
        ),
        (
            "oldest-nights",
            "dict.fromkeys(reversed(effective_runs(publications(root), latest.run)))",
            "dict.fromkeys(effective_runs(publications(root), latest.run))",
            PUBLICATION,
        ),
        ("gates-that-passed", 'if not gate["passed"]]', 'if gate["passed"]]', PUBLICATION),
        ("published-again", "changed = before != run", "changed = True", PUBLICATION),
        (
            "latest-first",
            """    try:
        files.create_document(record, entry)
""",
            """    try:
        files.write_document(
            files.join(root, LATEST),
            {"run": manifest.run, "stage": manifest.stage, "manifest": f"{RUNS}/{manifest.run}/{MANIFEST}"},
            durable=True,
        )
        files.create_document(record, entry)
""",
            PUBLISHED,
        ),
        (
            "number-by-count",
            "max((number for number, _ in published_files(root)), default=0)",
            "len(published_files(root))",
            PUBLISHED,
        ),
        ("record-replaced", "files.create_document(record, entry)", "files.write_document(record, entry)", WRITERS),
        ("backwards", 'if shown > pointer["number"]:', "if False:", WRITERS),
        ("same-bytes", 'pointer | {"number": number}', "pointer", WRITERS),
        ("not-checked", "    if writer is not None:\n        writer.check()\n", "", WRITERS),
        ("first-publications", "entries[-last if last else None :]", "entries[:last]", PUBLICATION),
    ),
    *of(
        "pipelines/runs/readers_path.py",
        (
            "path-stays",
            "if run == (manifest.run if paths else None):",
            "if run or not paths:",
            READERS,
        ),
        (
            "repeated-attempt-stays",
            "if found.path not in listed and _OURS.fullmatch",
            "if found.path in listed and _OURS.fullmatch",
            READERS,
        ),
        ("others-files-go", "if foreign or not os.path.isdir(path):", "if not os.path.isdir(path):", READERS),
        ("absolute-link", 'os.symlink(f"../{RUNS}/', 'os.symlink(f"{root}/{RUNS}/', READERS),
    ),
    *of(
        "pipelines/runs/context.py",
        ("cut-off-path-stays", "readers_path.update_or_warn(request.out, latest)", "pass", READERS),
    ),
    *of(
        "pipelines/runs/store.py",
        (
            "marker-first",
            "[path for part, keys, _ in some for path in (part, keys)]",
            "[marker for _, _, marker in some]",
            REPLACED,
        ),
        ("listed-parts-go", "for part in old if part.path not in kept]", "for part in old]", REPLACED),
        ("replaced-come-back", "names += [name for name in older if name in there]", "pass", REPLACED),
        ("kernels-not-sorted", "(part.kernels, part.bytes, part.path)", "(part.bytes, part.path)", PLANNED),
        (
            "merged-at-the-limit",
            "if len(small) <= (SMALL_PARTS if leave is None else leave):",
            "if len(small) < (SMALL_PARTS if leave is None else leave):",
            PLANNED,
        ),
        (
            "failures-of-the-first",
            "tuple(sorted({failure for part in group for failure in part.failures}))",
            "group[0].failures",
            MERGED,
        ),
    ),
    *of(
        "pipelines/score/gates.py",
        ("coverage-exclusive", "share >= LEAST_COVERAGE", "share > LEAST_COVERAGE", GATES),
        ("mean-may-fall", "abs(change) <= MOST_MEAN_CHANGE", "change <= MOST_MEAN_CHANGE", GATES),
        ("first-nights", "before = before[-NIGHTS:]", "before = before[:NIGHTS]", GATES),
        ("mean-of-nights", "statistics.median(night.mean_cvr", "statistics.fmean(night.mean_cvr", GATES),
        ("any-model", "for night in before if night.model == now.model]", "for night in before]", GATES),
        ("mean-distribution", "expected = np.median(shares, axis=0)", "expected = np.mean(shares, axis=0)", GATES),
    ),
    *of(
        "pipelines/score/snapshot.py",
        ("order-of-this-moment", "item_ids, time - 1, outcomes[1])", "item_ids, time, outcomes[1])", BOOKS + SCORED),
        ("click-of-this-moment", "item_ids, time - 1, outcomes[0])", "item_ids, time, outcomes[0])", ACTIVE + BOOKS),
        (
            "activity-exclusive",
            "recent = events.clicked_at >= log.time - ACTIVE_DAYS * DAY_US",
            "recent = events.clicked_at > log.time - ACTIVE_DAYS * DAY_US",
            ACTIVE,
        ),
        (
            "active-exclusive",
            'log.last_seen["at"] >= log.time - ACTIVE_DAYS * DAY_US',
            'log.last_seen["at"] > log.time - ACTIVE_DAYS * DAY_US',
            ACTIVE,
        ),
        ("orders-of-old-clicks", "bought = recent & (", "bought = (", ACTIVE),
        ("first-seen", 'drop_duplicates("user", keep="last")', 'drop_duplicates("user", keep="first")', ACTIVE),
        ("last-store", '["at", "user", "store"]', '["store", "at", "user"]', ACTIVE),
        ("never-is-now", 'np.nan if "days_since" in name else 0.0', "0.0", STRANGERS),
        ("unknown-brand-is-the-last", " & (right[None, :] >= 0)", "", SCORED),
        ("empty-is-found", "(self.key[place] == asked)", "(self.key[place] >= asked)", SCORED),
        ("rejects-not-counted", "    rejects.append(log.rejects)\n", "", BOOKS),
        ("first-listings", "self.items[name][rows][None, :]", "self.items[name][: len(rows)][None, :]", SOME_ROWS),
    ),
    *of(
        "pipelines/score/tiles.py",
        (
            "ties-by-falling-item",
            "order = np.lexsort((np.broadcast_to(items, cvr.shape), -cvr), axis=1)",
            "order = np.lexsort((-np.broadcast_to(items, cvr.shape), -cvr), axis=1)",
            TILES,
        ),
        ("worst-of", "(np.broadcast_to(items, cvr.shape), -cvr)", "(np.broadcast_to(items, cvr.shape), cvr)", TILES),
        (
            "others-first",
            "np.argsort(~np.take_along_axis(allowed, order",
            "np.argsort(np.take_along_axis(allowed, order",
            TILES,
        ),
        (
            "others-too",
            "bool) if allowed is None else np.take_along_axis(allowed, order, axis=1)",
            "bool)",
            TILES,
        ),
        (
            "chunk-ties-by-falling-item",
            "np.lexsort((item, -cvr, audience))",
            "np.lexsort((-item, -cvr, audience))",
            TILES,
        ),
        ("rank-from-zero", "np.arange(len(audience)) - first + 1", "np.arange(len(audience)) - first", TILES),
        ("one-too-few", "keep = rank <= self.top_k", "keep = rank < self.top_k", TILES),
        (
            "states-of-another-chunk",
            "if self.latest is None or self.latest[0] != tile.chunk:",
            "if self.latest is None:",
            TILES,
        ),
        (
            "candidates-of-the-first-chunk",
            "wanted = np.arange(first, last)[:, None]",
            "wanted = np.arange(last - first)[:, None]",
            TILES,
        ),
        (
            "rows-of-the-first-chunk",
            "best_of(cvr, np.arange(first, last), rows",
            "best_of(cvr, np.arange(last - first), rows",
            TILES,
        ),
        ("not-calibrated", "self.package.calibration(logits)", "1 / (1 + np.exp(-logits))", TILES),
        (
            "pairs-before-items",
            'return [*NUMERIC_GROUPS["item_counts"], *NUMERIC_GROUPS["pair_counts"]]',
            'return [*NUMERIC_GROUPS["pair_counts"], *NUMERIC_GROUPS["item_counts"]]',
            TILES,
        ),
    ),
    *of(
        "pipelines/shards/examples.py",
        ("open-window-exclusive", "(clicked_at + window <= as_of)", "(clicked_at + window < as_of)", REFERENCE),
        ("label-of-the-first-click", "closed.assign(label=bought[same].astype(np.int8))", "closed", REFERENCE),
        (
            "final-day-by-click",
            '(clicks["session_start"] >= frozen_before)',
            '(clicks["clicked_at"] >= frozen_before)',
            EARLY,
        ),
        ("summed-too-far", "early = time < frozen_before", "early = time <= frozen_before", EARLY),
        (
            "summed-without-weight",
            "np.bincount(code, minlength=len(pairs)), np.ones",
            "np.ones(len(pairs), dtype=np.int64), np.ones",
            EARLY,
        ),
        (
            "summed-at-the-first-order",
            "(np.minimum if kind == CLICK_EVENT else np.maximum).at(moment, code, time[early])",
            "moment[:] = NEVER\n    np.minimum.at(moment, code, time[early])",
            EARLY,
        ),
        (
            "conversion-known-at-the-click",
            "click_item[happened], click_store[happened], converted_at[happened])",
            "click_item[happened], click_store[happened], clicked_at[happened])",
            FUTURE,
        ),
        ("counts-as-they-came", "counts[name].take(place)", "counts[name]", BUCKETS),
        ("zone-not-given", "timezones.get(name, timezone)", 'timezones.get(name, "UTC")', REFERENCE),
    ),
    *of(
        "pipelines/shards/final_days.py",
        ("not-whole-days", "(before - late) // DAY_US * DAY_US", "before - late", FINAL),
        ("final-inclusive", "if start_of(date) < frozen_before:", "if start_of(date) <= frozen_before:", FINAL),
        ("final-as-of-tonight", "(before - late) // DAY_US", "(as_of - late) // DAY_US", FINAL),
        ("late-forgotten", "(before - late) // DAY_US", "before // DAY_US", FINAL),
        (
            "labels-stay",
            'stay = stay.set_column(label, rows.schema.field("label"), rows["label"].filter(pa.array(known)))',
            "",
            OPEN_DAYS,
        ),
        ("sample-of-the-first-day", "kept.samples.keys()) - {first})", "kept.samples.keys()))", SAME_LOG),
        ("sample-beyond-its-end", "[value for value in known if value <= end]", "list(known)", SAME_LOG),
        ("sample-all-gone", "missing > len(expected) / 2", "missing >= len(expected)", SAME_LOG),
        ("sample-of-repeats", "if len(least) >= count:", "if len(least):", SAMPLES),
        (
            "sample-not-least",
            "np.unique(np.concatenate([found.get(value, numbers[:0]), numbers]))[:SAMPLE_SIZE]",
            "numbers[:SAMPLE_SIZE]",
            SAMPLES,
        ),
        ("delisted-for-ever", '.filter(pc.is_in(gone["item_id"], wanted))', "", DELISTED),
    ),
    *of(
        "pipelines/shards/log_cache.py",
        ("hash-without-types", 'f"{types};{group.num_rows}"', 'f"{group.num_rows}"', GROUPS),
        ("hash-without-dictionary", "start = min(start, chunk.dictionary_page_offset)", "pass", GROUPS),
        ("alike-are-one", 'again = f"{name}-{seen[name]}" if seen[name] > 1 else name', "again = name", GROUPS),
        (
            "rejected-rows-are-known",
            "if key in before and there.get(before[key].number, 0) == group.rows:",
            "if key in before:",
            PLANS,
        ),
        (
            "only-forgotten-drop",
            "any(not part.slices.keys() <= self.known for part in self.parts)",
            "bool(self.forgotten)",
            PLANS,
        ),
        ("last-day-not-sampled", "for day in range(start, end + 1)}", "for day in range(start, end)}", PLANS),
        ("days-that-touch", "if any(first <= end and last >= start", "if any(first < end and last > start", PLANS),
        (
            "numbers-come-again",
            'following: int = earlier["tables"][name]["next"] if earlier else 0',
            "following: int = len(before)",
            PLANS,
        ),
        ("dropped-rows-count", "drop_stale_rows(kept, self.known) if self.dropped else kept", "kept", PLANS),
        ("merged-late", "if number >= MERGE", "if number > MERGE", PLANS),
        ("only-new-rows-are-merged", "if bucket in self.merged:", "if bucket in self.merged and fresh is None:", PLANS),
        (
            "merged-files-stay",
            "for part in plan.parts if part.bucket not in plan.merged]",
            "for part in plan.parts]",
            PLANS,
        ),
        (
            "parts-not-checked",
            "check_records(latest.records(kept_table(contract)), ",
            "check_records([], ",
            CUT_PARTS,
        ),
    ),
    *of(
        "pipelines/shards/pipeline.py",
        (
            "pieces-numbered-on",
            'np.searchsorted(day_cuts, start, side="right") - before}',
            'np.searchsorted(day_cuts, start, side="right")}',
            FILES_OF_DAYS,
        ),
    ),
    *of(
        "pipelines/shards/splits.py",
        ("part-begins-late", 'session_start, side="right")', 'session_start, side="left")', PARTS),
        ("no-first-gap", "gap=early_stop - window,", "gap=early_stop,", SPLIT),
        ("no-second-gap", "second_gap = test - window", "second_gap = test", SPLIT),
        (
            "early-stop-is-calibration",
            "at(share - CALIBRATION_SHARE - EARLY_STOP_SHARE)",
            "at(share - EARLY_STOP_SHARE)",
            PARTS,
        ),
        (
            "share-of-all-clicks",
            "calibration = at(share - CALIBRATION_SHARE)",
            "calibration = at(1 - test_share - CALIBRATION_SHARE)",
            PARTS,
        ),
    ),
)
