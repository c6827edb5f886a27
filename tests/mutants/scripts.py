"""Bugs to plant in train.py and sample.py."""

from mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        "a batch is learnt as it comes",
        "train.py",
        "mask_targets(self.loader.batch(number, rows), cfg, vocab)",
        "self.loader.batch(number, rows)",
        "test_train.py",
    ),
    Mutant(
        "a training step foretells its loss wrongly",
        "train.py",
        "Expected(cfg.train.z_loss, mesh.dp_size /",
        "Expected(cfg.train.z_loss, 2 * mesh.dp_size /",
        "test_losses.py",
    ),
    Mutant(
        "dropout draws on from anywhere",
        "train.py",
        "keys = fold_in(places[rows], cfg.seed)",
        "keys = fold_in(places[rows], int(torch.randint(99, ())))",
        "test_train.py",
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
        "(count,) = mesh.all_reduce_sum(float((batch.targets != IGNORE).sum()))",
        "count = float((batch.targets != IGNORE).sum())",
        "parallel/test_parallel_training.py",
    ),
    Mutant(
        "the mean over ranks stands for their sum",
        "train.py",
        "(loss * mesh.dp_size).backward()",
        "loss.backward()",
        "parallel/test_parallel_training.py",
    ),
    Mutant(
        "each rank drops what the first one drops",
        "train.py",
        "keys = fold_in(places[rows], cfg.seed)",
        "keys = fold_in(places[: rows.stop - rows.start], cfg.seed)",
        "parallel/test_parallel_training.py",
    ),
    Mutant(
        "what led to a streak of failures is saved",
        "train.py",
        "(self.owed and not p.failed)",
        "self.owed",
        "test_train.py",
    ),
    Mutant(
        "a save that fell into a streak is not made up for",
        "train.py",
        "            self.owed |= p.step",
        "            self.owed = p.step",
        "test_train.py",
    ),
    Mutant(
        "roll-backs long ago count",
        "train.py",
        "self.rolled_back.count(path) == MAX_ROLLBACKS",
        "len(self.rolled_back) == MAX_ROLLBACKS",
        "test_train.py",
    ),
    Mutant(
        "a restart by torchrun starts anew",
        "train.py",
        'if env_int("TORCHELASTIC_RESTART_COUNT", 0):',
        "if False:",
        "test_train.py",
    ),
    Mutant(
        "rolled back to the same batches",
        "train.py",
        "= before.step + before.passed - self.progress.step",
        "= 0",
        "test_train.py",
    ),
    Mutant(
        "a batch that is not finite moves the weights",
        "train.py",
        "            p.left_out += 1",
        "            self.move(lr)",
        "test_train.py",
    ),
]
