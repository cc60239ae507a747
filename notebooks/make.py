"""Execute notebooks/*.py (jupytext's percent format) into the .ipynb files beside them.

    pip install jupytext nbclient ipykernel
    python notebooks/make.py
"""

from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"}}


def make(script: Path) -> Path:
    """The executed notebook of one script, without what libraries say on stderr and with one picture per output."""
    notebook = jupytext.read(script)
    NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False,
                   resources={"metadata": {"path": str(HERE)}}).execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", nbformat.from_dict({})           # else every run differs
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
        for out in cell.get("outputs", []):
            if "image/png" in out.get("data", {}):
                out.data.pop("image/jpeg", None)
    nbformat.write(notebook, script.with_suffix(".ipynb"))
    return script.with_suffix(".ipynb")


if __name__ == "__main__":
    for script in sorted(HERE.glob("*.py")):
        if script != Path(__file__):
            print(make(script))
