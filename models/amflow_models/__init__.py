"""Temporal adapters with AM flow for frozen image backbones: video classifiers out of image models.

Agrawal, Ali, Dantcheva, Bremond, "AM Flow: Adapters for Temporal Processing in Action Recognition", arXiv 2411.02065.
Needs ``pip install 'amflow-kernels[models]'``, and `load_classifier` the extra ``train``. Each name is imported when it
is first used, so that the command ``amflow`` starts fast and its `doctor` needs only torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amflow_models.adapters import FORMS, Adapter
    from amflow_models.alignment import AligningEncoder, load_aligning_encoders
    from amflow_models.backbones import create_backbone
    from amflow_models.blocks import AdaptedBlock, AdapterOptions, read_qk
    from amflow_models.classifier import VideoClassifier
    from amflow_models.gates import GATES, Gate
    from amflow_models.inference import Prediction, TrainedClassifier, load_classifier
    from amflow_models.insertion import PLACEMENTS, AdapterReport, add_adapters, grow_am_flow, placement
    from amflow_models.temporal import UNITS, TemporalUnit
    from amflow_models.weights import load_trained, save_trained

__all__ = [
    "FORMS",
    "GATES",
    "PLACEMENTS",
    "UNITS",
    "AdaptedBlock",
    "Adapter",
    "AdapterOptions",
    "AdapterReport",
    "AligningEncoder",
    "Gate",
    "Prediction",
    "TemporalUnit",
    "TrainedClassifier",
    "VideoClassifier",
    "add_adapters",
    "create_backbone",
    "grow_am_flow",
    "load_aligning_encoders",
    "load_classifier",
    "load_trained",
    "placement",
    "read_qk",
    "save_trained",
]

_NAMES = {  # the imports above, by module
    "adapters": ("FORMS", "Adapter"),
    "alignment": ("AligningEncoder", "load_aligning_encoders"),
    "backbones": ("create_backbone",),
    "blocks": ("AdaptedBlock", "AdapterOptions", "read_qk"),
    "classifier": ("VideoClassifier",),
    "gates": ("GATES", "Gate"),
    "inference": ("Prediction", "TrainedClassifier", "load_classifier"),
    "insertion": ("PLACEMENTS", "AdapterReport", "add_adapters", "grow_am_flow", "placement"),
    "temporal": ("UNITS", "TemporalUnit"),
    "weights": ("load_trained", "save_trained"),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
