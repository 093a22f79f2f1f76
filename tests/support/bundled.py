"""Where the bundled model lies, and the repository."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ROOT / "saeray" / "models" / "tiny-python"
HOOK = "blocks.2.hook_resid_pre"
