"""The real files of $VECFL_DATA, and what the derived copies of MNIST have in common."""

import os
from pathlib import Path

import pytest
import torch

from vecfl.data import FederatedDataset, mnist_writers

DATA = Path(os.environ.get("VECFL_DATA") or "/nowhere")


def real(folder: str) -> pytest.MarkDecorator:
    """Skips a test where this folder is missing."""
    return pytest.mark.skipif(not (DATA / folder).is_dir(), reason=f"needs $VECFL_DATA/{folder}")


def same_images(*parts: FederatedDataset) -> None:
    """The images of three writers are, inverted and in bytes, digits of those writers in MNIST."""
    by_writer = mnist_writers(DATA / "mnist_writers")[0]
    for part in parts:
        for k in (0, 3, part.num_clients - 1):
            ours = part.client(k)
            theirs = by_writer.client(by_writer.position(int(str(part.client_ids[k])[1:5])))
            images = theirs["x"].numpy()
            known = {x.tobytes(): y for x, y in zip(images, theirs["y"].tolist(), strict=True)}
            whole = ours["x"] if ours["x"].dtype == torch.uint8 else (255 * ours["x"]).round()
            found = [known.get(x.tobytes()) for x in (255 - whole).to(torch.uint8).numpy()]
            assert found == ours["y"].tolist()
