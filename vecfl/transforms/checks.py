"""What the client side of a transform must give."""

from torch import Tensor

from vecfl.algorithms.base import Upload
from vecfl.errors import InputError


def check_upload(name: str, changed: object, sent: Upload) -> Upload:
    """`changed` by the transform `name`; InputError unless it is an Upload shaped like `sent`.

    It looks at shapes alone, and waits for no GPU.
    """
    what = f"transform {name}: its client side gave"
    if not isinstance(changed, Upload):
        raise InputError(f"{what} {changed!r}; expected an Upload, such as replace(upload, ...)")
    for part in ("update", "weight"):
        found, wanted = getattr(changed, part), list(getattr(sent, part).shape)
        if not isinstance(found, Tensor) or list(found.shape) != wanted:
            given = list(found.shape) if isinstance(found, Tensor) else repr(found)
            raise InputError(f"{what} the {part} {given}; expected a tensor {wanted}")
    return changed
