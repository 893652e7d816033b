"""The teachers that come with recipelin: a folder `pocket*` of this package each (no torch)."""

from pathlib import Path

POCKET = Path(__file__).parent / "pocket"
SHIPPED = {
    folder.name: folder for folder in sorted(POCKET.parent.glob("pocket*")) if (folder / "config.json").is_file()
}
"""Folder of each by its name, which `model.teacher` gives."""
