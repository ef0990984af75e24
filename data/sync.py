"""What makes a rename last."""

import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Makes the folder's entries (creations, renames) survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
