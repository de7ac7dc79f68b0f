"""Breaks the product on purpose, one line at a time, and looks whether a test notices.

    python tools/mutants.py --list
    python tools/mutants.py                       # all of them; --only NAME ... for some

Each mutant is tried in a copy of the repository, in which the tests that should notice it are run: first as it is, when they
must pass, and then with the mutant, when one must fail. Exits with 1 if a mutant survives, or could not be tried.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fault_injector import ROOT, Started, environment

TIMEOUT_SECONDS = 600.0
FAILED = 1  # exit code of pytest


@dataclass(frozen=True)
class Mutant:
    """One breakage."""

    name: str
    what: str
    """what is wrong then"""
    file: str
    old: str
    """is in the file once"""
    new: str
    tests: tuple[str, ...]
    """pytest arguments: files or node ids"""


def mutant(name: str, what: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    """With tests named without their folder."""
    return Mutant(name, what, file, old, new, tuple(f"tests/{test}" for test in tests))


MUTANTS = (
    mutant(
        "warmup-one-step-late",
        "the warm-up starts with a learning rate of 0",
        "trainer/optimisation/schedule.py",
        "return peak * step / warmup_steps",
        "return peak * (step - 1) / warmup_steps",
        "test_schedule.py",
    ),
    mutant(
        "cosine-over-the-warmup",
        "the cosine begins with the warm-up instead of behind it",
        "trainer/optimisation/schedule.py",
        "progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))",
        "progress = min(1.0, step / total_steps)",
        "test_schedule.py",
    ),
    mutant(
        "ramp-one-step-early",
        "the ramp counts the step itself as done",
        "trainer/optimisation/schedule.py",
        "done = min(step - 1, total_steps)",
        "done = min(step, total_steps)",
        "test_schedule.py",
    ),
    mutant(
        "one-cycle-ends-high",
        "one cycle ends where it began",
        "trainer/optimisation/schedule.py",
        "last = first / half",
        "last = first",
        "test_schedule.py",
    ),
    mutant(
        "warmup-cut-to-a-fifth",
        "an untyped warm-up is cut to a fifth of the run",
        "trainer/optimisation/schedule.py",
        "limit = max(1, total_steps // 10)",
        "limit = max(1, total_steps // 5)",
        "test_schedule.py",
    ),
    mutant(
        "same-order-each-epoch",
        "every epoch has the same order",
        "trainer/data/stream.py",
        'hash32("order", seed, epoch)',
        'hash32("order", seed)',
        "test_batches.py",
    ),
    mutant(
        "ranks-read-the-same",
        "every rank reads the samples of rank 0",
        "trainer/data/stream.py",
        "self.first_micro_batch * self.batch_size + self.rank * self.part",
        "self.first_micro_batch * self.batch_size",
        "test_batches.py",
    ),
    mutant(
        "resumed-elsewhere",
        "a resumed stream goes on elsewhere on several processes",
        "trainer/data/stream.py",
        "start = self.first_micro_batch * self.batch_size +",
        "start = self.first_micro_batch * self.part +",
        "test_batches.py",
    ),
    mutant(
        "numbers-without-epoch",
        "sample numbers do not tell the epoch: augmentation repeats",
        "trainer/data/stream.py",
        "[p - p % length + int(",
        "[int(",
        "test_batches.py",
    ),
    mutant(
        "evaluation-drops-the-rest",
        "evaluation leaves out what fills no whole batch",
        "trainer/data/stream.py",
        "starts = range(0, length, part * processes)",
        "starts = range(0, length - part * processes + 1, part * processes)",
        "test_batches.py",
    ),
    mutant(
        "hash-without-borders",
        "the parts of a hash run into each other",
        "trainer/data/seeding.py",
        '",".join(map(str, parts))',
        '"".join(map(str, parts))',
        "test_batches.py",
    ),
    mutant(
        "evaluation-counts-twice",
        "the spare sample of a rank without samples counts",
        "trainer/evaluation/exact.py",
        "counted = pair if own_samples else torch.zeros_like(pair)",
        "counted = pair",
        "test_evaluation_in_one_process.py",
    ),
    mutant(
        "evaluation-with-dropout",
        "evaluation runs in training mode",
        "trainer/evaluation/exact.py",
        "    model.eval()\n",
        "",
        "test_evaluation_in_one_process.py",
    ),
    mutant(
        "training-without-dropout",
        "the mode is not restored after an evaluation",
        "trainer/evaluation/exact.py",
        "        model.train(was_training)\n",
        "",
        "test_evaluation_in_one_process.py",
    ),
    mutant(
        "mean-over-another-count",
        "every measure is divided by the count of the first",
        "trainer/evaluation/exact.py",
        "max(sums[2 * i + 1], 1.0)",
        "max(sums[1], 1.0)",
        "test_evaluation_in_one_process.py",
    ),
    mutant(
        "evaluation-loss-unweighted",
        "the loss of an evaluation ignores the weights of its terms",
        "trainer/evaluation/objective.py",
        "sum(loss_weights[t] * means[t] for t in terms)",
        "sum(means[t] for t in terms)",
        "test_evaluation_in_one_process.py",
    ),
    mutant(
        "hash-not-checked",
        "a flipped bit in a checkpoint goes unnoticed",
        "trainer/checkpoints/checkpoint.py",
        'if actual != recorded["sha256"]:',
        "if False:",
        "test_checkpoint.py::test_a_damaged_checkpoint_is_passed_over_with_a_message",
    ),
    mutant(
        "manifest-may-point-elsewhere",
        "a manifest may name files outside its folder",
        "trainer/checkpoints/checkpoint.py",
        "if Path(name).name != name:",
        "if False:",
        "test_checkpoint.py::test_a_manifest_that_points_elsewhere_is_refused",
    ),
    mutant(
        "index-may-point-elsewhere",
        "an index may name files that are not in the manifest",
        "trainer/checkpoints/checkpoint.py",
        "if stray:",
        "if False:",
        "test_checkpoint.py::test_an_index_that_points_elsewhere_is_refused",
    ),
    mutant(
        "newer-format-is-read",
        "a checkpoint of a newer format is read",
        "trainer/checkpoints/checkpoint.py",
        "if version != FORMAT:",
        "if version not in (FORMAT, FORMAT + 1):",
        "test_checkpoint.py::test_another_format_is_refused_with_both_versions",
    ),
    mutant(
        "an-empty-shard",
        "a tensor larger than a shard leaves an empty one",
        "trainer/checkpoints/checkpoint.py",
        "if shards[-1] and size + entry.size_bytes > limit:",
        "if size + entry.size_bytes > limit:",
        "test_on_disk.py",
    ),
    mutant(
        "no-fsync-of-texts",
        "text files of a checkpoint are not brought to the disk",
        "trainer/checkpoints/checkpoint.py",
        "        os.fsync(file.fileno())\n",
        "",
        "test_on_disk.py",
    ),
    mutant(
        "no-fsync-of-the-folder",
        "the names in a checkpoint are not brought to the disk before it counts",
        "trainer/checkpoints/checkpoint.py",
        "    fsync_directory(temporary)\n",
        "",
        "test_on_disk.py",
    ),
    mutant(
        "no-fsync-of-the-name",
        "the name of a checkpoint is not brought to the disk",
        "trainer/checkpoints/checkpoint.py",
        "    fsync_directory(final.parent)\n",
        "",
        "test_on_disk.py",
    ),
    mutant(
        "oldest-first",
        "a resumed run takes its oldest checkpoint",
        "trainer/checkpoints/retention.py",
        "return sorted(folders, reverse=True)",
        "return sorted(folders)",
        "test_checkpoint.py",
    ),
    mutant(
        "links-are-checkpoints",
        "a link that is named like a step checkpoint is one",
        "trainer/checkpoints/retention.py",
        "if match and path.is_dir() and not path.is_symlink():",
        "if match and path.is_dir():",
        "test_checkpoint.py::test_links_and_other_names_are_no_step_checkpoints",
    ),
    mutant(
        "best-model-is-pruned",
        "what a link points to is deleted",
        "trainer/checkpoints/retention.py",
        "kept = {*links(folder).values(), *(",
        "kept = {*(",
        "test_checkpoint.py",
        "test_retention.py::test_what_is_kept",
    ),
    mutant(
        "best-ones-push-out",
        "checkpoints saved for a new best push the regular ones out",
        "trainer/checkpoints/retention.py",
        "[path for path in folders if not _only_best(path)] if older else []",
        "list(folders)",
        "test_retention.py::test_what_is_kept",
    ),
    mutant(
        "rolls-back-one-too-many",
        "a roll-back sets aside the checkpoint it goes back to",
        "trainer/checkpoints/retention.py",
        "if at > step]",
        "if at >= step]",
        "test_checkpoint.py::test_roll_back_sets_later_checkpoints_aside",
    ),
    mutant(
        "no-fsync-of-links",
        "a link is not brought to the disk",
        "trainer/checkpoints/retention.py",
        "    os.replace(temporary, folder / name)\n    fsync_directory(folder)\n",
        "    os.replace(temporary, folder / name)\n",
        "test_on_disk.py",
    ),
    mutant(
        "tensors-not-aligned",
        "tensors start anywhere in a file",
        "trainer/checkpoints/tensor_file.py",
        "key=lambda entry: -entry.dtype.itemsize",
        "key=lambda entry: 0",
        "test_tensor_file.py",
    ),
    mutant(
        "no-fsync-of-tensors",
        "tensors are not brought to the disk",
        "trainer/checkpoints/tensor_file.py",
        "        os.fsync(self._file.fileno())\n",
        "",
        "test_on_disk.py",
    ),
    mutant(
        "hash-of-the-first-bytes",
        "the hash of a tensor file covers the beginning of each tensor alone",
        "trainer/checkpoints/tensor_file.py",
        "self._hash.update(content)",
        "self._hash.update(content[:8])",
        "test_checkpoint.py::test_what_is_written_is_read",
    ),
    mutant(
        "half-a-write",
        "what a write did not take is left out",
        "trainer/checkpoints/tensor_file.py",
        "        while content:  #",
        "        if content:  #",
        "test_tensor_file.py",
    ),
    mutant(
        "scale-grows-late",
        "the loss scale grows a step late",
        "trainer/optimisation/finite.py",
        "grow = clean >= self.GROWTH_INTERVAL",
        "grow = clean > self.GROWTH_INTERVAL",
        "test_backends.py::test_the_scale_halves_at_an_overflow_and_doubles_after_clean_steps",
    ),
    mutant(
        "bad-steps-add-up",
        "bad steps need not be in a row to end a run",
        "trainer/optimisation/finite.py",
        "if is_bad else (0, self.last_step)",
        "if is_bad else (self.in_a_row, self.last_step)",
        "test_backends.py::test_bad_steps_are_counted_one_step_late",
    ),
    mutant(
        "decay-on-norms",
        "norms and biases decay",
        "trainer/optimisation/optimizers.py",
        'if p.ndim < dimensions], "weight_decay": 0.0}',
        'if p.ndim < dimensions], "weight_decay": weight_decay}',
        "test_gpt2_model.py::test_no_weight_decay_on_biases_and_norms",
    ),
    mutant(
        "gpt2-learns-to-copy",
        "labels are not shifted",
        "recipes/data/token_samples.py",
        "np.where(real, window[:, 1:], IGNORED)",
        "np.where(real, window[:, :-1], IGNORED)",
        "test_loss_references.py::test_gpt2",
    ),
    mutant(
        "gpt2-learns-padding",
        "padding is a label",
        "recipes/data/token_samples.py",
        "np.where(real, window[:, 1:], IGNORED)",
        "np.where(real, window[:, 1:], pad)",
        "test_loss_references.py::test_gpt2",
    ),
    mutant(
        "overlaps-count-twice",
        "the overlap of two blocks is predicted twice",
        "recipes/data/token_samples.py",
        '        batch["labels"][blocks > 0, : self.max_length - self.stride] = IGNORED\n',
        "",
        "test_gpt2_commands.py::test_a_smaller_stride_gives_every_token_more_context",
    ),
    mutant(
        "stories-learn-padding",
        "what fills up the last window is a label",
        "recipes/data/token_windows.py",
        "tokens[row, real:] = IGNORED",
        "tokens[row, real:] = 0",
        "test_loss_references.py::test_tinystories",
    ),
    mutant(
        "last-start-is-never-drawn",
        "no window starts at the last place",
        "recipes/data/token_windows.py",
        "np.uint64(self.file.count - self.length))",
        "np.uint64(self.file.count - self.length - 1))",
        "test_token_windows.py::test_every_start_is_equally_likely_and_independent_of_the_last",
    ),
    mutant(
        "windows-overlap",
        "evaluation windows overlap by one id",
        "recipes/data/token_windows.py",
        "* self.stride % self.windows * self.length",
        "* self.stride % self.windows * (self.length - 1)",
        "test_token_windows.py::test_windows_predict_every_id_but_the_first_exactly_once",
    ),
    mutant(
        "label-of-the-fainter",
        "the label of a mixed image is that of the fainter one",
        "recipes/data/image_batches.py",
        "label if weight >= 0.5 else other_label",
        "other_label if weight >= 0.5 else label",
        "test_image_batches.py::test_mixing_takes_another_item_with_the_weight_of_its_label",
    ),
    mutant(
        "smoothing-over-the-others",
        "smoothed targets do not sum to 1",
        "recipes/data/image_batches.py",
        "a.label_smoothing / self.classes",
        "a.label_smoothing / (self.classes - 1)",
        "test_loss_references.py::test_vit",
    ),
    mutant(
        "flips-most",
        "three images of four are mirrored",
        "recipes/data/image_batches.py",
        "random.rand() < 0.5",
        "random.rand() < 0.75",
        "test_image_batches.py::test_flipping_mirrors_half_of_them",
    ),
    mutant(
        "noise-of-another-size",
        "the noise of a task has its variance as standard deviation",
        "recipes/data/regression.py",
        "self.noise_std = math.sqrt(noise)",
        "self.noise_std = noise",
        "test_regression.py",
    ),
    mutant(
        "held-out-numbers-are-trained-on",
        "training meets held-out numbers",
        "recipes/data/collatz.py",
        "while attempt == _0 or _is_held_out(words[row, 0], words[row, 1], words[row, 2]):",
        "while attempt == _0:",
        "test_collatz_data.py::test_training_never_meets_a_held_out_number_and_evaluation_only_those",
    ),
    mutant(
        "the-prefix-shows-the-answer",
        "numbers that end with the prefix are scored",
        "recipes/data/collatz.py",
        "return steps > (0 if",
        "return steps >= (0 if",
        "test_loss_references.py::test_collatz",
        "test_collatz_data.py",
    ),
    mutant(
        "damaged-cache-is-read",
        "a damaged file of the cache is used",
        "recipes/data/cache.py",
        "            intact &= all(_file_hash(self.folder / name) == expected for name, expected in files.items())\n",
        "",
        "test_text.py::test_second_call_reads_the_cache_and_damage_is_repaired",
    ),
    mutant(
        "added-tokens-are-cut-up",
        "a special token in a text is cut into words",
        "recipes/data/encoding.py",
        "if not self.by_words or any(token in text for token in self.added):",
        "if not self.by_words:",
        "test_encoding.py",
    ),
    mutant(
        "loss-in-bf16",
        "the loss is summed in the type of the logits",
        "recipes/gpt2_wikitext.py",
        ".logits.flatten(0, 1).float()",
        ".logits.flatten(0, 1)",
        "test_gpt2_model.py::test_the_loss_is_summed_in_fp32_whatever_the_logits_are",
    ),
    mutant(
        "bins-closed-above",
        "a y on an edge belongs to the bin below",
        "recipes/models/pfn.py",
        "torch.bucketize(y, self.edges, right=True)",
        "torch.bucketize(y, self.edges, right=False)",
        "test_loss_references.py::test_pfn",
    ),
    mutant(
        "query-knows-its-y",
        "a query sees its own y",
        "recipes/models/pfn.py",
        "torch.stack([torch.zeros_like(y), y], -1)",
        "torch.stack([y, y], -1)",
        "test_loss_references.py::test_pfn",
    ),
    mutant(
        "queries-see-queries",
        "tokens look at queries instead of examples",
        "recipes/models/pfn.py",
        "& (tokens % 2 == 1)",
        "& (tokens % 2 == 0)",
        "test_pfn_model.py",
    ),
    mutant(
        "collatz-learns-to-copy",
        "parities are not shifted",
        "recipes/collatz.py",
        'batch["tokens"][:, 1:].long(), ignore_index',
        'batch["tokens"][:, :-1].long(), ignore_index',
        "test_loss_references.py::test_collatz",
    ),
    mutant(
        "collatz-learns-padding",
        "padding is predicted",
        "recipes/collatz.py",
        ".long(), ignore_index=PADDING,",
        ".long(),",
        "test_loss_references.py::test_collatz",
    ),
    mutant(
        "unscored-times-count",
        "numbers whose prefix shows the answer are scored",
        "recipes/collatz.py",
        '.log1p(), reduction="none") * batch["scored"]',
        '.log1p(), reduction="none")',
        "test_loss_references.py::test_collatz",
    ),
    mutant(
        "rotation-is-a-reflection",
        "pairs are reflected instead of turned",
        "recipes/models/transformer_lm.py",
        "even * cos - odd * sin",
        "even * cos + odd * sin",
        "test_transformer_lm.py",
    ),
    mutant(
        "nucleus-one-too-many",
        "the nucleus holds a token that is not needed",
        "recipes/models/transformer_lm.py",
        "ordered * (before < top_p)",
        "ordered * (before <= top_p)",
        "test_transformer_lm.py",
    ),
    mutant(
        "stories-without-a-limit",
        "generation sees more than the context",
        "recipes/models/transformer_lm.py",
        "network(tokens[None, -network.context_length :])",
        "network(tokens[None])",
        "test_transformer_lm.py",
    ),
    mutant(
        "embeddings-decay",
        "embeddings decay",
        "recipes/tinystories_lm.py",
        "(p.ndim >= 2 and p is not embedding)",
        "p.ndim >= 2",
        "test_transformer_lm.py",
    ),
    mutant(
        "bias-of-another-offset",
        "the bias mixes up offsets in windows that are no squares",
        "recipes/models/relative_position_bias.py",
        "(dh + height - 1) * (2 * width - 1)",
        "(dh + height - 1) * (2 * height - 1)",
        "test_vit_model.py",
    ),
    mutant(
        "class-token-rows-swapped",
        "class to patch and patch to class have each other's bias",
        "recipes/models/relative_position_bias.py",
        "offsets, offsets + 1, offsets + 2",
        "offsets + 1, offsets, offsets + 2",
        "test_vit_model.py",
    ),
    mutant(
        "attention-drops-in-evaluation",
        "dropout of attention weights acts in evaluation too",
        "recipes/models/vit.py",
        "dropout = self.dropout if self.training else 0.0",
        "dropout = self.dropout",
        "test_vit_model.py",
    ),
    mutant(
        "discount-of-another-size",
        "Kneser-Ney's discount is too large",
        "recipes/baselines/ngrams.py",
        "once / (once + 2 * twice)",
        "once / (once + twice)",
        "test_ngram_baseline.py",
    ),
    mutant(
        "ridge-is-too-sure",
        "the predictive variance of ridge leaves out the noise",
        "recipes/baselines/regression.py",
        "noise * (1 + variance_of_w)",
        "noise * variance_of_w",
        "test_regression_baselines.py",
    ),
    mutant(
        "dmmse-knows-y",
        "dMMSE weighs the tasks by the y it predicts",
        "recipes/baselines/regression.py",
        "torch.cumsum(log_likelihood[:, :-1], 1, out=log_posterior[:, 1:])",
        "torch.cumsum(log_likelihood, 1, out=log_posterior)",
        "test_regression_baselines.py",
    ),
    mutant(
        "baseline-knows-its-number",
        "the mean of the others holds the number itself",
        "recipes/baselines/collatz.py",
        "own = (near & same)[same]",
        "own = (near & same)[same] & False",
        "test_collatz_errors.py::test_the_mean_of_the_magnitude_is_that_of_other_scored_numbers_of_the_size",
    ),
    mutant(
        "nan-in-json",
        "metrics.jsonl holds what JSON lacks",
        "trainer/reporting/trackers.py",
        "value if math.isfinite(value) else None for name",
        "value for name",
        "test_metrics.py::test_a_row_is_one_line_of_strict_json_written_at_once",
    ),
    mutant(
        "rows-twice",
        "rows after the checkpoint stay in metrics.jsonl",
        "trainer/reporting/trackers.py",
        'row["step"] > resumed_step',
        'row["step"] > resumed_step + 10',
        "test_metrics.py::test_a_new_run_starts_empty_and_a_resumed_one_drops_what_comes_after_its_checkpoint",
    ),
    mutant(
        "refusals-are-repeated",
        "a webhook that refuses is asked again",
        "trainer/reporting/alerts.py",
        "error.code in (408, 429) or error.code >= 500",
        "error.code >= 400",
        "test_alerts.py::test_a_server_in_trouble_is_asked_again_and_a_refusal_is_final",
    ),
    mutant(
        "alerts-tell-secrets",
        "an alert holds a password",
        "trainer/reporting/alerts.py",
        'redact_text(f"[{self._title}] {text}")',
        'f"[{self._title}] {text}"',
        "test_alerts.py::test_a_text_is_cut_and_loses_secrets_and_broken_characters",
    ),
    mutant(
        "alerts-hold-up",
        "a full queue holds up the training",
        "trainer/reporting/alerts.py",
        "self._waiting.put_nowait(body)\n        except",
        "self._waiting.put(body, timeout=0.01)\n        except",
        "test_alerts.py::test_a_dead_webhook_costs_nothing",
    ),
    mutant(
        "all-alerts-at-the-end",
        "at the end every alert that waits is tried",
        "trainer/reporting/alerts.py",
        "if hurried and body is not self._last:",
        "if False:",
        "test_alerts.py::test_at_the_end_only_what_happened_last_is_tried_once_more",
    ),
    mutant(
        "log-tells-secrets",
        "train.log and the terminal show a URL that is a secret",
        "trainer/reporting/console.py",
        "            text = redact_text(text)\n            self._print",
        "            self._print",
        "test_console.py::test_secrets_in_urls_are_neither_shown_nor_logged",
    ),
    mutant(
        "other-hosts-may-write",
        "a run of another machine does not keep others out",
        "trainer/reporting/lock.py",
        'if kernel == "held" or _may_live(holder, kernel):',
        'if kernel == "held":',
        "test_run_directory.py::test_heartbeat_of_another_machine_decides",
    ),
    mutant(
        "no-fsync-of-status",
        "status.json may be empty after a power cut",
        "trainer/reporting/run_directory.py",
        "            os.fsync(file.fileno())\n",
        "",
        "test_on_disk.py",
    ),
    mutant(
        "secrets-in-command-txt",
        "the value behind --api_key is written down",
        "trainer/command_line/secrets.py",
        'value_is_secret = named and not equals and argument.startswith("--")',
        "value_is_secret = False",
        "test_redaction.py",
    ),
    mutant(
        "yaml-runs-python",
        "a python tag in YAML is obeyed",
        "trainer/command_line/flags.py",
        "class _UniqueKeys(yaml.SafeLoader):",
        "class _UniqueKeys(yaml.UnsafeLoader):",
        "test_config.py::test_a_python_tag_runs_nothing",
    ),
    mutant(
        "yaml-keys-twice",
        "the last of two equal keys in YAML wins in silence",
        "trainer/command_line/flags.py",
        "if keys.count(key) > 1:",
        "if False:",
        "test_config.py::test_bad_yaml_is_refused",
    ),
    mutant(
        "yaml-of-any-type",
        "YAML may give a list for a number",
        "trainer/command_line/flags.py",
        "if leaf is not None and kind != kinds[canonical]:",
        "if False:",
        "test_config.py::test_a_wrong_type_in_yaml_names_its_key",
    ),
    mutant(
        "ranks-drop-the-same",
        "every rank has the dropout masks of rank 0",
        "trainer/loop.py",
        "state.step, self.launch.rank)",
        "state.step)",
        "test_each_step.py",
    ),
    mutant(
        "steps-drop-the-same",
        "every step has the same dropout masks",
        "trainer/loop.py",
        "self.optimisation.seed, state.step, self.launch.rank)",
        "self.optimisation.seed, self.launch.rank)",
        "test_each_step.py",
    ),
    mutant(
        "divided-by-own-items",
        "a rank divides by its own items",
        "trainer/loop.py",
        "self.term_weights(votes.item_counts)",
        "self.term_weights([sum(self.recipe.items(b)[t] for b in next_step.micro_batches) for t in self.terms])",
        "test_each_step.py",
    ),
    mutant(
        "divided-by-the-last-items",
        "a step is divided by the items of its last micro-batch",
        "trainer/loop.py",
        "n + items[term] for n, term in zip",
        "items[term] for n, term in zip",
        "test_each_step.py",
    ),
    mutant(
        "weights-left-out",
        "the terms of the objective are not weighted",
        "trainer/loop.py",
        "weights[term] / max(count, 1.0) for",
        "1.0 / max(count, 1.0) for",
        "test_each_step.py",
    ),
    mutant(
        "reduced-each-micro-step",
        "gradients are reduced in every micro-step",
        "trainer/backends/plain.py",
        "contextlib.nullcontext() if last or no_sync is None else no_sync()",
        "contextlib.nullcontext()",
        "test_each_step.py",
    ),
    mutant(
        "averaged-over-processes",
        "gradients are averaged over processes",
        "trainer/backends/plain.py",
        "        loss = loss * self.launch.processes\n",
        "",
        "test_each_step.py",
    ),
    mutant(
        "clipped-by-another-norm",
        "a step is clipped to twice the norm",
        "trainer/backends/plain.py",
        "self.settings.grad_clip, norm)",
        "2 * self.settings.grad_clip, norm)",
        "test_backends.py",
    ),
    mutant(
        "stories-learn-to-copy",
        "labels are not shifted",
        "recipes/tinystories_lm.py",
        'batch["tokens"][:, 1:].long()',
        'batch["tokens"][:, :-1].long()',
        "test_loss_references.py::test_tinystories",
    ),
    mutant(
        "stories-count-padding",
        "padding counts as predicted",
        "recipes/tinystories_lm.py",
        '{"next_token": int((batch["tokens"][:, 1:] >= 0).sum())}',
        '{"next_token": batch["tokens"][:, 1:].numel()}',
        "test_loss_references.py::test_tinystories",
    ),
    mutant(
        "vit-learns-plain-labels",
        "smoothing and mixing do not reach the loss",
        "recipes/vit_relpos.py",
        'batch.get("targets", labels)',
        "labels",
        "test_loss_references.py::test_vit",
    ),
    mutant(
        "vit-trains-on-accuracy",
        "the accuracy is part of the objective",
        "trainer/evaluation/objective.py",
        "0.0 if term in recipe.monitored else float",
        "float",
        "test_loss_references.py::test_vit",
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant."""

    killed: bool
    how: str


