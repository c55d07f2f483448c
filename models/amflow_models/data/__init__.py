"""Videos from disk: lists, checks of lists, reading frames, sampling, augmentation, data sets.

``python -m amflow_models.data check`` finds problems in lists before a model is trained on them.
"""

from amflow_models.data.checks import Problem, Report, check_lists
from amflow_models.data.dataset import SyntheticDataset, VideoDataset, collate
from amflow_models.data.frames import FrameFolder, FrameTemplate
from amflow_models.data.lists import KINDS, SPLITS, read_list
from amflow_models.data.reading import UnreadableVideo, VideoReader
from amflow_models.data.sampling import dense, uniform, views
from amflow_models.data.transforms import TrainTransform, names_directions, spatial_crops
from amflow_models.data.video import VideoFile, count_frames, open_video, read_frames_at
from amflow_models.data.videos import Video, VideoList

__all__ = [
    "KINDS",
    "SPLITS",
    "FrameFolder",
    "FrameTemplate",
    "Problem",
    "Report",
    "SyntheticDataset",
    "TrainTransform",
    "UnreadableVideo",
    "Video",
    "VideoDataset",
    "VideoFile",
    "VideoList",
    "VideoReader",
    "check_lists",
    "collate",
    "count_frames",
    "dense",
    "names_directions",
    "open_video",
    "read_frames_at",
    "read_list",
    "spatial_crops",
    "uniform",
    "views",
]
