"""Bugs to plant in train.py and sample.py."""

from mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        "a batch is learnt as it comes",
        "train.py",
        "mask_targets(loader.batch(number, rows), t.image_loss, n_codes, run.vocab)",
        "loader.batch(number, rows)",
        "training/test_recovery.py",
    ),
    Mutant(
        "a training step multiplies its gradient again",
        "train.py",
        "sums.next_token.loss.backward()",
        "(2 * sums.next_token.loss).backward()",
        "test_losses.py",
    ),
    Mutant(
        "dropout draws on from anywhere",
        "train.py",
        "fold_in(sample_indices, cfg.seed)",
        "fold_in(sample_indices, int(torch.randint(99, ())))",
        "training/test_train_resume.py",
    ),
    Mutant(
        "an out that cannot be written is found after drawing",
        "sample.py",
        "        output.check()\n",
        "",
        "test_sample_cli.py",
    ),
    Mutant(
        "ranks divide by what they have alone",
        "train.py",
        "(n_supervised,) = mesh.all_reduce_sum(float((batch.targets != IGNORE).sum()))",
        "n_supervised = float((batch.targets != IGNORE).sum())",
        "parallel/test_parallel_training.py",
    ),
    Mutant(
        "the mean over ranks in place of their sum",
        "train.py",
        "normalizer = max(n_supervised, 1.0) / mesh.dp_size",
        "normalizer = max(n_supervised, 1.0)",
        "parallel/test_parallel_training.py",
    ),
    Mutant(
        "each rank drops what the first one drops",
        "train.py",
        "fold_in(sample_indices, cfg.seed)",
        "fold_in(sample_indices - rows.start, cfg.seed)",
        "parallel/test_parallel_training.py",
    ),
    Mutant(
        "what led to a streak of failures is saved",
        "train.py",
        "(save_pending and not progress.nonfinite_streak)",
        "save_pending",
        "training/test_recovery.py",
    ),
    Mutant(
        "a save that fell into a streak is not made up for",
        "train.py",
        "save_pending |= progress.step %",
        "save_pending = progress.step %",
        "training/test_recovery.py",
    ),
    Mutant(
        "roll-backs long ago count",
        "training/recovery.py",
        "self.rolled_back.count(path) == MAX_ROLLBACKS",
        "len(self.rolled_back) == MAX_ROLLBACKS",
        "training/test_recovery.py",
    ),
    Mutant(
        "a restart by torchrun starts again",
        "train.py",
        'if env_int("TORCHELASTIC_RESTART_COUNT", 0):',
        "if False:",
        "training/test_run_folder.py",
    ),
    Mutant(
        "rolled back to the same batches",
        "training/recovery.py",
        "= next_batch - restored.step",
        "= 0",
        "training/test_recovery.py",
    ),
    Mutant(
        "a batch that is not finite moves the weights",
        "train.py",
        "        if bad:",
        "        if False:",
        "training/test_recovery.py",
    ),
]
