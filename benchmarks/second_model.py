"""A second small language model for quality.py: two layers, on other text, made on this machine.

    python benchmarks/second_model.py                 # about four minutes on 2 cores

Trained on the code of Python's standard library without docstrings and comments, where the bundled
model has read documentation and docstrings; narrower (96), shallower (2 layers), with a tokenizer
of its own. The same Python, torch and seed give the same model; another Python has another
standard library. `.second-model/` is kept and not committed.
"""

from __future__ import annotations

import ast
import shutil
import sysconfig
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / ".second-model"
D_MODEL = 96
PIECE = 4000  # characters of a document, at least
SKIPPED = {"site-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
TABLES = {"pydoc_data", "encodings"}  # documentation, which the bundled model read; and numbers
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_documents() -> list[str]:
    """The standard library's modules as bare code, cut between top-level statements."""
    documents = []
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = set(path.relative_to(root).parts)
        if parts & (SKIPPED | TABLES) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        piece = ""
        for statement in tree.body:
            piece += ast.unparse(statement) + "\n"
            if len(piece) > PIECE:
                documents.append(piece)
                piece = ""
        documents.append(piece)
    return documents


def second_model() -> Path:
    """The model's folder, made if it is not there: as the bundled one, text included."""
    if not (FOLDER / "figures.json").exists():
        import torch

        from saeray.models.build_tiny_python import Size, build

        shutil.rmtree(FOLDER, ignore_errors=True)
        torch.set_num_threads(2)  # how sums are cut is part of what the model is a function of
        build(FOLDER, code_documents(), Size(layers=2, d_model=D_MODEL), tokens=3e6, seed=0)
    return FOLDER


if __name__ == "__main__":
    print(second_model())
