"""Temporal adapters with AM flow for frozen image backbones: video classifiers out of image models.

Agrawal, Ali, Dantcheva, Bremond, "AM Flow: Adapters for Temporal Processing in Action Recognition", arXiv 2411.02065.
Needs ``pip install 'amflow-kernels[models]'``.
"""

from amflow_models.adapters import FORMS, Adapter
from amflow_models.alignment import AligningEncoder, load_aligning_encoders
from amflow_models.backbones import create_backbone
from amflow_models.blocks import AdaptedBlock, AdapterOptions, read_qk
from amflow_models.classifier import VideoClassifier
from amflow_models.gates import GATES, Gate
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
    "TemporalUnit",
    "VideoClassifier",
    "add_adapters",
    "create_backbone",
    "grow_am_flow",
    "load_aligning_encoders",
    "load_trained",
    "placement",
    "read_qk",
    "save_trained",
]
