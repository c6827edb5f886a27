"""What `prove` checks and times, on a GPU: each op takes its tensors there, at full size and in memory with bands."""

from types import SimpleNamespace

from fake_cuda.harness import run_on_fake_cuda
from nanochameleon.bench.subjects import subjects


def prove_all() -> list[str]:
    """Run each problem by the kernels and by torch in both precisions, and each job once. Launches do nothing."""
    import torch
    import torch._dynamo  # before device.py changes torch, which it asks for a device while it is imported
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from fake_cuda.device import CUDA, fake_tensors
    from nanochameleon.bench import kernels
    from nanochameleon.bench.bands import Bands
    from nanochameleon.bench.subjects import QUICK
    from nanochameleon.kernels import dispatch
    from nanochameleon.kernels.attention.documents import Documents
    from nanochameleon.kernels.gpu import launch

    def find_documents(doc_ids: torch.Tensor) -> Documents:
        """With real numbers, four documents a sequence: those of fake tensors are not known."""
        b, t = doc_ids.shape
        with unset_fake_temporarily() as fake:
            found = documents_of((torch.arange(t) * 4 // t).expand(b, t))
            return Documents(*(fake.from_tensor(x) for x in found[:2]), found.max_len)

    documents_of, Documents.of = Documents.of, staticmethod(find_documents)
    torch.Generator = lambda device=None: SimpleNamespace(manual_seed=lambda seed: None)  # a GPU's own needs a GPU
    kernels.visible_pairs = lambda *_: 1  # which counts from numbers
    launch.start = lambda *arguments, **options: None
    dispatch.why_cuda_unavailable = lambda op, device, dtype: None
    done = []
    for subject in subjects():
        with fake_tensors():
            for problem in subject.problems(QUICK, CUDA):
                bands = Bands()
                inputs = {name: bands.copy(x, name) for name, x in problem.inputs.items()}
                with bands.everywhere():
                    results = problem.run(inputs)
                for kind in (torch.float64, subject.dtype):
                    truth = problem.reference(problem.inputs, kind)
                    assert {name: x.shape for name, x in truth.items()} == {n: results[n].shape for n in truth}, (
                        problem.name
                    )
                    assert {x.device for x in (*truth.values(), *results.values())} == {CUDA}
            for shape in QUICK.shapes[subject.op]:
                for job in subject.jobs(subject.case(shape, CUDA), False).values():
                    job()
        done.append(subject.name)
    return done


def test_everything_that_is_proven_runs_on_a_gpu_s_tensors():
    assert run_on_fake_cuda(prove_all) == [subject.name for subject in subjects()]
