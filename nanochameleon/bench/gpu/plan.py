"""Sizes of everything that is measured: on a GPU, and tiny ones for a dry run on a CPU."""

from dataclasses import dataclass

from nanochameleon.bench.engine import GPU_MODELS, TOY, TOY_VOCAB
from nanochameleon.bench.gpu_cases import Sizes
from nanochameleon.bench.train import CASES, Case
from nanochameleon.config import ModelConfig
from nanochameleon.vocab import Vocab


@dataclass(frozen=True)
class Plan:
    dry: bool
    patience: float  # factor of all time limits
    copy_bytes: int  # read and written to measure the memory's speed
    matmul_dim: int  # of square matrices
    toy: tuple[str, ...]  # options of train.py toy
    attention: tuple[int, int, int, int]  # B, H, T, E
    steps: tuple[Case, ...]  # the first one is measured in each way
    models: tuple[tuple[str, ModelConfig], ...]  # the smallest first
    vocab: Vocab
    image_codes: int
    text_tokens: int  # of a request
    kernels: Sizes

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"


# few steps, but each thing that a training does: a checkpoint to resume from, grids of samples, the report
TOY_STEPS = (
    "--tokenizers.steps", "60", "--tokenizers.warmup-steps", "20", "--train.steps", "100", "--train.sample-every", "50",
    "--train.save-every", "10", "--evaluation.images", "20", "--evaluation.answers", "20",
    "--evaluation.reconstructions", "40",
)  # fmt: skip
TINY_STEPS = (
    "--vqgan.ch", "4", "--vqgan.z-channels", "4", "--vqgan.embed-dim", "4", "--vqgan.n-codes", "16",
    "--vqgan.n-groups", "2", "--tokenizers.n-merges", "64", "--tokenizers.n-texts", "200", "--tokenizers.steps", "6",
    "--tokenizers.warmup-steps", "2", "--tokenizers.batch-size", "2", "--model.dim", "16", "--model.n-layers", "1",
    "--model.n-heads", "2", "--model.multiple-of", "8", "--train.steps", "40", "--train.batch-size", "2",
    "--train.seq-len", "192", "--train.sample-every", "20", "--train.save-every", "4", "--evaluation.images", "4",
    "--evaluation.answers", "4", "--evaluation.reconstructions", "4", "--sample.max-new-tokens", "80",
)  # fmt: skip
ON_GPU = Plan(
    dry=False, patience=1.0, copy_bytes=2**30, matmul_dim=8_192, toy=TOY_STEPS, attention=(4, 16, 4_096, 128),
    steps=tuple(CASES["cuda"]), models=tuple(reversed(GPU_MODELS.items())), vocab=Vocab(), image_codes=1_024,
    text_tokens=32, kernels=Sizes(),
)  # fmt: skip
TINY = ModelConfig(TOY.vocab_size, 128, 2, 2, n_kv_heads=1, max_seq_len=128)
DRY = Plan(
    dry=True, patience=5.0, copy_bytes=2**20, matmul_dim=64, toy=TINY_STEPS, attention=(2, 2, 64, 64),
    steps=(Case("tiny, 2 x 128", TINY, TOY_VOCAB, 2, 128), Case("tinier, 2 x 64", TINY, TOY_VOCAB, 2, 64)),
    models=(("tiny", TINY), ("tinier", TINY)), vocab=TOY_VOCAB, image_codes=8, text_tokens=8,
    kernels=Sizes(
        ((1, 20, 2, 64), (1, 40, 2, 128)), ((3, 64), (2, 128)), ((3, 64, 16),),
        ((2, 2, 1, 30, 64), (1, 2, 2, 30, 64), (2, 4, 1, 40, 64)),
    ),
)  # fmt: skip
