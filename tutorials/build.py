"""Build the notebooks: run each lesson from top to bottom and save it with its outputs.

    python tutorials/build.py                 all lessons (make notebooks)
    python tutorials/build.py 01_words ...    these

A lesson's source is a .py file in jupytext's percent format; the .ipynb next to it is made from it and never edited.
Times and random cell ids are left out, so a rebuild that changes nothing writes the same bytes.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from traitlets.config import Config

from nanochameleon.errors import UserError, exit_on_user_error
from nanochameleon.files import write_file

HERE = Path(__file__).resolve().parent
TIMEOUT = 300  # seconds a cell
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
ENVIRONMENT = {  # of the kernel
    "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1",  # the same sums, so the same outputs, on any number of cores
    "TQDM_DISABLE": "1",  # a saved progress bar is hundreds of lines
    "PYTHONDONTWRITEBYTECODE": "1", "MPLBACKEND": "agg",
}  # fmt: skip


def lessons() -> dict[str, Path]:
    """Return name -> source, in order."""
    return {path.stem: path for path in sorted(HERE.glob("[0-9][0-9]_*.py"))}


def execute(notebook: nbformat.NotebookNode) -> None:
    """Run all cells in the folder of the lessons; their outputs go into the notebook. Raises as nbclient does."""
    with tempfile.TemporaryDirectory() as folder:
        # sockets in a folder of its own: two kernels that start at once never want the same port
        kernel = {"transport": "ipc", "connection_file": f"{folder}/kernel.json"}
        client = NotebookClient(
            notebook, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(HERE)}},
            record_timing=False, coalesce_streams=True, config=Config({"KernelManager": kernel}),
        )  # fmt: skip
        try:
            client.execute(env=os.environ | ENVIRONMENT | {"IPYTHONDIR": folder})  # IPython keeps a history
        except AssertionError:  # a cell's own comes as CellExecutionError
            if client.km is None:  # nbclient has ended the kernel on Ctrl-C, and then misses it
                raise KeyboardInterrupt from None
            raise


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Leave out what differs from run to run and from machine to machine."""
    notebook.nbformat, notebook.nbformat_minor = 4, 5  # the first minor version with cell ids
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for number, cell in enumerate(notebook.cells, start=1):
        cell.id, cell.metadata = f"cell-{number}", {}


def build(source: Path) -> None:
    """Write the notebook of one lesson. Raises UserError where a cell raises."""
    start, notebook = time.perf_counter(), jupytext.read(source)
    print(f"{source.stem} ...", end=" ", flush=True)
    try:
        execute(notebook)
    except CellExecutionError as error:
        raise UserError(f"{where(notebook)} of {source.name} raises {error.ename}: {error.evalue}") from None
    except CellTimeoutError:
        raise UserError(f"a cell of {source.name} takes more than {TIMEOUT} s: make it smaller") from None
    tidy(notebook)
    write_file(source.with_suffix(".ipynb"), (nbformat.writes(notebook) + "\n").encode())
    print(f"{time.perf_counter() - start:.0f} s", flush=True)


def where(notebook: nbformat.NotebookNode) -> str:
    """Return which cell raised, such as 'cell 7'."""
    failed = (i for i, cell in enumerate(notebook.cells, start=1) for out in cell.get("outputs", [])
              if out.output_type == "error")  # fmt: skip
    return f"cell {next(failed)}"


def main() -> None:
    known = lessons()
    names = [Path(name).stem for name in sys.argv[1:]] or list(known)
    for name in names:
        if name not in known:
            raise UserError(f"there is no lesson {name!r}: there are {', '.join(known)}")
        build(known[name])


if __name__ == "__main__":
    exit_on_user_error(main)
