"""Everything that the first minutes on one NVIDIA GPU should show, as one command (`make gpu`).

    python -m nanochameleon.bench gpu          on a GPU: eight minutes, twice
    python -m nanochameleon.bench gpu --dry    tiny sizes on a CPU, CUDA kernels in the emulator

run.py starts each part as a process of its own (part.py) with a time limit. A part prints to the log and writes its
rows as they come. Parts that finished are not run again, so the same command resumes. page.py fills in docs/results.
"""
