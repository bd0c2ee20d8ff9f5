"""Runs the tutorials and stores their outputs in the notebooks.

    python docs/tutorials/execute.py                      # all of them, in the order in which they are to be read
    python docs/tutorials/execute.py bring_your_own       # one

They run in a folder of their own, which is removed. Progress and warnings, which go to standard error, are left out,
and so is the text of pages that are shown as HTML.
Needs the extra `docs`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat

FOLDER = Path(__file__).resolve().parent
NAMES = ("explain_a_decision", "correct_a_decision", "bring_your_own")


def execute(name: str, folder: str) -> None:
    """Runs a notebook in a folder and writes it with its outputs."""
    path = FOLDER / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=1800,
        kernel_name="python3",
        resources={"metadata": {"path": folder}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "text/html" in output.get("data", {}):
                    output.data.pop("text/plain", None)  # a page, once more
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}  # without the version of whoever ran it last
    nbformat.write(notebook, path)


def main() -> None:
    names = [Path(name).stem for name in sys.argv[1:]] or NAMES
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            print(name, flush=True)
            execute(name, folder)


if __name__ == "__main__":
    main()
