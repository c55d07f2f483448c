"""AM flow: how attention maps change from one video frame to the next, without ever forming the maps."""

from amflow_kernels.api import am_flow, am_flow_matmul, am_flow_matmul_pair, am_flow_pair, explain
from amflow_kernels.attention import am_flow_attention
from amflow_kernels.integrations.recording import record_am_flow, record_qk
from amflow_kernels.motion import MotionPCA, motion_maps, motion_pca
from amflow_kernels.stream import AMFlowStream

__all__ = [
    "AMFlowStream",
    "MotionPCA",
    "am_flow",
    "am_flow_attention",
    "am_flow_matmul",
    "am_flow_matmul_pair",
    "am_flow_pair",
    "explain",
    "motion_maps",
    "motion_pca",
    "record_am_flow",
    "record_qk",
]
__version__ = "0.1.0"
