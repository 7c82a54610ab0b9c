"""Lets a torchvision whose compiled part does not load (a CUDA build beside a CPU torch) be imported all the same.

`tools/setup_env.py` copies this module and the `.pth` file beside it into the site-packages of `.venv`, only where
`import torchvision` fails with `operator torchvision::nms does not exist`. vLLM needs that import for the image
processors of transformers, whose transforms are Python on torch; nothing compiled is needed for them.

What must hold:

- Interpreter start pays for one small object on `sys.meta_path`. Nothing is imported here, torch least of all, and
  looking for torchvision (`importlib.util.find_spec("torchvision")`) changes nothing either.
- torchvision first tries to load its compiled part (`torchvision.extension`), then registers Python companions for
  two of its operators without asking whether that worked. Between the two the schemas are declared, and only if it
  did not work: a torchvision that is whole is left alone, so this module does no harm when one is installed later.
- Nothing is emulated. Calling a compiled operator (`torchvision.ops.nms`, `roi_align`, image decoding) still raises.
- Then the finder leaves `sys.meta_path`. Whatever goes wrong in it, torchvision's own error is the one that shows.
"""

import sys

# Of torchvision 0.28, in the order of its __init__: the modules that follow `torchvision.extension`.
_AFTER_EXTENSION = ("torchvision._autograd_registrations", "torchvision._meta_registrations")
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_library = None  # torch drops the schemas when the object that declared them goes


class _DeclareMissingSchemas:
    """A finder that finds nothing: it only notices that torchvision has come past loading its compiled part."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name in _AFTER_EXTENSION:
            try:
                sys.meta_path.remove(self)
                _declare()
            except Exception:  # torchvision goes on and says itself what it misses
                return


def _declare() -> None:
    global _library
    extension = sys.modules.get("torchvision.extension")
    torch = sys.modules.get("torch")
    if extension is None or torch is None or extension._has_ops():
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        try:
            _library.define(schema)
        except RuntimeError:  # declared by somebody else
            continue


sys.meta_path.insert(0, _DeclareMissingSchemas())