class Copy:
    """A copy of the repository in a folder of its own, with caches of its own: what is tried there spoils nothing."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "repository"
        skipped = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "plots", "build", "dist")
        shutil.copytree(ROOT, self.root, ignore=skipped)
        self.log = folder / "log.txt"
        self.environment = environment(
            PYTHONPATH=str(self.root), PYTHONDONTWRITEBYTECODE="1", SAMECURVE_CACHE=str(folder / "cache"), PYTEST_ADDOPTS=""
        )

    def test(self, tests: Sequence[str], seconds: float) -> int | None:
        """The exit code of pytest, which stops at the first failure; None if it took too long."""
        self.log.unlink(missing_ok=True)
        words = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-p", "no:cacheprovider", "-rfE", *tests]
        process = Started(words, self.log, self.environment, cwd=self.root)
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            process.kill_all()

    def said(self) -> str:
        """The end of what the last tests printed."""
        return self.log.read_text(errors="replace")[-3000:]


def mutated(mutant: Mutant, root: Path) -> str:
    """The text of its file with the mutant in it. ValueError if that does not say one place."""
    text = (root / mutant.file).read_text(encoding="utf-8")
    found = text.count(mutant.old)
    if found != 1:
        raise ValueError(f"the old text is {found} times in {mutant.file}; give text that is there once")
    return text.replace(mutant.old, mutant.new)


def attempt(mutant: Mutant, copy: Copy, seconds: float) -> Outcome:
    """Run the tests of a mutant with it in place, which is restored."""
    path = copy.root / mutant.file
    try:
        text = mutated(mutant, copy.root)
    except ValueError as error:
        return Outcome(False, str(error))
    before = path.read_bytes()
    path.write_text(text, encoding="utf-8")
    try:
        code = copy.test(mutant.tests, seconds)
    finally:
        path.write_bytes(before)
    if code is None:
        return Outcome(True, f"hung for {seconds:g} s")
    if code == 0:
        return Outcome(False, "")
    # In a test, or in what it is given: a mutant that cannot even be imported says nothing of the tests.
    failed = [line for line in copy.said().splitlines() if line.startswith(("FAILED ", "ERROR ")) and "::" in line]
    if code != FAILED or not failed:
        return Outcome(False, f"pytest ended with {code}:\n{copy.said()}")
    return Outcome(True, failed[-1].partition(" - ")[0])


def run(chosen: Sequence[Mutant], seconds: float) -> int:
    """Try each; the number of those that were not killed."""
    bad = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy, healthy = Copy(Path(folder)), {}
        for mutant in chosen:
            started = time.monotonic()
            if mutant.tests not in healthy:
                code = copy.test(mutant.tests, seconds)
                healthy[mutant.tests] = code == 0
                if code != 0:
                    print(f"{' '.join(mutant.tests)} must pass without a mutant, and ends with {code}:\n{copy.said()}")
            outcome = attempt(mutant, copy, seconds) if healthy[mutant.tests] else Outcome(False, "its tests fail without it")
            bad += not outcome.killed
            verdict = "killed  " if outcome.killed else "SURVIVED"
            print(f"{verdict} {mutant.name} ({time.monotonic() - started:.0f} s): {mutant.what} {outcome.how}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} mutants killed")
    return bad


def main(arguments: Sequence[str]) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description="Breaks the product on purpose and looks whether a test notices.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="mutants to try (default: all)")
    parser.add_argument("--list", action="store_true", help="names and descriptions, and try none")
    parser.add_argument("--timeout_seconds", type=float, default=TIMEOUT_SECONDS, help="for the tests of one mutant")
    flags = parser.parse_args(arguments)
    known = {mutant.name: mutant for mutant in MUTANTS}
    unknown = [name for name in flags.only or () if name not in known]
    if unknown:
        parser.error(f"unknown mutant {unknown[0]}; --list shows all {len(known)}")
    chosen = [known[name] for name in flags.only or known]
    if flags.list:
        for mutant in chosen:
            print(f"{mutant.name:40s} {mutant.file}: {mutant.what}")
        return 0
    return min(1, run(chosen, flags.timeout_seconds))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
